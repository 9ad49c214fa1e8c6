"""The decode loop: every method's NLL against an independent computation, its rows, its failures, its settings.

Blocks and steps must agree for every policy, the baselines must equal plain forwards, and whatever ends a run early
must leave what was measured.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import tiny_model
import torch
from oracle.models import token_ids

import sinkstream.evaluation.run as run_module
from sinkstream.cache.attention import SINKSTREAM_SDPA
from sinkstream.engine import STEPS
from sinkstream.evaluation.backends import BACKENDS, evaluation_backends
from sinkstream.evaluation.decoders import RecomputeDecoder, StreamingDecoder
from sinkstream.evaluation.run import RunResult, check_run, run, run_interleaved
from sinkstream.evaluation.settings import BASELINES, FIXED, RunSettings, method_names
from sinkstream.measure.metrics import NLL_ROWS, token_nll
from sinkstream.measure.numerics import numerics, set_numerics
from sinkstream.policies import PRESETS, PruneSchedule
from sinkstream.policies.options import option_fields
from sinkstream.statistics import paired_delta_ppl

TOKENS, CAP = 176, 40
TOLERANCE = 1e-5  # nats per token
SIZES = {"compress_every": 8, "refresh": 5, "overlap": 4, "max_drop": 3, "slack": 6}
ADAPTIVE = {"adaptive_min": 2, "adaptive_every": 4, "adaptive_max": 8}
POLICIES = [name for name in method_names() if name not in BASELINES]
POISON_AT = 100


@pytest.fixture(scope="module")
def healthy():
    return tiny_model.loaded()


@pytest.fixture(scope="module")
def poisoned():
    return tiny_model.loaded(poisoned=True)


def text_ids(tokens: int = TOKENS, poison_at: int | None = None) -> torch.Tensor:
    """Random tokens with repeats; POISON nowhere but at `poison_at`."""
    bad = tiny_model.tokenizer().convert_tokens_to_ids(tiny_model.POISON)
    ids = token_ids(tokens)
    ids[ids == bad] = 1
    if poison_at is not None:
        ids[poison_at] = bad
    return ids


def settings_of(method: str, **more) -> RunSettings:
    """A method at test size: at least a dozen prunes within the text."""
    preset = {} if method in BASELINES else PRESETS[method]()
    options = {k: v for k, v in SIZES.items() if k in preset and k not in FIXED.get(method, ())}
    options |= ADAPTIVE if "adaptive" in preset else {}
    options |= {"observation": 6} if preset.get("scorer") == "window-attention" else {}
    given = {"cap": CAP, "options": options, "block_tokens": 29, "warmup_tokens": 8} | more
    return RunSettings(method, **given)


def window_nll(model, ids: torch.Tensor, t: int, cap: int) -> float:
    """NLL of token t + 1 given the `cap` tokens up to t alone."""
    with torch.no_grad():
        logits = model(ids[None, max(0, t + 1 - cap) : t + 1], use_cache=False).logits[0, -1]
    return -logits.double().log_softmax(-1)[ids[t + 1]].item()


def worst(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max())


def hooks_of(model) -> int:
    """Forward hooks on a model and all its parts."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---- what is scored ----


def test_logits_are_turned_into_figures_slice_by_slice(monkeypatch):
    logits, targets = torch.randn(300, 97), torch.randint(97, (300,))
    whole = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(token_nll(logits, targets), whole, rtol=1e-6, atol=0)  # eight epsilons
    rows = []
    entropy = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda x, *a, **k: rows.append(len(x)) or entropy(x, *a, **k)
    )
    token_nll(logits, targets)
    assert sum(rows) == 300 and max(rows) == NLL_ROWS < 300


@pytest.mark.parametrize("method", method_names())
def test_blocks_give_the_nll_of_steps(method, healthy):
    ids = text_ids()
    steps = run(healthy, ids, settings_of(method)).arrays
    mixed = run(healthy, ids, settings_of(method, timed_tokens=37)).arrays
    blocks = run(healthy, ids, settings_of(method, evaluate="blocks")).arrays
    for other in (mixed, blocks):
        assert worst(steps["nll"], other["nll"]) < TOLERANCE
        for name in ("index", "kv_length", "event", "drop_size"):
            assert np.array_equal(steps[name], other[name]), name
    assert np.isfinite(steps["seconds"]).all()
    assert np.isfinite(mixed["seconds"][:37]).all() and np.isnan(mixed["seconds"][37:]).all()
    assert np.isnan(blocks["seconds"]).all()


