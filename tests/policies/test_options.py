"""Options of policies: what is refused and how it is said, registries, presets, and a policy of somebody else's."""

import argparse
from dataclasses import dataclass, field

import pytest

from sinkstream.cli.options import add_policy_options, policy_options
from sinkstream.policies import (
    CAP_ACCOUNTING,
    PRESETS,
    SCORERS,
    SIGNALS,
    TRIGGERS,
    EvictionPolicy,
    PruneSchedule,
    Scorer,
    Trigger,
    option_names,
    option_specs,
    preset_options,
)
from sinkstream.policies.options import option

REFUSED = [
    ({"windoww": 9}, r"unknown policy option 'windoww' \(did you mean 'window'\?\); accepted: .*window"),
    ({"zzz": 9}, r"unknown policy option 'zzz'; accepted: .*window"),
    ({"cap": 32, "evict": "turns", "slack": 2}, "goes with sink and window only, and slack=2 is given"),
    ({"cap": 32, "evict": "turns", "overlap": 2}, "goes with sink and window only, and overlap=2 is given"),
    ({}, "window is missing; give window=TOKENS or cap=SLOTS"),
    ({"window": 0}, "window=0 is not accepted; accepted: a whole number of at least 1"),
    ({"window": 9, "sink": -1}, "sink=-1 is not accepted; accepted: a whole number of at least 0"),
    ({"window": 9, "overlap": -3}, "overlap=-3 is not accepted"),
    ({"window": 9, "refresh": -3}, "refresh=-3 is not accepted"),
    ({"window": 9.0}, r"window=9\.0 is not accepted; accepted: a whole number"),
    ({"window": "9"}, "window='9' is not accepted"),
    ({"window": True}, "window=True is not accepted"),
    ({"window": 9, "compress_every": 0}, "compress_every=0 is not accepted; accepted: a whole number of at least 1"),
    ({"window": 9, "slack": -1}, "slack=-1 is not accepted; accepted: a whole number of at least 0"),
    ({"window": 9, "max_drop": 1}, "max_drop=1 is not accepted; accepted: a whole number of at least 2"),
    ({"cap": 0}, "cap=0 is not accepted; accepted: a whole number of at least 1"),
    ({"cap": 32.0}, r"cap=32\.0 is not accepted"),
    ({"cap": True}, "cap=True is not accepted"),
    ({"cap": 32, "window": 9}, "cap=32 and window=9 exclude each other"),
    ({"cap": 40, "compress_every": 64}, r"cap=40 is too small: sink 4 .* growth 63 .* cap of at least 68"),
    ({"cap": 4}, "cap=4 is too small.*at least 5"),
    ({"cap": 32, "cap_accounting": "fair"}, "unknown cap accounting 'fair'; accepted: peak, published"),
    ({"cap": 32, "refresh": 4}, "refresh=4 goes with a scorer"),
    ({"cap": 32, "scorer": "uniform"}, "refresh=0 leaves a scorer no token to choose; accepted: refresh of at least 1"),
    ({"cap": 32, "refresh": 4, "scorer": "magic"}, "unknown scorer 'magic'; accepted: .*uniform"),
    ({"cap": 32, "refresh": 4, "scorer": "uniform", "observation": 4}, "observation=4 goes with .*window-attention"),
    ({"cap": 32, "uncertainty": "nll"}, "uncertainty='nll' goes with scorer='uncertainty', not with None"),
    (
        {"cap": 32, "refresh": 4, "scorer": "uncertainty", "uncertainty": "x"},
        "uncertainty='x' .*accepted: nll, entropy",
    ),
    ({"cap": 99, "refresh": 4, "scorer": "window-attention", "observation": 0}, "observation=0 is not accepted"),
    ({"cap": 99, "adaptive": "mood"}, "adaptive='mood' is not accepted; accepted: entropy, top1"),
    ({"cap": 99, "adaptive_min": 4}, "adaptive_min goes with adaptive, which is not given"),
    ({"cap": 99, "adaptive": "top1", "adaptive_min": 50}, "adaptive_min <= adaptive_every <= adaptive_max"),
    ({"cap": 99, "adaptive": "top1", "adaptive_max": 8}, "adaptive_min <= adaptive_every <= adaptive_max"),
    (
        {"cap": 99, "adaptive": "top1", "adaptive_quantile": 0.2},
        r"adaptive_quantile=0\.2 .*a finite number from 0\.5 to 0\.99",
    ),
    ({"cap": 99, "adaptive": "top1", "adaptive_quantile": float("nan")}, "adaptive_quantile=nan is not accepted"),
    ({"cap": 99, "adaptive": "top1", "adaptive_smoothing": float("inf")}, "smoothing=inf .*a finite number from 0"),
    ({"cap": 99, "adaptive": "top1", "adaptive_smoothing": 1}, "adaptive_smoothing=1 is not accepted"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_wrong_option_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        EvictionPolicy.build(**options)


def test_none_means_not_given_and_a_number_may_be_whole():
    options = {"window": 9, "sink": None, "max_drop": None, "scorer": None, "adaptive": None, "adaptive_min": None}
    assert EvictionPolicy.build(**options) == EvictionPolicy.build(window=9)
    assert EvictionPolicy.build(window=9, adaptive="top1", adaptive_smoothing=0).triggers[0].adaptive_smoothing == 0


@pytest.mark.parametrize(
    ("registry", "name"),
    [(r, name) for r in (TRIGGERS, SCORERS, SIGNALS, PRESETS, CAP_ACCOUNTING) for name in r],
    ids=lambda value: getattr(value, "kind", value),
)
def test_every_entry_says_what_it_is(registry, name):
    assert len(registry.summary(name)) > 15
    assert not registry.summary(name).endswith(".")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_at_equal_peak_and_its_record_says_everything(name):
    options = preset_options(name)
    policy = EvictionPolicy.build(cap=160, **options)
    assert policy.peak == 160
    record = policy.record()
    assert record["peak"] == 160 and record["growth"] == policy.growth
    assert options.items() <= record.items()
    again = {k: v for k, v in record.items() if k not in ("growth", "peak")}
    assert EvictionPolicy.build(**again) == policy
    assert EvictionPolicy.build(cap=200, **preset_options(name, sink=9, max_drop=None)).sink == 9


def test_the_presets_cover_every_scorer_and_signal():
    assert {f"refresh-{s}" for s in SCORERS} | {f"adaptive-{s}" for s in SIGNALS} <= set(PRESETS)
    assert preset_options("window-only")["sink"] == 0
    assert PRESETS["lazy"]() is not PRESETS["lazy"]()  # a run that changes its options changes no other
    with pytest.raises(
        ValueError, match=r"unknown policy 'lasy' \(did you mean 'lazy'\?\); accepted: window-only, strict"
    ):
        preset_options("lasy")


# ---- a policy of somebody else's ----


@pytest.fixture
def even_trigger():
    """A trigger and a scorer as a contributor would write them, registered for one test."""

    @TRIGGERS.register("even")
    @dataclass(frozen=True)
    class Even(Trigger):
        """Prune at an even sum of risks, or when too many have gathered."""

        even: int | None = option(None, "most gathered tokens", minimum=1)
        even_signal: str = option("top1", "what is summed", choices=SIGNALS.names)

        growth = property(lambda self: self.even - 1)
        sure_growth = 0
        signal = property(lambda self: self.even_signal)

        def start(self):
            return [0.0]

        def observe(self, state, risk):
            state[0] += risk

        def due(self, over, state):
            return over >= self.even or state[0] % 2 == 0

    @SCORERS.register("stride")
    @dataclass(frozen=True)
    class Stride(Scorer):
        """Keep the tokens whose position is a multiple of the stride."""

        stride: int = option(16, "distance between the tokens that stay", minimum=1)
        spare: list = field(default_factory=list, repr=False)

        def score(self, known):
            return -(known.position % self.stride)

    yield
    del TRIGGERS._entries["even"], SCORERS._entries["stride"]


def test_a_new_trigger_and_scorer_need_no_other_change(even_trigger):
    assert {"even", "even_signal", "stride"} <= option_names() and "spare" not in option_names()
    specs = {spec.name: spec for spec in option_specs()}
    assert specs["even"].type is int and specs["stride"].default == 16
    assert specs["even_signal"].choices == SIGNALS.names()
    parser = argparse.ArgumentParser()
    add_policy_options(parser)
    line = ["--even", "9", "--even-signal", "entropy", "--scorer", "stride", "--stride", "5", "--refresh", "3"]
    options = policy_options(parser.parse_args([*line, "--cap", "40"]))
    policy = EvictionPolicy.build(cap=40, **options)
    assert (policy.growth, policy.sure_growth, policy.window) == (8, 0, 25)
    assert policy.needs == {"risk"} and not policy.plan_known
    assert policy.scorer.stride == 5 and {"even": 9, "scorer": "stride", "stride": 5}.items() <= policy.record().items()

    schedule = PruneSchedule(EvictionPolicy.build(sink=1, window=3, even=9))
    assert schedule.signals() == {"top1"}
    drops = []
    for t in range(12):
        drops.append(schedule.step().drop)
        schedule.observe("entropy", 1.0)  # not asked for
        schedule.observe("top1", 1.0 if t in (3, 8) else 0.0)
    assert {t: drop for t, drop in enumerate(drops) if drop} == {9: 6, 10: 1, 11: 1}
    both = EvictionPolicy.build(window=30, even=9, adaptive="entropy")
    assert PruneSchedule(both).signals() == {"top1", "entropy"}
    with pytest.raises(ValueError, match="even_signal='mood' is not accepted; accepted: entropy, top1"):
        EvictionPolicy.build(cap=40, even=9, even_signal="mood")
    with pytest.raises(ValueError, match="stride=5 goes with scorer='stride'"):
        EvictionPolicy.build(cap=40, stride=5)


def test_afterwards_it_is_gone():
    with pytest.raises(ValueError, match="unknown policy option 'even'"):
        EvictionPolicy.build(cap=40, even=9)
    with pytest.raises(ValueError, match="registered twice"):
        SCORERS.register("uniform")(Scorer)
