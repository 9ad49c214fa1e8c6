"""Recall in the engine against brute force, and against the drop-in cache: the same tokens come back, and are seen."""

import pytest
import torch
from oracle.models import build, token_ids
from oracle.network import Network
from oracle.recall import Recalled, run_recall
from oracle.rules import Rule
from recall_case import POLICIES, READING, SMALL, STRICT, WORDS, WORDS_AGAIN, frames_of, repetitive, token_bytes
from streams import TOLERANCE, FakeTokenizer, feed

from sinkstream.cache import StreamingCache
from sinkstream.engine import Engine
from sinkstream.kernels.config import PersistentConfig
from sinkstream.kernels.plans import PERSISTENT_LLAMA_PLANS, OpLaunch

JOBS = list(zip(POLICIES, ("llama", "gpt_neox", "qwen3", "gpt_neox"), ("ring", "kernels") * 2, strict=True))
PARTS = (1, 40, 129, 20)  # prefilled, stepped, prefilled …


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()


def stepped(engine: Engine, ids: torch.Tensor) -> torch.Tensor:
    """Logits after every token, (tokens, vocab)."""
    return torch.cat([engine.step([token]) for token in ids.tolist()])


def in_parts(engine: Engine, ids: torch.Tensor) -> torch.Tensor:
    """NLL of every token but the first, prefilled and stepped in turn; NaN where a token was prefilled."""
    nll, done, steps = torch.full((len(ids),), float("nan")), 0, False
    while done < len(ids):
        for size in PARTS:
            part = ids[done : done + size]
            if steps and len(part):
                nll[done : done + size] = engine.score(part)
            elif len(part):
                engine.prefill(part)
            done, steps = done + len(part), not steps
    return nll[1:]


@pytest.mark.parametrize(("policy", "family", "backend"), JOBS)
def test_every_token_sees_what_brute_force_sees(policy, family, backend):
    model, ids, options = build(family), repetitive(), POLICIES[policy]
    lag = 3 if backend == "kernels" else 0
    step_tokens = 5 if policy == "slack" else 12  # of at most 12: two tokens late, or at once
    alarms = 4 if policy == "lazy" else 0
    rules = Recalled(8, hold=8, distance=9, lag=lag, step_tokens=step_tokens, alarms=alarms)
    expected, frames = run_recall(Network(model), ids, Rule(**options), WORDS_AGAIN, rules)
    assert sum(bool(tokens) for _, tokens in frames) >= 8 and any(not tokens for _, tokens in frames)
    more = {"recall_distance": 9, "recall_lag": lag, "recall_step_bytes": step_tokens * token_bytes(model)}
    more["recall_alarms"] = alarms
    engine = Engine(model, **options, recall="lexical", **SMALL | WORDS | more, backend=backend)
    assert worst(engine.score(ids)[1:], expected.nll) < TOLERANCE
    assert frames_of(engine) == frames and engine.stats()["kept"] <= engine.policy.peak
    engine.reset()
    assert not engine.recall_events and not engine.stats()["archived"]
    nll = in_parts(engine, ids)
    assert frames_of(engine) == frames
    judged = ~nll.isnan()
    assert judged.sum() > 40 and worst(nll[judged], expected.nll[judged]) < TOLERANCE


def test_a_recalled_key_one_place_beside_its_own_would_show(monkeypatch):
    """The control: the comparison above must be able to fail."""
    from sinkstream.engine.recalling import StreamRecall

    recall = StreamRecall.recall
    monkeypatch.setattr(
        StreamRecall, "recall", lambda *a, drop=0, **more: recall(*a, drop=drop, shift=more["shift"] + 1)
    )
    model, ids = build("llama"), repetitive()
    engine = Engine(model, **STRICT, recall="lexical", **SMALL, **WORDS, recall_distance=9)
    expected, _ = run_recall(Network(model), ids, Rule(**STRICT), WORDS_AGAIN, Recalled(8, hold=8, distance=9))
    assert worst(engine.score(ids)[1:], expected.nll) > 100 * TOLERANCE


