"""The diagnosis of planted runs, its record and reports; the command on a tiny model, and what it refuses."""

import csv
import errno
import json
import os
import re
import shlex
import signal
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model
from record_factory import make_arrays, make_record

import sinkstream.evaluation.batch as batch_module
from sinkstream.cli import main
from sinkstream.cli.show import PIPE_WIDTH
from sinkstream.evaluation.settings import RunSettings
from sinkstream.records.records import load_record, load_records, write_record
from sinkstream.report.documents import render_tables
from sinkstream.report.summary import write_summary
from sinkstream.studies.diagnosis.attribution import PARTS
from sinkstream.studies.diagnosis.diagnose import Controls, diagnose
from sinkstream.studies.diagnosis.plots import DIAGNOSIS_PICTURES
from sinkstream.studies.diagnosis.record import Diagnosis, build_diagnosis
from sinkstream.studies.diagnosis.run import diagnosis_settings, length_caps, pair_runs
from sinkstream.studies.diagnosis.tables import (
    DIAGNOSIS_HEADLINES,
    DIAGNOSIS_TABLES,
    find_diagnosis,
    markdown_diagnosis,
)
from sinkstream.studies.diagnosis.verdict import VERDICTS

ROOT = Path(__file__).resolve().parents[2]
TOKENS, PERIOD, CAP = 6400, 64, 256
STRICT = {"peak": CAP}


def lazy_arrays(extra=(), *, seed=1, shift=0.0, noise=0.05):
    """A lazy run of period 64 with extra NLL from every event on; all seeds share the text's part of the NLL."""
    arrays = make_arrays(TOKENS, seed=seed, shift=shift, noise=noise)
    since = np.arange(TOKENS) % PERIOD
    cycle = np.zeros(PERIOD)
    cycle[: len(extra)] = extra
    event = since == 0
    arrays["nll"] = arrays["nll"] + cycle[since]
    seconds = np.where(event, 0.05, 0.02)
    kv = CAP - PERIOD + 1 + since
    return arrays | {"event": event, "drop_size": event * PERIOD, "kv_length": kv, "seconds": seconds}


@pytest.fixture
def store(tmp_path):
    """Write a run record and load it again."""

    def write(name, policy="lazy", arrays=None, *, options=None, label=None, **keywords):
        arrays = make_arrays(TOKENS) if arrays is None else arrays
        content = make_record(name, policy, arrays=arrays, options=STRICT | (options or {}), **keywords)
        content["policy"]["label"] = label or name
        return load_record(write_record(content, arrays, tmp_path / "runs"))

    return write


def strict_arrays(*, seed=2, noise=0.05, kv=CAP):
    arrays = make_arrays(TOKENS, seed=seed, noise=noise)
    every = np.ones(TOKENS, dtype=bool)
    return arrays | {"event": every, "drop_size": every * 1, "kv_length": np.full(TOKENS, kv)}


def diagnosed(store, arrays, **controls):
    strict = store("strict", "strict", strict_arrays())
    return diagnose(store("policy", "lazy", arrays), Controls(strict, **controls))


# ---- figures and verdicts ----


def test_a_planted_spike_is_measured_and_named(store):
    entry = diagnosed(store, lazy_arrays(np.full(5, 0.4)))
    spike = entry["spike"]["strict"]
    assert spike["found"] and spike["peak"]["low"] < 0.4 < spike["peak"]["high"]
    assert spike["area"]["low"] < 2.0 < spike["area"]["high"] and spike["width"]["low"] < 5 < spike["width"]["high"]
    assert entry["delta_ppl"]["strict"]["delta_percent"] == pytest.approx(100 * np.expm1(2 / 64), abs=0.4)
    assert entry["verdict"]["outcome"] == "no-go: spike" and "ΔPPL +3." in entry["verdict"]["line"]
    assert entry["attribution"]["shares"]["near_event"] == pytest.approx(1, abs=0.1)
    assert entry["period"] == {"events": 100, "min": 64, "median": 64.0, "max": 64}


def test_a_level_without_a_spike_points_at_drift(store):
    entry = diagnosed(store, lazy_arrays(shift=0.05))
    assert entry["verdict"]["outcome"] == "no-go: drift" and "drift and positions first" in entry["verdict"]["line"]
    outside = entry["long_run"]["outside_events"]
    assert outside["low"] < 0.05 < outside["high"]
    assert entry["long_run"]["growth"]["low"] < 0 < entry["long_run"]["growth"]["high"]


