"""Tables and headline figures of prompt records."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sinkstream.bench.prompt_records import PromptRecord
from sinkstream.bench.two_shapes import before, newest_on_gpu, shape_name, worse_of_two
from sinkstream.records.cards import each_card
from sinkstream.records.headline import Headline
from sinkstream.records.origin import machine
from sinkstream.registry import Registry
from sinkstream.show.table import EMPTY, NONE_YET, Table

#: Generated tables of the documents: name -> function of all prompt records, oldest first.
PROMPT_TABLES: Registry[Callable[[Sequence[PromptRecord]], str]] = Registry("prompt table")
#: Key -> function of all prompt records, oldest first, that returns a headline, or None if records are missing.
PROMPT_HEADLINES: Registry[Callable[[Sequence[PromptRecord]], Headline | None]] = Registry("prompt headline")

HEADER = [
    *("shape", "policy", "prompt", "plain forward (ms)", "engine (ms)", "engine / forward", "generate(), drop-in (ms)"),
    *("drop-in / dynamic cache", "floor (ms)", "engine / floor"),
]
BEFORE = "engine / forward, the measurement before"
APPEND_HEADER = ["shape", "policy", "appended", "ms", "step (ms)", "steps"]


def prompt_table(
    records: Sequence[PromptRecord], title: str | None = None, earlier: Sequence[PromptRecord | None] = ()
) -> Table:
    """One row a prompt.

    Parameters
    ----------
    earlier : sequence of PromptRecord or None
        For each record the one before it, shown beside it where at least one record has one.
    """
    earlier = earlier if any(earlier) else ()
    rows, header = [], [*HEADER, *[BEFORE][: len(earlier)]]
    for record, older in zip(records, earlier or [None] * len(records)):
        for p in record.prompts:
            times = [p[f"{name}_ms"] for name in ("forward", "engine", "drop_in", "dynamic")]
            forward, engine, drop_in, dynamic = times
            rows.append(
                [
                    *_named(record),
                    f"{p['tokens']:,}",
                    f"{forward:.2f}",
                    f"{engine:.2f}",
                    f"{engine / forward:.3f}",
                    EMPTY if drop_in is None else f"{drop_in:.2f}",
                    EMPTY if drop_in is None else f"{drop_in / dynamic:.3f}",
                    f"{p['floor_ms']:.2f}",
                    f"{engine / p['floor_ms']:.2f}",
                ]
            )
            if earlier:
                ratio = None if older is None else older.over("engine", "forward", p["tokens"])
                rows[-1].append(EMPTY if ratio is None else f"{ratio:.3f}")
    caption = "TTFT: prompt in, logits of its last token out; floor: operations at the measured rate of matrix products"
    return Table(header, rows, title, [caption], 2)


def append_table(records: Sequence[PromptRecord], title: str | None = None) -> Table:
    """A turn appended to a full stream, one row a record."""
    rows = [
        [*_named(r), f"{r.append['tokens']}", *(f"{r.append[n]:.3f}" for n in ("ms", "step_ms", "over_step"))]
        for r in records
    ]
    return Table(APPEND_HEADER, rows, title, [], 2)


def _named(record: PromptRecord) -> list[str]:
    return [shape_name(record), record.policy["label"]]


# ---- documents ----


def render_prompts(results: Path) -> dict[str, str]:
    """Markdown of every table of `PROMPT_TABLES`, by name. Raises ValueError if a prompt record is broken."""
    records = PromptRecord.below(results)
    return {name: render(records) for name, render in PROMPT_TABLES.items()}


@PROMPT_TABLES.register("bench-prompts")
def prompts_table(records: Sequence[PromptRecord]) -> str:
    """Prompts through the engine and the drop-in against a plain forward, 2,052 slots, newest record a policy."""
    return _of_each_machine(records, lambda found: prompt_table(found, earlier=[before(r, records) for r in found]))


@PROMPT_TABLES.register("bench-append")
def appended_table(records: Sequence[PromptRecord]) -> str:
    """A turn of 50 tokens appended to a full stream, against a step."""
    return _of_each_machine(records, append_table)


def _of_each_machine(records: Sequence[PromptRecord], table: Callable[[Sequence[PromptRecord]], Table]) -> str:
    """A table for the records of each kind of machine, so that no row stands beside one of other hardware."""
    found = newest_on_gpu(records)
    return each_card(found, lambda some: f"{_origin(some)}\n\n{table(some).markdown()}") or NONE_YET


def _origin(records: Sequence[PromptRecord]) -> str:
    rates = sorted({f"{r.ceiling['dtype']} {r.ceiling['tflops']:,.0f} TFLOP/s" for r in records})
    return machine(records, f"matrix products {', '.join(rates)}")


# ---- headline figures ----


@PROMPT_HEADLINES.register("engine.prefill_8192_over_forward")
def prefill_8192_over_forward(records: Sequence[PromptRecord]) -> Headline | None:
    """Engine.prefill of 8,192 tokens over the module's own forward, strict, 2,052 slots, GPU; worse of two shapes."""
    return worse_of_two(records, lambda r: r.over("engine", "forward", 8192))


@PROMPT_HEADLINES.register("engine.prefill_32768_over_forward")
def prefill_32768_over_forward(records: Sequence[PromptRecord]) -> Headline | None:
    """Engine.prefill of 32,768 tokens over the module's own forward, strict, 2,052 slots, GPU; worse of two shapes."""
    return worse_of_two(records, lambda r: r.over("engine", "forward", 32768))


@PROMPT_HEADLINES.register("engine.append_50_over_step")
def append_50_over_step(records: Sequence[PromptRecord]) -> Headline | None:
    """Appending 50 tokens to a full stream over one decode step, strict, 2,052 slots, GPU; worse of two shapes."""
    return worse_of_two(records, lambda r: r.append["over_step"] if r.append["tokens"] == 50 else None)