@pytest.mark.parametrize("archive", ["kv", "text"])
def test_forty_choices_agree_with_the_drop_in_token_for_token(archive):
    """Rebases on the way, and an archive of keys and values that loses its oldest tokens."""
    model, ids = build("gpt_neox" if archive == "kv" else "llama", layers=2), token_ids(440)
    options = {"recall": "random", **SMALL, "recall_distance": 6, "recall_seed": 3, "recall_archive": archive}
    options |= {"recall_bytes": 100_000} if archive == "kv" else {"recall_bytes": 4_000, "recall_behind": 5}
    engine = Engine(model, **STRICT, **options, rebase_at=90)
    found = stepped(engine, ids)
    cache = StreamingCache.for_model(model, **STRICT, **options)
    wanted = feed(model, cache, ids[None])[0]
    assert worst(found, wanted) < 2e-5
    assert engine.recall_events == cache.recall_events
    counts, theirs = engine.stats(), cache.stats()
    assert counts["rebases"] >= 1 and counts["recalls"] >= 40 and bool(counts["archive_lost"]) == (archive == "kv")
    names = ("seen", "kept", "evicted", "recalled", "recalls", "archived", "archive_bytes", "archive_lost")
    assert {name: counts[name] for name in names} == {name: theirs[name] for name in names}


@pytest.mark.parametrize(("family", "backend"), [("llama", "kernels"), ("gpt_neox", "ring")])
def test_a_gate_that_stays_shut_changes_nothing(family, backend):
    model, ids = build(family), repetitive()
    bare = Engine(model, **STRICT, backend=backend)
    shut = Engine(model, **STRICT, recall="lexical", recall_slots=12, recall_gate=1e9, backend=backend)
    assert torch.equal(stepped(bare, ids), stepped(shut, ids))
    stats, theirs = shut.stats(), bare.stats()
    assert stats["archived"] == stats["evicted"] > 200 and not stats["recalls"] and not shut.recall_events
    assert stats["bytes"] > theirs["bytes"]
    assert {name: stats[name] for name in theirs if name != "bytes"} == {
        name: theirs[name] for name in theirs if name != "bytes"
    }


def test_a_text_is_read_again_in_padded_forwards_whose_bands_are_kept():
    model, ids = build("llama"), token_ids(40)
    engine = Engine(model, **STRICT, recall="lexical", **SMALL, recall_archive="text", recall_behind=20)
    reader, exact = engine.recall.memory.reread, StreamingCache.for_model(model, **STRICT, recall="lexical", **SMALL)
    reader.prompts.short.capture, reader.prompts.short.sizes = False, (16, 32, 64)
    for first, count in ((0, 14), (9, 30), (20, 14), (3, 14), (0, 36)):
        text = ids[first : first + count].tolist()
        found, wanted = reader(text), exact.stream.recall.reread(text)
        assert worst(found[0], wanted[0]) < 1e-5 and worst(found[1], wanted[1]) < 1e-5
    assert set(reader._bands) == {14, 30, 36}


def test_questions_and_what_is_written_after_them_are_those_of_the_drop_in():
    model, ids = build("llama"), token_ids(200, seed=5)
    question, options = ids[60:70], {"recall": "lexical", **SMALL, **WORDS, "tokenizer": FakeTokenizer()}
    for replay in (True, False):
        options["recall_lag"] = 2 * replay
        cache = StreamingCache.for_model(model, **STRICT, **options)
        engine = Engine(model, **STRICT, **options)
        cache.stream.recall.decode = engine.recall.memory.decode = None  # the tokenizer of the tests has no text
        engine.tokenizer = None
        cache.prefill(model, ids[None])
        engine.prefill(ids)
        wanted = cache.ask(model, question[None], replay=replay)[0]
        assert worst(engine.ask(question.tolist(), replay=replay), wanted) < 2e-5
        written = []
        for _ in range(20):
            written.append(int(wanted.argmax()))
            wanted = model(torch.tensor([[written[-1]]]), past_key_values=cache).logits[0, -1]
        assert engine.generate([], max_new_tokens=20, stop_tokens=()).tokens == written
        assert engine.recall_events == cache.recall_events
        assert any(event.cause == "question" for event in engine.recall_events)
        if replay:
            text, events = torch.cat([ids, question]), engine.recall_events
            engine.reset()
            asked = engine.generate(text, max_new_tokens=20, stop_tokens=(), recall_ask=10)
            assert asked.tokens == written and engine.recall_events == events
            more = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 20, "recall_ask": 10}
            out = model.generate(text[None], custom_generate=engine.custom_generate, **more)
            assert out[0, 210:].tolist() == written and engine.recall_events == events
    with pytest.raises(ValueError, match="recall_ask=11 is not accepted; accepted: 0 to 10, the tokens of the prompt"):
        engine.generate(question, max_new_tokens=1, recall_ask=11)
    for asked in (lambda e: e.ask(question), lambda e: e.generate(question, max_new_tokens=1, recall_ask=3)):
        with pytest.raises(ValueError, match="this engine has no recall"):
            asked(Engine(model, **STRICT))