@pytest.mark.parametrize("method", ["strict", "max-drop", "refresh-key-norm"])
def test_blocks_give_the_nll_of_steps_at_original_positions(method, healthy):
    settings = settings_of(method, positions="original")
    steps = run(healthy, text_ids(), settings).arrays
    blocks = run(healthy, text_ids(), dataclasses.replace(settings, evaluate="blocks")).arrays
    cache_positions = run(healthy, text_ids(), settings_of(method, evaluate="blocks")).arrays
    assert worst(steps["nll"], blocks["nll"]) < TOLERANCE
    assert worst(steps["nll"], cache_positions["nll"]) > 1e-2


@pytest.mark.parametrize("method", [name for name in method_names() if name != "strict"])
def test_every_method_differs_from_strict(method, healthy):
    nlls = [run(healthy, text_ids(), settings_of(m, evaluate="blocks")).arrays["nll"] for m in ("strict", method)]
    assert worst(*nlls) > 1e-2


def test_full_is_one_plain_forward(healthy):
    ids = text_ids()
    with torch.no_grad():
        log_probs = healthy.model(ids[None], use_cache=False).logits[0].double().log_softmax(-1)
    plain = -log_probs[:-1].gather(1, ids[1:, None])[:, 0].numpy()  # entry t belongs to token t + 1
    found = run(healthy, ids, settings_of("full")).arrays
    assert worst(found["nll"], plain[found["index"] - 1]) < TOLERANCE
    assert worst(found["nll"], plain[found["index"] - 2]) > 0.1, "a shift by one token would not show"
    assert np.array_equal(found["kv_length"], found["index"])


def test_recompute_forwards_the_window_of_every_token(healthy):
    ids = text_ids()
    found = run(healthy, ids, settings_of("recompute")).arrays
    expected = [window_nll(healthy.model, ids, t - 1, CAP) for t in found["index"]]
    assert worst(found["nll"], expected) < TOLERANCE
    assert worst(found["nll"], [window_nll(healthy.model, ids, t - 1, CAP - 1) for t in found["index"]]) > 1e-2
    assert set(found["kv_length"]) == {CAP}


def test_recompute_of_a_window_that_is_not_full_yet(healthy):
    ids = text_ids()
    for more in ({}, {"evaluate": "blocks"}):
        found = run(healthy, ids, settings_of("recompute", prefill=5, **more)).arrays
        assert worst(found["nll"], [window_nll(healthy.model, ids, t - 1, CAP) for t in found["index"]]) < TOLERANCE
        assert found["kv_length"].tolist() == [min(CAP, t) for t in found["index"]]


@pytest.mark.parametrize("more", [{}, {"timed_tokens": 37}, {"evaluate": "blocks"}], ids=["steps", "mixed", "blocks"])
def test_sampled_recompute_scores_every_kth_token(healthy, more):
    ids, every = text_ids(), 7
    all_tokens = run(healthy, ids, settings_of("recompute")).arrays
    sampled = run(healthy, ids, settings_of("recompute", sample_every=every, **more))
    scored = np.isfinite(sampled.arrays["nll"])
    assert np.array_equal(np.flatnonzero(scored), np.arange(0, len(scored), every))
    assert np.array_equal(sampled.arrays["index"], all_tokens["index"])
    assert worst(sampled.arrays["nll"][scored], all_tokens["nll"][scored]) < TOLERANCE
    assert sampled.summary["scored_tokens"] == scored.sum() < sampled.summary["decode_tokens"]
    strict = run(healthy, ids, settings_of("strict", evaluate="blocks")).arrays
    paired = paired_delta_ppl(strict["nll"], sampled.arrays["nll"], positions=strict["index"], block_tokens=8)
    expected = 100 * np.expm1((strict["nll"] - all_tokens["nll"].astype(np.float64))[scored].mean())
    assert paired.n_tokens == scored.sum()
    assert paired.delta_percent == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("method", [name for name in method_names() if name != "full"])
