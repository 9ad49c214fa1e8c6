"""Pairing two runs: the tokens that both have scored, and whether they can be compared at all."""

import numpy as np

from sinkstream.records.records import Record


def same_text_and_model(record: Record, control: Record) -> bool:
    """Whether two records can be compared token by token."""
    return (record.data["sha256"], record.model["hash"]) == (control.data["sha256"], control.model["hash"])


def same_whole_text(record: Record, control: Record) -> bool:
    """Whether they are of one text and model, however much of the text either run took."""
    texts = [one.data.get("text_sha256") for one in (record, control)]
    alike = texts[0] == texts[1] if None not in texts else record.data["sha256"] == control.data["sha256"]
    return alike and record.model["hash"] == control.model["hash"]


def common_tokens(record: Record, control: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens that both records have: their index in the text, and the NLL of `record` and of `control` there.

    Raises
    ------
    ValueError
        If the records are of another text or another model, or share no token.
    """
    if not same_text_and_model(record, control):
        raise ValueError(
            f"record {record.id!r} ({record.model['name']} on {record.data['name']}) can not be paired with control "
            f"{control.id!r} ({control.model['name']} on {control.data['name']}): another text or another model"
        )
    index, here, there = np.intersect1d(
        record.arrays["index"], control.arrays["index"], assume_unique=True, return_indices=True
    )
    if index.size == 0:
        raise ValueError(f"record {record.id!r} and control {control.id!r} have no token in common")
    return index, record.arrays["nll"][here], control.arrays["nll"][there]
