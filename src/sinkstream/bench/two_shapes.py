"""The records of the two shapes that headline figures are of: the newest on a GPU, and the worse figure of the two."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sinkstream.bench.selection import LADDER_SHAPE
from sinkstream.models.shapes import PREFIX
from sinkstream.records.headline import Headline

R = TypeVar("R", bound=Any)

CAP = 2052
#: The shapes, and the dtype that the engine's figures are of.
BOTH = ((LADDER_SHAPE, "float16"), (PREFIX + "llama-3.2-1b", "bfloat16"))


def shape_name(record: Any) -> str:
    """A shape and its dtype, as tables name it."""
    return f"{record.model['name'].removeprefix(PREFIX)} {record.protocol['dtype']}"


def newest_on_gpu(records: Sequence[R]) -> list[R]:
    """The latest record on a GPU of every shape, dtype and policy at the cap of the ladder."""
    chosen = [r for r in records if r.protocol["device"] == "cuda" and r.protocol["cap"] == CAP]
    return list({(shape_name(r), r.policy["label"], r.environment["gpu"]["name"]): r for r in chosen}.values())


def worse_of_two(
    records: Sequence[R], figure: Callable[[R], float | None], *, any_dtype: bool = False
) -> Headline | None:
    """The larger figure of the two shapes, strict, `CAP` slots, newest on a GPU; None unless both were measured."""
    found = []
    for model, dtype in BOTH:
        values = [
            Headline(value, r.id)
            for r in newest_on_gpu(records)
            if (r.model["name"], r.policy["label"]) == (model, "strict")
            and (any_dtype or r.protocol["dtype"] == dtype)
            and (value := figure(r)) is not None
        ]
        if not values:
            return None
        found.append(values[-1])
    return max(found)
