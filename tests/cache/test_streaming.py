"""The life of a `StreamingCache`: long streams, rebasing, batches, turns, failures, several caches on one model."""

import gc

import pytest
import torch
from oracle.models import build, token_ids
from oracle.network import Network
from streams import TOLERANCE, chunk_sizes, feed, make_cache, nll_of, oracle_run, small_policy
from transformers import DynamicCache

from sinkstream.cache import SoftRing, StreamingCache
from sinkstream.cache.attention import SINKSTREAM_SDPA
from sinkstream.cache.stream import REBASE_AT, default_rebase
from sinkstream.compat import with_cache
from sinkstream.policies import SCORERS

ATTENTION = ("refresh-window-attention", "refresh-accumulated-attention")
FLOAT32_ANGLES = 5e-5  # nats; what transformers' own float32 angles cost at position 2,200: 400 epsilons of float32
STATEFUL = ("lazy", "max-drop", "adaptive-entropy", "refresh-uncertainty", "refresh-key-norm", *ATTENTION)


def stream(model, policy: str | dict, ids: torch.Tensor, **more) -> torch.Tensor:
    """Logits (batch, T, vocab) of a fresh run in chunks."""
    cache = make_cache(model, small_policy(policy) if isinstance(policy, str) else policy, **more)
    return feed(model, cache, ids, chunk_sizes(cache, ids.shape[1]))


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Logits that agree up to rounding."""
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


# ---- long streams ----


LONG = {  # every prune looks at queries from before the latest rebase, and at slots that were written before
    "lazy": small_policy("lazy"),
    "refresh-uniform": small_policy("refresh-uniform"),
    "refresh-window-attention": small_policy("refresh-window-attention", compress_every=5, observation=16),
    "refresh-accumulated-attention": small_policy("refresh-accumulated-attention"),
}


@pytest.mark.parametrize("policy", LONG)
def test_rebases_change_nothing(policy):
    model, ids, options = build("llama", layers=1), token_ids(2200), LONG[policy]
    expected = oracle_run(model, ids, options).nll
    for rebase_at, least, tolerance in [(100, 3, TOLERANCE), (REBASE_AT, 1, TOLERANCE), (10**9, 0, FLOAT32_ANGLES)]:
        cache = make_cache(model, options, rebase_at=rebase_at)
        nll = nll_of(feed(model, cache, ids[None], chunk_sizes(cache, len(ids))), ids[None])[0]
        assert (nll - expected).abs().max() < tolerance
        assert cache.stats()["rebases"] >= least and (cache.stats()["rebases"] == 0) == (least == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_in_half_precision_fewer_rebases_are_as_exact(dtype):
    """Every rebase rounds the keys of the window once more, so the default of half precision rebases rarely."""
    model, ids, options = build("llama", layers=1, dtype=dtype), token_ids(2200), small_policy("strict")
    expected, errors = oracle_run(model, ids, options).nll, []
    for rebase_at, rebases in ((100, 4), (None, 0)):
        cache = make_cache(model, options, rebase_at=rebase_at)
        nll = nll_of(feed(model, cache, ids[None], [50] * 44), ids[None])[0]
        errors.append((nll - expected).square().mean().sqrt())
        assert cache.stats()["rebases"] == rebases
    assert errors[1] < 1.1 * errors[0]


@pytest.mark.parametrize("positions", ["cache", "original"])
def test_rebases_change_nothing_in_either_frame_nor_in_chunks_that_cross_prunes(positions):
    model, ids, options = build("gpt_neox", layers=1), token_ids(2200)[None], small_policy("max-drop")
    runs = [stream(model, options, ids, positions=positions, rebase_at=at) for at in (0, 10**9)]
    torch.testing.assert_close(*runs, rtol=0, atol=FLOAT32_ANGLES)


def pinned_error(cache: StreamingCache, network: Network, ids: torch.Tensor) -> torch.Tensor:
    """Error of every pinned key of a one-layer model, (pinned,), against the true key rotated once in float64."""
    ring = cache.stream.ring
    tokens = ids[ring.pinned_positions.flatten()]
    true = network.project(0, network.embed(tokens))[1].transpose(0, 1)  # (kv_heads, pinned, dim)
    place = torch.arange(ring.pinned) + ring.first_window - ring.pinned - ring.base
    cached = ring.keys[0, 0, :, ring.start : ring.start + ring.pinned].double()
    return (cached - network.rotate(true, place.double())).norm(dim=-1).amax(0)


def key_rounding(network: Network, dtype: torch.dtype) -> tuple[float, float]:
    """Norm of the longest key, and what rounding may do to a key that is rotated once: four epsilons of that norm."""
    norm = network.project(0, network.embed(torch.arange(97)))[1].norm(dim=-1).max().item()
    return norm, 4 * torch.finfo(dtype).eps * norm


def one_layer(dtype: torch.dtype) -> tuple:
    """A model of one layer, and its oracle with the frequencies that the model itself rotates with."""
    model = build("llama", layers=1, dtype=dtype)
    network = Network(model)
    network.rotations = [(model.model.rotary_emb.inv_freq.double(), 1.0)]
    return model, network


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_after_200_000_tokens_pinned_keys_are_as_exact_as_after_the_first_prune_and_memory_is_flat(dtype):
    (model, network), ids = one_layer(dtype), token_ids(200_000)
    norm, rounding = key_rounding(network, dtype)
    options = {"sink": 4, "window": 40, "compress_every": 120, "refresh": 5, "scorer": "uniform"}
    cache = make_cache(model, options)
    fed, first, furthest, sizes = 0, None, 0, set()
    with torch.no_grad():
        for size in cache.chunks(len(ids)):
            model.model(ids[None, fed : fed + size], **with_cache(model, cache))
            fed += size
            furthest = max(furthest, cache.stream.ring.seen - cache.stream.ring.base)
            if cache.stream.ring.pinned:
                sizes.add(cache.stats()["bytes"])
                first = pinned_error(cache, network, ids) if first is None else first
    stats, last, capacity = cache.stats(), pinned_error(cache, network, ids), cache.stream.ring.capacity
    assert stats["seen"] == 200_000 and stats["events"] > 900 and stats["rebases"] > 20
    assert len(sizes) == 1
    assert furthest <= default_rebase(dtype) + capacity
    assert first.max() <= rounding and last[:4].max() <= rounding
    # a refreshed token keeps the rounding of the model's own float32 angle where it was written
    assert last[4:].max() <= rounding + norm * furthest * 2**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("drifts", [True, False])
def test_pinned_keys_that_are_rotated_again_and_again_would_show(dtype, drifts, monkeypatch):
    """Control of the test above: without the unrotated copy roundings add up."""
    write = SoftRing._write_pinned

    def write_and_read_back(ring: SoftRing) -> None:
        write(ring)
        phases = ring.pinned_phases()
        ring._keep_pinned_keys(ring.rope.unrotate(ring._pinned_slots(ring.keys), phases.real, phases.imag))

    if drifts:
        monkeypatch.setattr(SoftRing, "_write_pinned", write_and_read_back)
    (model, network), ids = one_layer(dtype), token_ids(20_000)
    cache = make_cache(model, {"sink": 4, "window": 20, "compress_every": 12})
    with torch.no_grad():
        for piece in ids.split(12):
            model.model(piece[None], **with_cache(model, cache))
    assert cache.stats()["events"] > 1600
    error, (_, rounding) = pinned_error(cache, network, ids).max(), key_rounding(network, dtype)
    assert error > rounding if drifts else error <= rounding


# ---- batches, turns, reset ----


@pytest.mark.parametrize("policy", ["strict", "max-drop", "refresh-uncertainty", "refresh-key-norm", *ATTENTION])
def test_rows_of_a_batch_are_streams_of_their_own(policy):
    model, ids = build("gpt_neox"), token_ids(160, batch=3)
    rows = [stream(model, policy, row[None]) for row in ids]
    assert_close(stream(model, policy, ids), torch.cat(rows))
    assert (rows[0] - rows[1]).abs().max() > 1


@pytest.mark.parametrize("policy", STATEFUL)
def test_turns_appended_to_one_cache_equal_one_run(policy):
    model, ids = build("llama"), token_ids(200)[None]
    expected = stream(model, policy, ids)
    cache = make_cache(model, small_policy(policy))
    for start, answer, end in [(0, 61, 70), (70, 150, 152), (152, 153, 200)]:
        last = cache.prefill(model, ids[:, start:answer], chunk_tokens=23)
        assert_close(last, expected[:, answer - 1])
        assert_close(feed(model, cache, ids[:, answer:end]), expected[:, answer:end])
    assert cache.stats()["seen"] == 200


@pytest.mark.parametrize("policy", STATEFUL)
def test_reset_begins_a_new_stream(policy):
    model, ids, options = build("llama"), token_ids(150)[None], small_policy(policy)
    cache = make_cache(model, options)
    feed(model, cache, token_ids(130, seed=5, batch=2), cache.chunks(130, 17))
    cache.reset()
    assert set(cache.stats().values()) == {0}
    assert_close(feed(model, cache, ids), feed(model, make_cache(model, options), ids))


# ---- a forward that raises ----


class Stumble:
    """A hook that raises at every fourth call of its module, once."""

    def __init__(self, error: type[BaseException]):
        self.error, self.calls, self.raised = error, 0, 0

    def __call__(self, *args) -> None:
        self.calls += 1
        if self.calls % 4 == 0:
            self.raised += 1
            raise self.error("stumbled")


@pytest.mark.filterwarnings("ignore:module forward hook with ``always_call``")
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["first layer", "last layer", "head"])
@pytest.mark.parametrize("policy", STATEFUL)
def test_a_forward_that_raises_leaves_no_trace(policy, place, error):
    model, ids = build("llama"), token_ids(150)[None]
    cache = make_cache(model, small_policy(policy))
    expected = feed(model, cache, ids, cache.chunks(150, 9))
    cache.reset()
    module = {"first layer": model.model.layers[0], "last layer": model.model.layers[-1].mlp, "head": model.lm_head}
    stumble = Stumble(error)
    handle = module[place].register_forward_hook(stumble)
    logits, fed = [], 0
    with torch.no_grad():
        for size in cache.chunks(150, 9):
            seen = cache.stats()["seen"]
            try:
                out = model(ids[:, fed : fed + size], **with_cache(model, cache))
            except error:
                assert cache.stats()["seen"] == seen
                out = model(ids[:, fed : fed + size], **with_cache(model, cache))
            logits.append(out.logits)
            fed += size
    handle.remove()
    assert stumble.raised >= 2
    assert_close(torch.cat(logits, 1), expected)


def test_a_first_call_that_raises_does_not_fix_the_batch():
    model, ids = build("llama"), token_ids(150)[None]
    cache = make_cache(model, small_policy("lazy"))
    with pytest.raises(ValueError, match="logits_to_keep=1"):
        model(torch.zeros(3, 2000, dtype=torch.int64), **with_cache(model, cache))
    handle = model.lm_head.register_forward_hook(Stumble(RuntimeError))
    with pytest.raises(RuntimeError, match="stumbled"):
        for _ in range(4):
            cache.reset()
            model(ids[:, :5].expand(2, -1), **with_cache(model, cache))
    handle.remove()
    assert_close(feed(model, cache, ids), stream(model, "lazy", ids))


# ---- gradients and inference mode ----


def test_no_graph_grows_along_with_the_stream_outside_no_grad():
    model, ids = build("llama"), token_ids(120)[None]
    cache = make_cache(model, small_policy("refresh-window-attention"))
    logits = [model(ids[:, i : i + 1], **with_cache(model, cache)).logits for i in range(120)]
    assert logits[-1].requires_grad
    kept = [
        cache.stream.ring.keys,
        cache.stream.ring.values,
        cache.stream.ring.pinned_keys,
        *cache.stream.observer.queries.values(),
    ]
    assert not any(t.requires_grad for t in kept)
    assert_close(torch.cat(logits, 1).detach(), stream(model, "refresh-window-attention", ids))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", [{"cap": 100}, {"cap": 20}])
def test_a_backward_through_a_cache_is_refused(attention, policy):
    """With eager attention it would run, and leave out all that comes by keys and values."""
    model, ids = build("llama", attn_implementation=attention), token_ids(30)[None]
    cache = StreamingCache.for_model(model, **policy)
    loss = model(ids, labels=ids, **with_cache(model, cache)).loss
    with pytest.raises(ValueError, match=r"backward\(\) through a StreamingCache.*use_cache=False"):
        loss.backward()
    out = model.model(ids[:, :1], output_hidden_states=True, **with_cache(model, cache))
    with pytest.raises(ValueError, match="through a StreamingCache"):
        out.hidden_states[1].sum().backward()
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert model.model.layers[0].self_attn.k_proj.weight.grad.norm() > 0, "control"


def test_what_is_trained_behind_the_decoder_has_its_gradient():
    model, ids = build("llama"), token_ids(30)[None]
    model.model.requires_grad_(False)
    gradients = []
    for given in ({"use_cache": False}, with_cache(model, StreamingCache.for_model(model, cap=100))):
        model(ids, labels=ids, **given).loss.backward()
        gradients.append(model.lm_head.weight.grad)
        model.lm_head.weight.grad = None
    assert_close(*gradients)


@pytest.mark.parametrize("policy", STATEFUL)
def test_inference_mode_may_come_and_go(policy):
    model, ids = build("llama"), token_ids(120)[None]
    cache = make_cache(model, small_policy(policy))
    with torch.inference_mode():
        parts = [cache.prefill(model, ids[:, :60])]
    parts += [feed(model, cache, ids[:, 60:80])[:, -1]]
    with torch.inference_mode():
        parts += [cache.prefill(model, ids[:, 80:120])]
    assert_close(torch.stack(parts, 1), stream(model, policy, ids)[:, [59, 79, 119]])


# ---- several caches on one model ----


PAIRS = [("strict", "refresh-key-norm"), ATTENTION, ("adaptive-top1", "refresh-uncertainty")]


@pytest.mark.parametrize("policies", PAIRS, ids="+".join)
def test_caches_on_one_model_do_not_disturb_each_other(policies):
    model, texts = build("llama"), [token_ids(140, seed=s)[None] for s in (1, 2)]
    expected = [stream(model, p, ids) for p, ids in zip(policies, texts)]
    caches = [make_cache(model, small_policy(p)) for p in policies]
    plain, alone = DynamicCache(), token_ids(140, seed=3)[None]
    logits = [[], []]
    with torch.no_grad():
        for i in range(140):
            for cache, ids, out in zip(caches, texts, logits):
                out.append(model(ids[:, i : i + 1], **with_cache(model, cache)).logits)
            model(alone[:, i : i + 1], **with_cache(model, plain))
        for out, want in zip(logits, expected):
            assert_close(torch.cat(out, 1), want)
        again = model(alone[:, :1], **with_cache(model, plain)).logits
        assert_close(again, model(torch.cat([alone, alone[:, :1]], 1)).logits[:, -1:])


def hooks_of(model) -> int:
    """Hooks on a model and everything in it."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("policy", ["strict", "adaptive-entropy", *ATTENTION])