def test_a_cap_above_the_text_reproduces_the_full_cache(method, healthy):
    more = {"prefill": 30, "evaluate": "blocks"}
    full = run(healthy, text_ids(), settings_of("full", **more)).arrays
    found = run(healthy, text_ids(), settings_of(method, **more | {"cap": TOKENS + 20})).arrays
    assert worst(found["nll"], full["nll"]) < TOLERANCE  # a cap below the text is off by 1e-2: see above
    assert np.array_equal(found["kv_length"], full["kv_length"])
    assert not found["event"].any() and not found["drop_size"].any()


# ---- rows ----


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("prefill", [None, 1, 25, TOKENS - 2])
def test_rows_cover_the_tokens_after_the_prefill(method, prefill, healthy):
    result = run(healthy, text_ids(), settings_of(method, evaluate="blocks", prefill=prefill))
    first = CAP if prefill is None else prefill
    assert result.arrays["index"].tolist() == list(range(first + 1, TOKENS))
    assert result.prefill_tokens == first
    assert (result.status, result.reason) == ("complete", None)
    assert result.summary["decode_tokens"] == result.summary["scored_tokens"] == TOKENS - 1 - first


@pytest.mark.parametrize("method", POLICIES)
@pytest.mark.parametrize("accounting", ["peak", "published"])
def test_the_cache_stays_within_its_cap_and_follows_its_schedule(method, accounting, healthy):
    settings = settings_of(method, evaluate="blocks", cap_accounting=accounting)
    found, policy = run(healthy, text_ids(), settings).arrays, settings.policy()
    kv, drop = found["kv_length"], found["drop_size"]
    growth = policy.growth if accounting == "published" else 0
    assert policy.peak == CAP + growth
    assert kv.max() <= policy.peak and kv.min() >= policy.sink
    assert np.array_equal(np.diff(kv), 1 - drop[1:]), "a token adds one entry and a drop takes its entries away"
    assert found["event"].sum() >= 10
    if all(t.sure_growth == t.growth for t in policy.triggers):
        steps = PruneSchedule(policy).plan(TOKENS - 1)[CAP:]
        assert [(s.visible, s.drop, s.event) for s in steps] == list(zip(kv, drop, found["event"]))


@pytest.mark.parametrize("method", ["strict", "recompute"])
def test_progress_reaches_its_end(method, healthy):
    for more in ({"repeats": 2}, {"timed_tokens": 5}, {"evaluate": "blocks"}):
        calls: list[tuple[int, int]] = []
        run(healthy, text_ids(), settings_of(method, **more), lambda *call, calls=calls: calls.append(call))
        total = (TOKENS - 1 - CAP) * more.get("repeats", 1)
        assert {t for _, t in calls} == {total}
        assert [d for d, _ in calls] == sorted({d for d, _ in calls}) and calls[-1][0] == total


# ---- times ----


class FakeTimer:
    """Stands in for `timed`: calls and lets the test say how many seconds each kind of call took."""

    def __init__(self, seconds: Callable[[int, str, int], float]):
        self.seconds, self.repeat, self.steps = seconds, -1, 0

    def __call__(self, fn, *args, device, **kwargs):
        kind = {"decode": "total", "prefill": "prefill", "step": "step"}.get(fn.__name__, "pick")
        if kind == "total":
            self.repeat, self.steps = self.repeat + 1, 0
        result = fn(*args, **kwargs)
        self.steps += kind == "step"
        return result, self.seconds(self.repeat, kind, self.steps)


def test_repeats_give_medians(healthy, monkeypatch):
    factor = (1.0, 10.0, 3.0)
    base = {"total": 50.0, "prefill": 2.0, "pick": 0.5}
    timer = FakeTimer(lambda repeat, kind, step: factor[repeat] * base.get(kind, 0.01 * step))
    monkeypatch.setattr(run_module, "timed", timer)
    result = run(healthy, text_ids(), settings_of("strict", repeats=3))
    steps = TOKENS - 1 - CAP
    assert timer.repeat == 2
    assert result.arrays["seconds"] == pytest.approx(0.03 * np.arange(1, steps + 1), rel=1e-6)
    assert len(result.arrays["index"]) == steps
    figures = {name: result.summary[name] for name in ("prefill_sec", "ttft_ms", "total_sec")}
    assert figures == pytest.approx({"prefill_sec": 6.0, "ttft_ms": 7500.0, "total_sec": 150.0})


