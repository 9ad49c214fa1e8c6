"""Verdicts: judged by intervals of planted differences, the same on every run, and contradicted by a changed record."""

import json
from pathlib import Path

import pytest
from point_factory import point, small_matrix, write
from record_factory import GPU, make_bench_record

from sinkstream.cli import main
from sinkstream.matrix.record import load_points
from sinkstream.report.criteria import KINDS, OUTCOMES, Evidence, read_criteria
from sinkstream.report.ledger import counts, judge_all, read_ledger
from sinkstream.report.summary import write_summary
from sinkstream.report.verdicts import conditions, groups, once, time_over, timed_beside

CRITERIA = Path(__file__).resolve().parents[2] / "experiments" / "criteria.toml"


def outcomes(results: Path) -> dict[tuple[str, str], str]:
    """(criterion, subject) -> outcome."""
    return {(v.criterion, v.subject): v.outcome for v in judge_all(read_criteria(CRITERIA), Evidence.below(results))}


def test_without_records_nothing_is_measured(tmp_path):
    assert set(outcomes(tmp_path).values()) == {"not measured"}
    assert main(["verdict", "--results", str(tmp_path / "nosuch"), "--criteria", str(CRITERIA)]) == 2


def test_planted_differences_are_judged_by_their_intervals(tmp_path):
    found = outcomes(write(tmp_path, *small_matrix()))
    model = "SmolLM2-135M"
    assert found["pg19-quality-and-speed", model] == "go"
    assert found["strict-against-recompute", model] == "go"
    assert found["pg19-snapkv-class", model] == "go"
    assert found["wikitext-quality", ""] == "not measured", "another text says nothing of WikiText"
    assert found["finite", ""] == found["same-attention", ""] == "go"
    assert found["step-slack", ""] == "not measured", "one round is not two"


def test_every_cap_counts_and_an_interval_across_the_limit_is_no_go(tmp_path):
    worse = [p for p in small_matrix(128) if p["policy"]["name"] == "recompute"]
    results = write(tmp_path, *small_matrix(), *worse, point("strict-128", shift=0.0049, cap=128))
    verdicts = judge_all(read_criteria(CRITERIA), Evidence.below(results))
    strict = next(v for v in verdicts if v.criterion == "strict-against-recompute")
    assert strict.outcome == "no-go" and "met at 1 of 2 caps" in strict.figures and "cap 128" in strict.figures
    assert strict.records == ("point-strict-128", "point-recompute-128")


def test_a_step_that_improves_nothing_in_two_rounds_is_stopped_and_one_that_does_is_not(tmp_path):
    results = write(tmp_path, *small_matrix(), *small_matrix(128))
    assert outcomes(results)["step-slack", ""] == "stop-loss"
    both = point("good", "slack", shift=-0.03, tpot=0.9, label="slack slack=32")
    assert outcomes(write(results, both))["step-slack", ""] == "go"
    scattered = point("good", "slack", shift=-0.03, repeats=(0.85, 0.9, 1.1), tpot=0.9, label="slack slack=32")
    assert outcomes(write(tmp_path / "noisy", *small_matrix(), *small_matrix(128), scattered))["step-slack", ""] == (
        "stop-loss"
    ), "its own repeats differ by more than it gains"
    faster = point("faster", "overlap", shift=0.05, tpot=0.5, label="overlap R=64 O=9", options={"compress_every": 64})
    better = point("better", "overlap", shift=-0.05, tpot=1.5, cap=128, label="overlap", options={"compress_every": 64})
    assert outcomes(write(results, faster, better))["step-overlap", ""] == "stop-loss", "each improves one of the two"


def test_points_that_are_not_comparable_are_not_compared(tmp_path):
    other_machine = point("other", "strict", shift=0.001)
    other_machine["environment"]["gpu"] = GPU | {"name": "Another GPU"}
    outside = point("outside", "recompute", sample_every=4, accounting="published")
    results = write(tmp_path, point("recompute-512", "recompute", sample_every=4), other_machine, outside)
    assert outcomes(results)["strict-against-recompute", ""] == "not measured"


def test_quality_is_compared_between_gpus_of_the_same_arithmetic_and_times_are_not(tmp_path):
    base, strict = point("recompute-512", "recompute", sample_every=4), point("other", "strict", shift=0.001)
    for content, name in ((base, "NVIDIA H100 80GB HBM3"), (strict, "NVIDIA H200")):
        content["environment"] = content["environment"] | {"gpu": GPU | {"name": name}}
    found = load_points(write(tmp_path, base, strict))
    assert conditions(found[0]) == conditions(found[1])
    assert timed_beside(found[0], found) == [found[0]]


