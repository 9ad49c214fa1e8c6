"""A headline figure, as the functions of the registries of headlines give it."""

from typing import NamedTuple


class Headline(NamedTuple):
    """A figure of ``summary.json``, the id of the record that it was computed from, and its interval if it has one."""

    value: float
    record: str
    low: float | None = None
    high: float | None = None
