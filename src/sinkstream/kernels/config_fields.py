"""The numbers that a configuration of a kernel accepts, checked when the configuration is made."""

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Accepted:
    """What a field accepts: whole numbers from `least` on.

    Attributes
    ----------
    most : int or None
        None: as many as fit.
    power : bool
        Powers of two only.
    multiple : int
        Of which the number is a multiple.
    off : bool
        0 too, which leaves the choice to somebody else.
    """

    least: int
    most: int | None = None
    power: bool = False
    multiple: int = 1
    off: bool = False

    def takes(self, value: Any) -> bool:
        """Whether a value is accepted."""
        if isinstance(value, bool) or not isinstance(value, int):
            return False
        if self.off and value == 0:
            return True
        if value < self.least or (self.most is not None and value > self.most):
            return False
        return value % self.multiple == 0 and not (self.power and value & (value - 1))

    def __str__(self) -> str:
        kind = "a power of two" if self.power else "a whole number"
        kind = f"a multiple of {self.multiple}" if self.multiple > 1 else kind
        bounds = f"at least {self.least}" if self.most is None else f"{self.least} to {self.most}"
        return f"{'0, or ' if self.off else ''}{kind}, {bounds}"


def number(default: int, least: int, most: int | None = None, **more: Any) -> Any:
    """A field of a `KernelConfig` that holds a whole number; `more` as for `Accepted`."""
    return field(default=default, metadata={"accepted": Accepted(least, most, **more)})


@dataclass(frozen=True)
class KernelConfig:
    """Base of all configurations. Raises ValueError, naming field, value and what is accepted."""

    def __post_init__(self) -> None:
        for one in fields(self):
            value, accepted = getattr(self, one.name), one.metadata.get("accepted")
            if accepted is not None and not accepted.takes(value):
                raise ValueError(f"{one.name}={value!r} in the configuration; accepted: {accepted}")
            if one.type is bool and not isinstance(value, bool):
                raise ValueError(f"{one.name}={value!r} in the configuration; accepted: True or False")