def test_the_steady_latency_leaves_out_the_warm_up(healthy, monkeypatch):
    monkeypatch.setattr(run_module, "timed", FakeTimer(lambda repeat, kind, step: 5.0 if step <= 8 else 0.02))
    summary = run(healthy, text_ids(), settings_of("lazy")).summary
    assert summary["steady_tpot_ms"]["mean"] == pytest.approx(20.0)
    assert summary["tpot_ms"] > 100


# ---- runs that end early ----


def assert_kept(result: RunResult, whole: RunResult, rows: int) -> None:
    """The first `rows` rows are those of the whole run, and the summary is theirs."""
    assert len(result.arrays["index"]) == result.summary["decode_tokens"] == rows
    for name in ("index", "kv_length", "event", "drop_size"):
        assert np.array_equal(result.arrays[name], whole.arrays[name][:rows]), name
    assert np.allclose(result.arrays["nll"], whole.arrays["nll"][:rows], atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("method", ["full", "recompute", "strict", "lazy", "refresh-uncertainty", "adaptive-entropy"])
@pytest.mark.parametrize("more", [{}, {"timed_tokens": 20}, {"evaluate": "blocks"}], ids=["steps", "mixed", "blocks"])
def test_nan_logits_stop_the_run_at_their_token(method, more, healthy, poisoned):
    settings, ids = settings_of(method, **more), text_ids(poison_at=POISON_AT)
    result = run(poisoned, ids, settings)
    assert result.status == "failed"
    assert result.reason == f"the logits that predict token {POISON_AT + 1} are not finite"
    assert_kept(result, run(healthy, ids, settings), POISON_AT - CAP)
    assert hooks_of(poisoned.model) == 0


@pytest.mark.parametrize("more", [{}, {"evaluate": "blocks"}], ids=["steps", "blocks"])
def test_nan_logits_between_samples_are_seen_at_the_next_sample(more, healthy, poisoned):
    settings, ids = settings_of("recompute", sample_every=7, **more), text_ids(poison_at=POISON_AT)
    seen_at = next(t for t in range(POISON_AT, TOKENS) if (t - CAP) % 7 == 0)
    result = run(poisoned, ids, settings)
    assert (result.status, result.reason) == ("failed", f"the logits that predict token {seen_at + 1} are not finite")
    assert_kept(result, run(healthy, ids, settings), seen_at - CAP)


def test_nan_logits_of_one_forward_only_are_told(healthy, monkeypatch):
    score = StreamingDecoder.score
    monkeypatch.setattr(StreamingDecoder, "score", lambda *args: float("nan") * score(*args))
    result = run(healthy, text_ids(), settings_of("strict", evaluate="blocks"))
    assert result.status == "failed"
    assert "tokens 41 to 69 in one forward are not finite, although one by one they are" in result.reason


@pytest.mark.parametrize("method", ["full", "recompute", "strict"])
def test_nan_logits_after_the_prefill(method, poisoned):
    result = run(poisoned, text_ids(poison_at=20), settings_of(method))
    assert result.status == "failed"
    assert result.reason == f"the logits after the prefill of {CAP} tokens are not finite"
    assert result.summary["decode_tokens"] == 0 and result.summary["ppl"] is None
    assert result.summary["ttft_ms"] > 0


def interrupt_after(steps: int, repeat: int = 0) -> FakeTimer:
    """A timer in whose run Ctrl-C is pressed after that many steps."""

    def seconds(at: int, kind: str, step: int) -> float:
        if (at, kind, step) == (repeat, "step", steps + 1):
            raise KeyboardInterrupt
        return float(at + 1)

    return FakeTimer(seconds)


@pytest.mark.parametrize("method", ["full", "recompute", "strict", "refresh-uncertainty"])
def test_ctrl_c_keeps_what_was_measured(method, healthy, monkeypatch):
    whole = run(healthy, text_ids(), settings_of(method))
    monkeypatch.setattr(run_module, "timed", interrupt_after(20))
    result = run(healthy, text_ids(), settings_of(method))
    assert (result.status, result.reason) == ("partial", f"interrupted after token {CAP + 20}")
    assert_kept(result, whole, 20)
    assert result.summary["prefill_sec"] == 1.0 and result.summary["total_sec"] is None
    assert result.summary["ppl"] == pytest.approx(np.exp(whole.arrays["nll"][:20].mean()), rel=1e-4)
    assert hooks_of(healthy.model) == 0


def test_ctrl_c_in_blocks(healthy):
    def press(done: int, total: int) -> None:
        if done > 50:
            raise KeyboardInterrupt

    settings = settings_of("lazy", evaluate="blocks")
    result = run(healthy, text_ids(), settings, press)
    rows = len(result.arrays["index"])
    assert (result.status, result.reason) == ("partial", f"interrupted after token {CAP + rows}")
    assert_kept(result, run(healthy, text_ids(), settings), rows)
    assert rows > 50


def test_ctrl_c_between_runs_in_turn_names_the_token_that_all_have(healthy, monkeypatch):
    """One of the two runs is a token ahead of the other."""
    for steps in (20, 22):  # the order of the runs changes from token to token
        monkeypatch.setattr(run_module, "timed", interrupt_after(steps + 1, repeat=-1))
        both = [settings_of(method) for method in ("full", "strict")]
        for result in run_module.run_interleaved(healthy, text_ids(), both):
            assert (result.status, result.reason) == ("partial", f"interrupted after token {CAP + steps // 2}")
            assert len(result.arrays["index"]) == steps // 2


def test_ctrl_c_in_the_prefill(healthy, monkeypatch):
    def press(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(StreamingDecoder, "prefill", press)
    result = run(healthy, text_ids(), settings_of("strict"))
    assert (result.status, result.reason) == ("partial", f"interrupted after token {CAP}")
    assert result.summary["decode_tokens"] == 0 and result.summary["ttft_ms"] is None


def test_ctrl_c_in_a_later_repeat_keeps_the_whole_first_run(healthy, monkeypatch):
    whole = run(healthy, text_ids(), settings_of("strict"))
    monkeypatch.setattr(run_module, "timed", interrupt_after(20, repeat=2))
    result = run(healthy, text_ids(), settings_of("strict", repeats=3))
    assert (result.status, result.reason) == ("partial", f"interrupted after token {CAP + 20} of repeat 3")
    assert_kept(result, whole, TOKENS - 1 - CAP)
    assert set(result.arrays["seconds"]) == {1.5}, "the median over the two runs that came to their end"


def test_exhausted_memory_keeps_what_was_measured(healthy, monkeypatch):
    def seconds(repeat: int, kind: str, step: int) -> float:
        if step == 31:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")
        return 1.0

    whole = run(healthy, text_ids(), settings_of("full"))
    monkeypatch.setattr(run_module, "timed", FakeTimer(seconds))
    result = run(healthy, text_ids(), settings_of("full"))
    assert result.status == "failed"
    assert result.reason == f"out of memory after token {CAP + 30}: CUDA out of memory. Tried to allocate 2 GiB"
    assert_kept(result, whole, 30)


@pytest.mark.parametrize("more", [{}, {"timed_tokens": 20}, {"evaluate": "blocks"}], ids=["steps", "mixed", "blocks"])
@pytest.mark.parametrize("method", ["refresh-last-query", "strict"])
def test_the_hooks_and_the_attention_function_go_with_the_run(method, more, healthy):
    seen, config = [], healthy.model.config
    look = lambda *_: seen.append((hooks_of(healthy.model), config._attn_implementation))  # noqa: E731
    run(healthy, text_ids(), settings_of(method, **more), look)
    assert min(seen)[0] > 0
    assert {name for _, name in seen} == {"sdpa" if method == "strict" and not more else SINKSTREAM_SDPA}
    assert hooks_of(healthy.model) == 0 and config._attn_implementation == "sdpa"


# ---- settings ----


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "nosuch"}, "policy 'nosuch' is not known; accepted: full, recompute, .*strict"),
        ({"positions": "absolute"}, "positions='absolute' is not accepted; accepted: cache, original"),
        ({"evaluate": "all"}, "evaluate='all' is not accepted; accepted: steps, blocks"),
        ({"cap_accounting": "x"}, "cap_accounting='x' is not accepted; accepted: peak, published"),
        *(
            ({name: value}, f"{name}={value} is not accepted; accepted: a whole number of at least 1")
            for name in ("cap", "prefill", "timed_tokens", "block_tokens", "sample_every", "repeats")
            for value in (0, -3)
        ),
        ({"warmup_tokens": -1}, "warmup_tokens=-1 is not accepted; accepted: 0 or more"),
        ({"cap": None}, "policy 'strict' needs a cap; give --cap SLOTS"),
        *(
            ({"cap": None, "method": "recompute", "options": options}, "policy 'recompute' needs a cap")
            for options in ({}, {"window": None})
        ),
        ({"sample_every": 4}, "sample_every=4 is for recompute only, not for 'strict'"),
        ({"sample_every": 4, "method": "full"}, "sample_every=4 is for recompute only, not for 'full'"),
        ({"evaluate": "blocks", "repeats": 2}, "repeats=2 is about timings; evaluate='blocks' takes none"),
        ({"evaluate": "blocks", "timed_tokens": 1}, "timed_tokens=1 is about timings; evaluate='blocks' takes none"),
        ({"method": "full", "options": {"sink": 2}}, "policy 'full' takes no policy options, but sink is given"),
        ({"method": "recompute", "options": {"window": 9}}, "'recompute' takes no policy options, but window is given"),
        ({"options": {"bogus": 1}}, "unknown policy option 'bogus'; accepted: .*compress_every"),
        ({"cap": 4}, "cap=4 is too small: sink 4 .*; accepted: cap of at least 5"),
        ({"cap": 35, "method": "lazy"}, "cap=35 is too small: .*growth 31 leave no window; accepted: .* at least 36"),
        ({"method": "lazy", "options": {"max_drop": 0}}, "max_drop=0 is not accepted; accepted: .* at least 2"),
        ({"method": "lazy", "options": {"refresh": 4}}, "refresh=4 goes with a scorer"),
        ({"options": {"window": 37}}, "window=37 fills 41 slots .* more than cap=40; accepted: window of at most 36"),
        ({"options": {"compress_every": 8}}, "compress_every=8 makes another policy of 'strict'"),
        ({"method": "window-only", "options": {"sink": 4}}, "sink=4 makes another policy of 'window-only'"),
    ],
)
def test_settings_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        RunSettings(**{"method": "strict", "cap": CAP} | given)