@pytest.mark.parametrize("lag", [0, 3])
def test_a_question_that_is_not_fed_again_chooses_before_the_next_step_however_late_frames_are(lag):
    model, ids = build("llama", layers=2), token_ids(200, seed=5)
    question, options = ids[60:70], {"recall": "lexical", **SMALL, **WORDS, "recall_lag": lag}
    cache, engine = StreamingCache.for_model(model, **STRICT, **options), Engine(model, **STRICT, **options)
    cache.prefill(model, ids[None])
    cache.ask(model, question[None], replay=False)
    engine.prefill(ids)
    engine.ask(question, replay=False)
    for token in ids[:6]:
        wanted = model(token.view(1, 1), past_key_values=cache).logits[0, -1]
        assert worst(engine.step([int(token)])[0], wanted) < 2e-5
    assert engine.recall_events == cache.recall_events
    assert [(e.token, e.cause) for e in engine.recall_events if e.cause == "question"] == [(210, "question")]


def test_the_first_choice_after_a_prune_comes_in_time_wherever_a_prompt_ends():
    model, ids = build("llama", layers=2), token_ids(130)
    options = {"sink": 4, "window": 20, "compress_every": 30, "recall": "recent", **SMALL, "recall_empty_every": 8}
    for first in range(54, 62):  # the first tokens leave before token 53; there is a choice before token 56
        cache, engine = (kind(model, **options) for kind in (StreamingCache.for_model, Engine))
        for part in (ids[:first], ids[first:]):
            wanted = cache.prefill(model, part[None])[0]
            assert worst(engine.prefill(part), wanted) < 2e-5, first
        assert engine.recall_events == cache.recall_events and engine.recall_events[0].token == 56


def test_a_question_at_the_beginning_of_a_stream_is_fed_twice_although_it_becomes_sinks():
    model, ids = build("llama", layers=2), repetitive(240)
    options = {"recall": "heads", **SMALL, "recall_heads": "1.1", "recall_query_tokens": 8, "recall_row_level": 0.185}
    for tokens in (1, 3, 6):
        cache, engine = StreamingCache.for_model(model, **STRICT, **options), Engine(model, **STRICT, **options)
        wanted = cache.ask(model, ids[None, :tokens])[0]
        assert worst(engine.ask(ids[:tokens]), wanted) < 2e-5
        wanted = cache.prefill(model, ids[None, tokens:])[0]
        assert worst(engine.prefill(ids[tokens:]), wanted) < 2e-5
        assert frames_of(engine) == frames_of(cache) and engine.stats()["archived"] == cache.stats()["archived"]


@pytest.mark.parametrize(("chooser", "backend"), [("heads", "kernels"), ("mean-key", "ring")])  # union: both parts
def test_choosers_that_read_keys_and_queries_agree_with_brute_force(chooser, backend):
    model, ids = build("llama"), repetitive()
    options, recaller = READING[chooser]
    expected, frames = run_recall(Network(model), ids, Rule(**STRICT), recaller, Recalled(8, hold=8, empty_every=8))
    engine, other = (
        Engine(model, **STRICT, recall=chooser, **SMALL, **options, backend=backend, rebase_at=90) for _ in range(2)
    )
    in_parts(engine, ids[:205])
    other.prefill(ids[:50])
    other.undump(engine.dump())
    nll, again = (in_parts(one, ids[205:]) for one in (engine, other))
    assert torch.equal(nll.nan_to_num(), again.nan_to_num()), "a stream from a file goes on bit for bit"
    assert frames_of(engine) == frames and engine.recall_events == other.recall_events
    judged = ~nll.isnan()
    assert judged.sum() > 30 and worst(nll[judged], expected.nll[205:][judged]) < TOLERANCE
    assert model.config._attn_implementation == "sdpa", "no attention of the module is watched"


