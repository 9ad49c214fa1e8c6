"""The table of what policies gain over strict streaming, and the headline of the nearest rival."""

import pytest
from point_factory import point, small_matrix, write
from record_factory import make_bench_record

from sinkstream.report.matrix_tables import HEADER, render_matrix
from sinkstream.report.nearest_rival import timed_ways, tpot_over_nearest_rival
from sinkstream.show.table import EMPTY, NONE_YET


def cells(results) -> list[dict[str, str]]:
    lines = [line for line in render_matrix(results)["matrix-answers"].splitlines() if line.startswith("|")]
    return [dict(zip(HEADER, (c.strip() for c in line.strip("|").split("|")), strict=True)) for line in lines[2:]]


def test_a_row_names_the_best_policy_of_each_kind_and_its_planted_difference(tmp_path):
    assert render_matrix(tmp_path / "nosuch") == {"matrix-answers": NONE_YET}
    better = point("better", "refresh-key-norm", shift=-0.05, label="refresh-key-norm R=64")
    (row,) = cells(write(tmp_path, *small_matrix(), better))
    assert row["best without refresh against strict"].startswith("slack slack=16: +0.3"), row
    assert row["best refresh against strict"].startswith("refresh-key-norm R=64: -"), row
    value = float(row["best refresh against strict"].split(": ")[1].split()[0])
    assert value == pytest.approx(-5.0, abs=0.3), "0.001 + 0.05 nats below strict"
    assert row["TPOT lazy ÷ strict"] == "1.000" and row["cap"] == "512"


def test_what_is_not_there_is_an_empty_cell_and_nothing_without_strict(tmp_path):
    (row,) = cells(write(tmp_path / "a", point("strict-512"), point("x", "slack", label="slack")))
    assert row["strict against recompute"] == row["lazy R=64 against strict"] == EMPTY
    assert render_matrix(write(tmp_path / "b", point("x", "slack")))["matrix-answers"] == NONE_YET


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
