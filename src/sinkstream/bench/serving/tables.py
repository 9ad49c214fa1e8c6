"""Tables and headline figures of records of a server."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sinkstream.bench.serving.records import PARTS, ServeRecord
from sinkstream.measure.environment import hardware
from sinkstream.models.shapes import PREFIX
from sinkstream.records.cards import one_card
from sinkstream.records.headline import Headline
from sinkstream.records.origin import machine
from sinkstream.registry import Registry
from sinkstream.show.table import EMPTY, NONE_YET, Table
from sinkstream.statistics.proportion import proportion

#: Key -> function of all serve records, oldest first, that returns a headline, or None if records are missing.
SERVE_HEADLINES: Registry[Callable[[Sequence[ServeRecord]], Headline | None]] = Registry("serve headline")
LEAST_TURNS = 1000  # of a record that says how a long conversation goes on
HEADER = ["what", "model", "on", "figure"]
SESSION_HEADER = [
    "model",
    "on",
    "sessions",
    "replies",
    "tokens/s",
    "over one session",
    "engine's own streams",
    "over them",
]

RECALL_HEADER = ["after the chats", "asked", "came back", "right with recall", "without", "with nothing evicted"]
RECALL_FORMS = {
    "named": "a fact, with words of its statement: its turn",
    "paraphrased": "a fact, in other words: its turn",
}


def serve_table(records: Sequence[ServeRecord], title: str | None = None) -> Table:
    """One row a figure."""
    rows = [[what, *_named(r), figure] for r in records for what, figure in _figures(r)]
    return Table(HEADER, rows, title, [], 4)


def sessions_table(records: Sequence[ServeRecord], title: str | None = None) -> Table:
    """Throughput, one row a number of sessions."""
    rows = [
        [
            *_named(r),
            str(row["sessions"]),
            f"{r.figures['tokens']:,} tokens, {'streamed' if row['streamed'] else 'whole'}",
            f"{row['tokens_per_second']:,.1f}",
            f"{row['over_one']:.2f}",
            f"{row['engine_tokens_per_second']:,.1f}",
            f"{row['over_engine']:.3f}",
        ]
        for r in records
        if r.part == "sessions"
        for row in r.figures["rows"]
    ]
    return Table(SESSION_HEADER, rows, title, [], 4)


def recall_table(records: Sequence[ServeRecord], title: str | None = None) -> Table:
    """What was recalled, and answered, in chats: a row a kind of question, with 95 % intervals."""
    rows = []
    for figures in (r.figures for r in records if r.part == "recall"):
        for form, what in RECALL_FORMS.items():
            f = figures["facts"][form]
            right = [_share(f["right"][arm], f["asked"]) for arm in ("recall", "none", "whole")]
            rows.append([what, str(f["asked"]), _share(f["found"], f["asked"]), *right])
        kinds = figures["unrelated"]
        total = {name: sum(kind[name] for kind in kinds.values()) for name in ("asked", "recalled")}
        for kind, f in {**kinds, "all of these": total}.items():
            what = f"what no fact answers, {kind}: any turn"
            rows.append([what, str(f["asked"]), _share(f["recalled"], f["asked"]), *[EMPTY] * 3])
    return Table(RECALL_HEADER, rows, title, [], 1)


def _share(hits: int, of: int) -> str:
    found = proportion(hits, of)
    if found.value is None or found.low is None or found.high is None:
        return EMPTY
    return f"{100 * found.value:.0f} % [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def _named(record: ServeRecord) -> list[str]:
    name = f"{record.model['name'].removeprefix(PREFIX)} {record.protocol['dtype']}, {record.protocol['cap']:,} slots"
    if pinned := record.protocol.get("pinned"):
        name += f", at most {pinned:,} pinned"
    return [name, "CPU" if record.protocol["device"] == "cpu" else hardware(record.environment)]


def _figures(record: ServeRecord) -> list[tuple[str, str]]:
    return {"turns": _turns, "overhead": _overhead, "soak": _soak, "restart": _restart}.get(
        record.part, lambda figures: []
    )(record.figures)


def _turns(f: dict[str, Any]) -> list[tuple[str, str]]:
    tpot, ttft = f["tpot_ms"], f["ttft_ms"]
    many = f"{f['turns']:,} turns in one session, {f['sent_tokens']} new tokens and {f['reply_tokens']} of a reply each"
    rows = [
        (
            many,
            f"{f['context']['evicted_turns']:,} turns evicted, {f['errors']} errors, {f['length_errors']} for length",
        ),
        (
            f"TPOT, last {tpot['turns']} turns / first {tpot['turns']}",
            f"{tpot['last']:.2f} / {tpot['first']:.2f} ms = {tpot['ratio']:.3f}",
        ),
        (
            f"TTFT, last {ttft['turns']} turns / those at turn {ttft['turn']}",
            f"{ttft['late']:.1f} / {ttft['early']:.1f} ms = {ttft['ratio']:.3f}",
        ),
        ("memory after a tenth of the turns, at the end", _memory(f["rss_mb"], "RSS")),
    ]
    return rows + ([("the same on the GPU", _memory(f["gpu_mb"], "allocated"))] if f["gpu_mb"] else [])


def _memory(f: dict[str, float] | None, kind: str) -> str:
    return EMPTY if f is None else f"{f['early']:,.1f}, {f['last']:,.1f} MB ({kind})"


def _overhead(f: dict[str, Any]) -> list[tuple[str, str]]:
    engine, server = (sorted(f[name])[len(f[name]) // 2] for name in ("engine_ms", "server_ms"))
    what = (
        f"a token of a stream over `Engine.generate`, one session, {f['tokens']} tokens, {f['rounds']} rounds in turns"
    )
    return [(what, f"{server:.3f} / {engine:.3f} ms; {100 * f['over_engine']:+.1f} %")]


def _soak(f: dict[str, Any]) -> list[tuple[str, str]]:
    asked = f"{f['users']} users for {f['seconds']:,.0f} s, {f['generator']}"
    did = (
        f"{f['requests']:,} requests, {f['disconnects']:,} broken off, {f['refused_as_expected']:,} refused as expected"
    )
    wrong = f"{f['unexpected_5xx']} unexpected 5xx, {f['wrongly_answered']} other wrong answers"
    differing = f"{f['differing']} of {f['compared']:,} replies differ"
    if f["compared"] < f.get("replies", 0):
        differing += f"; {f['replies']:,} could be compared"
    leaked = f"{f['leaked_sessions']} sessions, {f['leaked_files']} files"
    rows = [(asked, did), ("its answers", wrong), ("against the same sessions served alone", differing)]
    return [*rows, ("left behind", leaked)]


def _restart(f: dict[str, Any]) -> list[tuple[str, str]]:
    what = f"killed in mid-load, {f['sessions']} sessions: the next {f['next_tokens']} tokens after a restart"
    kept = f"{f['spilled']} found, {f['same']} of {f['continued']} go on as if never interrupted"
    return [(what, f"{kept}; at most {f['turns_lost']} complete turns lost")]


# ---- documents ----


def render_serve(results: Path) -> dict[str, str]:
    """Markdown of the tables, by their names in the documents. Raises ValueError if a serve record is broken."""
    found = newest(ServeRecord.below(results))
    rendered = {}
    tables = {"sessions": ("serve-sessions", sessions_table), "recall": ("serve-recall", recall_table)}
    for part, (name, table) in {"": ("serve-figures", serve_table), **tables}.items():
        of = [r for r in found if r.part == part or (not part and r.part not in tables)]
        rendered[name] = f"{_recall_line(of)}{machine(of)}\n\n{table(of).markdown()}" if of else NONE_YET
    return rendered


def _recall_line(records: Sequence[ServeRecord]) -> str:
    """How many chats of how many turns, where records are of recall."""
    told = (f"{_named(r)[0]}, {r.figures['talks']} chats of {r.figures['turns']} turns. " for r in records)
    return "".join(told) if records and records[0].part == "recall" else ""


def newest(records: Sequence[ServeRecord]) -> list[ServeRecord]:
    """The latest record of every part, model, precision, cap and machine, in the order of the parts."""
    latest = {(r.part, *_named(r)): r for r in records}
    return sorted(latest.values(), key=lambda r: (PARTS.index(r.part), r.protocol["device"]))


# ---- headline figures ----


def _worst(records: Sequence[ServeRecord], part: str, figure: Callable[[dict[str, Any]], float]) -> Headline | None:
    """The largest figure among the latest records of a part."""
    found = [Headline(figure(r.figures), r.id) for r in newest(records) if r.part == part]
    return max(found, default=None)


def _timed(records: Sequence[ServeRecord]) -> list[ServeRecord]:
    """Records of a GPU, which nobody shares; of turns, those of a thousand."""
    of_gpu = [r for r in records if r.protocol["device"] == "cuda"]
    return [r for r in of_gpu if r.part != "turns" or r.figures["turns"] >= LEAST_TURNS]


@SERVE_HEADLINES.register("serve.thousand_turn_tpot_ratio")
@one_card
def thousand_turn_tpot_ratio(records: Sequence[ServeRecord]) -> Headline | None:
    """Median TPOT of the last 100 of 1,000 turns over the first 100, on a GPU; the larger of the models."""
    return _worst(_timed(records), "turns", lambda f: f["tpot_ms"]["ratio"])


@SERVE_HEADLINES.register("serve.ttft_turn_1000_over_turn_10")
@one_card
def ttft_turn_1000_over_turn_10(records: Sequence[ServeRecord]) -> Headline | None:
    """Median TTFT of the last ten of 1,000 turns over ten turns around turn 10, on a GPU; the larger of the models."""
    return _worst(_timed(records), "turns", lambda f: f["ttft_ms"]["ratio"])


@SERVE_HEADLINES.register("serve.soak_requests")
def soak_requests(records: Sequence[ServeRecord]) -> Headline | None:
    """Requests of the latest soak."""
    soaks = [r for r in records if r.part == "soak"]
    return Headline(soaks[-1].figures["requests"], soaks[-1].id) if soaks else None


@SERVE_HEADLINES.register("serve.unexpected_5xx")
def unexpected_5xx(records: Sequence[ServeRecord]) -> Headline | None:
    """Answers of the latest soaks with a 5xx that no limit explains; the largest count."""
    return _worst(records, "soak", lambda f: f["unexpected_5xx"])


@SERVE_HEADLINES.register("serve.replies_differing")
def replies_differing(records: Sequence[ServeRecord]) -> Headline | None:
    """Replies of the latest soaks that differ from the same session served alone; the largest count."""
    return _worst(records, "soak", lambda f: f["differing"])


def _recalled(records: Sequence[ServeRecord], figure: Callable[[dict[str, Any]], float]) -> Headline | None:
    """A figure of the latest chats with facts."""
    found = [r for r in records if r.part == "recall"]
    return Headline(figure(found[-1].figures), found[-1].id) if found else None


@SERVE_HEADLINES.register("serve.recall_found")
def recall_found(records: Sequence[ServeRecord]) -> Headline | None:
    """Share of facts, asked with words of their statements, whose evicted turn came back."""
    return _recalled(records, lambda f: f["facts"]["named"]["found"] / f["facts"]["named"]["asked"])


@SERVE_HEADLINES.register("serve.recall_right")
def recall_right(records: Sequence[ServeRecord]) -> Headline | None:
    """Share of the same facts that the reply has right."""
    return _recalled(records, lambda f: f["facts"]["named"]["right"]["recall"] / f["facts"]["named"]["asked"])


@SERVE_HEADLINES.register("serve.recall_false_alarms")
def recall_false_alarms(records: Sequence[ServeRecord]) -> Headline | None:
    """Share of messages that no fact answers at which a turn came back."""

    def share(f: dict[str, Any]) -> float:
        kinds = f["unrelated"].values()
        return sum(kind["recalled"] for kind in kinds) / sum(kind["asked"] for kind in kinds)

    return _recalled(records, share)


@SERVE_HEADLINES.register("serve.overhead_over_engine")
@one_card
def overhead_over_engine(records: Sequence[ServeRecord]) -> Headline | None:
    """A token of a streamed reply over one of Engine.generate, less 1, one session, GPU; the larger of the models."""
    return _worst(_timed(records), "overhead", lambda f: f["over_engine"])
