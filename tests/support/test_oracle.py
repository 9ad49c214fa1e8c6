"""The oracle's forward pass and scores, checked against transformers run in float64 throughout."""

import math

import pytest
import torch
from oracle.forward import cache_positions, keep_best, run
from oracle.models import FAMILIES, UNIFORM, build, token_ids
from oracle.network import Network
from oracle.rotation import FLOAT32_POWER, rope_frequencies
from oracle.rules import Rule
from torch.overrides import TorchFunctionMode

TOKENS = 120
CONTROL_TOKENS = 64


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices are slower on two threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class AllDouble(TorchFunctionMode):
    """Inside, transformers' own casts to float32 (rotary angles, RMSNorm, softmax) go to float64 instead."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def widen(value):
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(widen, args), **{key: widen(value) for key, value in (kwargs or {}).items()})


def band(tokens, window):
    """(T, T) bool mask of a layer that slides."""
    back = torch.arange(tokens)[:, None] - torch.arange(tokens)
    return (back >= 0) & (back < window)


def additive(mask, batch):
    """(T, T) bool to (batch, 1, T, T) float64: 0 where seen."""
    return torch.where(mask, 0.0, -math.inf).double()[None, None].expand(batch, -1, -1, -1)


def reference(model, ids, mask=None):
    """Transformers' output in float64 for ids (batch, T); mask is (T, T) bool, for full layers, default causal."""
    model = model.double()
    base = getattr(model, model.base_model_prefix)
    if model.config.model_type == "falcon":  # reads the name at every call
        model.config._attn_implementation = "eager"
    else:
        model.set_attn_implementation("eager")
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped product knows no float64
    if mask is not None:
        window = next((w for w in Network(model).windows if w is not None), None)
        mask = additive(mask, len(ids))
        if window is not None:
            mask = {"full_attention": mask, "sliding_attention": additive(band(mask.shape[-1], window), len(ids))}
    with AllDouble(), torch.no_grad():
        base.rotary_emb = type(base.rotary_emb)(config=model.config)  # its frequencies in float64 as well
        return model(ids, attention_mask=mask, output_attentions=True)


def nll_of(logits, ids):
    """(batch, T - 1) NLL of the next token from logits (batch, T, vocab)."""
    return -logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def visible_mask(steps):
    """(T, T) bool mask of a run whose visible sets are shared."""
    mask = torch.zeros(len(steps), len(steps), dtype=torch.bool)
    for t, step in enumerate(steps):
        mask[t, step.visible[0, 0]] = True
    return mask


def every_third(past, candidates, keep, t, group):
    """An arbitrary chooser that mixes old and new and differs between groups."""
    shift = 0 if group is None else 1 + sum(part or 0 for part in group)
    return sorted(candidates, key=lambda token: ((token + shift) % 3, -token))[:keep]


# ---- the forward pass against transformers ----


