"""The eviction policy: a geometry (sinks, pinned, window, overlap), a trigger and a scorer, composed."""

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from sinkstream.policies.options import OptionSpec, check_options, check_whole, option, option_fields
from sinkstream.policies.scorers import SCORERS, Scorer
from sinkstream.policies.triggers import TRIGGERS, Lazy, Trigger, Turns
from sinkstream.registry import Registry, did_you_mean

CAP_ACCOUNTING: Registry = Registry("cap accounting")


@CAP_ACCOUNTING.register("peak")
def _peak(growth: int) -> int:
    """Growth counts: the cache never holds more than cap entries (the only fair budget)."""
    return growth


@CAP_ACCOUNTING.register("published")
def _published(growth: int) -> int:
    """Growth is left out, as in the published tables: the cache holds up to cap + growth entries."""
    return 0


@dataclass(frozen=True)
class EvictionPolicy:
    """Which cached tokens stay, and when that is decided.

    Build one with `EvictionPolicy.build`, which takes the flat options of the command line.

    Raises
    ------
    ValueError
        If an option, or a combination of them, is not accepted.
    """

    window: int = option(None, "recent tokens kept by every prune", minimum=1)
    sink: int = option(4, "first tokens, never evicted", minimum=0)
    refresh: int = option(0, "older tokens kept pinned between sinks and window", minimum=0)
    overlap: int = option(0, "extra recent tokens kept by a prune", minimum=0)
    max_drop: int | None = option(None, "most tokens that one step drops; the rest follows step by step", minimum=2)
    triggers: tuple[Trigger, ...] = (Lazy(1),)
    scorer: Scorer | None = None

    def __post_init__(self):
        if self.window is None:
            raise ValueError("window is missing; give window=TOKENS or cap=SLOTS")
        check_options(self)
        if self.refresh > 0 and self.scorer is None:
            raise ValueError(f"refresh={self.refresh} goes with a scorer, and none is given; accepted: {_scorers()}")
        if self.scorer is not None and self.refresh == 0:
            raise ValueError("refresh=0 leaves a scorer no token to choose; accepted: refresh of at least 1")
        if any(isinstance(t, Turns) for t in self.triggers):
            others = {"refresh": self.refresh, "overlap": self.overlap, "max_drop": self.max_drop or 0}
            wrong = [f"{name}={value}" for name, value in others.items() if value]
            wrong += [_switched_on_by(trigger) for trigger in self.triggers if not isinstance(trigger, Turns)]
            if wrong:
                raise ValueError(
                    f"evict='turns' goes with sink and window only, and {wrong[0]} is given; accepted: without it"
                )

    @classmethod
    def build(cls, *, cap: int | None = None, cap_accounting: str = "peak", **options: Any) -> "EvictionPolicy":
        """Compose a policy from flat options.

        Parameters
        ----------
        cap : int or None
            KV slots. The window is what sinks, pinned tokens, overlap and (with ``cap_accounting="peak"``) growth leave
            of it. Give either `cap` or ``window``.
        cap_accounting : {"peak", "published"}
            Whether growth counts against the cap.
        **options
            ``sink``, ``window``, ``refresh``, ``scorer`` (a name), ``overlap``, ``max_drop`` and the options of every
            registered trigger and scorer (``compress_every``, ``slack``, ``adaptive`` …). None means "not given".

        Raises
        ------
        ValueError
            Naming the option, the value and what is accepted; also when the cap leaves no window.
        """
        given = {k: v for k, v in options.items() if v is not None}
        own = {f.name for f in option_fields(cls)}
        triggers = tuple(t for t in (_take_trigger(name, given) for name in TRIGGERS) if t is not None) or (Lazy(1),)
        scorer = _take_scorer(given)
        unknown = sorted(set(given) - own)
        if unknown:
            accepted = sorted(option_names())
            meant = did_you_mean(unknown[0], accepted)
            raise ValueError(f"unknown policy option {unknown[0]!r}{meant}; accepted: {', '.join(accepted)}")
        parts = {"triggers": triggers, "scorer": scorer, **given}
        if cap is None:
            return cls(**parts)
        if "window" in given:
            raise ValueError(f"cap={cap} and window={given['window']} exclude each other; give one of them")
        return cls._for_cap(cap, cap_accounting, parts)

    @classmethod
    def _for_cap(cls, cap: int, cap_accounting: str, parts: dict[str, Any]) -> "EvictionPolicy":
        cap = check_whole("cap", cap, 1)
        smallest = cls(window=1, **parts)
        growth = CAP_ACCOUNTING[cap_accounting](smallest.growth)
        window = cap - (smallest.sink + smallest.refresh + smallest.overlap + growth)
        if window < 1:
            raise ValueError(
                f"cap={cap} is too small: sink {smallest.sink} + refresh {smallest.refresh} + overlap"
                f" {smallest.overlap} + growth {growth} leave no window; accepted: cap of at least {cap - window + 1}"
            )
        return replace(smallest, window=window)

    def with_sink(self, sink: int) -> "EvictionPolicy":
        """The same policy with another number of sinks and as many slots: the window gives the slots, or takes them.

        Raises
        ------
        ValueError
            If no window is left.
        """
        window = self.window + self.sink - sink
        if window < 1:
            raise ValueError(
                f"sink={sink} leaves no window in {self.sink + self.window} slots of sinks and window;"
                f" accepted: at most {self.sink + self.window - 1}"
            )
        return replace(self, sink=sink, window=window)

    @cached_property
    def base(self) -> int:
        """C₀ = sinks + pinned + window."""
        return self.sink + self.refresh + self.window

    @cached_property
    def target(self) -> int:
        """Entries that a finished prune leaves, the newest token included: C₀ + overlap."""
        return self.base + self.overlap

    @cached_property
    def growth(self) -> int:
        """The most entries past the target before the next prune."""
        return min(t.growth for t in self.triggers)

    @cached_property
    def sure_growth(self) -> int:
        """Entries past the target that surely gather before a prune, whatever is observed."""
        return min(t.sure_growth for t in self.triggers)

    @cached_property
    def peak(self) -> int:
        """The most KV entries that any token's attention sees."""
        return self.target + self.growth

    @cached_property
    def needs(self) -> frozenset[str]:
        """Everything that must be observed during the run for triggers and scorer."""
        return frozenset().union(*(t.needs for t in self.triggers), self.scorer.needs if self.scorer else ())

    @cached_property
    def plan_known(self) -> bool:
        """Whether every prune is known in advance from the token count alone."""
        return self.scorer is None and all(t.sure_growth == t.growth for t in self.triggers)

    def record(self) -> dict[str, Any]:
        """All options, JSON-able, for run records. Raises ValueError if the scorer has no name."""
        flat = {f.name: getattr(self, f.name) for f in option_fields(type(self))}
        for trigger in self.triggers:
            flat |= asdict(trigger)
        if self.scorer is not None:
            flat |= {"scorer": _name_of(self.scorer), **asdict(self.scorer)}
        return flat | {"growth": self.growth, "peak": self.peak}