def test_extreme_events_are_counted(store):
    arrays = lazy_arrays()
    arrays["nll"] = arrays["nll"] + np.where(np.arange(TOKENS) % (10 * PERIOD) == 3, 8.0, 0.0)
    extreme = diagnosed(store, arrays)["extreme"]
    assert extreme["extreme"] == 10 and extreme["extreme_per_1000_tokens"] == pytest.approx(10 / 6.4)
    assert extreme["mean_nats"]["max"] == pytest.approx(8 / 32, abs=0.05) and extreme["mean_nats"]["p50"] < 0.05


def test_growing_error_is_seen(store):
    arrays = lazy_arrays()
    arrays["nll"] = arrays["nll"] + np.linspace(0, 0.2, TOKENS)
    growth = diagnosed(store, arrays)["long_run"]["growth"]
    assert growth["low"] < 0.1 < growth["high"] and growth["low"] > 0.05


def test_noise_is_a_go(store):
    entry = diagnosed(store, lazy_arrays())
    assert entry["verdict"]["outcome"] == "go" and not entry["spike"]["strict"]["found"]
    assert "not shown to be worse" in entry["verdict"]["line"]
    assert all(share is None for share in entry["attribution"]["shares"].values())
    assert set(VERDICTS) >= {entry["verdict"]["outcome"]}


def test_plain_figures_do_not_see_a_paired_spike_that_the_text_hides(store):
    """The plan's unpaired maximum is nearly the same for policy and control, spike or not."""
    plain = diagnosed(store, lazy_arrays(np.full(5, 0.4)))["plain"]
    assert plain["policy"]["max"]["mean"] == pytest.approx(plain["strict"]["max"]["mean"], rel=0.05)
    assert plain["policy"]["area"]["mean"] > 10


def test_latency_and_lengths(store):
    entry = diagnosed(store, lazy_arrays())
    latency, drift = entry["latency"], entry["drift"]
    assert latency["event_steps"]["p50"] == pytest.approx(50) and latency["other_steps"]["p99"] == pytest.approx(20)
    assert latency["tokens"] == TOKENS - 64
    assert drift["kv_length"] == {"min": 193, "mean": pytest.approx(224.5), "max": 256, "share_past_trained": 0}
    assert drift["drop_size"]["p99"] == 64


def test_strict_runs_at_other_caps_tell_fewer_tokens(store):
    arrays = lazy_arrays(noise=0.01)
    arrays["nll"] = arrays["nll"] + 0.001 * (CAP - arrays["kv_length"])
    lengths = {}
    for cap in (192, 224):
        shorter = strict_arrays(noise=0.01, kv=cap)
        shorter["nll"] = shorter["nll"] + 0.001 * (CAP - cap)
        lengths[cap] = store(f"strict-{cap}", "strict", shorter, cap=cap)
    entry = diagnosed(store, arrays, lengths=lengths)
    parts = entry["attribution"]["parts"]
    assert parts["fewer_tokens"]["value"] == pytest.approx(0.0315, abs=0.003)
    assert abs(parts["near_event"]["value"]) < 0.003
    assert sum(part["value"] for part in parts.values()) == pytest.approx(entry["attribution"]["total"]["value"])


def test_an_event_at_every_token(store):
    arrays = strict_arrays(seed=5)
    arrays["nll"] = arrays["nll"] + 0.1
    entry = diagnosed(store, arrays)
    assert entry["verdict"]["outcome"] == "no-go: drift" and "no spike can be told" in entry["verdict"]["line"]
    assert entry["attribution"]["parts"]["near_event"]["value"] == 0


def test_a_run_without_events_is_refused(store):
    arrays = lazy_arrays() | {"event": np.arange(TOKENS) == 7}
    with pytest.raises(ValueError, match="has 1 prune events; a diagnosis needs at least 2"):
        diagnosed(store, arrays)


@pytest.mark.parametrize("other", [{"model": "pythia-70m"}, {"text": "wikitext"}])
def test_a_control_of_another_text_or_model_is_refused(store, other):
    strict, lazy = store("strict", "strict", strict_arrays(), **other), store("policy", "lazy", lazy_arrays())
    with pytest.raises(ValueError, match="another text or another model"):
        diagnose(lazy, Controls(strict))
    with pytest.raises(ValueError, match="another text or another model"):
        pair_runs([lazy, strict])


