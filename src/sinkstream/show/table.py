"""One table for all: shown in the terminal, in Markdown and in HTML."""

import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any, TypeVar

from rich import table as rich_table
from rich.console import JustifyMethod
from rich.text import Text

EMPTY = "–"  # in place of a figure that there is not
NONE_YET = "*no records yet*"  # in place of a table
HEADER_WIDTH = 10  # headers in the terminal are not broken into less than that

Item = TypeVar("Item")
Column = tuple[str, Callable[[Item], str]]


@dataclass(frozen=True)
class Table:
    """Header, rows and what a reader must know."""

    header: Sequence[str]  # names of the columns, with their units
    rows: Sequence[Sequence[str]]  # plain text, one cell a column
    title: str | None = None  # of the terminal
    notes: Sequence[str] = ()  # lines below the table
    left: int = 1  # how many columns are text, aligned to the left; the others are figures
    bold: Sequence[int] = ()  # rows that the terminal prints in bold

    @classmethod
    def of(cls, items: Iterable[Item], columns: Sequence[Column], **more: Any) -> "Table":
        """One row an item; `columns` are header and function of an item, `more` the other attributes."""
        return cls([name for name, _ in columns], [[cell(item) for _, cell in columns] for item in items], **more)

    def __rich__(self) -> rich_table.Table:
        """For a rich console; headers are broken to the width of their column's cells."""
        caption = Text("\n".join(self.notes)) if self.notes else None
        title = Text(self.title) if self.title else None
        shown = rich_table.Table(title=title, caption=caption, caption_justify="left", header_style="bold")
        for number, name in enumerate(self.header):
            width = max([HEADER_WIDTH, *(len(row[number]) for row in self.rows)])
            justify: JustifyMethod = "left" if number < self.left else "right"
            shown.add_column(Text("\n".join(textwrap.wrap(name, width))), justify=justify, overflow="fold")
        for number, row in enumerate(self.rows):
            shown.add_row(*map(Text, row), style="bold" if number in self.bold else None)
        return shown

    def markdown(self) -> str:
        """The table in Markdown, its notes below."""
        rule = ["---" if number < self.left else "---:" for number in range(len(self.header))]
        lines = ([cell.replace("|", r"\|") for cell in line] for line in (self.header, rule, *self.rows))
        grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([grid, *(["\n".join(self.notes)] if self.notes else [])])

    def html(self) -> str:
        """The table in HTML, without its notes; intervals, "[low, high]", and shares, "(3 %)", are not broken."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.header)
        unbroken = partial(re.sub, r"\[[^]]*\]|\([^)]*\)", r'<span class="whole">\g<0></span>')
        lines = ("<tr>" + "".join(f"<td>{unbroken(escape(cell))}</td>" for cell in row) + "</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def counted(count: int, noun: str) -> str:
    """A number of things for people: "1 point", "2 points"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def figures_text(figures: Mapping[str, float | None], names: Sequence[str], digits: int) -> str:
    """Several figures as "1.2 / 3.4": a dash in place of a missing figure, one dash if all are missing."""
    if all(figures[name] is None for name in names):
        return EMPTY
    return " / ".join(EMPTY if figures[name] is None else f"{figures[name]:,.{digits}f}" for name in names)


def with_interval(value: float | None, low: float | None, high: float | None, digits: int, unit: str = "") -> str:
    """A figure, its unit and its interval: "+0.31 % [+0.06, +0.58]" with the unit " %"; a dash without a figure."""
    if value is None:
        return EMPTY
    if low is None:
        return f"{value:+.{digits}f}{unit} [no interval]"
    return f"{value:+.{digits}f}{unit} [{low:+.{digits}f}, {'inf' if high is None else f'{high:+.{digits}f}'}]"


def plus_minus(value: float | None, low: float | None, high: float | None, digits: int) -> str:
    """A figure with half of its interval: "+0.31 ±0.26"; a dash without a figure."""
    if value is None:
        return EMPTY
    if low is None:
        return f"{value:+.{digits}f}"
    return f"{value:+.{digits}f} ±{((math.inf if high is None else high) - low) / 2:.{digits}f}"