def _name_of(scorer: Scorer) -> str:
    """The name under which a scorer is registered. Raises ValueError."""
    for name, cls in SCORERS.items():
        if cls is type(scorer):
            return name
    raise ValueError(
        f"{type(scorer).__name__} has no name that a record or a snapshot could hold; accepted: a class that"
        " @SCORERS.register(NAME) has registered"
    )


def option_specs() -> list[OptionSpec]:
    """Every declared option of a policy, once: geometry, then triggers, then scorers."""
    classes = (EvictionPolicy, *(cls for registry in (TRIGGERS, SCORERS) for _, cls in registry.items()))
    return [OptionSpec.of(f) for cls in classes for f in option_fields(cls)]


def option_names() -> set[str]:
    """Every flat option that `EvictionPolicy.build` takes, besides cap and cap_accounting."""
    return {spec.name for spec in option_specs()} | {"scorer"}


def _scorers() -> str:
    return "scorer=" + ", ".join(SCORERS)


def _switched_on_by(trigger: Trigger) -> str:
    """The option that a trigger was made for, with its value."""
    switch = option_fields(type(trigger))[0].name
    return f"{switch}={getattr(trigger, switch)!r}"


def _take_trigger(name: str, given: dict[str, Any]) -> Trigger | None:
    cls = TRIGGERS[name]
    switch, *_ = names = [f.name for f in option_fields(cls)]
    mine = {n: given.pop(n) for n in names if n in given}
    if mine and switch not in mine:
        raise ValueError(f"{next(iter(mine))} goes with {switch}, which is not given")
    return cls(**mine) if mine else None


def _take_scorer(given: dict[str, Any]) -> Scorer | None:
    name = given.pop("scorer", None)
    mine = {f.name for f in option_fields(SCORERS[name])} if name is not None else set()
    for other, cls in SCORERS.items():
        for f in option_fields(cls):
            if f.name in given and f.name not in mine:
                raise ValueError(f"{f.name}={given[f.name]!r} goes with scorer={other!r}, not with {name!r}")
    if name is None:
        return None
    return SCORERS[name](**{n: given.pop(n) for n in mine if n in given})
