"""A figure with its interval."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval.

    Attributes
    ----------
    value : float or None
        None if the figure does not exist.
    low, high : float or None
        The interval; None with a `reason` where it cannot be given.
    reason : str or None
        Why value or interval is missing.
    """

    value: float | None = None
    low: float | None = None
    high: float | None = None
    reason: str | None = None

    @property
    def above_zero(self) -> bool:
        """Whether the interval says that the figure is positive."""
        return self.low is not None and self.low > 0

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.above_zero or (self.high is not None and self.high < 0)
