"""The records of the two shapes that headline figures are of: the newest on a GPU, and the worse figure of the two."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sinkstream.bench.selection import LADDER_SHAPE
from sinkstream.models.shapes import PREFIX
from sinkstream.records.cards import on_one_card
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
    return list({_kind(r): r for r in _on_gpu(records)}.values())


def before(record: R, records: Sequence[R]) -> R | None:
    """Of records, oldest first, that of the same kind before one of them; None: it is the first."""
    alike = [r for r in _on_gpu(records) if _kind(r) == _kind(record)]
    at = next(i for i, other in enumerate(alike) if other is record)
    return alike[at - 1] if at else None


def _on_gpu(records: Sequence[R]) -> list[R]:
    return [r for r in records if r.protocol["device"] == "cuda" and r.protocol["cap"] == CAP]


def _kind(record: Any) -> tuple[str, str, str]:
    return shape_name(record), record.policy["label"], record.environment["gpu"]["name"]


def worse_of_two(
    records: Sequence[R], figure: Callable[[R], float | None], *, any_dtype: bool = False
) -> Headline | None:
    """The larger figure of the two shapes, strict, `CAP` slots, newest on one GPU; None unless both were measured."""
    return on_one_card(lambda some: _worse_of_two(some, figure, any_dtype), records)


def _worse_of_two(records: Sequence[Any], figure: Callable[[Any], float | None], any_dtype: bool) -> Headline | None:
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
