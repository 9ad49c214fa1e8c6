"""The table of what policies gain over strict streaming, and the headline of the nearest rival."""

import pytest
from point_factory import point, small_matrix, write
from record_factory import make_bench_record

from sinkstream.matrix.record import load_points
from sinkstream.report.matrix_tables import HEADER, SWEEP_HEADER, render_matrix
from sinkstream.report.nearest_rival import timed_ways, tpot_over_nearest_rival
from sinkstream.show.table import EMPTY, NONE_YET


def cells(results, table="matrix-answers", header=HEADER) -> list[dict[str, str]]:
    lines = [line for line in render_matrix(load_points(results))[table].splitlines() if line.startswith("|")]
    return [dict(zip(header, (c.strip() for c in line.strip("|").split("|")), strict=True)) for line in lines[2:]]


def test_a_row_names_the_best_policy_of_each_kind_and_its_planted_difference(tmp_path):
    assert set(render_matrix([]).values()) == {NONE_YET}
    better = point("better", "refresh-key-norm", shift=-0.05, label="refresh-key-norm R=64")
    (row,) = cells(write(tmp_path, *small_matrix(), better))
    assert row["best without refresh against strict"].startswith("slack slack=16: +0.3"), row
    assert row["best refresh against strict"].startswith("refresh-key-norm R=64: -"), row
    value = float(row["best refresh against strict"].split(": ")[1].split()[0])
    assert value == pytest.approx(-5.0, abs=0.3), "0.001 + 0.05 nats below strict"
    assert row["TPOT lazy ÷ strict"] == "1.000" and row["cap"] == "512"
    ids = row["records"].replace("`", "").split(", ")
    assert len(ids) == len(set(ids)) == 5 and "point-better" in ids and "point-strict-512" in ids


def test_what_is_not_there_is_an_empty_cell_and_nothing_without_strict(tmp_path):
    (row,) = cells(write(tmp_path / "a", point("strict-512"), point("x", "slack", label="slack")))
    assert row["strict against recompute"] == row["lazy R=64 against strict"] == EMPTY
    assert render_matrix(load_points(write(tmp_path / "b", point("x", "slack"))))["matrix-answers"] == NONE_YET


def test_strict_is_compared_with_the_recompute_that_scored_most_tokens(tmp_path):
    """Two matrices have the same baselines; the sparser one is newer, and its tokens are not those of the points."""
    sparse = point("again", "recompute", sample_every=8)
    dense, strict, lazy = small_matrix()[:3]
    (row,) = cells(write(tmp_path / "a", dense, sparse, strict, lazy))
    (alone,) = cells(write(tmp_path / "b", dense, strict, lazy))
    assert row == alone and row["strict against recompute"] != EMPTY
    (none,) = cells(write(tmp_path / "c", sparse, strict, lazy))
    assert none["strict against recompute"] == EMPTY, "tokens of another sample are not paired"


def test_times_are_compared_at_one_commit(tmp_path):
    old = [point("strict-old", tpot=2.0, commit="a" * 40), point("lazy-old", "lazy", tpot=2.2, commit="a" * 40)]
    new = [point("strict-new", tpot=1.0, commit="b" * 40)]
    old[1]["policy"]["label"] = "lazy R=64"
    (row,) = cells(write(tmp_path, *old, *new))
    assert row["TPOT lazy ÷ strict"] == "1.100"


def test_a_sweep_has_its_best_and_its_worst_policy_and_not_strict_by_another_name(tmp_path):
    base = point("s", tpot=1.0)
    others = [
        point("worse", "lazy", shift=0.03, tpot=1.1, label="lazy R=64", strict="s"),
        point("better", "overlap", shift=-0.02, tpot=0.9, label="overlap", strict="s"),
        point("same", "slack", shift=-0.5, label="slack", options={"slack": 0}, strict="s"),
        point("unlinked", "lazy", shift=0.4, label="lazy R=128"),
    ]
    (row,) = cells(write(tmp_path, base, *others), "matrix-sweeps", SWEEP_HEADER)
    assert row["matrix"] == "test" and row["cap"] == "512" and row["policies"] == "2"
    assert row["ΔPPL against strict, best"].startswith("overlap: -") and row["worst"].startswith("lazy R=64: +")
    assert row["TPOT ÷ strict"] == "0.900 – 1.100"


def test_a_sweep_compares_with_the_strict_point_of_its_own_machine_where_two_have_the_same_id(tmp_path):
    lazy = point("lazy", "lazy", tpot=2.2, label="lazy R=64", strict="s", commit="a" * 40)
    write(tmp_path / "all" / "1", point("s", tpot=2.0, commit="a" * 40), lazy)
    write(tmp_path / "all" / "2", point("s", tpot=1.0, commit="b" * 40))
    (row,) = cells(tmp_path / "all", "matrix-sweeps", SWEEP_HEADER)
    assert row["TPOT ÷ strict"] == "1.100 – 1.100"
    (tmp_path / "all" / "1" / "point-s.json").unlink()
    (row,) = cells(tmp_path / "all", "matrix-sweeps", SWEEP_HEADER)
    assert row["TPOT ÷ strict"] == EMPTY, "control: timed elsewhere"


def test_the_nearest_rival_is_the_fastest_on_the_same_card_and_both_shapes_are_needed(tmp_path):
    neox = [
        make_bench_record("ours", "fused", tpot_ms=2.0, cap=2052, dtype="float16"),
        make_bench_record("static", "hf-static", "full", tpot_ms=8.0, cap=2052, dtype="float16"),
        make_bench_record("growing", "hf-full", "full", tpot_ms=20.0, cap=2052, dtype="float16"),
    ]
    results = write(tmp_path, *neox)
    assert tpot_over_nearest_rival(timed_ways(results)) is None, "the other shape was not timed"
    llama = {"model": "random:llama-3.2-1b", "cap": 2052, "dtype": "bfloat16"}
    write(results, make_bench_record("l", "fused", tpot_ms=1.0, **llama))
    assert tpot_over_nearest_rival(timed_ways(results)) is None, "without a rival"
    write(results, make_bench_record("lf", "hf-full", "full", tpot_ms=10.0, **llama))
    assert tpot_over_nearest_rival(timed_ways(results)).value == pytest.approx(0.25)