def test_a_cache_that_is_closed_or_collected_leaves_the_model_as_it_was(policy):
    model, ids, before = build("llama"), token_ids(60)[None], hooks_of(build("llama"))
    for close in (True, False):
        cache = make_cache(model, small_policy(policy))
        feed(model, cache, ids)
        assert hooks_of(model) > before
        assert model.config._attn_implementation == (SINKSTREAM_SDPA if policy in ATTENTION else "sdpa")
        if close:
            cache.close()
            cache.close()
        else:
            gc.disable()  # no cycle may hold it
            del cache
            gc.enable()
        assert hooks_of(model) == before and model.config._attn_implementation == "sdpa"


def test_closing_one_of_several_attention_caches_leaves_the_others_observing():
    model, ids = build("llama"), token_ids(140)[None]
    policy = "refresh-accumulated-attention"
    whole, decoder = make_cache(model, small_policy(policy)), make_cache(model.model, small_policy(policy))
    with torch.no_grad():
        model.model(ids[:, :20], **with_cache(model, decoder))
    decoder.close()
    assert_close(feed(model, whole, ids), stream(build("llama"), policy, ids))
    whole.close()
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="not attached"):
        model(ids, **with_cache(model, whole))


@pytest.mark.parametrize("policy", ATTENTION)
def test_attention_that_is_no_longer_seen_is_an_error(policy):
    model, ids = build("llama"), token_ids(140)[None]
    cache = make_cache(model, small_policy(policy))
    start = feed(model, cache, ids[:, :70])
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attn_implementation was changed"):
        feed(model, cache, ids[:, 70:])
    model.set_attn_implementation(SINKSTREAM_SDPA)
    whole = torch.cat([start, feed(model, cache, ids[:, 70:])], 1)
    assert_close(whole, stream(build("llama"), policy, ids))


