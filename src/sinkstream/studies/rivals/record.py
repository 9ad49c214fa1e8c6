"""Rival records: one JSON file a rival, model, text and cap, with the provenance of a run record.

A rival runs in an environment of its own, which has no sinkstream. What it measured comes back as a `Measured`; the
versions of a record are those of the rival's environment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sinkstream.measure.metrics import finite_or_none
from sinkstream.measure.timing import WARMUP_TOKENS, latency_summary
from sinkstream.records.base import StatusRecord
from sinkstream.records.blocks import Blocks
from sinkstream.records.schema import REQUIRED as RUN_REQUIRED
from sinkstream.show.table import EMPTY

#: Largest accepted difference, in nats per token, between the rival's and our own NLL of a prompt that neither evicts
#: from, by dtype: it shows that both run the same model on the same tokens. Quantised kernels differ the most.
PROMPT_TOLERANCE = {"float32": 1e-3, "float16": 0.02, "bfloat16": 0.05, "quantised": 0.05}

REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "command", "arguments")),
    "environment": RUN_REQUIRED["environment"],
    "model": RUN_REQUIRED["model"],
    "data": RUN_REQUIRED["data"],
    "rival": dict.fromkeys(("name", "method", "label", "options", "version", "positions")),
    "protocol": dict.fromkeys(
        (
            *("dtype", "device", "tf32", "seed", "cap", "prefill_tokens", "decode_tokens", "warmup_tokens"),
            *("evaluate", "call", "feed", "peak_slots"),
        )
    ),
    "summary": {
        **dict.fromkeys(("decode_tokens", "scored_tokens", "timed_tokens", "mean_nll", "ppl", "tpot_ms")),
        "steady_tpot_ms": dict.fromkeys(("mean", "p50", "p90", "p99")),
        **dict.fromkeys(("prefill_sec", "decode_sec", "peak_memory_mb", "peak_memory_kind")),
    },
    "blocks": None,
    "checks": None,
}


@dataclass(frozen=True)
class Measured:
    """What a rival's worker measured; arrays (tokens,), one entry a decode step from the first scored token on."""

    index: list[int]  # in the text, of the token that is predicted
    nll: list[float | None]  # nats; None: a rival that cannot score a given text
    seconds: list[float | None]  # None: not timed
    kv_length: list[int]  # entries that the step saw, its own token included
    prefill_tokens: int
    prefill_seconds: float
    peak_memory_mb: float
    peak_memory_kind: str
    prefill_nll: float  # mean NLL of the prompt, in nats
    more: dict[str, Any] = field(default_factory=dict)  # what else this rival reports

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Measured":
        """From the JSON object of a worker."""
        names = [name for name in cls.__dataclass_fields__ if name != "more"]
        known = {name: content[name] for name in names}
        return cls(**known, more={k: v for k, v in content.items() if k not in {*names, "versions"}})

    def summary(self, warmup_tokens: int = WARMUP_TOKENS) -> dict[str, Any]:
        """The `summary` part of a record."""
        nll, seconds = (np.array(values, dtype=np.float64) for values in (self.nll, self.seconds))
        scored = nll[np.isfinite(nll)]
        mean = float(scored.mean()) if scored.size else None
        return {
            "decode_tokens": len(self.index),
            "scored_tokens": int(scored.size),
            "timed_tokens": int(np.isfinite(seconds).sum()),
            "mean_nll": mean,
            "ppl": None if mean is None else finite_or_none(float(np.exp(mean))),
            **latency_summary(seconds, warmup_tokens),
            "prefill_sec": self.prefill_seconds,
            "decode_sec": float(np.nansum(seconds)),
            "peak_memory_mb": self.peak_memory_mb,
            "peak_memory_kind": self.peak_memory_kind,
        }

    def blocks(self) -> dict[str, Any] | None:
        """The `blocks` part of a record; None without a scored token."""
        nll = np.array(self.nll, dtype=np.float32)
        if not np.isfinite(nll).any():
            return None
        found = Blocks.of(np.array(self.index), nll, np.array(self.kv_length))
        return None if found is None else found.record()


def failed_row(label: str, reason: str | None, header: Sequence[str]) -> list[str]:
    """The row of a rival that cannot run, in a table with such a header."""
    return [label, f"cannot run: {reason}", *[EMPTY] * (len(header) - 2)]


def not_measured() -> dict[str, Any]:
    """The `summary` part of a rival that cannot run."""
    summary = Measured([], [], [], [], 0, 0.0, 0.0, "", 0.0).summary()
    return summary | dict.fromkeys(("prefill_sec", "decode_sec", "peak_memory_mb", "peak_memory_kind"))


def check_same_prompt(rival_nll: float, own_nll: float, kind: str) -> None:
    """Raise ValueError if a rival's NLL of the prompt is not ours: another model, or other tokens.

    `kind` is a dtype, or "quantised" for a rival that computes in the GGUF file's own format.
    """
    accepted = PROMPT_TOLERANCE[kind]
    if not abs(rival_nll - own_nll) <= accepted:
        raise ValueError(
            f"the rival's NLL of the prompt is {rival_nll:.4f} nats per token and ours is {own_nll:.4f}: another model"
            f" or other tokens; accepted for {kind}: a difference of at most {accepted:g}"
        )


@dataclass(frozen=True)
class RivalRecord(StatusRecord):
    """One rival: the fields of its JSON file (see `REQUIRED`).

    Attributes
    ----------
    rival : dict
        ``name`` of the project, ``method`` (its class or option), ``label``, ``options``, ``version``, ``positions``.
    block_sums : dict or None
        As in a run record; None for a rival that cannot score, or cannot run.
    checks : dict
        ``prompt_nll`` of the rival and ``own_prompt_nll``, and what the rival reports of itself.
    """

    SCHEMA, KIND, STATUSES = "sinkstream.rival/1", "rival", ("complete", "failed")
    REQUIRED = REQUIRED

    data: dict[str, Any]
    rival: dict[str, Any]
    summary: dict[str, Any]
    checks: dict[str, Any]
    block_sums: dict[str, Any] | None = None

    @classmethod
    def values(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        return super().values(content) | {"block_sums": content["blocks"]}

    @property
    def label(self) -> str:
        """What a table calls this rival."""
        return self.rival["label"]

    @cached_property
    def blocks(self) -> Blocks | None:
        """NLL in blocks; None for a rival that does not score."""
        return None if self.block_sums is None else Blocks.read(self.block_sums)