def on(record, gpu):
    """The record, made on that GPU."""
    return record | {"environment": record["environment"] | {"gpu": GPU | {"name": gpu}}}


def test_a_later_point_of_another_card_does_not_take_the_place_of_one(tmp_path):
    """One id on two cards: quality is judged once, and a time stays beside those of its own card."""
    for folder, gpu, strict in (("1", "NVIDIA H100 80GB HBM3", 0.001), ("2", "NVIDIA H200", 0.0011)):
        recompute = point("recompute-512", "recompute", sample_every=4)
        write(tmp_path / folder, on(recompute, gpu), on(point("strict-512", shift=strict), gpu))
    evidence = Evidence.below(tmp_path)
    assert sorted(p.environment["gpu"]["name"][7:11] for p in evidence.points) == ["H100", "H100", "H200", "H200"]
    ((group,),) = groups(evidence).values()
    assert len(group) == 4 and len(once(group)) == 2
    assert {p.id for p in timed_beside(group[0], group)} == {"point-recompute-512", "point-strict-512"}
    failed = on(point("strict-512", status="failed"), "NVIDIA H200")
    write(tmp_path / "3", failed | {"created": "2026-03-01T00:00:00+00:00"})
    left = Evidence.below(tmp_path)
    assert len(left.failed) == 1 and len(left.points) == 3, "a failure is of its own card"


def test_a_verdict_of_speed_keeps_its_card_and_what_has_an_interval(tmp_path):
    later = "2026-02-01T00:00:00+00:00"

    def timing(name, policy, ms, gpu, chunks=12, **more):
        seconds = [50 * ms / 1e3 * (1 + 1e-3 * (i % 3)) for i in range(chunks)]
        record = make_bench_record(name, "fused", policy, tpot_ms=ms, chunk_seconds=seconds, **more)
        return on(record, gpu)

    h100, h200, model = "NVIDIA H100 80GB HBM3", "NVIDIA H200", "random:pythia-2.8b"
    fast = [timing("s", "strict", 2.0, h100, turn="s"), timing("l", "lazy R=64", 2.0, h100, turn="s")]
    results = write(tmp_path, *fast)
    before = {v.criterion: v for v in read_ledger(CRITERIA, results)[1] if v.subject == model}
    assert before["strict-against-lazy"].outcome == "go"
    there = [timing("s2", "strict", 1.9, h200, turn="s2", created=later, floor_ms=1.0)]
    there += [timing("l2", "lazy R=64", 1.0, h200, turn="s2", created=later)]
    short = [timing("s3", "strict", 3.0, h100, chunks=6, turn="s3", created=later, floor_ms=1.0)]
    short += [timing("l3", "lazy R=64", 1.0, h100, chunks=6, turn="s3", created=later)]
    write(results, *there, *short)
    assert {v.criterion: v for v in read_ledger(CRITERIA, results)[1] if v.subject == model} == before
    again = [timing("s4", "strict", 3.0, h100, turn="s4", created=later, floor_ms=1.0)]
    again += [timing("l4", "lazy R=64", 1.0, h100, turn="s4", created=later)]
    after = {v.criterion: v for v in read_ledger(CRITERIA, write(results, *again))[1] if v.subject == model}
    assert after["strict-against-lazy"].outcome == "no-go", "control: the same on the card of the figure"
    floors = [c for c, v in after.items() if "byte floor" in v.figures]
    assert floors and all(before[c].records == ("s",) and after[c].records == ("s4",) for c in floors)


def test_failed_and_scattered_points_stop(tmp_path):
    scattered = point("scattered", repeats=(1.0, 1.02, 1.01), tpot=1.01)
    steady = point("steady", cap=128, repeats=(1.0, 1.005, 1.001), tpot=1.001)
    found = outcomes(write(tmp_path / "a", steady))
    assert (found["finite", ""], found["reproducible", ""]) == ("go", "go")
    found = outcomes(write(tmp_path / "b", steady, scattered, point("bad", status="failed")))
    assert (found["finite", ""], found["reproducible", ""]) == ("stop-loss", "stop-loss")


