"""Matrices of points: what a file means, that nothing finished is redone or lost, with the figures of eval."""

import errno
import json
import os
import shlex
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import tiny_model
import torch

import sinkstream.evaluation.runner as runner
import sinkstream.matrix.measure as measuring
import sinkstream.records.files as files
from sinkstream.cli import main
from sinkstream.evaluation.run import run
from sinkstream.evaluation.settings import RunSettings
from sinkstream.matrix.file import KEYS, read_matrix
from sinkstream.matrix.record import PointRecord, load_points, point_delta
from sinkstream.measure.bandwidth import Bandwidth
from sinkstream.records.records import load_records
from sinkstream.statistics import paired_delta_ppl

TOKENS, CAP = 240, 40
FOLDER = Path(__file__).resolve().parents[2] / "experiments"
EXPERIMENTS = [path for path in sorted(FOLDER.glob("*.toml")) if path.stem != "criteria"]
HEAD = f"""
name = "trial"
[models]
tiny = "tiny"
[texts]
text = {{ source = "text.txt", tokens = {TOKENS} }}
[defaults]
cap = {CAP}
steady_tokens = 4
warmup_tokens = 1
"""
QUALITY = 'speed_backend = "none"\n'
BASELINES = '[[grid]]\npolicy = ["recompute", "strict"]\n'


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a tiny model and a text, as the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measuring, "memory_bandwidth", lambda device: Bandwidth("host memcpy", 10.0, 11.0, 1 << 20))
    tiny_model.save_model(tmp_path / "tiny")
    tiny_model.write_text(tmp_path / "text.txt", 2 * TOKENS)
    return tmp_path


@pytest.fixture
def matrix(here, capsys):
    """Write a matrix file and run the command on it; returns exit code, stdout and stderr."""

    def call(content: str, more: str = "") -> SimpleNamespace:
        (here / "m.toml").write_text(content)
        capsys.readouterr()
        try:
            code = main(["matrix", "m.toml", "--out", "out", "--device", "cpu", *shlex.split(more)])
        except SystemExit as stop:
            code = stop.code
        told = capsys.readouterr()
        return SimpleNamespace(code=code, out=told.out, err=told.err, points=load_points("out"))

    return call


def by_label(points: list[PointRecord]) -> dict[str, PointRecord]:
    return {point.label: point for point in points}


# ---- the file ----


def test_a_grid_is_every_combination_and_baselines_come_first(here):
    grid = (
        'policy = ["lazy", { name = "refresh-uniform", refresh = 4 }]\ncompress_every = [2, 4]\nmax_drop = ["none", 2]'
    )
    (here / "m.toml").write_text(f'{HEAD}[[grid]]\n{grid}\n{BASELINES}[[point]]\npolicy = "lazy"\ncompress_every = 2\n')
    matrix = read_matrix(here / "m.toml", device="cpu")
    labels = [point.settings.label() for point in matrix.points]
    assert labels[:2] == ["recompute", "strict"]
    assert len(labels) == len(set(labels)) == 2 + 8, "the single point is one of the grid"
    recompute, strict, *others = matrix.points
    for point in others:
        assert matrix.baselines(point) == {"recompute": recompute, "strict": strict, "full": None}
    assert matrix.baselines(strict)["strict"] is None, "no point is its own baseline"
    assert [p.settings.label() for p in matrix.points if p.settings.options.get("refresh")] == labels[6:]


def test_a_baseline_is_of_the_same_text_and_prefill_and_of_the_nearest_cap_below(here):
    points = "".join(
        f'[[point]]\npolicy = "{policy}"\ncap = {cap}\nprefill = {prefill}\n'
        for policy, cap, prefill in [
            ("strict", 20, 40),
            ("strict", 38, 40),
            ("strict", 60, 40),
            ("strict", 40, 50),
            ("lazy", 40, 40),
        ]
    )
    (here / "m.toml").write_text(HEAD + points)
    matrix = read_matrix(here / "m.toml", device="cpu")
    lazy = next(p for p in matrix.points if p.settings.method == "lazy")
    found = matrix.baselines(lazy)["strict"]
    assert (found.settings.cap, found.settings.prefill) == (38, 40)


