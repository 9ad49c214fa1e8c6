"""Rivals beside our own runs: the same model and tokens, and no more KV entries than the same cap."""

from collections.abc import Sequence
from dataclasses import dataclass

from sinkstream.records.records import Record
from sinkstream.statistics import PairedDelta, delta_of_blocks
from sinkstream.studies.rivals.record import RivalRecord

CONTROL = "strict"


@dataclass(frozen=True)
class Comparison:
    """What ran on the same tokens of a text, with the same model and the same cap."""

    rivals: list[RivalRecord]  # the newest of each label, complete or failed, the oldest label first
    ours: list[Record]  # the newest complete run of each label

    @property
    def first(self) -> RivalRecord:
        """A record that says what all share."""
        return self.rivals[0]

    @property
    def control(self) -> Record | None:
        """Our strict streaming, which every rival is paired with; None if it did not run."""
        return next((r for r in self.ours if r.label == CONTROL), None)

    def scored(self) -> list[RivalRecord]:
        """The rivals that have a perplexity, the nearest (lowest) first."""
        return sorted((r for r in self.rivals if r.summary["ppl"] is not None), key=lambda r: r.summary["ppl"])


def comparisons(records: Sequence[Record], rivals: Sequence[RivalRecord]) -> list[Comparison]:
    """Groups of rivals with the runs of ours that can be paired with them, the oldest group first.

    Parameters
    ----------
    records, rivals : sequence
        Oldest first. Rivals with random weights are left out: they have no quality.
    """
    groups: dict[tuple, dict[str, RivalRecord]] = {}
    for rival in rivals:
        if rival.model["source"] != "random":
            groups.setdefault(_key(rival), {})[rival.label] = rival
    found = []
    for key, labelled in groups.items():
        dtypes = {r.protocol["dtype"] for r in labelled.values()}
        runs = [r for r in records if r.status == "complete" and r.protocol["cap"] and _key(r) == key]
        fitting = [r for r in runs if r.protocol["dtype"] in dtypes and r.protocol["prefill_tokens"] == key[2]]
        ours = {r.label: r for r in fitting if r.protocol.get("cap_accounting", "peak") == "peak"}
        found.append(Comparison(list(labelled.values()), list(ours.values())))
    return found


def _key(record: Record | RivalRecord) -> tuple[str, str, int]:
    """Model, tokens and cap."""
    return record.model["hash"], record.data["sha256"], record.protocol["cap"]


def delta(run: Record, rival: RivalRecord) -> PairedDelta:
    """ΔPPL of our `run` against a rival on the same tokens, in percent; below 0: ours is better.

    Raises ValueError: another text or model, or the two did not score the same tokens.
    """
    own, other = run.blocks, rival.blocks
    if _key(run)[:2] != _key(rival)[:2] or own is None or other is None or not own.pairs_with(other):
        raise ValueError(
            f"record {run.id!r} can not be paired with rival {rival.id!r}: another text, another model, or other tokens"
        )
    return delta_of_blocks(own.sums - other.sums, own.counts, own.tokens)