# ---- which runs ----


def test_controls_are_found_by_what_they_are(store):
    lazy = store("policy", "lazy", lazy_arrays())
    strict = store("strict", "strict", strict_arrays())
    store("half", "strict", strict_arrays(), dtype="float16")
    shorter = store("shorter", "strict", strict_arrays(), cap=192)
    full, recompute = store("full", "full"), store("recompute", "recompute", sample_every=8)
    store("elsewhere", "recompute", cap=192)
    ((found, controls),) = pair_runs(load_records(lazy.path.parent))
    assert found.id == lazy.id
    ids = {"strict": strict.id, "full": full.id, "recompute": recompute.id, "lengths": {"192": shorter.id}}
    assert controls.record() == ids


def test_pairing_refuses_what_cannot_be_diagnosed(store):
    lazy = store("policy", "lazy", lazy_arrays())
    with pytest.raises(ValueError, match="has no strict run beside it"):
        pair_runs([lazy, store("shorter", "strict", strict_arrays(), cap=192)])
    with pytest.raises(ValueError, match="no policy to diagnose among the records \\(full, strict\\)"):
        pair_runs([store("strict", "strict", strict_arrays()), store("full", "full")])
    with pytest.raises(ValueError, match=r"several values of cap .256, 192.*accepted: policies of one cap"):
        pair_runs([lazy, store("small", "lazy", lazy_arrays(), cap=192), store("other", "strict", strict_arrays())])
    with pytest.raises(ValueError, match="no run records"):
        pair_runs([])


def settings(method="lazy", cap=512, **options):
    return RunSettings(method, cap=cap, options=options, evaluate="blocks")


def test_a_diagnosis_runs_the_policies_and_their_controls():
    policies = [settings(compress_every=64), settings("refresh-uniform", compress_every=64, refresh=64)]
    runs = diagnosis_settings(policies, tokens=4000, trained_positions=2048, sample_every=32)
    assert runs[-2:] == policies
    assert [(one.method, one.cap) for one in runs[:-2]] == [
        ("strict", 512),
        *(("strict", cap) for cap in (448, 480)),
        ("recompute", 512),
    ]
    assert {one.prefill_tokens(4000) for one in runs} == {512}
    short = diagnosis_settings(policies, tokens=2000, trained_positions=2048)
    assert [one.method for one in short if one.method in ("full", "recompute")] == ["full", "recompute"]


@pytest.mark.parametrize(
    ("compress_every", "expected"), [(1, []), (16, [480]), (64, [448, 480]), (256, [256, 384, 448, 480])]
)
def test_the_lengths_span_what_the_policy_sees(compress_every, expected):
    assert length_caps([settings(compress_every=compress_every)]) == expected


def test_growth_outside_the_cap_is_spanned_up_to_the_trained_length():
    one = RunSettings("lazy", cap=512, options={"compress_every": 256}, cap_accounting="published")
    assert length_caps([one], 640) == [640] and length_caps([one], 4096) == [767]


@pytest.mark.parametrize(
    ("policy", "tokens", "message"),
    [
        (settings("full"), 4000, "policy 'full' has no prune events"),
        (settings("strict"), 4000, "'strict' is the control of every diagnosis"),
        (settings(compress_every=256), 1024, "shorter than two prune periods of lazy R=256 .256 tokens each."),
        (settings(), 300, "leaves nothing to decode"),
        (RunSettings("lazy", options={"window": 64}), 4000, "give --cap"),
    ],
)
def test_runs_that_cannot_be_diagnosed_are_refused_before_they_start(policy, tokens, message):
    with pytest.raises(ValueError, match=message):
        diagnosis_settings([policy], tokens=tokens, trained_positions=8192)


# ---- records and reports ----


def build(store, label="lazy R=64", **keywords):
    strict = store("strict", "strict", strict_arrays(), cap=512, **keywords)
    run = store("policy", "lazy", lazy_arrays(np.full(5, 0.4)), label=label, cap=512, **keywords)
    entry = diagnose(run, Controls(strict))
    return build_diagnosis(
        [run],
        [entry],
        arguments={},
        command=["sinkstream", "diagnose"],
        git=run.environment["git"],
        created="2026-01-01T00:00:00+00:00",
        seed=0,
    )