def test_steps_of_the_ladder_are_judged_in_turns_and_by_command(tmp_path):
    def timing(name, rung, ms, **more):
        seconds = [50 * ms / 1e3 * (1 + 1e-3 * (i % 3)) for i in range(12)]
        return make_bench_record(name, rung, tpot_ms=ms, chunk_seconds=seconds, **more)

    graph = timing("g", "graph", 6.0)
    results = write(tmp_path, graph, timing("d1", "graph-norm", 5.97), timing("d3", "graph-linear", 3.0))
    model = "random:pythia-2.8b"
    found = outcomes(results)
    assert (found["step-d1", model], found["step-d3", model]) == ("stop-loss", "go"), "half a percent is no step"
    assert found["phase-c", ""] == "not measured"
    cut, ring = timing("cut", "hf-cut", 27.0, session="other"), timing("hf", "hf", 24.0)
    assert outcomes(write(results, cut, ring))["phase-c", ""] == "not measured", "timed by two commands"
    turns = [timing("s", "fused", 2.00, turn="s"), timing("l", "fused", 1.99, turn="s", policy="lazy R=64")]
    assert outcomes(write(results, *turns))["strict-against-lazy", model] == "go"
    later = "2026-02-01T00:00:00+00:00"
    slow = [
        timing("s2", "fused", 2.10, turn="s2", created=later),
        timing("l2", "fused", 1.99, turn="s2", policy="lazy R=64", created=later),
    ]
    assert outcomes(write(results, *slow))["strict-against-lazy", model] == "no-go"


def test_the_page_is_the_same_on_every_run_and_a_contradicting_record_is_noticed(tmp_path, capsys):
    results, page = write(tmp_path / "results", *small_matrix()), tmp_path / "LEDGER.md"
    command = ["verdict", "--results", str(results), "--criteria", str(CRITERIA), "--ledger", str(page)]
    assert main(command) == 0 and "written" in capsys.readouterr().out
    first = page.read_bytes()
    assert main(command) == 0 and "as it was" in capsys.readouterr().out and page.read_bytes() == first
    assert main([*command, "--check"]) == 0
    capsys.readouterr()
    write(
        results, point("strict-128", shift=0.2, cap=128), point("recompute-128", "recompute", cap=128, sample_every=4)
    )
    assert main([*command, "--check"]) == 1
    told = capsys.readouterr().out
    assert "printed: | PG19: strict streaming" in told and "records say: | PG19: strict streaming" in told
    assert page.read_bytes() == first, "a check writes nothing"


OWN = '[[criterion]]\nid="a"\nstatement="b"\nsource="c"\n'
TAIL, IMPROVES, RATIO = (OWN + f'kind="{kind}"\n' for kind in ("tail", "improves", "tpot-ratio"))
RATIO += "limit=1\n"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[criterion\n", "not valid TOML: Expected"),
        ("", "one or several [[criterion]]"),
        ('[[criterion]]\nid = "a"\n', "'statement' is missing"),
        ('[[criterion]]\nid="a"\nstatement="b"\nsource="c"\nkind="d"\n', "kind='d' is not known; accepted: quality"),
        ('[[criterion]]\nid="a"\nstatement="b"\nsource="c"\nkind="tail"\nlimit=1\n', "key 'tokens' is missing"),
        ('[[criterion]]\nid="a"\nstatement="b"\nsource="c"\nkind="finite"\nlimt=1\n', "unknown key 'limt'"),
        ("criterion = [1]", "one or several [[criterion]]"),
        (TAIL + 'limit="x"\ntokens=1\n', "limit='x' is not accepted; accepted: a finite number"),
        (TAIL + "limit=true\ntokens=1\n", "limit=True is not accepted"),
        (TAIL + "limit=nan\ntokens=1\n", "limit=nan is not accepted"),
        (TAIL + "limit=1\ntokens=1.5\n", "tokens=1.5 is not accepted; accepted: a whole number"),
        (IMPROVES + 'policies="slack"\n', "policies='slack' is not accepted; accepted: a list of names"),
        (IMPROVES + "policies=[]\n", "policies=[] is not accepted; accepted: a list of names"),
        (IMPROVES + 'policies=["slak"]\n', "policies='slak' is not known (did you mean 'slack'?); accepted: recompute"),
        (
            RATIO + 'rung="graf-norm"\nagainst="ring"\n',
            "rung='graf-norm' is not known (did you mean 'graph-norm'?); accepted: hf",
        ),
        (
            RATIO + 'rung="graph"\nagainst="ring"\notherwise="go"\n',
            "otherwise='go' is not known; accepted: no-go, stop-loss",
        ),
        (RATIO + 'rung="hf"\nagainst="hf"\nagainst_policy="lasy R=64"\n', "against_policy='lasy R=64' is not known"),
        (2 * '[[criterion]]\nid="a"\nstatement="b"\nsource="c"\nkind="finite"\n', "the id occurs twice"),
    ],
)
def test_wrong_criteria_are_refused(tmp_path, content, said):
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises(ValueError) as refused:
        read_criteria(tmp_path / "c.toml")
    assert said in str(refused.value) and "c.toml" in str(refused.value)


