"""``bench --late``: tokens are timed at several places, recorded, tabled, and give the headline figure."""

import io
from functools import partial

import pytest
import tiny_model
from rich.console import Console

from sinkstream.bench.late import LateSession
from sinkstream.bench.late_records import EARLY, LATE, LATE_HEADLINES, LATE_TIMES, LateRecord, late_table
from sinkstream.cli import main
from sinkstream.data import random_tokens
from sinkstream.evaluation.runner import Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.records.headline import Headline
from sinkstream.report.summary import write_summary

KEY = "dropin.late_over_early_token"


def session(folder, places=(40, 90), resume: bool = False) -> LateSession:
    request = Request(folder, {}, ["bench"], 0, resume)
    return LateSession(tiny_model.loaded("llama"), random_tokens(90, 60), places, request, "s", tokens=4)


def runs() -> list[RunSettings]:
    return [RunSettings("strict", cap=32, options={}), RunSettings("lazy", cap=32, options={"compress_every": 4})]


def test_every_place_is_timed_and_recorded(tmp_path):
    records = session(tmp_path).run(runs(), Console(file=io.StringIO()))
    assert records == LateRecord.below(tmp_path) and [r.policy["name"] for r in records] == ["strict", "lazy"]
    for record in records:
        assert [place["seen"] for place in record.places] == [40, 90]
        assert min(place[f"{name}_ms"] for place in record.places for name in LATE_TIMES) > 0
    assert late_table(records).markdown().count("strict") == 2
    again = session(tmp_path, resume=True).run(runs(), Console(file=io.StringIO()))
    assert again == records
    assert session(tmp_path, (41,), resume=True).run(runs(), Console(file=io.StringIO())) != records


def test_the_headline_is_the_ratio_of_late_and_early(tmp_path):
    (record,) = session(tmp_path).run(runs()[:1], Console(file=io.StringIO()))
    assert KEY not in write_summary(tmp_path).headlines, "other places"
    record.places[0].update(seen=EARLY, conversation_ms=2.0)
    record.places[1].update(seen=LATE, conversation_ms=3.0)
    assert LATE_HEADLINES[KEY]([record]) == Headline(1.5, record.id)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sinkstream.cli.bench.LateSession", partial(LateSession, tokens=2))
    where = ["--model", "random:pythia-14m", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["bench", "--late", "40", "--cap", "32", "--policy", "strict", *where]) == 0
    assert "tokens of generate()" in capsys.readouterr().out and len(LateRecord.below(tmp_path)) == 1


@pytest.mark.parametrize(
    "more", [["--late", "1"], ["--late", "50", "--prefill", "20"], ["--late", "50", "--ladder"], ["--engine-only"]]
)
def test_what_does_not_go_together_is_refused(more, capsys):
    assert main(["bench", "--model", "random:pythia-14m", "--device", "cpu", "--cap", "32", *more]) == 2
    assert "accepted:" in capsys.readouterr().err