def test_a_record_reads_back_as_it_was_written(store, tmp_path):
    content = build(store)
    path = Diagnosis.write(content, tmp_path)
    read = Diagnosis.read(path)
    assert read.policies[0]["label"] == "lazy R=64" and read.policies[0]["spike"]["strict"]["found"] is True
    area, written = read.policies[0]["spike"]["strict"]["area"], content["policies"][0]["spike"]["strict"]["area"]
    assert area["value"] == pytest.approx(written["value"], rel=1e-6)
    assert [one.id for one in Diagnosis.below(tmp_path)] == [read.id]
    assert {r.id for r in load_records(tmp_path)} == {"strict", "policy"}, "run records are read past it"
    with pytest.raises(ValueError, match="never overwritten"):
        Diagnosis.write(content, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "sinkstream.diagnosis/2"}, "field 'schema' is 'sinkstream.diagnosis/2'"),
        ({"model": None}, "field 'model' is null"),
        ({"policies": []}, "field 'policies' is empty"),
        ({"policies": [{}]}, r"policies\[0\].label"),
        ({"protocol": {}}, "protocol.backend"),
    ],
)
def test_other_records_are_refused(store, tmp_path, change, message):
    path = Diagnosis.write(build(store), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
        Diagnosis.read(path)
    run = next((tmp_path / "runs").glob("*.json"))
    with pytest.raises(ValueError, match=r"'sinkstream\.run/1'; this version reads 'sinkstream\.diagnosis/1'"):
        Diagnosis.read(run)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not a JSON file"):
        Diagnosis.read(tmp_path / "broken.json")


def test_records_of_a_gpu_are_diagnosed_on_a_machine_without_one(store, tmp_path):
    """The environment is that of the runs; what diagnosed them is told beside it."""
    strict = store("strict", "strict", strict_arrays(), device="cuda")
    lazy = store("policy", "lazy", lazy_arrays(), device="cuda")
    out = tmp_path / "out"
    assert main(["diagnose", str(strict.path), str(lazy.path), "--out", str(out)]) == 0
    (diagnosis,) = Diagnosis.below(out)
    assert diagnosis.environment == lazy.environment and diagnosis.environment["gpu"]["name"] == "Test GPU"
    assert set(diagnosis.protocol["diagnosis_git"]) == {"commit", "dirty", "reason"}
    assert "Test GPU" in markdown_diagnosis(diagnosis)


def test_tables_and_headline_come_from_the_record(store, tmp_path):
    Diagnosis.write(build(store, model="SmolLM2-135M-Instruct.Q4_1", text="pg19_dragons_blood"), tmp_path)
    (diagnosis,) = Diagnosis.below(tmp_path)
    area = diagnosis.policies[0]["spike"]["strict"]["area"]
    found = write_summary(tmp_path).headlines["diagnosis.spike_area_lazy64"]
    assert found["record"] == diagnosis.id and found["low"] < found["value"] < found["high"]
    assert found["value"] == pytest.approx(area["value"], rel=1e-5)
    table = render_tables(tmp_path)["diagnosis-pg19-smollm2"]
    assert table == markdown_diagnosis(diagnosis) and "| lazy R=64 |" in table and "no-go: spike" in table
    assert all(text in table for text in PARTS.values())
    overview = render_tables(tmp_path)["diagnosis-overview"]
    assert "| SmolLM2-135M, PG19 (20,000) |" in overview and table.splitlines()[4].split(" | ")[1] in overview
    assert "*no records yet*: neox-27m-sink, PG19; " in overview
    widths = [{line.count("|") for line in part.splitlines()} for part in table.split("\n\n")[1:]]
    assert all(len(width) == 1 for width in widths)


def test_the_diagnosis_of_the_most_tokens_is_shown_and_of_those_the_newest():
    def one(name, tokens, text="pg19"):
        found = {"name": "SmolLM2-135M"}, {"name": text}, {"cap": 512, "decode_tokens": tokens}
        return SimpleNamespace(id=name, model=found[0], data=found[1], protocol=found[2])

    several = [one("old", 900), one("new", 900), one("short", 90), one("other", 9000, "wikitext")]
    assert find_diagnosis(several, model="smollm2-135m", text="pg19", cap=512).id == "new"
    assert find_diagnosis(several, model="smollm2-135m", text="pg19", cap=256) is None


def test_without_records_keys_are_absent_and_tables_say_so(tmp_path):
    assert render_tables(tmp_path)["diagnosis-pg19-smollm2"] == "*no records yet*"
    summary = write_summary(tmp_path)
    assert not summary.headlines and set(DIAGNOSIS_HEADLINES) <= set(summary.missing)
    assert len(DIAGNOSIS_TABLES) == 8
    overview = render_tables(tmp_path)["diagnosis-overview"]
    assert overview.startswith("*no records yet*: SmolLM2-135M, PG19; ") and overview.count(";") == 5


# ---- the command ----


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("diagnose")
    tiny_model.save_model(folder / "tiny")
    tiny_model.write_text(folder / "text.txt", 900)
    return folder


@pytest.fixture
def cli(model_folder, tmp_path, monkeypatch, capsys):
    """Run a diagnose line in a fresh folder beside the model."""
    for entry in model_folder.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    shared = "--model tiny --text text.txt --cap 48 --out out"

    def call(line: str, shared: str = shared) -> SimpleNamespace:
        capsys.readouterr()
        code = main(["diagnose", *shlex.split(shared), *shlex.split(line)])
        told = capsys.readouterr()
        return SimpleNamespace(code=code, out=told.out, err=told.err)

    return call


LINE = "--tokens 600 --policy lazy:compress_every=16,max-drop:compress_every=16:max_drop=4 --sample-every 40"


def test_the_command_writes_everything_and_resumes(cli, tmp_path):
    done = cli(f"{LINE} --timed-tokens 90")
    assert (done.code, done.err) == (0, "")
    (diagnosis,) = Diagnosis.below(tmp_path / "out")
    runs = load_records(tmp_path / "out" / "runs")
    assert [entry["label"] for entry in diagnosis.policies] == ["lazy R=16", "max-drop R=16 max_drop=4"]
    assert sorted(r.protocol["cap"] for r in runs if r.policy["name"] == "strict") == [24, 36, 42, 45, 48]
    assert {entry["latency"]["tokens"] for entry in diagnosis.policies} == {90 - 64}
    assert all(entry["verdict"]["line"] in done.out for entry in diagnosis.policies)
    assert max(map(len, done.out.split("lazy R=16: ")[0].splitlines())) <= PIPE_WIDTH
    files = {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()}
    pictures = {f"01-lazy-r-16-{name}.png" for name in DIAGNOSIS_PICTURES} | {"attribution.png"}
    assert pictures | {"diagnosis.html", "01-lazy-r-16-tokens.csv", "01-lazy-r-16-events.csv"} <= files
    page = (tmp_path / "out" / "diagnosis.html").read_text()
    assert page.count("data:image/png;base64,") == 2 * len(DIAGNOSIS_PICTURES) + 1
    assert not re.search(r'(src|href)="(?!data:|#policy-)', page), "the page refers to no other file"
    found = [re.findall(rf'{attribute}([^"]+)"', page) for attribute in ('href="#', 'id="')]
    assert found == [["policy-0", "policy-1"]] * 2
    assert len(page) < 2 * 150_000 + 50_000, "twenty policies stay under three megabytes"
    with (tmp_path / "out" / "tables" / "01-lazy-r-16-tokens.csv").open() as file:
        rows = list(csv.DictReader(file))
    lazy = next(r for r in runs if r.policy["name"] == "lazy")
    strict = next(r for r in runs if r.policy["name"] == "strict" and r.protocol["cap"] == 48)
    assert len(rows) == 600 - 49 and rows[0]["index"] == "49"
    assert (
        "".join(row["token"] for row in rows[:20])
        == tiny_model.SENTENCE[49:60].replace("\n", r"\n") + "The quick "[:-1]
    )
    assert [float(row["nll"]) for row in rows[:9]] == pytest.approx(lazy.arrays["nll"][:9].tolist(), abs=1e-5)
    assert [float(row["control_nll"]) for row in rows[:9]] == pytest.approx(strict.arrays["nll"][:9].tolist(), abs=1e-5)
    assert [row["event"] for row in rows].count("1") == diagnosis.policies[0]["period"]["events"]
    assert sum(row["time_ms"] != "" for row in rows) == 90
    with (tmp_path / "out" / "tables" / "02-max-drop-r-16-max-drop-4-events.csv").open() as file:
        events = list(csv.DictReader(file))
    assert len(events) == diagnosis.policies[1]["period"]["events"]
    assert {(e["drop_size"], e["kv_len"]) for e in events} == {("4", "45")}, "one step drops at most four"
    whole = {(e["drop_steps"], e["dropped"], e["tokens_to_next"]) for e in events[:-1]}
    assert len(whole) == 1 and whole.pop()[1:] == ("20", "20"), "all that an event drops, though not at once"
    again = cli(f"{LINE} --timed-tokens 90 --resume")
    assert again.code == 0 and again.out.count("taken from") == len(runs)
    first, second = Diagnosis.below(tmp_path / "out")
    assert first.policies == second.policies

    read = cli("", shared="out/runs --out again")
    assert read.code == 0, read.err
    assert Diagnosis.below(tmp_path / "again")[0].policies == first.policies, "records give the same figures"
    assert "run records hold no text" in read.out and "run records hold no text" not in done.out


def test_ctrl_c_keeps_the_runs_and_says_how_to_go_on(cli, tmp_path, monkeypatch):
    plain, calls = batch_module.run, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return plain(*args)

    monkeypatch.setattr(batch_module, "run", interrupted)
    assert cli(LINE).code == 130
    assert [r.status for r in load_records(tmp_path / "out" / "runs")] == ["complete"]
    assert not list((tmp_path / "out").glob("*.json"))
    monkeypatch.setattr(batch_module, "run", plain)
    done = cli(f"{LINE} --resume")
    assert done.code == 0 and done.out.count("taken from") == 1


def test_a_full_disk_keeps_the_diagnosis_elsewhere(cli, tmp_path, monkeypatch):
    assert cli(LINE).code == 0
    runs, (whole,) = tmp_path / "out" / "runs", Diagnosis.below(tmp_path / "out")
    refused, rescued, move = tmp_path / "refused", tmp_path / "rescued", os.replace
    rescued.mkdir()

    def full(source, target):
        if refused in Path(target).resolve().parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return move(source, target)

    monkeypatch.setattr(tempfile, "tempdir", str(rescued))
    monkeypatch.setattr("sinkstream.records.files.os.replace", full)
    done = cli(str(runs), shared=f"--out {refused}")
    assert done.code == 2 and "No space left on device" in done.err
    told = re.search(r"; the record was kept as (\S+)\n", done.err).group(1)
    assert Diagnosis.read(told).policies == whole.policies and rescued in Path(told).parents
    done = cli(str(runs), shared="--out text.txt")
    assert done.code == 2 and "--out text.txt: cannot be written" in done.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--tokens 70 --policy lazy:compress_every=16", "shorter than two prune periods of lazy R=16"),
        ("--tokens 600 --policy full", "'full' has no prune events"),
        ("--tokens 600 --policy strict", "'strict' is the control"),
        ("--tokens 5000 --policy lazy", "too short: it has 900 tokens"),
    ],
)
def test_mistakes_are_told_in_one_line(cli, tmp_path, line, message):
    done = cli(line)
    assert done.code == 2
    assert re.fullmatch(r"sinkstream diagnose: error: .+\n", done.err) and message in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("empty", "empty: there are no run records; accepted: records that sinkstream eval or diagnose wrote"),
        (
            "empty --out=x --cap 64",
            "--cap 64 changes nothing about runs that are records already; accepted together with",
        ),
        ("nosuch.json", "nosuch.json: there is no such record"),
        (
            "notes.json",
            "notes.json: field 'schema' is 'sinkstream.diagnosis/1'; this version reads 'sinkstream.run/1'",
        ),
    ],
)
def test_mistakes_about_records_are_told_in_one_line(cli, tmp_path, line, message):
    (tmp_path / "notes.json").write_text('{"schema": "sinkstream.diagnosis/1"}')
    (tmp_path / "empty").mkdir()
    done = cli(line, shared="")
    assert done.code == 2
    assert re.fullmatch(r"sinkstream diagnose: error: .+\n", done.err) and message in done.err
