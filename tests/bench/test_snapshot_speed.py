"""``bench --snapshot``: a stream to its file and back is timed beside the disk, recorded and tabled."""

import io

import pytest
import tiny_model
from rich.console import Console

from sinkstream.bench.snapshot_records import WAYS, SnapshotRecord, render_snapshots, snapshot_table
from sinkstream.bench.snapshots import SnapshotSession
from sinkstream.cli import main
from sinkstream.data import random_tokens
from sinkstream.evaluation.runner import Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.show.table import NONE_YET


def test_every_way_is_timed_and_recorded(tmp_path):
    loaded, runs = tiny_model.loaded("llama"), [RunSettings("strict", cap=32, options={})]

    def timed(resume: bool) -> list[SnapshotRecord]:
        request = Request(tmp_path, {}, ["bench"], 0, resume)
        session = SnapshotSession(loaded, random_tokens(90, 60), "ring", request, "s", repeats=3)
        return session.run(runs, Console(file=io.StringIO()))

    (record,) = timed(False)
    assert SnapshotRecord.below(tmp_path) == [record]
    assert all(len(record.repeats_seconds[way]) == 3 and record.seconds[way] > 0 for way in WAYS)
    spec = loaded.model.config
    cached = 2 * 32 * spec.num_hidden_layers * spec.num_key_value_heads * spec.head_dim * 4
    assert cached < record.bytes < cached + 10_000, "keys and values, and little else"
    assert snapshot_table([record]).markdown().count("strict") == 1
    assert render_snapshots(tmp_path)["bench-snapshot"] == NONE_YET, "a record of a CPU is not in the documents"
    assert timed(True) == [record]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json"}, "no snapshot is left"


def test_the_command(tmp_path, capsys):
    where = ["--model", "random:pythia-14m", "--device", "cpu", "--cap", "32", "--policy", "strict"]
    assert main(["bench", "--snapshot", *where, "--out", str(tmp_path / "out")]) == 0
    assert "a stream to its file" in capsys.readouterr().out and len(SnapshotRecord.below(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prefill", "9"], "exclude each other"),
        (["--streams", "2"], "--snapshot times one stream and does not take --streams"),
        (["--backend", "hf"], "one of the engine's"),
    ],
)
def test_what_does_not_go_together_is_refused(more, message, capsys):
    given = ["bench", "--model", "random:pythia-14m", "--device", "cpu", "--cap", "32", "--snapshot", *more]
    assert main(given) == 2 and message in capsys.readouterr().err
