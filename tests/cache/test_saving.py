"""A cache in a file: it goes on bit for bit in another cache, and in an engine; what does not fit is refused."""

import random

import pytest
import torch
from oracle.models import build, token_ids
from safetensors.torch import save_file
from stream_files import rewrite
from streams import TOLERANCE, FakeTokenizer, chunk_sizes, feed, make_cache, nll_of, small_policy

from sinkstream.cache import POSITIONS, StreamingCache
from sinkstream.compat import with_cache
from sinkstream.engine import Engine
from sinkstream.policies import PRESETS

PLACES = (3, 25, 101)  # before the first prune, about it, and after it
GIVEN = {"tokenizer": FakeTokenizer(), "rebase_at": 60}
EVERY_POLICY = [(name, POSITIONS[i % 2]) for i, name in enumerate(PRESETS)]
ids = token_ids(180)[None]


def fed(model, policy: str, tokens: int, rows: torch.Tensor = ids, **more) -> StreamingCache:
    cache = make_cache(model, small_policy(policy), rebase_at=60, **more)
    feed(model, cache, rows[:, :tokens], chunk_sizes(cache, tokens))
    return cache


@pytest.mark.parametrize(("policy", "positions"), EVERY_POLICY)
def test_a_loaded_cache_goes_on_bit_for_bit(policy, positions, tmp_path):
    model, path = build("llama", layers=2), tmp_path / "stream.safetensors"
    for place in PLACES:
        cache = fed(model, policy, place, positions=positions)
        cache.save(path)
        loaded = StreamingCache.load(model, path, **GIVEN)
        assert loaded.policy == cache.policy and loaded.stats() == cache.stats()
        expected = feed(model, cache, ids[:, place:])
        assert torch.equal(feed(model, loaded, ids[:, place:]), expected)
        assert loaded.stats() == cache.stats()


@pytest.mark.parametrize("policy", ["strict", "refresh-window-attention"])
def test_copies_back_and_rebases_come_when_they_would_have_come(policy, tmp_path):
    model, path, long = build("llama", layers=2), tmp_path / "stream.safetensors", token_ids(1100)[None]
    cache = fed(model, policy, 600, long)
    cache.save(path)
    loaded = StreamingCache.load(model, path, **GIVEN)
    rebases = cache.stats()["rebases"]
    expected = feed(model, cache, long[:, 600:], chunk_sizes(cache, 500))
    assert torch.equal(feed(model, loaded, long[:, 600:], chunk_sizes(loaded, 500)), expected)
    assert loaded.stats() == cache.stats() and cache.stats()["rebases"] > rebases > 0


@pytest.mark.parametrize(("policy", "positions"), EVERY_POLICY)
def test_a_stream_changes_hands_between_cache_and_engine(policy, positions, tmp_path):
    model, path = build("llama", layers=2), tmp_path / "stream.safetensors"
    engine = Engine(model, **small_policy(policy), positions=positions, **GIVEN)
    whole = make_cache(model, small_policy(policy), positions=positions)
    wanted = nll_of(feed(model, whole, ids), ids)[0]
    for place in PLACES:
        fed(model, policy, place, positions=positions).save(path)
        engine.restore(path)
        first = engine.score(ids[0, place : place + 40])
        assert first[0].isnan() or policy == "refresh-uncertainty", "a cache has the logits where its policy reads them"
        assert (first[1:] - wanted[place : place + 39]).abs().max() < TOLERANCE
        engine.snapshot(path)
        loaded = StreamingCache.load(model, path, **GIVEN)
        assert loaded.seen_tokens == place + 40
        rest = nll_of(feed(model, loaded, ids[:, place + 40 :], chunk_sizes(loaded, 180)), ids[:, place + 40 :])[0]
        assert (rest - wanted[place + 40 :]).abs().max() < TOLERANCE


