"""Pairing two runs: the tokens that both have scored, and whether they can be compared at all."""

import numpy as np

from sinkstream.records.blocks import DIGITS
from sinkstream.records.records import Record
from sinkstream.statistics import PairedDelta, block_sums, delta_of_blocks, suitable_block_tokens


def same_text_and_model(record: Record, control: Record) -> bool:
    """Whether two records can be compared token by token."""
    return (record.data["sha256"], record.model["hash"]) == (control.data["sha256"], control.model["hash"])


def same_whole_text(record: Record, control: Record) -> bool:
    """Whether they are of one text and model, however much of the text either run took."""
    texts = [one.data.get("text_sha256") for one in (record, control)]
    alike = texts[0] == texts[1] if None not in texts else record.data["sha256"] == control.data["sha256"]
    return alike and record.model["hash"] == control.model["hash"]


def check_pair(record: Record, control: Record) -> None:
    """Raise ValueError if the records are of another text or another model."""
    if not same_text_and_model(record, control):
        raise ValueError(
            f"record {record.id!r} ({record.model['name']} on {record.data['name']}) can not be paired with control "
            f"{control.id!r} ({control.model['name']} on {control.data['name']}): another text or another model"
        )


def paired_delta(record: Record, control: Record) -> PairedDelta:
    """ΔPPL of `record` against `control` on their common tokens. Raises ValueError as `paired_blocks`."""
    return delta_of_blocks(*paired_blocks(record, control))


def paired_blocks(record: Record, control: Record) -> tuple[np.ndarray, np.ndarray, int]:
    """NLL of `record` less that of `control` on the tokens that both scored, in blocks.

    Returns
    -------
    (sums, counts, block_tokens) : (blocks,) float in nats, (blocks,) int, int

    Raises ValueError as `common_tokens`; or the records score other tokens, so that arrays are needed, and these are
    absent.
    """
    check_pair(record, control)
    own, other = record.blocks, control.blocks
    if own and other and own.pairs_with(other):
        return own.sums - other.sums, own.counts, own.tokens

    def compute() -> dict[str, list | int]:
        index, nll, control_nll = common_tokens(record, control)
        tokens = suitable_block_tokens(int(index[-1] - index[0]) + 1)
        _, sums, counts = block_sums(nll - control_nll, index, tokens)
        return {"tokens": tokens, "difference": np.round(sums, DIGITS).tolist(), "scored": counts.tolist()}

    found = record.pairs.figure("paired blocks", (record, control), compute)
    return np.array(found["difference"]), np.array(found["scored"]), found["tokens"]


def common_tokens(record: Record, control: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens that both records have: their index in the text, and the NLL of `record` and of `control` there, float64.

    Raises ValueError if the records are of another text or another model, or share no token.
    """
    check_pair(record, control)
    index, here, there = common_places(record, control)
    if index.size == 0:
        raise ValueError(f"record {record.id!r} and control {control.id!r} have no token in common")
    return index, *(one.arrays["nll"][at].astype(np.float64) for one, at in ((record, here), (control, there)))


def common_places(record: Record, control: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index in the text of the tokens that both have, and where they stand in the arrays of either, (tokens,) int."""
    return np.intersect1d(record.arrays["index"], control.arrays["index"], assume_unique=True, return_indices=True)
