"""Table and headline figure of sampling records."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sinkstream.bench.draw_records import DrawRecord
from sinkstream.bench.two_shapes import newest_on_gpu, shape_name, worse_of_two
from sinkstream.records.cards import each_card
from sinkstream.records.headline import Headline
from sinkstream.records.origin import machine
from sinkstream.registry import Registry
from sinkstream.show.table import NONE_YET, Table

#: Key -> function of all sampling records, oldest first, that returns a headline, or None if records are missing.
DRAW_HEADLINES: Registry[Callable[[Sequence[DrawRecord]], Headline | None]] = Registry("sampling headline")

HEADER = ["shape", "policy", "way", "ms", "over greedy"]


def draw_table(records: Sequence[DrawRecord], title: str | None = None) -> Table:
    """One row a way of drawing."""
    rows = [
        [shape_name(r), r.policy["label"], draw["name"], f"{draw['ms']:.4f}", f"{draw['over_greedy']:.4f}"]
        for r in records
        for draw in r.draws
    ]
    return Table(HEADER, rows, title, ["ms per token of Engine.generate(); the ways take turns, median of each"], 3)


def render_draws(results: Path) -> dict[str, str]:
    """Markdown of the table, by its name in the documents. Raises ValueError if a sampling record is broken."""
    found = newest_on_gpu(DrawRecord.below(results))
    said = each_card(found, lambda some: f"{machine(some)}\n\n{draw_table(some).markdown()}")
    return {"bench-sampling": said or NONE_YET}


@DRAW_HEADLINES.register("engine.top_p_over_greedy")
def top_p_over_greedy(records: Sequence[DrawRecord]) -> Headline | None:
    """A token drawn with top-p 0.95 over a greedy one, strict, 2,052 slots, GPU; worse of two shapes."""
    return worse_of_two(records, lambda r: r.over_greedy("top-p 0.95"))
