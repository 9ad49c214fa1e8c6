"""A figure with its interval."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval."""

    value: float | None = None  # None if the figure does not exist
    # low, high: the interval; None with a `reason` where it cannot be given
    low: float | None = None
    high: float | None = None
    reason: str | None = None  # why value or interval is missing

    @property
    def above_zero(self) -> bool:
        """Whether the interval says that the figure is positive."""
        return self.low is not None and self.low > 0

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.above_zero or (self.high is not None and self.high < 0)