@pytest.mark.parametrize("family", FAMILIES)
def test_without_eviction_the_oracle_equals_transformers_in_float64(family):
    model, ids = build(family), token_ids(TOKENS, batch=2)
    result = run(Network(model), ids, Rule(sink=4, window=TOKENS), keep_logits=True, keep_attention=True)
    out = reference(model, ids)
    torch.testing.assert_close(result.logits, out.logits, rtol=0, atol=1e-9)
    torch.testing.assert_close(result.nll, nll_of(out.logits, ids), rtol=0, atol=1e-9)
    for layer, expected in enumerate(out.attentions):
        found = result.steps[-1].attention[layer]
        torch.testing.assert_close(found, expected[:, :, -1, -found.shape[-1] :], rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_transformers_is_within_the_tolerance_of_cache_tests(family):
    """Control of the tolerance: the rounding of a float32 model must leave room below 1e-5."""
    ids = token_ids(320)
    model = build(family)
    with torch.no_grad():
        stock = nll_of(model(ids[None]).logits.double(), ids[None])[0]
    assert (run(Network(model), ids).nll - stock).abs().max() < 4e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_equal_those_of_transformers(family):
    model = build(family)
    rotary = getattr(model, model.base_model_prefix).rotary_emb
    for kind in ("full_attention", "sliding_attention"):
        prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        frequencies, factor = rope_frequencies(model.config, kind)
        expected = getattr(rotary, f"{prefix}inv_freq")
        torch.testing.assert_close(frequencies.float(), expected, rtol=FLOAT32_POWER, atol=0)
        assert factor == pytest.approx(getattr(rotary, f"{prefix}attention_scaling"), abs=1e-12)
    scaled = ("llama_yarn", "phi3_longrope", "olmo3", "gpt_oss")
    assert (rope_frequencies(model.config)[1] != 1) == (family in scaled)


@pytest.mark.parametrize("family", FAMILIES)
def test_eviction_in_original_positions_equals_a_masked_transformers_pass(family):
    model, ids = build(family), token_ids(TOKENS, batch=1)
    rule = Rule(sink=3, window=20, refresh=5, overlap=2, compress_every=9, max_drop=4)
    result = run(Network(model), ids, rule, positions="original", choose=every_third)
    expected = nll_of(reference(model, ids, visible_mask(result.steps)).logits, ids)
    torch.testing.assert_close(result.nll, expected, rtol=0, atol=1e-9)
    assert sum(step.event for step in result.steps) >= 6


@pytest.mark.parametrize("family", UNIFORM)
def test_eviction_in_cache_positions_equals_transformers_on_the_gathered_text(family):
    """In one layer keys depend on their own token only, so that a fresh pass over the visible tokens is exact."""
    model, ids = build(family, layers=1), token_ids(90, batch=1)
    rule = Rule(sink=3, window=20, refresh=5, compress_every=7)
    result = run(Network(model), ids, rule, choose=every_third, keep_logits=True)
    for t in range(20, 90, 7):
        seen = ids[:, result.steps[t].visible[0, 0]]
        expected = reference(model, seen).logits[:, -1]
        torch.testing.assert_close(result.logits[:, t], expected, rtol=0, atol=1e-9)


def test_cache_positions_without_sinks_depend_on_differences_only():
    model, ids = build("llama"), token_ids(TOKENS)
    rule = Rule(sink=0, window=24, compress_every=5)
    cache = run(Network(model), ids, rule).nll
    torch.testing.assert_close(cache, run(Network(model), ids, rule, positions="original").nll, rtol=0, atol=1e-9)


# ---- the models must be able to show an error ----


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_sharp(family):
    result = run(Network(build(family)), token_ids(TOKENS), keep_attention=True)
    shares = []
    for step in result.steps[TOKENS // 2 :]:
        for p in step.attention:
            entropy = -(p * p.clamp_min(1e-300).log()).sum(-1)
            shares.append((entropy / math.log(p.shape[-1])).mean())
    assert torch.stack(shares).mean() < 0.7


def _shift(rows: slice, by: int):
    def positions(visible):
        moved = cache_positions(visible).clone()
        moved[..., rows] += by
        return moved

    return positions


@pytest.mark.parametrize("family", FAMILIES)
def test_a_position_bug_would_show(family):
    """Sinks one too far, every cached key one too early, the window three too early: each moves the NLL."""
    network, ids, rule = Network(build(family)), token_ids(CONTROL_TOKENS), Rule(sink=4, window=20, compress_every=8)
    right = run(network, ids, rule).nll
    for rows, by in [(slice(0, 4), 1), (slice(0, -1), -1), (slice(4, -1), -3)]:
        assert (run(network, ids, rule, positions=_shift(rows, by)).nll - right).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_eviction_and_position_mode_matter_only_after_the_first_prune(family):
    network, ids, rule = Network(build(family)), token_ids(CONTROL_TOKENS), Rule(sink=4, window=20, compress_every=8)
    cache, original = run(network, ids, rule), run(network, ids, rule, positions="original")
    first = next(t for t, step in enumerate(cache.steps) if step.event)
    for other in (original.nll, run(network, ids).nll):
        torch.testing.assert_close(cache.nll[:first], other[:first], rtol=0, atol=1e-12)
        assert (cache.nll[first:] - other[first:]).abs().max() > 1e-2


def test_models_are_the_same_at_every_call_and_differ_by_seed():
    first, again, other = build("qwen2"), build("qwen2"), build("qwen2", seed=1)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
    with pytest.raises(ValueError, match="accepted"):
        build("mamba")


# ---- what scorers read ----


@pytest.mark.parametrize("family", ["gpt_neox", "llama_yarn", "qwen3"])
def test_attention_scores_equal_sums_of_transformers_attention(family):
    model, ids = build(family), token_ids(60, batch=2)
    network = Network(model)
    past = run(network, ids).past
    attentions = torch.stack(reference(model, ids).attentions)  # (layers, batch, q_heads, queries, keys)
    grouped = attentions.unflatten(2, (network.kv_heads, -1)).mean((1, 3))
    tokens = list(range(60))
    for layer, head in [(0, 0), (1, network.kv_heads - 1)]:
        group, expected = (layer, head), grouped[layer, head]
        torch.testing.assert_close(past.accumulated(tokens, group), expected.sum(0), rtol=0, atol=1e-9)
        torch.testing.assert_close(past.last_query(tokens, group), expected[-1], rtol=0, atol=1e-9)
        torch.testing.assert_close(past.recent(tokens, 16, group), expected[-16:].sum(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(past.accumulated(tokens), grouped.sum(2).mean((0, 1)), rtol=0, atol=1e-9)
    torch.testing.assert_close(past.accumulated(tokens, (1, None)), grouped[1].sum(1).mean(0), rtol=0, atol=1e-9)


def test_uncertainty_belongs_to_the_distribution_that_a_token_was_drawn_from():
    model, ids = build("mistral"), token_ids(40)
    past = run(Network(model), ids).past
    log_p = reference(model, ids[None]).logits[0].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(past.nll([7, 8]), -log_p[[6, 7], ids[[7, 8]]])
    torch.testing.assert_close(past.entropy([0, 7, 8]), torch.stack([entropy[0] * 0, entropy[6], entropy[7]]))
    torch.testing.assert_close(past.output_entropy([7, 8]), entropy[[7, 8]])
    torch.testing.assert_close(past.output_doubt([7]), 1 - log_p[[7]].exp().amax(-1))


def test_key_norm_is_that_of_the_unrotated_key_after_qk_norm():
    model, ids, seen = build("qwen3"), token_ids(30, batch=2), []
    past = run(Network(model), ids).past
    model.model.layers[1].self_attn.k_norm.register_forward_hook(lambda module, args, out: seen.append(out))
    reference(model, ids)
    expected = seen[0].norm(dim=-1).mean(0)[:, 1]  # (tokens, kv_heads)
    torch.testing.assert_close(past.key_norm(list(range(30)), (1, 1)), expected, rtol=0, atol=1e-9)


def test_choosers_see_the_state_before_the_drop_and_without_the_new_token():
    network, ids, seen = Network(build("llama")), token_ids(80), []

    def choose(past, candidates, keep, t, group):
        cached = past.visible[group[0], group[1]].tolist()
        one = past.recent(cached, 1, group)  # the last query alone, at unchanged cache positions
        torch.testing.assert_close(one, past.last_query(cached, group), rtol=0, atol=1e-12)
        assert cached[-1] == t - 1 and set(candidates) <= set(cached)
        assert past.nll([t]).item() > 0  # known once t - 1 has been processed
        assert past.accumulated([t], group).item() == 0 and past.output_entropy([t]).item() == 0
        seen.append((t, group))
        return keep_best(lambda p, tokens, g: p.recent(tokens, 8, g))(past, candidates, keep, t, group)

    result = run(network, ids, Rule(sink=2, window=16, refresh=4, compress_every=8), choose=choose, per="head")
    events = [t for t, step in enumerate(result.steps) if step.event]
    assert seen == [(t, (layer, head)) for t in events for layer in range(3) for head in range(2)]
    sets = {tuple(row) for row in result.steps[-1].visible.flatten(0, 1).tolist()}
    assert len(sets) > 1, "every head chose the same tokens: the test shows nothing about groups"


def test_visible_sets_per_head_reach_their_head():
    """Same sets for all heads equal the shared run; sets that differ in one head change the result."""
    network, ids = Network(build("llama")), token_ids(80)
    rule = Rule(sink=2, window=16, refresh=4, compress_every=8)

    def oldest(past, candidates, keep, t, group):
        return candidates[:keep]

    def one_differs(past, candidates, keep, t, group):
        return candidates[-keep:] if group == (1, 0) else candidates[:keep]

    shared = run(network, ids, rule, choose=oldest).nll
    for per in ("layer", "head"):
        torch.testing.assert_close(run(network, ids, rule, choose=oldest, per=per).nll, shared, rtol=0, atol=1e-12)
    changed = run(network, ids, rule, choose=one_differs, per="head")
    assert (changed.nll - shared).abs().max() > 1e-3
    last = changed.steps[-1].visible
    assert last[1, 0].tolist() != last[1, 1].tolist() and last[0, 0].tolist() == last[1, 1].tolist()


@pytest.mark.parametrize("rule", [Rule(2, 10, 6), Rule(3, 1, 5), Rule(0, 2, 4, compress_every=5)], ids=str)
def test_only_queries_with_a_token_in_the_window_are_asked(rule):
    """In one layer a transformers pass over the cached tokens shows what each of them gives to each other one."""
    model, ids = build("llama", layers=1), token_ids(60)
    network = Network(model)
    past = run(network, ids, rule, choose=every_third).past
    cached = past.visible[0, 0].tolist()
    window = cached[rule.sink + rule.refresh :]
    assert past.window == window == list(range(60 - len(window), 60))
    attention = reference(model, ids[None, cached]).attentions[0][0].unflatten(0, (network.kv_heads, -1)).mean((0, 1))
    for obs in (1, len(window), 32):
        expected = attention[-min(obs, len(window)) :].sum(0)
        torch.testing.assert_close(past.recent(cached, obs), expected, rtol=0, atol=1e-9)
    assert (attention[-len(window) - 1] > 0).any(), "control: an older query would add to the sum"


def test_adaptive_run_reads_the_risk_of_the_previous_step():
    network, ids, asked = Network(build("llama")), token_ids(80), []

    def want(past, t, gathered):
        asked.append((past.output_entropy([t - 1]).item(), past.output_entropy([t]).item()))
        return gathered >= 3

    rule = Rule(sink=2, window=10, adaptive=True, compress_every=9)
    result = run(network, ids, rule, want_prune=want)
    assert all(previous > 0 and current == 0 for previous, current in asked)
    lazy = run(network, ids, Rule(sink=2, window=10, compress_every=3))
    torch.testing.assert_close(result.nll, lazy.nll, rtol=0, atol=0)