@pytest.mark.parametrize("other", [None, {"schema": "somebody.else/1"}], ids=["empty", "other files"])
def test_a_folder_without_a_record_says_nothing(tmp_path, capsys, other):
    """Else a wrong folder would turn the ledger and the headlines into "not measured"."""
    results, page = tmp_path / "results", tmp_path / "page.md"
    results.mkdir()
    if other:
        (results / "a.json").write_text(json.dumps(other))
    page.write_text("verdicts")
    verdict = ["verdict", "--results", str(results), "--criteria", str(CRITERIA), "--ledger", str(page)]
    for command in (verdict, [*verdict, "--check"], ["report", "--results", str(results)]):
        assert main(command) == 2
        told = capsys.readouterr().err
        assert "holds no record" in told and "accepted: a folder of what sinkstream's commands write" in told
        assert not other or "a.json: schema somebody.else)" in told
    assert page.read_text() == "verdicts" and not (results / "summary.json").exists()


def test_headlines_of_the_evidence(tmp_path):
    results = write(tmp_path / "results", *small_matrix(), *small_matrix(128))
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "criteria.toml").write_text(CRITERIA.read_text())
    found = write_summary(results).headlines
    assert found["evidence.matrix_points"]["value"] == 10
    strict = found["evidence.delta_ppl_strict_vs_recompute"]
    assert strict["low"] < strict["value"] < strict["high"] and abs(strict["value"] - 0.1) < 0.2
    assert strict["record"] == "point-strict-512"
    best = found["evidence.delta_ppl_best_vs_strict"]
    assert best["record"] == "point-slack-512" and best["value"] == pytest.approx(0.3, abs=0.2)
    _, verdicts = read_ledger(CRITERIA, results)
    numbers = counts(verdicts)
    assert found["evidence.verdicts"] == {
        "value": len(verdicts) - numbers["not measured"],
        **{name.replace("-", "_").replace(" ", "_"): numbers[name] for name in OUTCOMES},
        "record": "docs/LEDGER.md",
    }


def test_without_points_there_is_no_figure(tmp_path):
    (tmp_path / "results").mkdir()
    summary = write_summary(tmp_path / "results")
    assert not [key for key in summary.headlines if key.startswith("evidence.")]
    assert {key for key in summary.missing if key.startswith("evidence.")} == {
        "evidence.matrix_points",
        "evidence.delta_ppl_strict_vs_recompute",
        "evidence.delta_ppl_best_vs_strict",
        "evidence.delta_ppl_strict_vs_kvpress_snapkv",
        "evidence.tpot_over_nearest_rival",
        "evidence.verdicts",
    }


def test_every_kind_is_used_and_says_what_it_does():
    criteria = read_criteria(CRITERIA)
    assert {c.kind for c in criteria} == set(KINDS)
    assert all(KINDS.summary(kind) for kind in KINDS)


def test_times_are_compared_between_the_points_that_were_timed_most_often(tmp_path):
    """A newer single timing, with a stop in it, does not take the place of three."""
    strict, lazy = (
        point("strict-512"),
        point("lazy-512", "lazy", tpot=1.01, label="lazy R=64", repeats=(1.0, 1.01, 1.02)),
    )
    disturbed = point("lazy-512", "lazy", tpot=3.0, label="lazy R=64") | {"created": "2026-03-01T00:00:00+00:00"}
    points = [*load_points(write(tmp_path / "1", strict, lazy)), *load_points(write(tmp_path / "2", disturbed))]
    stricts, lazies = ([p for p in points if p.label == label] for label in ("strict", "lazy R=64"))
    assert time_over(lazies, stricts) == pytest.approx(1.01)
    assert time_over([p for p in lazies if p.tpot_ms == 3.0], stricts) == pytest.approx(3.0), "the control"
    assert time_over([], stricts) is None
