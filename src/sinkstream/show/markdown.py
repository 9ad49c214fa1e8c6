"""Markdown tables."""

from collections.abc import Sequence

EMPTY = "–"  # in place of a figure that there is not
NONE_YET = "*no records yet*"  # in place of a table


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Header and rows as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