def test_queries_of_a_prompt_that_are_lost_would_show(monkeypatch):
    """The control: the comparison above must be able to fail."""
    model, ids = build("llama"), repetitive(240)
    frames = []
    for lost in (False, True):
        if lost:
            monkeypatch.setattr("sinkstream.engine.prompt.keep_queries", lambda *_, **how: None)
        engine = Engine(model, **STRICT, recall="heads", **SMALL, **READING["heads"][0])
        engine.prefill(ids)
        frames.append(frames_of(engine))
    assert frames[0] != frames[1]


def test_a_question_whose_queries_are_read_is_fed_twice_as_in_the_drop_in():
    model, ids = build("llama", torch.float16), token_ids(210, seed=5)
    ids[200:] = ids[60:70]
    options = {"recall": "heads", **SMALL, "recall_heads": "1.1", "recall_query_tokens": 8, "recall_archive": "text"}
    cache, engine = StreamingCache.for_model(model, **STRICT, **options), Engine(model, **STRICT, **options)
    cache.prefill(model, ids[None, :200])
    wanted = cache.ask(model, ids[None, 200:])[0].float()
    asked = engine.generate(ids, max_new_tokens=1, stop_tokens=(), recall_ask=10)
    assert frames_of(engine)[-1] == frames_of(cache)[-1] and engine.recall_events[-1].cause == "question"
    assert asked.tokens == [int(wanted.argmax())] and engine.stats()["seen"] == 211


def test_taken_back_tokens_and_turns():
    model, ids = build("gpt_neox"), repetitive()
    options = {"recall": "recent", **SMALL, "recall_archive": "kv", "recall_lag": 5}
    engine, cache = Engine(model, **STRICT, **options), StreamingCache.for_model(model, **STRICT, **options)
    cache.prefill(model, ids[None, :100])
    engine.prefill(ids[:80])
    engine.begin_turn()
    engine.prefill(ids[80:100])
    engine.step([5])
    engine.rewind(1)
    wanted = feed(model, cache, ids[None, 100:200])[0]
    assert worst(stepped(engine, ids[100:200]), wanted) < 2e-5
    assert any(span.turn == 1 for event in engine.recall_events for span in event.spans)
    for _ in range(2):
        engine.begin_turn()
        engine.begin_turn(3)
        engine.prefill(ids[:5])
        engine.rewind(5)
    engine.begin_turn(7)
    assert engine.recall.memory.turns == [80, 207], "a turn whose tokens are taken back is none, and none counts twice"
    cache.begin_turn(7)
    for recalled in (engine, cache):
        recalled.begin_turn(7)
        with pytest.raises(ValueError, match="a turn that begins at token 202 comes after one at token 207"):
            recalled.begin_turn(2)
        with pytest.raises(ValueError, match="ahead='soon' is not accepted"):
            recalled.begin_turn("soon")
    engine = Engine(model, **STRICT, recall="lexical", **SMALL)
    engine.prefill(ids[:100])
    engine.ask(ids[:9])  # the chooser has read the window, which competes
    with pytest.raises(ValueError, match="12 tokens cannot be taken back; accepted: at most 9"):
        engine.rewind(12)
    engine.rewind(4)
    engine = Engine(model, **STRICT, recall="heads", **SMALL, recall_heads="1.1", recall_gate=0.0)
    engine.prefill(ids[:100])
    recalled = engine.stats()["recalled"]
    assert recalled, "recalled tokens are no window tokens"
    with pytest.raises(
        ValueError, match=f"tokens={45 - recalled} cannot be taken back; accepted: 0 to {44 - recalled}"
    ):
        engine.rewind(45 - recalled)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recall": "lexical", "streams": 2}, "recall with streams=2 is not served by the engine"),
        ({"recall": "lexical", "max_sink": 6}, "recall and max_sink=6 exclude each other"),
        ({"recall": "lexical", "recall_slots": 44}, "recall_slots=44 leave nothing of a window of 44 tokens"),
        ({"recall_slots": 4}, "recall_slots goes with recall=CHOOSER"),
        ({"recall": "lexical", "adaptive": "top1"}, "recall with adaptive eviction is not served by the engine"),
    ],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        Engine.check(build("llama"), **STRICT, **options)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("archive", ["kv", "text"])
