"""How long the demo is: what is measured, what it is expected to cost, what is chosen, what the command makes of it."""

import re
from dataclasses import replace

import pytest
import tiny_model
import torch

from sinkstream.cli import main
from sinkstream.cli.show import PIPE_WIDTH
from sinkstream.data import load_text, tokenize
from sinkstream.evaluation import batch, demo_plan
from sinkstream.evaluation.demo import CAP, SAMPLE_EVERY, TIMED_TOKENS, TOKENS, demo_settings
from sinkstream.evaluation.demo_plan import LADDER, Size, Speed, choose, expected_seconds, measure_speed
from sinkstream.records.records import load_records

IDLE = Speed(step=0.056, short=0.14, block=0.57, window=0.36)  # two cores, with AVX-512
SMALL = (Size(300, 20, 4), Size(320, 24, 4), Size())
SMALL_CAP = 72


def slower(times: float) -> Speed:
    return Speed(IDLE.step * times, IDLE.short * times, IDLE.block * times, IDLE.window * times)


def cost(size: Size, speed: Speed) -> float:
    return sum(expected_seconds(size.settings(CAP), size.tokens, speed))


# ---- the choice ----


def test_the_ladder_ends_with_the_whole_demo():
    assert [size.tokens for size in LADDER] == sorted({size.tokens for size in LADDER})
    assert LADDER[-1].settings(CAP) == demo_settings() and (LADDER[-1].tokens, SAMPLE_EVERY) == (TOKENS, 56)
    assert LADDER[0].tokens >= demo_plan.LEAST_CAPS * CAP
    windows = [size.windows(CAP) for size in LADDER]
    assert windows == sorted(windows) and windows[0] >= 24, "recompute needs some"
    assert all((size.timed_tokens or TIMED_TOKENS) > 64 for size in LADDER), "steady figures leave out 64 tokens"
    costs = [cost(size, IDLE) for size in LADDER]
    assert costs == sorted(costs) and costs[-1] > 2 * costs[0]


@pytest.mark.parametrize("seconds", [60.0, 150.0, 400.0])
def test_a_slower_machine_never_runs_more_and_keeps_to_the_time(seconds):
    plans = [choose(slower(times), seconds) for times in (0.01, 0.3, 0.5, 0.8, 1, 1.3, 1.6, 2, 2.5, 3, 100)]
    tokens = [plan.size.tokens for plan in plans]
    assert tokens == sorted(tokens, reverse=True) and len(set(tokens)) > 3
    assert (tokens[0], tokens[-1]) == (LADDER[-1].tokens, LADDER[0].tokens)
    for plan in plans:
        assert sum(plan.expected) <= seconds or plan.size == LADDER[0]
    assert plans[0].fits and not plans[-1].fits


def test_the_largest_that_fits_is_chosen():
    for size in LADDER:
        exactly = cost(size, IDLE)
        assert choose(IDLE, exactly).size == size
        assert choose(IDLE, exactly).whole_seconds == cost(LADDER[-1], IDLE)
        assert choose(IDLE, 0.999 * exactly).size == LADDER[max(0, LADDER.index(size) - 1)]


def test_a_run_is_late_if_it_would_end_far_after_its_time():
    plan = demo_plan.Plan(LADDER[0], 100.0, (10.0, 30.0, 40.0), 999.0)
    assert not plan.is_late([10.0]) and not plan.is_late([10.0, 30.0])
    assert not plan.is_late([15.0]), "slower, but in time"
    assert plan.is_late([10.0, 60.0]), "70 s, and 70 more at that pace"
    assert plan.is_late([90.0]) and not plan.is_late([90.0, 1.0, 1.0]), "nothing comes after the last run"
    too_long = replace(plan, seconds=1.0)
    assert not too_long.is_late([10.0]) and too_long.is_late([10.0, 60.0]), "what was told is what counts"


@pytest.mark.parametrize("piece", ["step", "short", "block", "window"])
def test_every_piece_counts(piece):
    only = replace(Speed(0, 0, 0, 0), **{piece: 1.0})
    assert 0 < cost(LADDER[0], only) < cost(LADDER[-1], only)


def test_steps_and_windows_are_counted_exactly():
    size = Size(1_000, 10, 70)
    assert cost(size, Speed(1, 0, 0, 0)) == 70 * (len(size.settings(CAP)) - 1)
    assert cost(size, Speed(0, 0, 0, 1)) == 1 + size.windows(CAP) == 1 + 75


def test_a_larger_cap_takes_a_longer_text():
    assert choose(slower(100), 150, cap=512).size == LADDER[2]
    assert choose(slower(100), 150, cap=3_000).size == LADDER[-1]
    assert choose(slower(100), 150, sample_every=7).size == replace(LADDER[0], sample_every=7)


def test_what_is_measured_is_each_piece(monkeypatch):
    def tokens_as_seconds(forward, ids, *more, device):
        return forward(ids, *more), float(len(ids))

    monkeypatch.setattr(demo_plan, "timed", tokens_as_seconds)
    ids = torch.randint(3, 90, (demo_plan.tokens_measured(SMALL_CAP),), generator=torch.Generator().manual_seed(0))
    assert measure_speed(tiny_model.loaded(), ids, SMALL_CAP) == Speed(1, demo_plan.SHORT, demo_plan.BLOCK, 1)


# ---- the command ----


