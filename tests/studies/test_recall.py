"""Recall past the window: layout, a copying model whose recall is known, records, table, picture and command line."""

import json
import math
import re
import shlex
import signal

import numpy as np
import pytest
import tiny_model
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from rich.console import Console

import sinkstream.evaluation.run as run_module
import sinkstream.studies.recall.run as recall_module
from sinkstream.cli import main
from sinkstream.cli.show import PIPE_WIDTH
from sinkstream.data import TokenStream
from sinkstream.evaluation.backends import HfBackend
from sinkstream.evaluation.decoders import ModuleDecoder
from sinkstream.evaluation.run import Attempt
from sinkstream.evaluation.runner import Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.policies import PruneSchedule, Step
from sinkstream.records.records import load_records
from sinkstream.report.documents import NONE_YET, render_tables
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.recall.run import GAP, RecallBatch, RecallDesign
from sinkstream.studies.recall.tables import draw_recall, recall_curve, recall_table

CAP, SINK, SIZE = 100, 4, 16
WINDOW = CAP - SINK
VOCABULARY = 10_000  # tokens that the copying model knows
SURE = 0.9  # what the copying model gives to the token that it copies
DESIGN = RecallDesign(CAP, (0.25, WINDOW / CAP, (WINDOW + 1) / CAP, 2.0, 4.0), passages=8, passage_tokens=SIZE)


def text_of(tokens: int) -> TokenStream:
    """A text in which no token occurs twice."""
    ids = torch.randperm(tokens, generator=torch.Generator().manual_seed(3))
    return TokenStream.of(ids, name="permutation", source="test", text_sha256=None)


class CopyDecoder(ModuleDecoder):
    """Predicts the token that followed the present one before, if it is still visible; else any token alike."""

    def __init__(self, model, settings):
        super().__init__(model, settings)
        policy = settings.policy()
        self.schedule, self.sink = (PruneSchedule(policy), policy.sink) if policy else (None, 0)
        self.seen: list[int] = []

    def feed(self, ids, *, last_only):
        self._steps = [self._append(token) for token in ids.tolist()]
        return torch.zeros(1, 2)

    def steps(self):
        return self._steps

    def score(self, ids, targets):
        nll, steps = [], []
        for token, target in zip(ids.tolist(), targets.tolist()):
            steps.append(self._append(token))
            now = len(self.seen) - 1
            followers = [self.seen[j + 1] for j in range(now) if self.seen[j] == token and self._sees(j + 1, steps[-1])]
            uniform = 1 / VOCABULARY
            chance = uniform if not followers else SURE * (followers[-1] == target) + (1 - SURE) * uniform
            nll.append(-math.log(chance))
        self._steps = steps
        return torch.tensor(nll)

    def _append(self, token: int) -> Step:
        self.seen.append(token)
        return self.schedule.step() if self.schedule else Step(0, False, len(self.seen))

    def _sees(self, index: int, step: Step) -> bool:
        return index < self.sink or index >= len(self.seen) - (step.visible - self.sink)


GAIN = math.log(SURE + (1 - SURE) / VOCABULARY) + math.log(VOCABULARY)  # of a token that is copied


@pytest.fixture
def batch(tmp_path, monkeypatch):
    """Run policies with the copying model over `DESIGN`'s streams."""
    monkeypatch.setattr(HfBackend, "open", lambda self: CopyDecoder(self.loaded.model, self.settings))
    monkeypatch.setattr(run_module, "vocabulary_size", lambda model: VOCABULARY)
    return RecallBatch(tiny_model.loaded(), DESIGN.streams(text_of), Request(tmp_path, {}, ["sinkstream", "recall"], 0))


def policy(name: str, **options) -> RunSettings:
    return RunSettings(name, CAP, options, evaluate="blocks")


def gains(record) -> dict[float, float]:
    return {point.ratio: point.gain.value for point in recall_curve(record)}


# ---- layout ----


