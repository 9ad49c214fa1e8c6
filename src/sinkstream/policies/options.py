"""Declared options: one dataclass field carries a policy option's default, help text and accepted values.

The command line, the error messages and the doc tables are made from these fields, so an option is written down once.
"""

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

import numpy as np


def option(default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None, choices=None):
    """A dataclass field that documents and bounds one option.

    Parameters
    ----------
    default : Any
        The default; None means "not set".
    help : str
        One line for ``--help`` and the docs.
    minimum, maximum : float or None
        Inclusive bounds.
    choices : callable or None
        Returns the accepted names; a callable, so that a registry can be filled later.
    """
    meta = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class OptionSpec:
    """What the command line needs to know of one option."""

    name: str
    type: type
    default: Any
    help: str
    choices: list[str] | None

    @classmethod
    def of(cls, f: Field) -> "OptionSpec":
        kind = next((t for t in (bool, int, float, str) if t.__name__ in str(f.type)), str)
        choices = f.metadata["choices"]() if f.metadata.get("choices") else None
        return cls(f.name, kind, None if f.default is MISSING else f.default, f.metadata["help"], choices)


def option_fields(cls: type) -> list[Field]:
    """The fields of a dataclass that were declared with `option`."""
    return [f for f in fields(cls) if "help" in f.metadata]


def check_options(instance: Any, prefix: str = "") -> None:
    """Check every declared option of a dataclass instance against its type, bounds and choices; store plain numbers.

    Parameters
    ----------
    prefix : str
        Of the options' names as the user gives them.

    Raises
    ------
    ValueError
        Naming the option, the value and what is accepted.
    """
    for f in option_fields(type(instance)):
        object.__setattr__(instance, f.name, check_option(f, getattr(instance, f.name), prefix))


def check_option(f: Field, value: Any, prefix: str = "") -> Any:
    """Check the value of one declared option, as `check_options`; returns it, `plain`."""
    spec, name, value = OptionSpec.of(f), prefix + f.name, plain(value)
    if value is None:
        if f.default is not None:
            raise ValueError(f"{name} must be given; accepted: {_accepted(f, spec)}")
        return value
    right_type = isinstance(value, spec.type) or (spec.type is float and isinstance(value, int))
    if not right_type or (isinstance(value, bool) and spec.type is not bool):
        raise ValueError(f"{name}={value!r} is not accepted; accepted: {_accepted(f, spec)}")
    low, high = f.metadata["minimum"], f.metadata["maximum"]
    outside = (low is not None and value < low) or (high is not None and value > high)
    outside = outside or (isinstance(value, float) and not math.isfinite(value))
    if outside or (spec.choices is not None and value not in spec.choices):
        raise ValueError(f"{name}={value!r} is not accepted; accepted: {_accepted(f, spec)}")
    return value


def plain(value: Any) -> Any:
    """The int or float of a numpy scalar; anything else, a bool of numpy among it, as it is.

    Numbers of a configuration often come out of an array. As a numpy scalar of a few bits a cap would overflow.
    """
    return value.item() if isinstance(value, np.integer | np.floating) else value


def check_whole(name: str, value: Any, least: int) -> int:
    """Raise ValueError unless an argument is a whole number of at least so much; returns it, `plain`."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not accepted; accepted: a whole number of at least {least}")
    return value


def _accepted(f: Field, spec: OptionSpec) -> str:
    if spec.choices is not None:
        return ", ".join(spec.choices)
    low, high = f.metadata["minimum"], f.metadata["maximum"]
    words = {"int": "a whole number", "float": "a finite number", "str": "a name", "bool": "true or false"}[
        spec.type.__name__
    ]
    if low is not None and high is not None:
        return f"{words} from {low} to {high}"
    return f"{words} of at least {low}" if low is not None else words