# ---- what scorers read ----


@pytest.mark.parametrize("signal", ["nll", "entropy"])
def test_a_scorer_may_need_one_kind_of_uncertainty_only(signal, monkeypatch):
    monkeypatch.setattr(SCORERS["uncertainty"], "needs", frozenset({signal}))
    model, ids = build("llama"), token_ids(200)
    options = small_policy("refresh-uncertainty", uncertainty=signal)
    cache = make_cache(model, options)
    nll = nll_of(feed(model, cache, ids[None]), ids[None])[0]
    assert (nll - oracle_run(model, ids, options).nll).abs().max() < TOLERANCE


def test_tokens_past_the_tokenizers_vocabulary_have_no_structure():
    class Short:
        def __len__(self):
            return 50

        def batch_decode(self, rows):
            return ["\n"] * len(rows)

    model, ids = build("llama"), token_ids(120)[None]
    cache = StreamingCache.for_model(model, tokenizer=Short(), **small_policy("refresh-structural"))
    feed(model, cache, ids)
    kept = ids[0, cache.stream.ring.pinned_positions[0, 0, 0, 4:]]
    assert (kept < 50).all() and (ids >= 50).any()


# ---- arguments ----

IDS = torch.arange(8)[None]
REFUSED = {
    "rebase_at": (
        lambda make: make(rebase_at=-1),
        "rebase_at=-1 is not accepted; accepted: a whole number",
    ),
    "block_tokens": (lambda make: make(block_tokens="4"), "block_tokens='4' is not accepted; accepted: a whole number"),
    "list": (lambda make: make().prefill(make.model, [1, 2]), "input_ids is list; accepted: a tensor"),
    "axes": (
        lambda make: make().prefill(make.model, IDS[0]),
        r"input_ids of shape \(8,\); accepted: \(batch, tokens\)",
    ),
    "dtype": (lambda make: make().prefill(make.model, IDS.float()), "input_ids of torch.float32; accepted: whole"),
    "chunk": (lambda make: make().prefill(make.model, IDS, 0), "chunk_tokens=0 is not accepted; accepted: a whole"),
    "turn": (lambda make: make().continuation([1]), "input_ids is list; accepted: a tensor"),
    "question": (lambda make: make(recall="lexical").ask(make.model, [1]), "question_ids is list; accepted: a tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_refused_by_name(name):
    """A negative `rebase_at` or `block_tokens` was once accepted in silence, and a list ended in an AttributeError."""
    model = build("llama")

    def make(**options):
        return StreamingCache.for_model(model, cap=16, **options)

    make.model = model
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(make)


def test_a_question_of_a_prompt_without_new_tokens_is_refused():
    model = build("llama")
    cache = StreamingCache.for_model(model, cap=16, recall="lexical")
    cache.prefill(model, token_ids(40)[None])
    cache.recall_ask = 3
    with pytest.raises(ValueError, match="the conversation has 30 tokens, and the cache has seen 40: none is new"):
        model.generate(token_ids(30)[None], max_new_tokens=1, **with_cache(model, cache))
