"""``bench --sampling``: ways of drawing are timed in turns, recorded, tabled, and give the headline figure."""

import io
import statistics

import pytest
import tiny_model
from record_factory import make_draw_record
from rich.console import Console

from sinkstream.bench.draw_records import DrawRecord
from sinkstream.bench.draw_tables import DRAW_HEADLINES, draw_table, render_draws
from sinkstream.bench.draws import WAYS, DrawSession
from sinkstream.cli import main
from sinkstream.data import random_tokens
from sinkstream.engine.sampling import Sampler
from sinkstream.evaluation.runner import Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.report.summary import write_summary
from sinkstream.show.table import NONE_YET

LLAMA = {"model": "random:llama-3.2-1b", "dtype": "bfloat16"}


def session(folder, tokens: int = 6, resume: bool = False) -> DrawSession:
    loaded = tiny_model.loaded("llama")
    request = Request(folder, {}, ["bench"], 0, resume)
    return DrawSession(loaded, random_tokens(90, 20), tokens, 2, "ring", request, "s", repeats=3)


def test_every_way_is_timed_and_recorded(tmp_path):
    runs = [RunSettings(name, cap=32) for name in ("strict", "window-only")]
    records = session(tmp_path).run(runs, Console(file=io.StringIO()))
    assert records == DrawRecord.below(tmp_path)
    assert [r.policy["name"] for r in records] == ["strict", "window-only"]
    for record in records:
        assert {d["name"]: d["options"] for d in record.draws} == WAYS
        greedy = record.draws[0]["ms"]
        for draw in record.draws:
            assert len(draw["repeats_ms"]) == 3 and draw["ms"] == statistics.median(draw["repeats_ms"]) > 0
            assert draw["over_greedy"] == pytest.approx(draw["ms"] / greedy)
        assert record.over_greedy("greedy") == 1.0 and record.over_greedy("no way") is None
    shown = draw_table(records, "title").markdown()
    assert all(shown.count(f"| {name} |") == 2 for name in WAYS)
    samplers = {name: Sampler(**options) for name, options in WAYS.items() if "log_probs" not in options}
    assert [name for name, sampler in samplers.items() if sampler.bare] == ["greedy"]


def test_a_policy_that_reads_the_tokenizer_is_timed(tmp_path):
    runs = [RunSettings("refresh-structural", cap=32, options={"refresh": 8, "compress_every": 4})]
    (record,) = session(tmp_path).run(runs, Console(file=io.StringIO()))
    assert record.policy["name"] == "refresh-structural" and len(record.draws) == len(WAYS)


def test_a_command_that_is_resumed_takes_what_is_there(tmp_path):
    console, runs = Console(file=io.StringIO()), [RunSettings("strict", cap=32)]
    first = session(tmp_path).run(runs, console)
    again = session(tmp_path, resume=True).run(runs, console)
    other = session(tmp_path, resume=True, tokens=7).run(runs, console)
    assert again == first and other != first and len(DrawRecord.below(tmp_path)) == 2


def test_the_headline_is_the_worse_of_two_shapes(tmp_path):
    DrawRecord.write(make_draw_record("a", over_greedy=1.0125), tmp_path)
    assert not set(write_summary(tmp_path).headlines) & set(DRAW_HEADLINES), "one of two shapes"
    DrawRecord.write(make_draw_record("b", over_greedy=1.0375, **LLAMA), tmp_path)
    DrawRecord.write(make_draw_record("c", over_greedy=2.0, policy="lazy R=64", **LLAMA), tmp_path)
    DrawRecord.write(make_draw_record("d", over_greedy=3.0, cap=512), tmp_path)
    assert write_summary(tmp_path).headlines["engine.top_p_over_greedy"] == {
        "value": 1.0375,
        "record": "b",
        "on": "Test GPU",
    }
    assert (
        "| llama-3.2-1b bfloat16 | strict | top-p 0.95 | 2.0750 | 1.0375 |" in render_draws(tmp_path)["bench-sampling"]
    )


def test_no_record_no_figure(tmp_path):
    assert set(render_draws(tmp_path).values()) == {NONE_YET}
    assert set(write_summary(tmp_path).missing) >= set(DRAW_HEADLINES)


def test_a_record_lacks_no_time(tmp_path):
    record = make_draw_record("a")
    del record["draws"][1]["over_greedy"]
    with pytest.raises(ValueError, match="field 'draws' lacks 'over_greedy'"):
        DrawRecord.write(record, tmp_path)


def test_the_command_shows_and_records(tmp_path, capsys):
    folder = tiny_model.save_model(tmp_path / "tiny")
    common = ["bench", "--model", str(folder), "--cap", "32", "--policy", "strict", "--device", "cpu", "--sampling"]
    assert main([*common, "--tokens", "3", "--warmup", "1", "--text", "random", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "ways of drawing a token" in shown and "top-p 0.95" in shown
    assert len(DrawRecord.below(tmp_path / "out")) == 1
    for more, says in [
        (["--prefill", "9"], "exclude each other"),
        (["--streams", "2"], "does not take --streams"),
        (["--tokens", "0"], "tokens=0"),
        (["--warmup", "0"], "warmup=0"),
        (["--backend", "hf"], "one of the engine's"),
    ]:
        assert main([*common, *more, "--out", str(tmp_path / "none")]) == 2
        assert says in capsys.readouterr().err
