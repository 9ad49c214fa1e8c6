"""Per-token and per-event tables of a diagnosis, as CSV."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sinkstream.records.files import write_atomically
from sinkstream.records.pairing import common_tokens
from sinkstream.records.records import Record
from sinkstream.studies.diagnosis.spikes import after_events, event_positions

TOKEN_COLUMNS = ("index", "token", "nll", "control_nll", "time_ms", "kv_len", "event", "drop_size")
_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t", "\0": r"\0"})
EVENT_COLUMNS = ("index", "drop_size", "drop_steps", "dropped", "kv_len", "tokens_to_next", "mean_difference")


def write_token_table(record: Record, control: Record, texts: Sequence[str] | None, path: Path | str) -> Path:
    """Write one row a token of a run, beside its control.

    Parameters
    ----------
    record, control : Record
        Of one text and model.
    texts : sequence of str or None
        Text of every token of the stream, from index 0 on; None leaves the column empty. Line ends, tabs and
        backslashes are escaped as in Python.
    path : path
        The CSV file. `index` counts tokens of the text; `nll` and `control_nll` in nats, empty where not scored;
        `time_ms` empty where not timed; `kv_len` the tokens seen; `event` 1 where a prune event began; `drop_size` in
        tokens.
    """
    arrays = record.arrays
    known = dict(zip(control.arrays["index"].tolist(), control.arrays["nll"].tolist()))
    rows = zip(*(arrays[name].tolist() for name in ("index", "nll", "seconds", "kv_length", "event", "drop_size")))
    lines = []
    for index, nll, seconds, kv_length, event, drop in rows:
        text = "" if texts is None else texts[index].translate(_ESCAPES)
        figures = (_cell(nll, 6), _cell(known.get(index, np.nan), 6), _cell(1e3 * seconds, 4))
        lines.append((index, text, *figures, kv_length, int(event), drop))
    return _write(TOKEN_COLUMNS, lines, path)


def write_event_table(record: Record, control: Record, path: Path | str) -> Path:
    """Write one row a prune event, the list of a run's prune steps.

    `index`: the first token predicted after it; `drop_size`: tokens that its first step dropped; `drop_steps` and
    `dropped`: steps with a drop, and tokens dropped, until the next event (more than one step with ``max_drop``);
    `kv_len`: tokens seen after the first step; `tokens_to_next`: tokens to the next event; `mean_difference`: mean
    paired difference over its first 32 tokens, in nats.
    """
    arrays, events = record.arrays, event_positions(record)
    at = np.flatnonzero(arrays["event"])
    index, nll, control_nll = common_tokens(record, control)
    table = after_events(nll - control_nll, index, events)
    known = np.isfinite(table).sum(axis=1)
    means = np.where(known > 0, np.nansum(table, axis=1) / np.maximum(known, 1), np.nan)
    gaps = [*np.diff(events).tolist(), ""]
    drops = [part[part > 0] for part in np.split(arrays["drop_size"], at)[1:]]
    sizes, lengths = arrays["drop_size"][at], arrays["kv_length"][at]
    columns = zip(events, sizes, drops, lengths, gaps, means)
    lines = [(event, size, d.size, d.sum(), kv, gap, _cell(mean, 6)) for event, size, d, kv, gap, mean in columns]
    return _write(EVENT_COLUMNS, lines, path)


def _cell(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else ""


def _write(header: Sequence[str], lines: Sequence[Sequence], path: Path | str) -> Path:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return write_atomically(path, buffer.getvalue())