@pytest.fixture
def demo(tmp_path, monkeypatch, capsys):
    """Run a demo of the tiny model at a speed; returns its exit code, its output and its records."""
    monkeypatch.setattr("sinkstream.cli.demo.load_model", lambda *_, **__: tiny_model.loaded())
    monkeypatch.setattr(demo_plan, "LADDER", SMALL)
    monkeypatch.chdir(tmp_path)

    def run(*words: str, times: float | None = 100, cap: int = SMALL_CAP):
        def measured(*_):
            assert times is not None, "the speed was measured"
            return slower(times)

        monkeypatch.setattr("sinkstream.cli.demo.measure_speed", measured)
        capsys.readouterr()
        try:
            code = main(["demo", "--cap", str(cap), *words])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err, load_records("out/demo") if (tmp_path / "out" / "demo").is_dir() else []

    return run


def test_each_row_is_printed_before_the_next_run_begins(demo, monkeypatch, capsys):
    before, real = [], batch.run

    def watched(loaded, ids, settings, progress):
        before.append(capsys.readouterr().out)
        return real(loaded, ids, settings, progress)

    monkeypatch.setattr(batch, "run", watched)
    code, rest, err, records = demo()
    labels = [record.policy["label"] for record in records]
    assert (code, err) == (0, "") and len(records) == len(SMALL[0].settings(SMALL_CAP))
    assert re.match(
        r"Measured: .* 300 tokens take about \d+ s, .* Cut to 300 of 6,144 tokens, .*--tokens 6144\n$", before[0]
    )
    assert before[1].splitlines()[0].startswith("Policy")
    printed = [*before[1:], rest]
    for label, row in zip(labels, [before[1].splitlines()[1], *(text.splitlines()[0] for text in printed[1:])]):
        assert row.startswith(label), row
    everything = "".join([*before, rest])
    assert "\x1b" not in everything and "\r" not in everything
    assert max(map(len, "".join(printed).splitlines())) <= PIPE_WIDTH and "…" not in everything
    assert rest.count(f"│ {labels[-1]} ") == 1, "the table comes at the end"
    assert [record.data["tokens"] for record in records] == [300] * len(records)
    assert {record.arguments["tokens"] for record in records} == {300}
    assert {record.arguments["sample_every"] for record in records} == {20}


def test_tokens_switch_the_choice_off(demo):
    code, out, err, records = demo("--tokens", "310", times=None)
    assert (code, err) == (0, "") and "Measured" not in out
    assert {record.data["tokens"] for record in records} == {310}
    settings = [record.arguments["identity"]["settings"] for record in records]
    assert [s["sample_every"] for s in settings if s["method"] == "recompute"] == [SAMPLE_EVERY]
    assert {s["timed_tokens"] for s in settings} == {TIMED_TOKENS}


def test_resuming_takes_the_size_of_the_records(demo, monkeypatch):
    real = batch.run
    monkeypatch.setattr(
        batch,
        "run",
        lambda loaded, ids, one, told: (
            pytest.fail(one.method) if one.method == "lazy" else real(loaded, ids, one, told)
        ),
    )
    with pytest.raises(pytest.fail.Exception):
        demo()
    begun = load_records("out/demo")
    monkeypatch.setattr(batch, "run", real)
    code, out, err, records = demo("--resume", times=None)
    assert (code, err) == (0, "") and "Resuming: 300 tokens" in out
    assert out.count("taken from") == len(begun) == 4 and len(records) == len(SMALL[0].settings(SMALL_CAP))
    assert {record.data["tokens"] for record in records} == {300}


@pytest.mark.parametrize("words", [("--resume", "--cap", "73"), ()], ids=["another cap", "not resumed"])
def test_other_records_do_not_choose(demo, words):
    assert demo("--tokens", "310", times=None)[0] == 0
    _, out, _, records = demo(*words, times=100)
    assert "Measured" in out and "taken from" not in out
    assert [record.data["tokens"] for record in records].count(300) == len(records) // 2


def test_what_would_be_too_late_is_left_out_and_resumed(demo, monkeypatch):
    monkeypatch.setattr(demo_plan, "LADDER", SMALL[:1])
    code, out, err, records = demo("--seconds", "0.001", times=1e-6)
    labels = [one.label() for one in SMALL[0].settings(SMALL_CAP)]
    assert (code, err) == (0, "") and [record.policy["label"] for record in records] == labels[:1]
    assert f"Left out: {', '.join(labels[1:])}. The same command with --resume runs them." in out
    code, out, err, records = demo("--seconds", "0.001", "--resume", times=None)
    assert code == 0 and [record.policy["label"] for record in records] == labels and "Left out" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--seconds 0", "--seconds 0 is not accepted; accepted: a number above 0"),
        ("--seconds -3", "--seconds -3 is not accepted"),
        ("--seconds nan", "argument --seconds: 'nan' is not accepted; accepted: a finite number"),
        ("--seconds inf", "argument --seconds: 'inf' is not accepted"),
        ("--seconds soon", "argument --seconds: 'soon' is not accepted; accepted: a finite number"),
        ("--seconds 9 --tokens 300", "argument --tokens: not allowed with argument --seconds"),
        ("--cap 7000", "the text has 6144 tokens and 7000 of them are prefill"),
        ("--sample-every 0", "sample_every=0 is not accepted"),
        ("--tokens 20", "the text has 20 tokens and 72 of them are prefill"),
    ],
)
def test_wrong_values_are_refused_by_name(demo, words, message):
    code, out, err, records = demo(*words.split(), times=None)
    assert code == 2 and message in err and "Traceback" not in err
    assert not records and out == ""


def test_the_text_is_long_enough_to_measure():
    tokens = demo_plan.tokens_measured(CAP)
    assert len(tokenize(load_text("builtin"), tiny_model.tokenizer(), tokens)) == tokens