def test_settings_that_are_accepted():
    assert RunSettings("full").cap is None
    assert RunSettings("strict", options={"window": 20}).policy().peak == 24
    assert RunSettings("strict", cap=CAP, options={"window": 36}).policy().peak == CAP
    assert RunSettings("strict", cap=CAP, options={"compress_every": 1, "sink": None}).policy().sink == 4
    lazy = {"options": {"window": 36, "compress_every": 9}}
    assert RunSettings("lazy", cap=CAP, cap_accounting="published", **lazy).policy().peak == CAP + 8
    with pytest.raises(ValueError, match="window=36 fills 48 slots"):
        RunSettings("lazy", cap=CAP, **lazy)


@pytest.mark.parametrize("method", method_names())
def test_a_text_that_leaves_nothing_to_decode_is_refused(method, healthy):
    for check in (check_run, run):
        with pytest.raises(
            ValueError, match=rf"has {CAP + 1} tokens and {CAP} .*; accepted: at least {CAP + 2} tokens"
        ):
            check(healthy, text_ids(CAP + 1), settings_of(method))
    check_run(healthy, text_ids(CAP + 2), settings_of(method))
    assert hooks_of(healthy.model) == 0


@pytest.mark.parametrize("method", method_names())
def test_more_positions_than_the_model_was_trained_on_are_refused(method, healthy):
    trained = healthy.trained_positions
    fits, tokens = (trained, trained) if method == "full" else (trained, 2 * trained)
    check_run(healthy, text_ids(tokens), settings_of(method, cap=fits, prefill=8))
    too_much = (trained, trained + 2) if method == "full" else (trained + 1, 2 * trained)
    settings = settings_of(method, cap=too_much[0], prefill=8)
    with pytest.raises(ValueError, match=rf"{trained}.*trained on.*accepted.*untrained.positions|trained on {trained}"):
        check_run(healthy, text_ids(too_much[1]), settings)
    with pytest.raises(ValueError, match=r"trained on"):
        run(healthy, text_ids(too_much[1]), settings)
    check_run(healthy, text_ids(too_much[1]), dataclasses.replace(settings, allow_untrained_positions=True))


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        (RunSettings("full"), "full"),
        (RunSettings("recompute", cap=256, sample_every=4), "recompute"),
        (RunSettings("strict", cap=256), "strict"),
        (RunSettings("window-only", cap=256, options={"sink": 0}), "window-only"),
        (RunSettings("strict", cap=256, options={"sink": 8}), "strict S=8"),
        (RunSettings("strict", options={"window": 20}), "strict W=20"),
        (RunSettings("lazy", cap=256), "lazy R=32"),
        (RunSettings("lazy", cap=256, options={"compress_every": 16}), "lazy R=16"),
        (RunSettings("max-drop", cap=256), "max-drop R=32 max_drop=8"),
        (RunSettings("overlap", cap=256), "overlap R=32 O=32"),
        (RunSettings("slack", cap=256, options={"slack": 5}), "slack slack=5"),
        (RunSettings("adaptive-entropy", cap=256), "adaptive-entropy"),
        (RunSettings("adaptive-entropy", cap=256, options={"adaptive_max": 99}), "adaptive-entropy adaptive_max=99"),
        (RunSettings("refresh-key-norm", cap=256), "refresh-key-norm R=32 B=32"),
        (RunSettings("lazy", cap=256, options={"refresh": 8, "scorer": "uniform"}), "lazy R=32 B=8 scorer=uniform"),
        (RunSettings("lazy", cap=256, positions="original"), "lazy R=32 positions=original"),
        (RunSettings("lazy", cap=256, cap_accounting="published"), "lazy R=32 growth outside cap"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_labels(settings, label):
    assert settings.label() == label


def test_labels_tell_namesakes_apart():
    """Every policy option that changes a policy shows in its label."""
    changed = {"window": 30, "sink": 7, "refresh": 9, "overlap": 3, "max_drop": 5, "slack": 2, "compress_every": 6}
    changed |= {"adaptive": "top1", "adaptive_min": 3, "adaptive_every": 20, "adaptive_max": 50}
    changed |= {"adaptive_quantile": 0.9, "adaptive_smoothing": 0.5}
    base = {"scorer": "uniform", "refresh": 4, "adaptive": "entropy"}
    policy = RunSettings("lazy", cap=256, options=base).policy()
    names = {f.name for part in (policy, *policy.triggers) for f in option_fields(type(part))}
    assert names | {"slack"} == set(changed), "a new option: give it a value above"
    labels = {RunSettings("lazy", cap=256, options=base).label()}
    labels |= {RunSettings("lazy", cap=256, options=base | {name: value}).label() for name, value in changed.items()}
    assert len(labels) == 1 + len(changed)


# ---- decoders and switches ----


def test_recompute_takes_one_token_or_scores(healthy):
    decoder = RecomputeDecoder(healthy.model, settings_of("recompute"))
    with pytest.raises(AssertionError, match="one token at a time"):
        decoder.feed(text_ids(), last_only=False)


def test_numerics_are_set_and_read():
    before = numerics()
    try:
        for tf32 in (True, False):
            for cudnn in (True, False):
                set_numerics(tf32=tf32, cudnn_attention=cudnn)
                assert numerics() == {"tf32": tf32, "cudnn_attention": cudnn}
    finally:
        set_numerics(**before)


# ---- backends ----


@pytest.mark.parametrize("evaluate", ["steps", "blocks"])
@pytest.mark.parametrize("method", ["strict", "lazy", "refresh-window-attention"])
def test_the_engine_says_what_the_transformers_module_says(method, evaluate, healthy):
    backend = "kernels" if evaluate == "blocks" else "ring"
    results = [
        run(healthy, text_ids(), settings_of(method, backend=name, evaluate=evaluate)) for name in ("hf", backend)
    ]
    hf, ring = (r.arrays for r in results)
    assert [r.status for r in results] == ["complete", "complete"]
    assert worst(hf["nll"], ring["nll"]) < TOLERANCE
    for name in ("index", "kv_length", "event", "drop_size"):
        assert (hf[name] == ring[name]).all(), name
    assert ring["event"].sum() >= 3 and np.isfinite(ring["seconds"]).all() == (evaluate == "steps")
    assert worst(hf["nll"], run(healthy, text_ids(), settings_of("window-only")).arrays["nll"]) > 1e-3, "control"


def test_the_engine_ends_where_the_numbers_end(poisoned):
    for evaluate in ("steps", "blocks"):
        result = run(poisoned, text_ids(poison_at=POISON_AT), settings_of("lazy", backend="ring", evaluate=evaluate))
        assert (result.status, result.arrays["index"][-1]) == ("failed", POISON_AT)


@pytest.mark.parametrize(("method", "backend"), list(zip(BASELINES, ("ring", "fused"))))
def test_baselines_are_refused_by_the_engine(method, backend, healthy):
    settings = settings_of(method, backend=backend)
    for check in (check_run, run):
        with pytest.raises(
            ValueError, match=f"policy '{method}' is a baseline, which --backend {backend} does not run"
        ):
            check(healthy, text_ids(), settings)


def test_a_rung_of_one_baseline_runs_that_baseline_only(healthy):
    wanted = run(healthy, text_ids(), settings_of("full", evaluate="blocks"))
    found = run(healthy, text_ids(), settings_of("full", evaluate="blocks", backend="hf-full"))
    assert np.array_equal(wanted.arrays["nll"], found.arrays["nll"])
    with pytest.raises(ValueError, match="runs the baseline 'full' only, and not 'strict'; accepted: --backend hf"):
        check_run(healthy, text_ids(), settings_of("strict", backend="hf-full"))
    with pytest.raises(ValueError, match="which only the benchmark times"):
        run(healthy, text_ids(), settings_of("full", backend="hf-static"))


def test_checking_for_the_engine_builds_no_engine(healthy, monkeypatch):
    hooks = hooks_of(healthy.model)
    monkeypatch.setattr("sinkstream.engine.decoder.pack", lambda model: pytest.fail("packed"))
    check_run(healthy, text_ids(), settings_of("refresh-structural", backend="ring"))
    with pytest.raises(ValueError, match="trained on"):
        check_run(healthy, text_ids(4 * TOKENS), settings_of("strict", cap=2000, prefill=8, backend="ring"))
    assert hooks_of(healthy.model) == hooks
    with pytest.raises(ValueError, match="captures a CUDA graph"):
        check_run(healthy, text_ids(), settings_of("strict", backend="fused"))
    assert hooks_of(healthy.model) == hooks


def test_every_rung_of_the_engine_is_a_backend():
    assert evaluation_backends() == ["hf", *STEPS.names()] and set(evaluation_backends()) < set(BACKENDS)
    assert all(BACKENDS.summary(name) == STEPS.summary(name) != "" for name in STEPS) and BACKENDS.summary("hf")


def test_interleaved_runs_are_the_runs_themselves(healthy):
    """Taking turns changes when a token is decoded, not what it sees, also beside a scorer that observes attention."""
    settings = [settings_of(m) for m in ("full", "recompute", "strict", "refresh-window-attention", "adaptive-entropy")]
    before = hooks_of(healthy.model)
    for one, result in zip(settings, run_interleaved(healthy, text_ids(), settings)):
        alone = run(healthy, text_ids(), one)
        assert result.status == "complete" and np.isfinite(result.arrays["seconds"]).all()
        assert worst(result.arrays["nll"], alone.arrays["nll"]) < TOLERANCE, one.method
        for name in ("index", "kv_length", "event", "drop_size"):
            assert (result.arrays[name] == alone.arrays[name]).all(), (one.method, name)
        assert result.summary["peak_memory_mb"] is None, "memory of all runs together belongs to none"
    assert hooks_of(healthy.model) == before


def test_an_interleaved_failure_keeps_rows_of_one_length(poisoned):
    settings = [settings_of("strict"), settings_of("lazy")]
    results = run_interleaved(poisoned, text_ids(poison_at=POISON_AT), settings)
    assert {r.status for r in results} == {"failed"}
    lengths = {len(r.arrays["nll"]) for r in results}
    assert len(lengths) == 1 and lengths.pop() > 0


@pytest.mark.parametrize(
    "odd",
    [{"evaluate": "blocks"}, {"repeats": 2}, {"timed_tokens": 5}, {"prefill": 11}],
    ids=lambda odd: next(iter(odd)),
)
def test_runs_that_cannot_take_turns_are_refused(healthy, odd):
    with pytest.raises(ValueError, match="interleaved runs are timed token by token"):
        run_interleaved(healthy, text_ids(), [settings_of("strict"), settings_of("lazy", **odd)])
