"""The headline figures of recall from the archive, each computed from records."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from sinkstream.records.cards import arithmetic
from sinkstream.records.headline import Headline
from sinkstream.records.selection import has_model
from sinkstream.registry import Registry
from sinkstream.statistics import Estimate
from sinkstream.studies.facts.record import accuracy
from sinkstream.studies.facts.record import pooled as facts_pooled
from sinkstream.studies.recall.facts import FactsRecord
from sinkstream.studies.recall.facts_tables import select_facts
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.recall.tables import NEAR, pooled, select_recalls, share_of
from sinkstream.studies.streameval.reply import ReplyRecord
from sinkstream.studies.streameval.reply_tables import select_replies, tpot_ratio

MODEL, CAP, CHOOSER = "SmolLM2-135M", 512, "lexical"
FAR = 16.0  # distance over cap
MILLION = 1_000_000
A = TypeVar("A", RecallRecord, FactsRecord)

#: Key -> function of all records of a kind, oldest first, that returns a headline, or None if records are missing.
RECALL_HEADLINES: Registry[Callable[[Sequence[RecallRecord]], Headline | None]] = Registry("headline")
FACTS_HEADLINES: Registry[Callable[[Sequence[FactsRecord]], Headline | None]] = Registry("headline")
REPLY_HEADLINES: Registry[Callable[[Sequence[ReplyRecord]], Headline | None]] = Registry("headline")


def is_chooser(record: RecallRecord | FactsRecord, chooser: str | None) -> bool:
    """Whether the record is of strict streaming with that chooser and all else by default; None: without recall."""
    recall = {name: value for name, value in record.policy["options"].items() if name.startswith("recall")}
    return record.policy["name"] == "strict" and recall == ({} if chooser is None else {"recall": chooser})


def passage_share(record: RecallRecord, ratio: float, reference: RecallRecord) -> Estimate:
    """What a policy recalls of a passage at a distance, as a share of what the reference recalls in its window."""
    far, near = (one.passages["nll_unseen"] - one.passages["nll_again"] for one in (record, reference))
    return share_of(far[record.passages["ratio"] == ratio], near[reference.passages["ratio"] == NEAR])


def facts_share(record: FactsRecord, ratio: float, reference: FactsRecord, form: str = "cue") -> Estimate:
    """Right answers of a policy at a distance, as a share of the reference's in its window, in one form."""

    def right(one: FactsRecord, at: float) -> np.ndarray:
        return one.answers["correct"][(one.answers["form"] == form) & (one.answers["ratio"] == at)].astype(float)

    return share_of(right(record, ratio), right(reference, NEAR))


def _beside_strict(runs: Sequence[A]) -> tuple[A, A] | None:
    """The newest run with the chooser, and strict without recall in the same precision and arithmetic."""
    found, strict = ([r for r in runs if is_chooser(r, chooser)] for chooser in (CHOOSER, None))
    ways = [(arithmetic(r), r.protocol["dtype"]) for r in strict]
    pairs = [
        (run, strict[ways.index(way)]) for run in found if (way := (arithmetic(run), run.protocol["dtype"])) in ways
    ]
    return pairs[-1] if pairs else None


@RECALL_HEADLINES.register("recall.passage_16x_share")
def passage_16x_share(records: Sequence[RecallRecord]) -> Headline | None:
    """Passage recall at 16 × cap, lexical, SmolLM2, cap 512, over that of strict inside its window (0.5 ×)."""
    runs = pooled(select_recalls(records, model=MODEL, cap=CAP, pooled_at=FAR))
    pair = _beside_strict(runs)
    return pair and _headline(passage_share(pair[0], FAR, pair[1]), pair[0].id)


@FACTS_HEADLINES.register("recall.facts_16x_share")
def facts_16x_share(records: Sequence[FactsRecord]) -> Headline | None:
    """Right answers at 16 × cap, cue form, lexical, SmolLM2, cap 512, over strict's inside its window (0.5 ×)."""
    runs = facts_pooled(select_facts(records, model=MODEL, cap=CAP))
    pair = _beside_strict(runs)
    return pair and _headline(facts_share(pair[0], FAR, pair[1]), pair[0].id)


@REPLY_HEADLINES.register("recall.million_token_accuracy")
def million_token_accuracy(records: Sequence[ReplyRecord]) -> Headline | None:
    """Right answers in one reply of a million tokens, lexical, SmolLM2; the distances are random."""
    found = _millions(records)
    if not found:
        return None
    share = accuracy(found[-1].answers)
    return _headline(share, found[-1].id)


@REPLY_HEADLINES.register("recall.million_token_tpot_ratio")
def million_token_tpot_ratio(records: Sequence[ReplyRecord]) -> Headline | None:
    """Mean time per token at the end of a reply of a million tokens over that after 4,096, lexical, SmolLM2."""
    found = _millions(records)
    ratio = tpot_ratio(found[-1]) if found else None
    return None if ratio is None else Headline(ratio, found[-1].id)


def _millions(records: Sequence[ReplyRecord]) -> list[ReplyRecord]:
    long = [r for r in records if has_model(r, MODEL) and r.data["tokens"] >= MILLION]
    return [r for r in select_replies(long, model=MODEL) if r.policy["options"].get("recall") == CHOOSER]


def _headline(figure: Estimate, record: str) -> Headline | None:
    return None if figure.value is None else Headline(figure.value, record, figure.low, figure.high)