@hypothesis_settings(max_examples=30)
@given(
    cap=st.integers(8, 90),
    ratios=st.lists(st.sampled_from([1.0, 1.5, 2.0, 3.0, 7.0]), min_size=1, unique=True),
    passages=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_places_keep_their_distance_and_never_touch(cap, ratios, passages, seed):
    design = RecallDesign(cap, tuple(ratios), passages, 8, seed)
    places = design.placements()
    assert sorted(p.ratio for p in places) == sorted(ratios * passages)
    assert all(p.second - p.first == design.distance(p.ratio) for p in places)
    starts = np.array([start for p in places for start in (p.first, p.second)])
    assert starts.min() >= cap
    apart = {(p.first, p.second) for p in places}
    for a in starts:
        for b in starts:
            assert a == b or (min(a, b), max(a, b)) in apart or abs(a - b) >= 8 + GAP
    assert len(set(starts.tolist())) == len(starts)


def test_places_keep_no_step_with_prunes():
    starts = np.array([place.second for place in RecallDesign(256, passages=16).placements()])
    assert len(set((starts % 32).tolist())) > 24


def test_streams_differ_in_the_first_places_only():
    asked = []
    streams = DESIGN.streams(lambda tokens: asked.append(tokens) or text_of(tokens))
    repeated, control = streams.repeated.ids, streams.control.ids
    changed = np.zeros(len(control), dtype=bool)
    for place in streams.placements:
        passage = control[place.second : place.second + SIZE]
        assert torch.equal(repeated[place.first : place.first + SIZE], passage)
        changed[place.first : place.first + SIZE] = True
    assert np.array_equal((repeated != control).numpy(), changed)
    assert len(control.unique()) == len(control), "nothing occurs twice in the control"
    assert asked == [len(control) + len(streams.placements) * SIZE]
    assert streams.repeated.sha256 != streams.control.sha256


def test_the_seed_changes_the_streams_and_nothing_else_does():
    again, other = DESIGN.streams(text_of), RecallDesign(CAP, DESIGN.ratios, 8, SIZE, seed=1).streams(text_of)
    assert again.repeated.sha256 == DESIGN.streams(text_of).repeated.sha256 != other.repeated.sha256


def test_what_is_cut_out_for_the_full_cache():
    streams, positions = DESIGN.streams(text_of), 250
    trials = streams.excerpts(positions)
    fitting = [n for n, p in enumerate(streams.placements) if p.second - p.first + SIZE + 4 <= positions]
    assert [trial.scored[0][0] for trial in trials] == fitting and 0 < len(fitting) < len(streams.placements)
    for trial in trials:
        ((number, second),) = trial.scored
        place = streams.placements[number]
        assert len(trial.repeated) == len(trial.control) <= positions
        assert torch.equal(trial.repeated[:4], streams.repeated.ids[:4])
        assert torch.equal(trial.repeated[second:], streams.repeated.ids[place.second : place.second + SIZE])
        first = second - (place.second - place.first)
        assert torch.equal(trial.repeated[first : first + SIZE], trial.repeated[second:])
        assert not torch.equal(trial.control[first : first + SIZE], trial.control[second:])
        assert first == min(CAP + 4, positions - (len(trial.repeated) - first)) or len(trial.repeated) == positions
    assert len(streams.excerpts(None)) == len(streams.placements)
    with pytest.raises(ValueError, match="full cache of a passage seen 25 tokens before goes past the 40 trained"):
        streams.excerpts(40)


# ---- what is recalled ----


def test_strict_recalls_to_the_last_token_of_its_window_and_no_further(batch):
    (strict,) = batch.run([policy("strict")], Console(quiet=True))
    inside, outside = WINDOW / CAP, (WINDOW + 1) / CAP
    assert gains(strict) == pytest.approx({0.25: GAIN, inside: GAIN, outside: 0, 2: 0, 4: 0}, abs=1e-5)


def test_the_full_cache_recalls_at_every_distance_and_no_sinks_mean_a_longer_window(batch):
    full, window_only = batch.run([policy("full"), policy("window-only")], Console(quiet=True))
    assert gains(full) == pytest.approx(dict.fromkeys(DESIGN.ratios, GAIN), abs=1e-5)
    assert gains(window_only)[(WINDOW + 1) / CAP] == pytest.approx(GAIN, abs=1e-5)
    assert gains(window_only)[2.0] == 0
    assert full.summary["ppl"] is None and window_only.summary["ppl"] == pytest.approx(10_000)


def test_lazy_recalls_what_its_cache_holds_at_that_time(batch):
    """Growth inside the cap: the window is between 48 and 95 tokens long, so the boundary is a slope."""
    (lazy,) = batch.run([policy("lazy", compress_every=48)], Console(quiet=True))
    found = gains(lazy)
    assert found[0.25] == pytest.approx(GAIN, abs=1e-5)
    assert 0 <= found[WINDOW / CAP] < 0.2 * GAIN and found[2.0] == 0


def test_recompute_is_refused_before_anything_runs(batch, monkeypatch):
    monkeypatch.setattr(recall_module, "run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=r"'recompute' .*accepted: full, or an eviction policy"):
        batch.run([policy("strict"), policy("recompute")], Console(quiet=True))


# ---- records, table, picture ----


def test_a_record_is_complete_and_no_run_record(batch, tmp_path):
    (made,) = batch.run([policy("strict")], Console(quiet=True))
    assert load_records(tmp_path) == []
    (read,) = RecallRecord.below(tmp_path)
    assert read.id == made.id and read.status == "complete"
    assert len(read.passages["ratio"]) == 8 * len(DESIGN.ratios)
    assert read.environment["versions"]["torch"] and read.data["sha256"] == batch.streams.repeated.sha256
    assert (read.protocol["cap"], read.protocol["passage_tokens"], read.protocol["passages"]) == (CAP, SIZE, 8)
    text = read.path.read_text()
    for broken, message in (
        (text.replace("sinkstream.recall/1", "sinkstream.recall/9"), "field 'schema' is 'sinkstream.recall/9'"),
        (text.replace('"policy"', '"politics"'), "required field 'policy' is missing"),
        (text.replace('"nll_again"', '"nll_agian"'), "field 'passages' must hold"),
        (text.replace('"status": "complete"', '"status": "done"'), "'status' is 'done'; accepted: complete"),
    ):
        read.path.write_text(broken)
        with pytest.raises(ValueError, match=message):
            RecallRecord.below(tmp_path)
    content = json.loads(text) | {"id": read.id}
    read.path.write_text(text)
    with pytest.raises(ValueError, match="exists already"):
        RecallRecord.write(content, tmp_path)


def test_curve_table_and_picture(batch, tmp_path):
    records = batch.run([policy("full"), policy("strict")], Console(quiet=True))
    point = recall_curve(records[1])[0]
    assert (point.ratio, point.distance) == (0.25, 25) and point.gain.low <= point.gain.value <= point.gain.high
    table = recall_table(records, title="T")
    header, rows = table.header, table.rows
    assert header[3:] == ["0.25 ×", "0.96 ×", "0.97 ×", "2 ×", "4 ×"]
    assert [row[0] for row in rows] == ["full", "strict"] and rows[1][-1] == "+0.00 ±0.00"
    assert rows[1][3] == f"{GAIN:+.2f} ±0.00"
    console = Console(width=150, record=True, quiet=True)
    console.print(table)
    assert draw_recall(records, tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert draw_recall(3 * records, tmp_path / "many.png").exists()
    with pytest.raises(ValueError, match="no recall records"):
        draw_recall([], tmp_path / "r.png")


def test_intervals_are_over_passages(batch):
    (record,) = batch.run([policy("strict")], Console(quiet=True))
    noise = np.random.default_rng(0).normal(0.0, 1.0, len(record.passages["ratio"]))
    record.passages["nll_unseen"][:] += noise
    gain = recall_curve(record)[-1].gain
    its = noise[record.passages["ratio"] == 4.0]
    assert gain.value == pytest.approx(its.mean(), abs=1e-5)
    assert 0.5 < (gain.high - gain.low) / (2 * 1.96 * its.std() / math.sqrt(8)) < 1.5


def test_documents_have_a_table_with_or_without_records(tmp_path):
    assert render_tables(tmp_path)["recall-neox-sink-512"] == NONE_YET
    design = RecallDesign(512, (0.25, 2.0), 2, 16)
    loaded = tiny_model.loaded()
    object.__setattr__(loaded, "name", "neox-27m-sink")
    out = tmp_path / "recall"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfBackend, "open", lambda self: CopyDecoder(self.loaded.model, self.settings))
        patch.setattr(run_module, "vocabulary_size", lambda model: VOCABULARY)
        batch = RecallBatch(loaded, design.streams(text_of), Request(out, {}, ["sinkstream", "recall"], 0))
        batch.run([RunSettings(name, 512, evaluate="blocks") for name in ("strict", "full")], Console(quiet=True))
    table = render_tables(tmp_path)["recall-neox-sink-512"]
    assert re.search(r"\| full \| – .*\n\| strict \| 10,000", table) and "cap (512 slots)" in table
    overview = render_tables(tmp_path)["recall-overview"].splitlines()
    assert overview[0] == "| Model | Policy | 0.25 × | 2 × |" and sum(NONE_YET in line for line in overview) == 2
    assert [line.split(" | ")[1] for line in overview if "neox-27m-sink" in line] == ["full", "strict"]


# ---- command line ----


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a tiny model and a text, to run commands in."""
    tiny_model.save_model(tmp_path / "tiny")
    tiny_model.save_model(tmp_path / "poisoned", poisoned=True)
    tiny_model.write_text(tmp_path / "text.txt", 2000)
    tiny_model.write_text(tmp_path / "poison.txt", 2000, 200)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(more: str = "", **options) -> list[str]:
    given = {"model": "tiny", "text": "text.txt", "cap": 48, "policy": "strict", "out": "out"}
    given |= {"distances": "0.5,1,2", "passages": 2, "passage-tokens": 8} | options
    return ["recall", *(f"--{name}={value}" for name, value in given.items() if value is not None), *shlex.split(more)]


def test_the_command_writes_records_and_picture_and_resumes(here, capsys):
    assert main(line(policy="full,strict,lazy:compress_every=8")) == 0
    records = RecallRecord.below("out")
    assert [r.policy["label"] for r in records] == ["full", "strict", "lazy R=8"]
    assert {tuple(r.passages["ratio"].tolist()) for r in records} == {(2.0, 2.0, 1.0, 1.0, 0.5, 0.5)}
    assert all(np.isfinite(r.passages["nll_again"]).all() for r in records)
    assert (here / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "lazy R=8" in shown and "0.5 ×" in shown and max(map(len, shown.splitlines())) <= PIPE_WIDTH
    assert main(line("--resume", policy="strict,window-only")) == 0
    assert len(RecallRecord.below("out")) == 4 and "strict: taken from recall-tiny" in capsys.readouterr().out
    assert main(line("--resume", seed=1)) == 0
    assert len(RecallRecord.below("out")) == 5, "other streams are another run"


def test_ctrl_c_keeps_what_is_done(here, monkeypatch, capsys):
    prefill, calls = Attempt.prefill, []

    def pressed(*args):
        calls.append(args)
        if len(calls) == 4:  # the control of the second policy
            signal.raise_signal(signal.SIGINT)
        prefill(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "prefill", pressed)
        assert main(line(policy="strict,lazy:compress_every=8,window-only")) == 130
    records = RecallRecord.below("out")
    assert [(r.policy["name"], r.status, len(r.passages["ratio"])) for r in records] == [
        ("strict", "complete", 6),
        ("lazy", "partial", 0),
    ]
    assert "lazy R=8: partial: interrupted after token 48" in capsys.readouterr().out
    assert main(line("--resume", policy="strict,lazy:compress_every=8")) == 0
    assert [r.status for r in RecallRecord.below("out")] == ["complete", "partial", "complete"]


def test_a_failed_run_is_told(here, capsys):
    assert main(line(model="poisoned", text="poison.txt")) == 1
    (record,) = RecallRecord.below("out")
    assert record.status == "failed" and len(record.passages["ratio"]) == 0
    assert "failed: the logits" in capsys.readouterr().out


MISTAKES = [
    ({"cap": None}, "", "give --cap SLOTS"),
    ({"cap": 3}, "", "cap=3 is not accepted; accepted: a whole number of at least 4"),
    (
        {"distances": "0.1,1"},
        "",
        r"--distances 0.1: 0.1 × cap 48 is less than a passage of 8 tokens.*accepted: at least 0.167",
    ),
    ({"distances": "-1"}, "", "--distances -1: -1 × cap 48 is less than a passage"),
    ({"distances": "nan"}, "", "--distances: 'nan' is not accepted; accepted: a finite number"),
    ({"distances": "inf"}, "", "--distances: 'inf' is not accepted"),
    ({"distances": "1,1"}, "", "--distances 1,1 names one twice"),
    ({"distances": ","}, "", "--distances '' is not accepted"),
    ({"distances": "1,x"}, "", "--distances: '1,x' is not accepted; accepted: a finite number, or several"),
    ({"passages": 0}, "", "passages=0 is not accepted; accepted: a whole number of at least 1"),
    ({"passage-tokens": 3}, "", "passage_tokens=3 is not accepted; accepted: a whole number of at least 8"),
    (
        {"passages": 40},
        "",
        r"has 2000 tokens, \d+ were asked for \(a stream[^;]*; accepted: a longer text, or fewer --p",
    ),
    ({"policy": "strict,recompute"}, "", "'recompute' .*accepted: full, or an eviction policy"),
    ({"policy": "nosuch"}, "", "'nosuch' is not known; accepted: full"),
    ({"cap": 1100, "distances": "0.1"}, "", "too short|1100 entries .*trained on 1024 positions"),
    ({"seed": -1}, "", "seed=-1 is not accepted"),
    ({"text": "nosuch.txt"}, "", "'nosuch.txt' does not exist"),
    ({"block-tokens": 0}, "", "block_tokens=0 is not accepted"),
    ({"out": "text.txt"}, "", "--out text.txt: cannot be written"),
    ({}, "--nosuch 1", "unknown argument '--nosuch'"),
]


@pytest.mark.parametrize(("options", "more", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(here, capsys, options, more, message):
    before = sorted(here.rglob("*"))
    try:
        code = main(line(more, **options))
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    assert code == 2 and re.fullmatch(r"sinkstream recall: error: .+\n", told.err), told.err
    assert re.search(message, told.err), told.err
    assert sorted(here.rglob("*")) == before


def test_a_cap_past_the_trained_positions_needs_the_option(here, capsys):
    tiny_model.write_text(here / "long.txt", 6000)
    options = {"text": "long.txt", "cap": 1030, "distances": "0.1", "passages": 1}
    assert main(line(**options)) == 2
    assert re.search(r"1030 entries .*trained on 1024 .*allow", capsys.readouterr().err)
    assert main(line("--allow-untrained-positions", **options)) == 0