def test_an_id_is_the_hash_of_all_that_the_figures_depend_on(here):
    def ids(content: str, **more) -> list[str]:
        (here / "m.toml").write_text(content)
        return [point.id for point in read_matrix(here / "m.toml", device="cpu", **more).points]

    plain = HEAD + '[[point]]\npolicy = "lazy"\n'
    one = ids(plain)
    assert ids(plain) == one == ids(plain.replace("trial", "another name"))
    changes = ["compress_every = 8", "prefill = 41", "seed = 1", QUALITY, 'quality_backend = "ring"', "repeats = 2"]
    others = [ids(plain + change + "\n") for change in changes]
    tiny_model.save_model(here / "other" / "tiny", "llama")
    others += [ids(plain, models=["other/tiny"]), ids(plain, dtype="bfloat16")]
    measuring_text = (here / "text.txt").read_text()
    (here / "same.txt").write_text(measuring_text.upper())
    others.append(ids(plain, texts=["text=same.txt"]))
    assert len({*one, *(i for found in others for i in found)}) == 1 + len(others)


def test_a_model_or_text_that_replaces_another_does_not_bear_its_name(here):
    (here / "m.toml").write_text(HEAD + '[[point]]\npolicy = "lazy"\n')
    tiny_model.save_model(here / "other" / "small", "llama")
    (here / "novel.txt").write_text((here / "text.txt").read_text())

    def names(**more) -> tuple[str, str]:
        (point,) = read_matrix(here / "m.toml", device="cpu", **more).points
        return point.model.name, point.text.name

    assert names() == ("tiny", "text")
    assert names(models=["other/small"], texts=["novel.txt"]) == ("small", "novel")
    assert names(models=["tiny=other/small"], texts=["text=novel.txt"]) == ("tiny", "text"), "a typed name is kept"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (HEAD + "[[grid\n", ("m.toml: not valid TOML", "at line 11")),
        (HEAD + '[[grid]]\npolicy = "lazy"\nwidow = 3\n', ("[[grid]] 1: unknown key 'widow'", "compress_every", *KEYS)),
        (HEAD + '[[grid]]\npolicy = { name = "lazy", cup = 3 }\n', ("unknown key 'cup'", "max_drop")),
        (HEAD + "[[grid]]\nslak = 4\n", ("unknown key 'slak' (did you mean 'slack'?); accepted: model",)),
        ("title = 3\n" + HEAD, ("m.toml: unknown key 'title'", "defaults, grid, point")),
        (HEAD + "[[grid]]\nseed = 1\nseed = 2", ("m.toml: not valid TOML", "at line 13, the end of the document")),
        ("name = 5\n" + HEAD.replace('name = "trial"', ""), ("m.toml: name=5 is not accepted; accepted: a string",)),
        (HEAD + '[[point]]\npolicy = "lazy"\nmodel = ""\n', ("model='' is not in [models]; accepted: tiny",)),
        *(
            (HEAD + f'[[point]]\npolicy = "{policy}"\n{name} = 0\n', (f"{name}=0 is not accepted; accepted: a whole",))
            for policy, name in (
                *(("strict", name) for name in ("repeats", "steady_tokens", "warmup_tokens", "block_tokens")),
                ("recompute", "sample_every"),
            )
        ),
        (HEAD + '[[point]]\npolicy = "lazy"\nseed = -1\n', ("seed=-1 is not accepted; accepted: 0 to",)),
        (HEAD + '[[grid]]\npolicy = "lezy"\n', ("policy='lezy' is not known (did you mean 'lazy'?)", "strict")),
        (HEAD + '[[grid]]\npolicy = "lazy"\ncap = [40, "x"]\n', ("cap='x' is not accepted", "a whole number")),
        (HEAD + '[[grid]]\npolicy = "lazy"\nmax_drop = true\n', ("max_drop=True is not accepted", "a whole number")),
        (
            HEAD + '[[grid]]\npolicy = "lazy"\ncompress_every = [4, 64]\n',
            ("compress_every", "cap=40 is too small", "68"),
        ),
        (HEAD + '[[grid]]\npolicy = "lazy"\ncap = 300\n', ("the text has 240 tokens", "at least 302")),
        (HEAD + '[[grid]]\npolicy = "lazy"\ncap = []\n', ("cap is an empty list",)),
        (HEAD + '[[grid]]\npolicy = "lazy"\nmodel = "big"\n', ("model='big' is not in [models]", "tiny")),
        (HEAD + '[[grid]]\npolicy = "strict"\nspeed_backend = "hf-full"\n', ("does not run policy 'strict'", "auto")),
        (HEAD + '[[grid]]\npolicy = "strict"\nquality_backend = "none"\n' + QUALITY, ("measures nothing",)),
        (HEAD + "[[grid]]\ncap = 40\n", ("policy is missing",)),
        (HEAD, ("no points",)),
        (HEAD.replace('tiny = "tiny"', 'tiny = ""') + BASELINES, ("model 'tiny' has no place", "--model tiny=PATH")),
        (HEAD.replace('tiny = "tiny"', 'tiny = "./nosuch"') + BASELINES, ("model './nosuch' does not exist",)),
    ],
)
def test_what_is_wrong_in_a_file_is_said_before_anything_runs(matrix, content, said):
    done = matrix(content)
    assert done.code == 2 and not done.points and not Path("out").exists()
    for part in said:
        assert part in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("folder", "is a folder; accepted: a TOML file (this folder has none)"),
        ("nosuch.toml", "cannot be read: No such file"),
        ("m.toml --model big=tiny", "--model big=tiny: accepted: NAME=PLACE with NAME one of tiny"),
        ("m.toml --only 'lazy R=9'", "no point has all these words"),
        ("m.toml --only strict --only 'lazy R=9'", "--only 'lazy R=9': no point has all these words"),
        ("m.toml --only ' '", "--only ' ' holds no word; accepted: words of the names of points"),
        ("m.toml --only '\"cap'", "No closing quotation; accepted: words"),
    ],
)
def test_what_is_wrong_in_a_command_is_said(here, capsys, arguments, said):
    (here / "folder").mkdir()
    (here / "m.toml").write_text(HEAD + BASELINES)
    assert main(["matrix", *shlex.split(arguments), "--device", "cpu"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("path", EXPERIMENTS, ids=[path.stem for path in EXPERIMENTS])
def test_the_experiments_fit_together_at_equal_peak_slots(path):
    matrix = read_matrix(path, device="cpu")
    assert not matrix.without_baseline()
    peaks = {(p.settings.cap, q.peak) for p in matrix.points if (q := p.settings.policy()) and _counts_growth(p)}
    assert all(peak == cap for cap, peak in peaks)


def _counts_growth(point) -> bool:
    return point.settings.cap_accounting == "peak" and "window" not in point.settings.options


def test_the_minimal_matrix_is_the_plans():
    matrix = read_matrix(next(path for path in EXPERIMENTS if path.stem == "minimal_matrix"), device="cpu")
    assert matrix.points[0].model.spec == "EleutherAI/pythia-2.8b"
    policies = [p for p in matrix.points if p.settings.method not in ("recompute", "strict")]
    assert len(policies) == 8 * 2 * 2, "eight points, two texts, growth outside and inside the cap"
    published = [p for p in policies if p.settings.cap_accounting == "published"]
    assert {(p.settings.policy().window, p.settings.policy().sink) for p in published} == {(2048, 4)}
    assert max(p.settings.policy().peak for p in policies if p not in published) == 2048


# ---- runs ----


def test_a_point_has_the_figures_of_an_evaluation_and_of_a_benchmark(matrix):
    content = HEAD + BASELINES + 'sample_every = 3\n[[point]]\npolicy = "lazy"\ncompress_every = 8\nrepeats = 2\n'
    done = matrix(content)
    assert done.code == 0, done.err
    points, model = by_label(done.points), tiny_model.loaded()
    text = torch.tensor(model.tokenizer.encode((Path("text.txt")).read_text()))[:TOKENS]
    settings = {
        "lazy R=8": RunSettings("lazy", cap=CAP, options={"compress_every": 8}),
        "strict": RunSettings("strict", cap=CAP),
        "recompute": RunSettings("recompute", cap=CAP, sample_every=3),
    }
    runs = {label: run(model, text, one) for label, one in settings.items()}  # token by token, not in blocks
    for label, result in runs.items():
        assert points[label].quality["backend"] == "hf" and points[label].quality["evaluate"] == "blocks"
        assert points[label].ppl == pytest.approx(result.summary["ppl"], rel=1e-4)
    for label in ("strict", "recompute"):
        delta = point_delta(points["lazy R=8"], points[label])
        expected = paired_delta_ppl(runs["lazy R=8"].arrays["nll"], runs[label].arrays["nll"], block_tokens=9)
        assert delta.delta_percent == pytest.approx(expected.delta_percent, abs=2e-3)
        assert delta.n_tokens == np.isfinite(runs[label].arrays["nll"]).sum()
    ids = {label: point.id for label, point in points.items()}
    assert points["lazy R=8"].baselines == {"recompute": ids["recompute"], "strict": ids["strict"], "full": None}
    backends = {label: point.speed["backend"] for label, point in points.items()}
    assert backends == {"recompute": "hf-recompute-sdpa", "strict": "ring", "lazy R=8": "ring"}
    speed = points["lazy R=8"].speed
    assert len(speed["repeats"]) == 2 and len({one["record"] for one in speed["repeats"]}) == 2
    assert speed["tpot_ms_range"] == sorted(one["tpot_ms"] for one in speed["repeats"])
    assert speed["latency_ms"]["p99"] >= speed["latency_ms"]["p50"] > 0
    assert points["lazy R=8"].spike["baseline"] == ids["strict"] and points["strict"].spike is None


def test_finished_points_are_never_measured_again(matrix, monkeypatch):
    content = HEAD + QUALITY + BASELINES
    first = matrix(content, "--dry-run")
    assert first.code == 0 and "2 points (2 open)" in first.out and not first.points
    assert matrix(content).code == 0
    before = {path: path.read_bytes() for path in Path("out").glob("*.json")}
    assert len(before) == 2
    monkeypatch.setattr(measuring.Workbench, "measure", None)
    again = matrix(content)
    assert again.code == 0 and "2 complete" in again.out
    assert {path: path.read_bytes() for path in Path("out").glob("*.json")} == before
    assert "2 points (2 complete)" in matrix(content, "--dry-run").out


def test_one_point_is_no_points(matrix):
    content = HEAD + QUALITY + BASELINES
    assert "\n1 point (1 open);" in "\n" + matrix(content, "--dry-run --only recompute").out
    assert "1 of 1 point to measure" in matrix(content, "--only recompute").out


LONG = 1200  # more than the 1,024 positions that the tiny model was trained on


def test_a_dry_run_says_why_points_will_fail_as_the_run_does(matrix, here):
    tiny_model.write_text(here / "text.txt", LONG)
    content = HEAD.replace(f"tokens = {TOKENS}", f"tokens = {LONG}") + (
        '[[grid]]\npolicy = ["full", "recompute", "strict"]\ncap = 1100\n'
        '[[point]]\npolicy = "lazy"\ncap = 1100\nquality_backend = "none"\n'
        '[[grid]]\npolicy = ["slack"]\n' + QUALITY
    )
    dry = matrix(content, "--dry-run")
    assert dry.code == 1 and "5 points (5 open, 4 will fail)" in dry.out and not Path("out").exists()
    done = matrix(content)
    reasons = {point.label.split()[0]: point.status_reason for point in done.points}
    assert done.code == 1 and reasons.pop("slack") is None and len(reasons) == 4
    for reason in reasons.values():
        said = reason.removeprefix("ValueError: ").rpartition("cap 1100: ")[2]
        assert "1024 positions" in said and f"will fail: {said}" in " ".join(dry.out.split())
    again = matrix(content, "--dry-run")
    assert again.code == 0 and "will fail" not in again.out, "a failed point is not measured again unasked"
    allowed = matrix(content.replace("[defaults]", "[defaults]\nallow_untrained_positions = true"), "--dry-run")
    assert allowed.code == 0 and "5 points (5 open)" in allowed.out


def test_a_dry_run_refuses_a_folder_as_the_run_does_and_makes_none(matrix):
    content = HEAD + QUALITY + BASELINES
    assert matrix(content, "--dry-run --out deep/er").code == 0 and not Path("deep").exists()
    for out, said in (("text.txt", "File exists"), ("text.txt/x", "Not a directory")):
        dry, real = matrix(content, f"--dry-run --out {out}"), matrix(content, f"--out {out}")
        assert (dry.code, dry.out, dry.err) == (real.code, real.out, real.err) == (2, "", dry.err)
        assert f"--out {out}: cannot be written: {said}" in dry.err


def test_a_model_that_is_not_here_is_not_checked_and_the_dry_run_says_so(matrix):
    elsewhere = HEAD.replace('tiny = "tiny"', 'tiny = "nobody/nothing"') + QUALITY + BASELINES
    dry = matrix(elsewhere, "--dry-run")
    assert dry.code == 0 and "'nobody/nothing': its trained positions are not known" in " ".join(dry.out.split())
    assert "not known" not in matrix(HEAD + QUALITY + BASELINES, "--dry-run").out


def test_texts_share_a_timing_and_only_selects(matrix, here):
    tiny_model.write_text(here / "b.txt", TOKENS)
    two = HEAD.replace("[defaults]", "b = 'b.txt'\n[defaults]") + '[[grid]]\ntext = ["text", "b"]\npolicy = "strict"\n'
    one = matrix(two, "--only 'b \"cap 40\"'")
    assert [point.data["key"] for point in one.points] == ["b"]
    done = matrix(two)
    records = {point.speed["repeats"][0]["record"] for point in done.points}
    assert len(done.points) == 2 and len(records) == 1


def test_a_failing_point_is_recorded_and_the_others_go_on(matrix, monkeypatch):
    content = HEAD + QUALITY + '[[grid]]\npolicy = ["full", "strict"]\n'
    run_one = measuring.Workbench._score

    def break_full(self, point, *more):
        if point.settings.method == "full":
            raise RuntimeError("a kernel has gone\nwith a long story")
        return run_one(self, point, *more)

    with monkeypatch.context() as broken:
        broken.setattr(measuring.Workbench, "_score", break_full)
        done = matrix(content)
    points = by_label(done.points)
    assert done.code == 1 and {label: p.status for label, p in points.items()} == {
        "full": "failed",
        "strict": "complete",
    }
    assert points["full"].status_reason == "RuntimeError: a kernel has gone"
    assert "failed: RuntimeError: a kernel has gone" in done.out
    assert matrix(content).code == 1, "a failed point is not tried again unasked"
    retried = matrix(content, "--retry-failed")
    assert retried.code == 0 and by_label(retried.points)["full"].status == "complete"
    assert by_label(retried.points)["strict"] == points["strict"]


def test_a_lost_device_ends_the_run_and_fails_only_the_point_that_lost_it(matrix, monkeypatch):
    """A dead context would fail every later point of the process too."""
    content = HEAD + QUALITY + '[[grid]]\npolicy = ["full", "strict"]\n'

    def lose(self, point, *more):
        raise RuntimeError("an illegal memory access was encountered\nlater calls fail too")

    with monkeypatch.context() as broken:
        broken.setattr(measuring.Workbench, "_score", lose)
        broken.setattr(measuring, "device_works", lambda device: False)
        done = matrix(content)
    (failed,) = done.points
    assert done.code == 2 and failed.label == "full" and failed.status == "failed"
    assert failed.status_reason == "RuntimeError: an illegal memory access was encountered"
    assert "refuses all further work of this process; call the command again for the other points" in done.err
    went_on = matrix(content)
    assert went_on.code == 1 and by_label(went_on.points)["strict"].status == "complete"


def test_non_finite_logits_and_untrained_positions_fail_a_point(matrix, here):
    tiny_model.save_model(here / "tiny", poisoned=True)
    tiny_model.write_text(here / "text.txt", 2 * TOKENS, poison_at=200)
    done = matrix(HEAD + QUALITY + '[[point]]\npolicy = "strict"\n')
    assert done.code == 1 and "not finite" in done.points[0].status_reason
    assert done.points[0].quality is None


CHILD = """
import os, signal, sys
import sinkstream.matrix.measure as measuring
from sinkstream.measure.bandwidth import Bandwidth
measuring.memory_bandwidth = lambda device: Bandwidth("host memcpy", 10.0, 11.0, 1 << 20)
signal.signal(signal.SIGINT, signal.default_int_handler)
timed, number, seen = measuring.Workbench._time, int(sys.argv.pop(1)), []
def ending(self, point, *more):
    seen.append(point)
    if len(seen) == 2:
        os.kill(os.getpid(), number)
    return timed(self, point, *more)
measuring.Workbench._time = ending
from sinkstream.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_run_that_is_killed_in_the_middle_goes_on_where_it_ended(matrix, here, number):
    content = HEAD + '[[grid]]\npolicy = ["strict", { name = "lazy", compress_every = 4 }]\n'
    (here / "m.toml").write_text(content)
    done = processes.run("-c", CHILD, str(int(number)), "matrix", "m.toml", "--out", "out", "--device", "cpu")
    assert done.returncode == (130 if number == signal.SIGINT else -number), done.stderr
    (first,) = load_points("out")
    kept, (quality,) = first.path.read_bytes(), [r.id for r in load_records("out/runs") if r.label == "lazy R=4"]
    went_on = matrix(content)
    assert went_on.code == 0 and "1 of 2 points to measure" in went_on.out
    assert first.path.read_bytes() == kept
    assert by_label(went_on.points)["lazy R=4"].quality["record"] == quality, "what the point had measured is kept"


def test_a_full_disk_loses_nothing(matrix, monkeypatch):
    content = HEAD + QUALITY + BASELINES
    replace, written = os.replace, []

    def full(source, target):
        written.append(Path(target))
        if len([path for path in written if path.name.startswith("point-")]) > 1 and "rescued" not in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as disk:
        disk.setattr(files.os, "replace", full)
        done = matrix(content)
    assert done.code == 2 and "No space left on device" in done.err and "the record was kept as" in done.err
    assert [point.label for point in done.points] == ["recompute"]
    went_on = matrix(content)
    assert went_on.code == 0 and [point.label for point in went_on.points] == ["recompute", "strict"]


@pytest.mark.parametrize("where", ["folder", "library"])
def test_a_disk_that_is_full_within_a_point_is_no_fault_of_the_point(matrix, monkeypatch, where):
    """Its record would say "failed", and so would those of all the others; room made, they would not be measured."""
    content = HEAD + QUALITY + BASELINES
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def no_room(*args, dir=None, **more):
        if "runs" in str(dir):
            raise full
        return temporary(*args, dir=dir, **more)

    def no_cache(*args):
        raise full

    temporary = runner.tempfile.TemporaryFile
    with monkeypatch.context() as disk:
        if where == "folder":
            disk.setattr(runner.tempfile, "TemporaryFile", no_room)
        else:
            disk.setattr(measuring.Workbench, "_score", no_cache)
        done = matrix(content)
    assert done.code == 2 and "No space left on device" in done.err and done.points == []
    assert matrix(content).code == 0


def test_points_of_another_text_or_model_are_not_paired(matrix, here):
    tiny_model.write_text(here / "b.txt", TOKENS - 30)
    two = (
        HEAD.replace("[defaults]", "b = 'b.txt'\n[defaults]")
        + QUALITY
        + '[[grid]]\ntext = ["text", "b"]\npolicy = "strict"\n'
    )
    a, b = matrix(two).points
    with pytest.raises(ValueError, match="another text"):
        point_delta(a, b)
    assert point_delta(a, a).delta_percent == 0
    content = json.loads(a.path.read_text())
    content["quality"]["blocks"]["first"] += 1
    a.path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="other tokens"):
        point_delta(PointRecord.read(a.path), a)


def test_an_incomplete_record_is_refused(matrix):
    (point,) = matrix(HEAD + QUALITY + '[[point]]\npolicy = "strict"\n').points
    content = json.loads(point.path.read_text())
    for part, said in (("quality", "'quality' is null"), ("baselines", "'baselines' must be an object")):
        point.path.write_text(json.dumps(content | {part: None}))
        with pytest.raises(ValueError, match=said):
            PointRecord.read(point.path)