@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.bfloat16), ("gpt_neox", torch.float16)])
def test_graphed_steps_bring_back_and_see_what_plain_ones_do(family, dtype, archive):
    model, ids = build(family, dtype).cuda(), repetitive(600).cuda()
    options = {"recall": "lexical", **SMALL, **WORDS, "recall_distance": 9, "recall_archive": archive}
    options["recall_lag"] = 2 if archive == "kv" else 0
    found = {}
    for backend in ("ring", "graph", "fused"):
        engine = Engine(model, **STRICT, **options, backend=backend, rebase_at=200)
        nll = engine.score(ids)[1:]
        assert len(engine.recall_events) >= 20 and engine.stats()["rebases"]
        found[backend] = nll, frames_of(engine)
    assert found["fused"][1] == found["graph"][1] == found["ring"][1]
    for backend in ("graph", "fused"):
        assert (found[backend][0] - found["ring"][0]).abs().mean() < 0.02
    wrong = Engine(model, **STRICT, **options | {"recall_distance": 0}, backend="fused")
    assert (wrong.score(ids)[1:] - found["ring"][0]).abs().mean() > 0.02, "the control: other positions would show"


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "one_kernel"), [("graph", 0), ("fused", 0), ("fused", 1)])
def test_on_a_gpu_a_gate_that_stays_shut_changes_nothing(backend, one_kernel, monkeypatch):
    model, ids = build("llama", torch.float16).cuda(), repetitive(400).cuda()
    if one_kernel:
        monkeypatch.setitem(PERSISTENT_LLAMA_PLANS, model.config.hidden_size, OpLaunch(PersistentConfig()))
    bare = Engine(model, **STRICT, backend=backend)
    shut = Engine(model, **STRICT, recall="lexical", recall_slots=12, recall_gate=1e9, backend=backend)
    assert torch.equal(stepped(bare, ids), stepped(shut, ids))
    assert bare.stats().get("persistent_layers", 0) == shut.stats().get("persistent_layers", 0) == one_kernel
    written = [engine.generate([], max_new_tokens=300, stop_tokens=(), temperature=0.8) for engine in (bare, shut)]
    assert written[0].tokens == written[1].tokens and shut.stats()["archived"] > 600


@pytest.mark.gpu
def test_what_is_written_with_recall_is_learned_while_steps_run():
    model, ids = build("llama", torch.float16).cuda(), repetitive(400).cuda()
    engine = Engine(model, **STRICT, recall="recent", **SMALL, backend="fused")
    engine.prefill(ids)
    written = engine.generate([], max_new_tokens=300, stop_tokens=(), temperature=0.8).tokens
    archived = [*ids.tolist(), *written][4 : 4 + engine.stats()["archived"]]
    archive = engine.recall.memory.archive
    assert list(archive.ids) == archived and archive.end == engine.stats()["seen"] - (
        48 - 4 - len(engine.recall.memory.frame)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("archive", ["kv", "text"])
def test_short_chunks_are_captured_while_tokens_stand_in_the_frame(archive):
    model, ids = build("llama", torch.float16).cuda(), repetitive(600).cuda()
    options = {**STRICT, "recall": "recent", **SMALL, "recall_archive": archive}
    logits = []
    for backend in ("ring", "fused"):
        engine = Engine(model, **options, backend=backend)
        for part in ids[:240].split(60):
            engine.prefill(part)
            engine.step(part[:1])
        logits.append(engine.ask(ids[300:330]))
        assert engine.stats()["recalled"] == 12
    assert (logits[0] - logits[1]).abs().mean() < 0.05


@pytest.mark.gpu
def test_on_a_gpu_the_queries_that_recall_reads_are_those_of_plain_steps():
    model, ids = build("llama", torch.float16).cuda(), repetitive(300).cuda()
    options = {**STRICT, "recall": "heads", **SMALL, **READING["heads"][0]}
    for steps in (0, 5):
        found = {}
        for backend in ("ring", "graph", "fused"):
            engine = Engine(model, **options, recall_gate=1e9, backend=backend, rebase_at=100)
            for part in ids[:240].split(60):  # short chunks are captured
                engine.prefill(part)
            if steps:
                engine.score(ids[240 : 240 + steps])
            found[backend] = torch.cat([*engine.recall.memory.queries.read(8).values()], 1)
        for backend in ("graph", "fused"):
            apart = [(found[backend].roll(back, 0) - found["ring"]).abs().mean() for back in (0, 1)]
            assert apart[0] < 0.05 * found["ring"].abs().mean() < apart[1], "and the control, of the token before"
    live = Engine(model, **options, backend="fused")
    live.score(ids)
    assert live.stats()["recalls"] >= 5
