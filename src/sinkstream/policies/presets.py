"""Named policies: the rows of the policy table, the demo and the ``--policy`` choices."""

from typing import Any

from sinkstream.policies.scorers import SCORERS
from sinkstream.policies.triggers import SIGNALS
from sinkstream.registry import Registry

PRESETS: Registry = Registry("policy")


@PRESETS.register("window-only")
def window_only() -> dict[str, Any]:
    """Window without sinks: the control that must collapse."""
    return {"sink": 0, "compress_every": 1}


@PRESETS.register("strict")
def strict() -> dict[str, Any]:
    """Sinks and window, one token dropped per step (StreamingLLM)."""
    return {"compress_every": 1}


@PRESETS.register("lazy")
def lazy() -> dict[str, Any]:
    """Sinks and window, pruned every R tokens."""
    return {"compress_every": 32}


@PRESETS.register("max-drop")
def max_drop() -> dict[str, Any]:
    """Lazy, with a bound on what one step drops."""
    return {"compress_every": 32, "max_drop": 8}


@PRESETS.register("overlap")
def overlap() -> dict[str, Any]:
    """Lazy, keeping extra recent tokens at a prune."""
    return {"compress_every": 32, "overlap": 32}


@PRESETS.register("slack")
def slack() -> dict[str, Any]:
    """Pruned as soon as the cache is more than the slack past its target."""
    return {"slack": 16}


def _adaptive(signal: str):
    def preset() -> dict[str, Any]:
        return {"adaptive": signal}

    preset.__doc__ = f"Pruned early where the model is unsure, by {signal}."
    return preset


def _refresh(scorer: str):
    def preset() -> dict[str, Any]:
        return {"compress_every": 32, "refresh": 32, "scorer": scorer}

    preset.__doc__ = (
        f"Lazy, with older tokens pinned: {SCORERS.summary(scorer)[0].lower()}{SCORERS.summary(scorer)[1:]}."
    )
    return preset


for _name in SIGNALS:
    PRESETS.register(f"adaptive-{_name}")(_adaptive(_name))
for _name in SCORERS:
    PRESETS.register(f"refresh-{_name}")(_refresh(_name))


def preset_options(name: str, **overrides: Any) -> dict[str, Any]:
    """Options of a named policy; `overrides` that are not None win.

    Raises
    ------
    ValueError
        If the name is unknown.
    """
    return PRESETS[name]() | {k: v for k, v in overrides.items() if v is not None}
