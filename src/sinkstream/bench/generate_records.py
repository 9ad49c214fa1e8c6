"""Records of a token of ``generate()`` with a streaming cache against one with transformers' own, their table and key.

The two take turns, so that a drift of clock or host is in both; a ratio is the median of the ratios of the turns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkstream.bench.two_shapes import newest_on_gpu, shape_name, worse_of_two
from sinkstream.records.base import StatusRecord
from sinkstream.records.cards import each_card
from sinkstream.records.headline import Headline
from sinkstream.records.origin import machine
from sinkstream.records.schema import REQUIRED
from sinkstream.registry import Registry
from sinkstream.show.table import NONE_YET, Table

#: The caches that take turns.
CACHES = ("dynamic", "streaming")

#: Figures of a token, beside the ratios ``median_over`` and ``mean_over``; what the names mean is in `protocol`.
FIGURES = ("median", "mean")

#: Required keys, as in `schema.REQUIRED`. Milliseconds a token.
GENERATE_REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "session", "command", "arguments")),
    "environment": REQUIRED["environment"],
    "model": REQUIRED["model"],
    "policy": dict.fromkeys(("name", "label", "options")),
    "protocol": dict.fromkeys(
        (
            *("dtype", "device", "tf32", "seed", "cap", "tokens", "warmup", "turns", "prompt_tokens", "text"),
            *("text_sha256", *CACHES, *FIGURES, "over"),
        )
    ),
    "turns": None,
    "token": dict.fromkeys(
        (*(f"{cache}_{name}_ms" for cache in CACHES for name in FIGURES), "median_over", "mean_over")
    ),
}

#: Key -> function of all these records, oldest first, that returns a headline, or None if records are missing.
GENERATE_HEADLINES: Registry[Callable[[Sequence["GenerateRecord"]], Headline | None]] = Registry("generate headline")

HEADER = [
    *("shape", "policy", "dynamic cache (ms)", "streaming cache (ms)", "over dynamic", "turns, least – most"),
    "over dynamic, mean token",
]


@dataclass(frozen=True)
class GenerateRecord(StatusRecord):
    """Tokens of one model under one policy: the fields of its JSON file (see `GENERATE_REQUIRED`).

    Attributes
    ----------
    turns : list of dict
        In order: ``<cache>_<figure>_ms`` of every name in `CACHES` and `FIGURES`.
    token : dict
        The same of all turns, and ``median_over`` and ``mean_over``: the streaming cache's over the dynamic one's.
    """

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.generate/1", "generate", GENERATE_REQUIRED, ("complete",)

    session: str
    policy: dict[str, Any]
    turns: list[dict[str, float]]
    token: dict[str, float]

    @classmethod
    def check_own(cls, content, where: str) -> None:
        names = {f"{cache}_{name}_ms" for cache in CACHES for name in FIGURES}
        for turn in content["turns"]:
            if missing := sorted(names - turn.keys()):
                raise ValueError(f"{where}: field 'turns' lacks {missing[0]!r}")


def turn_ratios(turns: Sequence[dict[str, float]], name: str) -> list[float]:
    """The streaming cache's figure of each turn over the dynamic cache's."""
    return [turn[f"streaming_{name}_ms"] / turn[f"dynamic_{name}_ms"] for turn in turns]


def generate_table(records: Sequence[GenerateRecord], title: str | None = None) -> Table:
    """One row a record."""
    rows = []
    for r in records:
        ratios = turn_ratios(r.turns, "median")
        rows.append(
            [
                *(shape_name(r), r.policy["label"]),
                *(f"{r.token[f'{cache}_median_ms']:.3f}" for cache in CACHES),
                *(f"{r.token['median_over']:.3f}", f"{min(ratios):.3f} – {max(ratios):.3f}"),
                f"{r.token['mean_over']:.3f}",
            ]
        )
    caption = "a token of generate(), median; dynamic and streaming cache take turns; the ratio is the turns' median"
    return Table(HEADER, rows, title, [caption], 2)


def render_generate(results: Path) -> dict[str, str]:
    """Markdown of the table, by its name in the documents. Raises ValueError if such a record is broken."""
    found = newest_on_gpu(GenerateRecord.below(results))
    said = each_card(found, lambda some: f"{machine(some)}\n\n{generate_table(some).markdown()}")
    return {"bench-generate": said or NONE_YET}


@GENERATE_HEADLINES.register("dropin.strict_over_dynamic_generate")
def strict_over_dynamic_generate(records: Sequence[GenerateRecord]) -> Headline | None:
    """Median token of generate(), strict over a dynamic cache, in turns, 2,052 slots, GPU; worse of two shapes."""
    return worse_of_two(records, lambda r: r.token["median_over"], any_dtype=True)