def test_greedy_tokens_go_on_in_the_other(tmp_path):
    model, path = build("gpt_neox"), tmp_path / "stream.safetensors"
    options = small_policy("strict")
    cache = make_cache(model, options)
    spoken = model.generate(ids[:, :50], **with_cache(model, cache), max_new_tokens=20, do_sample=False, pad_token_id=0)
    cache.save(path)
    wanted = model.generate(spoken, **with_cache(model, cache), max_new_tokens=20, do_sample=False, pad_token_id=0)
    engine = Engine(model, **options)
    engine.restore(path)
    with pytest.raises(ValueError, match=r"restored from a cache's file, which has no logits.*at least one token"):
        engine.generate([], max_new_tokens=3)
    found = engine.generate(spoken[0, -1:], max_new_tokens=20, stop_tokens=())
    assert list(found.tokens) == wanted[0, 70:].tolist()
    loaded = StreamingCache.load(model, path)
    with pytest.raises(ValueError, match="differs from what the cache has seen at token 3 of 69"):
        other = spoken.clone()
        other[0, 3] += 1
        model.generate(other, **with_cache(model, loaded), max_new_tokens=3, do_sample=False, pad_token_id=0)
    again = model.generate(spoken, **with_cache(model, loaded), max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(again, wanted)


@pytest.mark.parametrize("policy", ["strict", "refresh-window-attention", "refresh-uncertainty"])
def test_the_rows_of_a_batch(policy, tmp_path):
    model, path = build("llama", layers=2), tmp_path / "stream.safetensors"
    rows = token_ids(120, batch=3)
    cache = fed(model, policy, 80, rows)
    cache.save(path)
    loaded = StreamingCache.load(model, path, **GIVEN)
    expected = feed(model, cache, rows[:, 80:])
    assert torch.equal(feed(model, loaded, rows[:, 80:]), expected)
    engine = Engine(model, **small_policy(policy), **GIVEN)
    with pytest.raises(ValueError, match=r"holds 3 rows; accepted for one stream: row=0 to row=2"):
        engine.restore(path)
    with pytest.raises(ValueError, match=r"row=3 is not accepted; accepted: 0 to 2"):
        engine.restore(path, row=3)
    engine.restore(path, row=1)
    found = engine.score(rows[1, 80:120])[1:]
    assert (found - nll_of(expected, rows[:, 80:])[1, :39]).abs().max() < TOLERANCE


def test_rows_that_differ_are_saved_one_by_one(tmp_path):
    model, path = build("llama", layers=2), tmp_path / "stream.safetensors"
    rows = token_ids(120, batch=3)
    cache = fed(model, "adaptive-entropy", 80, rows)
    with pytest.raises(ValueError, match=r"rows that differ are not written to one file; accepted: for each row"):
        cache.save(path)
    row = cache.fork()
    row.batch_select_indices(torch.tensor([1]))
    row.save(path)
    loaded = StreamingCache.load(model, path, **GIVEN)
    assert torch.equal(feed(model, loaded, rows[1:2, 80:]), feed(model, row, rows[1:2, 80:]))


def test_a_cache_that_was_not_fed(tmp_path):
    model, path = build("llama", layers=2), tmp_path / "stream.safetensors"
    make_cache(model, small_policy("lazy")).save(path)
    loaded, engine = StreamingCache.load(model, path), Engine(model, **small_policy("lazy"))
    engine.restore(path)
    assert loaded.stats()["seen"] == engine.stats()["seen"] == 0 and loaded.policy == engine.policy
    engine.snapshot(path)
    assert StreamingCache.load(model, path).seen_tokens == 0


def test_a_forward_that_failed_after_its_prune(tmp_path):
    """The prune that its first token was due to is done and stays done; what comes next does not prune again."""
    model, path, options = build("llama", layers=2), tmp_path / "stream.safetensors", small_policy("refresh-key-norm")
    cache = make_cache(model, options)
    place = next(n for n in range(60, 90) if _prunes_next(model, cache, n))
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        feed(model, cache, ids[:, place : place + 1])
    handle.remove()
    cache.save(path)
    wanted = feed(model, cache, ids[:, place:])
    assert torch.equal(feed(model, StreamingCache.load(model, path), ids[:, place:]), wanted)
    engine = Engine(model, **options)
    engine.restore(path)
    assert (engine.score(ids[0, place:])[1:] - nll_of(wanted, ids[:, place:])[0]).abs().max() < TOLERANCE
    assert engine.stats()["events"] == cache.stats()["events"]


def _prunes_next(model, cache: StreamingCache, tokens: int) -> bool:
    feed(model, cache, ids[:, cache.seen_tokens : tokens])
    return bool(cache.stream.schedule.plan(1)[0].drop)


@pytest.mark.parametrize(
    ("load", "words"),
    [
        (lambda m, p: StreamingCache.load(build("llama", layers=2, seed=1), p), "another model: weights="),
        (
            lambda m, p: StreamingCache.load(build("llama", layers=2).half(), p),
            "dtype='float32'; accepted: dtype='float16'",
        ),
        (lambda m, p: StreamingCache.load(build("llama", layers=3), p), "another model: layers=2; accepted: layers=3"),
        (lambda m, p: StreamingCache.load(build("mistral"), p), "family='llama'; accepted: family='mistral'"),
        (lambda m, p: StreamingCache.load(m, p, sink=4, window=21), "another policy: .*; accepted: "),
        (lambda m, p: StreamingCache.load(m, p, positions="original"), "positions='cache'; accepted: positions='orig"),
        (lambda m, p: Engine(m, sink=4, window=21).restore(p), "another policy: .*; accepted: "),
        (lambda m, p: Engine(build("llama", layers=2, seed=1), **small_policy("lazy")).restore(p), "another model"),
        (lambda m, p: StreamingCache.load(m, p.parent / "none"), "there is no file '.*none'"),
        (lambda m, p: StreamingCache.load(m, p.parent), "there is no file"),
    ],
)
def test_another_model_policy_or_frame_is_refused(load, words, tmp_path):
    model, path = build("llama", layers=2), tmp_path / "stream.safetensors"
    fed(model, "lazy", 60).save(path)
    hooks = len(model._forward_hooks)
    with pytest.raises(ValueError, match=words):
        load(model, path)
    assert len(model._forward_hooks) <= hooks, "a cache that could not be loaded leaves no hooks"


def _flip(tensors) -> None:
    tensors["values"] = tensors["values"].clone()
    tensors["values"].view(torch.uint8).view(-1)[77] ^= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"header": lambda h: h.update(format=99, sinkstream="9.9")},
            r"format 99 \(written by sinkstream 9.9\); accepted: format 2",
        ),
        ({"header": lambda h: h.update(format=1)}, "format 1 .*; accepted: format 2"),
        ({"header": lambda h: h.pop("schedule")}, "damaged: its header lacks 'schedule'"),
        ({"header": lambda h: h["counts"].pop("seen")}, "damaged: its header lacks 'counts'"),
        ({"header": lambda h: h["counts"].update(kept=-3)}, "damaged: its header lacks 'counts'"),
        ({"header": lambda h: h["counts"].update(kept=7)}, "damaged: keys is .*; accepted: "),
        ({"header": lambda h: h["schedule"].update(cached=3)}, "damaged: its schedule"),
        ({"header": lambda h: h["schedule"].update(unheard=3, cached=None)}, "damaged: its schedule"),
        ({"header": lambda h: h.update(seen={"hashed": 0})}, "damaged: the tokens seen"),
        ({"tensors": _flip}, "damaged: values is not what was written"),
        ({"tensors": lambda t: t.pop("keys")}, "damaged: keys is not what was written"),
        ({"tensors": lambda t: t.update(more=torch.zeros(1))}, "damaged: more is not what was written"),
    ],
)
def test_what_is_damaged_is_refused(change, words, tmp_path):
    model, path = build("llama", layers=2), tmp_path / "stream.safetensors"
    fed(model, "refresh-uniform", 60).save(path)
    rewrite(path, **change)
    with pytest.raises(ValueError, match=words) as caught:
        StreamingCache.load(model, path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("policy", ["lazy", "adaptive-entropy"])
def test_a_digit_of_the_header_that_changes_is_noticed(policy, tmp_path):
    """Among them what nothing else contradicts: counts of a trigger, a sum of risks, the dtype of a tensor."""
    model, path = build("llama", layers=2), tmp_path / "stream.safetensors"
    engine = Engine(model, **small_policy(policy))
    fed(model, policy, 60).save(path)
    whole, draw = path.read_bytes(), random.Random(3)
    end = 8 + int.from_bytes(whole[:8], "little")
    digits = [i for i in range(8, end) if whole[i : i + 1].isdigit()]
    for place in draw.sample(digits, 60):
        path.write_bytes(whole[:place] + b"%d" % ((whole[place] - 47) % 10) + whole[place + 1 :])
        for load in (lambda: StreamingCache.load(model, path), lambda: engine.restore(path)):
            with pytest.raises(ValueError, match=r"damaged|truncated|has format|was saved"):
                load()
    path.write_bytes(whole)
    assert StreamingCache.load(model, path).seen_tokens == 60, "control"


def test_a_file_without_a_checksum_of_its_header_is_read(tmp_path):
    """Files had none before."""
    model, path = build("llama", layers=2), tmp_path / "stream.safetensors"
    cache = fed(model, "lazy", 60)
    cache.save(path)
    rewrite(path)
    assert torch.equal(feed(model, StreamingCache.load(model, path), ids[:, 60:]), feed(model, cache, ids[:, 60:]))


def test_what_is_truncated_or_no_stream_is_refused(tmp_path):
    model, path = build("llama", layers=2), tmp_path / "stream.safetensors"
    fed(model, "lazy", 60).save(path)
    whole = path.read_bytes()
    for left in (whole[: len(whole) // 2], whole[:-1], whole[:20], b"", b"nonsense"):
        path.write_bytes(left)
        with pytest.raises(ValueError, match="not a safetensors file, or is truncated"):
            StreamingCache.load(model, path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no stream"):
        StreamingCache.load(model, path)


@pytest.mark.parametrize("path", [None, 5, b"stream", "", "a\0b", build])
def test_what_is_no_path_is_refused_by_name(path):
    model = build("llama", layers=2)
    for call in (lambda: fed(model, "lazy", 60).save(path), lambda: StreamingCache.load(model, path)):
        with pytest.raises(ValueError, match=r"path=.* is not accepted; accepted: a str or a Path of a file"):
            call()


def test_swapped_arguments_are_named(tmp_path):
    model, path = build("llama", layers=2), tmp_path / "stream.safetensors"
    cache = fed(model, "lazy", 60)
    cache.save(path)
    with pytest.raises(ValueError, match="path=LlamaForCausalLM is not accepted; accepted: a str or a Path of a file"):
        StreamingCache.load(path, model)
    with pytest.raises(ValueError, match="there is no file 'x"):
        StreamingCache.load(model, "x" * 5_000)
    with pytest.raises(ValueError, match="model=str is not accepted; accepted: the model that the cache was made for"):
        cache.prefill("model", ids[:, 60:63])
    with pytest.raises(ValueError, match=r"attention_mask is int; accepted: none, or a tensor \(batch, tokens\)"):
        cache.prefill(model, ids[:, 60:63], attention_mask=1)


def test_a_file_that_cannot_be_written_leaves_the_older_one(tmp_path, monkeypatch):
    model, path = build("llama", layers=2), tmp_path / "folder" / "stream.safetensors"
    cache = fed(model, "lazy", 60)
    cache.save(path)
    older = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    feed(model, cache, ids[:, 60:63])
    with pytest.raises(OSError, match="could not write"):
        cache.save(path)
    assert path.read_bytes() == older and [p.name for p in path.parent.iterdir()] == [path.name]
    cache.close()
    with pytest.raises(ValueError, match="closed, or whose model is gone, cannot be saved"):
        cache.save(path)
