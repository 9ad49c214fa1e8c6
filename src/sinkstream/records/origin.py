"""One line on what a table was measured with."""

from collections.abc import Sequence
from typing import Any

from sinkstream.measure.environment import hardware


def text_and_machine(record: Any, *beside: Any) -> str:
    """Model, text, prefill and cap where the record has one prefill, precision; `machine` of it and of those beside."""
    protocol = record.protocol
    parts = [record.model["name"], record.data["name"], f"{record.data['tokens']:,} tokens"]
    if "decode_tokens" in protocol:
        parts[-1] += f" of which {protocol['prefill_tokens']:,} are prefill"
        parts.append(f"cap {protocol['cap']:,}")
    return ", ".join([*parts, protocol["dtype"], machine([record, *beside])])


def machine(records: Sequence[Any], *more: str) -> str:
    """Hardware and commits of all records, releases of the newest; `more` stands after the hardware."""
    newest = max(records, key=lambda record: record.created).environment
    machines = " and ".join(sorted({hardware(record.environment) for record in records}))
    commits = sorted({(record.environment["git"]["commit"] or "unknown")[:10] for record in records})
    releases = [f"{name} {newest['versions'][name]}" for name in ("torch", "transformers")]
    return ", ".join([machines, *more, *releases, f"commit {', '.join(f'`{c}`' for c in commits)}"]) + "."
