"""Progress and rows of runs, as a terminal shows them and as a file keeps them."""

import io

import pytest
import tiny_model
from rich.console import Console

from sinkstream.data import TokenStream
from sinkstream.evaluation.batch import Batch
from sinkstream.evaluation.runner import Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.records.records import load_records
from sinkstream.show.comparison import RowLines
from sinkstream.show.progress import is_live

ESCAPE = "\x1b"
CAP, TOKENS = 24, 90
SETTINGS = [RunSettings(name, CAP, evaluate="blocks", block_tokens=32) for name in ("strict", "window-only")]


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def batch(out, *, resume: bool = False, **options) -> Batch:
    loaded = tiny_model.loaded()
    ids = loaded.tokenizer(tiny_model.SENTENCE * 3)["input_ids"][:TOKENS]
    stream = TokenStream.of(ids, name="sentence", source="test", text_sha256=None)
    return Batch(loaded, stream, Request(out, {}, ["sinkstream", "test"], 0, resume), **options)


def printed(out, file: io.StringIO, *, console: dict | None = None, row=None, enough=None, **options) -> str:
    batch(out, **options).run(SETTINGS, Console(file=file, width=160, **(console or {})), row, enough)
    return file.getvalue()


@pytest.mark.parametrize("console", [{}, {"force_terminal": True}], ids=["plain", "colours"])
def test_a_file_gets_a_line_for_every_run(tmp_path, console):
    lines = printed(tmp_path, io.StringIO(), console=console).splitlines()
    ppl = [f"{record.summary['ppl']:,.2f}" for record in load_records(tmp_path)]
    assert [line.split(": ")[0] for line in lines] == ["strict", "window-only"]
    assert [line.split(" s, ")[1] for line in lines] == [f"PPL {value}" for value in ppl]
    assert all(": done in " in line for line in lines) and ESCAPE not in "".join(lines)


def test_a_terminal_gets_bars_instead(tmp_path):
    shown = printed(tmp_path, Terminal(), console={"force_terminal": True})
    assert ESCAPE in shown and "done in" not in shown and "strict" in shown


def test_runs_in_turn_end_together(tmp_path):
    steps = [RunSettings(one.method, CAP) for one in SETTINGS]
    file = io.StringIO()
    batch(tmp_path, interleave=True).run(steps, Console(file=file, width=160))
    (line,) = file.getvalue().splitlines()
    assert line.startswith("2 in turn: done in ") and line.count(" / ") == 1


def test_resumed_runs_are_told(tmp_path):
    printed(tmp_path, io.StringIO())
    lines = printed(tmp_path, io.StringIO(), resume=True).splitlines()
    assert lines == [f"{r.policy['label']}: taken from {r.id}" for r in load_records(tmp_path)]


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_rows_take_the_place_of_the_lines(tmp_path, file):
    seen = []
    terminal = {"force_terminal": True} if file is Terminal else {}
    shown = printed(tmp_path, file(), console=terminal, row=lambda records: seen.append(len(records)) or "a row [x]")
    assert seen == [1, 2] and shown.count("a row [x]") == 2 and "done in" not in shown


def test_a_batch_ends_where_it_is_enough(tmp_path):
    assert "window-only" not in printed(tmp_path, io.StringIO(), enough=lambda records: len(records) == 1)
    assert [record.policy["name"] for record in load_records(tmp_path)] == ["strict"]


def test_rows_are_lines_of_the_table(tmp_path):
    printed(tmp_path, io.StringIO())
    records = load_records(tmp_path)
    lines = RowLines(["strict", "window-only"], 160)
    header, control = lines.line(records[:1]).splitlines()
    other = lines.line(records)
    assert header.startswith("Policy") and "PPL" in header and header.endswith("Run (s)")
    assert control.startswith("strict ") and "control" in control
    assert other.startswith("window-only ") and f"{records[1].summary['ppl']:,.2f}" in other and "control" not in other
    assert len(header) == len(control) == len(other) <= 160
    narrow = RowLines(["strict", "window-only"], 60).line(records)
    assert narrow and other.startswith(narrow) and len(narrow) <= 60


def test_only_a_terminal_is_live():
    assert is_live(Console(file=Terminal(), force_terminal=True))
    assert not is_live(Console(file=io.StringIO(), force_terminal=True))
    assert not is_live(Console(file=Terminal(), force_terminal=True, force_interactive=False))
