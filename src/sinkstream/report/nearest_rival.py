"""The engine's time per token over that of the fastest other way to decode on the same GPU."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sinkstream.bench.record import BenchRecord
from sinkstream.bench.selection import fastest_rung, select
from sinkstream.bench.two_shapes import BOTH, CAP
from sinkstream.records.cards import one_card
from sinkstream.records.headline import Headline
from sinkstream.registry import Registry
from sinkstream.studies.rivals.record import RivalRecord

#: Key -> function of all speed and rival records that returns a headline, or None if records are missing.
NEAREST_RIVAL_HEADLINES: Registry[Callable[[Sequence[BenchRecord | RivalRecord]], Headline | None]] = Registry(
    "headline of the nearest rival"
)
#: Rungs that are transformers' own ways: a full cache that grows, and a static one, compiled.
TRANSFORMERS_RUNGS = ("hf-full", "hf-static")


def timed_ways(results: Path) -> list[BenchRecord | RivalRecord]:
    """All speed and rival records below a folder. Raises ValueError if a record is broken."""
    return [*BenchRecord.below(results), *RivalRecord.below(results)]


@NEAREST_RIVAL_HEADLINES.register("evidence.tpot_over_nearest_rival")
@one_card
def tpot_over_nearest_rival(records: Sequence[BenchRecord | RivalRecord]) -> Headline | None:
    """TPOT of strict, fastest rung, over the fastest rival's on its best day; worse of two shapes, 2,052 slots, GPU.

    Rivals: kvpress, generate(), and transformers' full and static caches, which evict nothing.
    """
    bench = [r for r in records if isinstance(r, BenchRecord)]
    found = []
    for model, dtype in BOTH:
        one = select(bench, model=model, dtype=dtype, cap=CAP, streams=1, short=True)
        ours = select(one, rung=fastest_rung(bench), policy="strict")
        if not ours:
            return None
        rivals = [r.steady["tpot_ms"] for name in TRANSFORMERS_RUNGS for r in select(one, rung=name)]
        for record in records:
            if isinstance(record, RivalRecord) and record.status == "complete":
                same = (record.model["name"], record.protocol["dtype"], record.protocol["cap"]) == (model, dtype, CAP)
                mean = record.summary["steady_tpot_ms"]["mean"]
                rivals += [mean] if same and mean is not None else []
        if not rivals:
            return None
        found.append(Headline(ours[-1].steady["tpot_ms"] / min(rivals), ours[-1].id))
    return max(found)
