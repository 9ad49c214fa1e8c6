"""The cliff: the grid of runs, and a loss of known parts that is taken apart again."""

import re
from dataclasses import replace

import numpy as np
import pytest
import tiny_model
from record_factory import make_arrays, make_record

from sinkstream.cli import main
from sinkstream.cli.show import PIPE_WIDTH
from sinkstream.records.blocks import Blocks
from sinkstream.records.pairs import PAIRS_FILE, Pairs
from sinkstream.records.records import BLOCKED, load_record, load_records, write_record
from sinkstream.report.documents import NONE_YET, render_tables
from sinkstream.report.summary import HEADLINES
from sinkstream.statistics import Bootstrap, block_sums, share_of_blocks
from sinkstream.studies.cliff.run import cliff_settings
from sinkstream.studies.cliff.tables import COLUMNS, cliff_table, decompose, draw_cliff, grid, shares

TRAINED, STRIDE, TOKENS = 8192, 256, 4096  # the first is the record factory's
EVICTION, WITHIN, PAST = 0.03, -0.01, 0.5


@pytest.fixture
def store(tmp_path):
    """Write a run of the grid with an NLL that differs from the text's by `shift` (tokens,); returns its record."""

    def write(name, policy="strict", *, shift=0.0, kv=None, stride=1, accounting="peak", noise=0.0, **more):
        arrays = make_arrays(TOKENS, noise=noise)
        arrays["nll"] = arrays["nll"] + shift
        arrays["kv_length"] = np.full(TOKENS, TRAINED) if kv is None else kv
        options = {"compress_every": stride, "positions": "cache", "sink": 4}
        record = make_record(
            name,
            policy,
            arrays=arrays,
            options=options,
            command=("sinkstream", "cliff"),
            **{"cap": TRAINED, "cap_accounting": accounting, "model": "neox-27m-sink", **more},
        )
        return load_record(write_record(record, arrays, tmp_path))

    return write


def planted(store, *, kv=None, past=PAST, **more):
    """Strict, inside and outside with known parts; half of the tokens of `outside` see more than the trained length."""
    kv = TRAINED - 127 + np.arange(TOKENS) % STRIDE if kv is None else kv
    length = np.where(kv > TRAINED, past, WITHIN)
    return (
        store("strict"),
        store("inside", "lazy", shift=EVICTION, stride=STRIDE, kv=kv - STRIDE, **more),
        store("outside", "lazy", shift=EVICTION + length, stride=STRIDE, kv=kv, accounting="published", **more),
    )


def test_planted_parts_are_found_and_add_up(store):
    found = decompose(*planted(store))
    parts = (found.eviction.value, found.within.value, found.past.value)
    assert parts == pytest.approx((EVICTION, WITHIN / 2, PAST / 2), abs=1e-5)
    assert found.total.value == pytest.approx(sum(parts), abs=1e-9)
    assert found.share_past.value == pytest.approx(PAST / 2 / (EVICTION + (WITHIN + PAST) / 2), abs=1e-4)
    assert found.share_past.low <= found.share_past.value <= found.share_past.high
    assert found.n_tokens == TOKENS and found.total.above_zero


def test_the_parts_are_the_same_from_records_without_their_arrays(store, tmp_path):
    records, pairs = planted(store), Pairs.load(tmp_path)
    with_arrays = decompose(*(replace(record, pairs=pairs) for record in records))
    (tmp_path / PAIRS_FILE).write_text(pairs.text())
    for record in records:
        record.tokens_path.unlink()
    found = decompose(*sorted(load_records(tmp_path), key=lambda record: [r.id for r in records].index(record.id)))
    assert found == with_arrays
    (tmp_path / PAIRS_FILE).unlink()
    with pytest.raises(ValueError, match=r"'inside'.*absent.*pairs\.json does not hold 'length past trained'"):
        decompose(*map(load_record, (record.path for record in records)))


def test_records_of_other_tokens_are_refused(store):
    strict, inside, outside = planted(store)
    inside.__dict__["arrays"] = {name: array[500:] for name, array in inside.arrays.items()}
    inside.__dict__["blocks"] = Blocks.of(*(inside.arrays[name] for name in BLOCKED))
    with pytest.raises(ValueError, match="do not score the same tokens"):
        decompose(strict, inside, outside)


def test_below_the_trained_length_there_is_no_share_of_it(store):
    kv = np.full(TOKENS, TRAINED)
    found = decompose(*planted(store, kv=kv))
    assert found.past.value == 0 and found.within.value == pytest.approx(WITHIN, abs=1e-5)
    assert found.share_past.value == 0


def test_without_a_loss_no_share_is_given(store):
    found = decompose(*planted(store, past=-PAST))
    assert found.total.value < 0 and found.share_past.value is None
    assert HEADLINES["diagnosis.cliff_share_length"]([]) is None


def test_noise_alone_gives_no_share(store):
    rng = np.random.default_rng(0)
    kv = TRAINED + np.arange(TOKENS) % STRIDE
    runs = [store("s", shift=rng.normal(0, 0.3, TOKENS))]
    for name, accounting in (("i", "peak"), ("o", "published")):
        shift = rng.normal(0, 0.3, TOKENS)
        runs.append(store(name, "lazy", shift=shift, kv=kv, stride=STRIDE, accounting=accounting))
    assert decompose(*runs).share_past.value is None


def test_the_interval_of_a_share_holds_the_truth_as_often_as_it_says():
    rng, held = np.random.default_rng(0), 0
    for seed in range(100):
        part, rest = rng.normal(0.3, 1.0, 2000), rng.normal(0.1, 1.0, 2000)
        (_, parts, counts), (_, wholes, _) = (block_sums(values, block_tokens=8) for values in (part, part + rest))
        found = share_of_blocks(parts, wholes, counts, 8, Bootstrap(resamples=400, seed=seed))
        held += found.low <= 0.75 <= found.high
    assert 88 <= held <= 100


def test_records_of_another_text_are_refused(store):
    strict, inside, _ = planted(store)
    other = store("other", "lazy", stride=STRIDE, accounting="published", text="wikitext")
    with pytest.raises(ValueError, match="several texts or models"):
        decompose(strict, inside, other)


def test_table_headline_and_picture(store, tmp_path):
    assert render_tables(tmp_path / "none")["cliff-neox-sink"] == NONE_YET
    older = {"created": "2025-01-01T00:00:00+00:00"}
    records = [store("other-prefill", prefill_tokens=3, **older), store("other-dtype", dtype="float16", **older)]
    records += [*planted(store), store("half", cap=4096), store("lonely", "lazy", stride=64, accounting="published")]
    assert {run.record.id for run in grid(records)} == {"strict", "inside", "outside", "half", "lonely"}
    assert [run.record.id for run, _ in shares(grid(records))] == ["outside"]
    rows = cliff_table(records).rows
    assert {len(row) for row in rows} == {len(COLUMNS)}
    outside = next(row for row in rows if row[2:4] == ["256", "outside cap"])
    assert outside[7] == "+0.0300 ±0.0000" and outside[9].startswith("+0.2500") and re.match("9[0-9] % ±", outside[10])
    assert next(row for row in rows if row[2] == "1")[6] == "control"
    value, record_id, _, _ = HEADLINES["diagnosis.cliff_share_length"](records)
    assert value == pytest.approx(0.909, abs=1e-3) and record_id == "outside"
    table = render_tables(tmp_path)["cliff-neox-sink"]
    assert "outside cap" in table and "T = 8,192 trained positions" in table
    overview = render_tables(tmp_path)["cliff-overview"].splitlines()
    assert len(overview) == 2 + 3 and sum(NONE_YET in line for line in overview) == 2
    cells = next(line for line in overview if "8,192" in line).strip("| ").split(" | ")
    assert cells[1:3] == ["8,192", "256"] and cells[4:] == outside[6:8] + outside[9:], "the grid's own figures"
    assert draw_cliff(records, tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no complete records"):
        draw_cliff([], tmp_path / "c.png")


# ---- the grid ----


def test_the_grid_scores_the_same_tokens_inside_and_past_the_trained_length():
    runs = cliff_settings(2048, 20_000)
    assert len({run.prefill for run in runs}) == 1
    assert runs[0].prefill == max(run.policy().peak for run in runs) == 2048 + 1023
    assert min(run.policy().peak for run in runs) < 2048 / 2
    kinds = {(r.positions, r.method, r.options.get("compress_every"), r.cap_accounting) for r in runs if r.cap == 2048}
    assert kinds == {
        (mode, *kind)
        for mode in ("cache", "original")
        for kind in [("strict", None, "peak")]
        + [("lazy", stride, accounting) for stride in (128, 1024) for accounting in ("peak", "published")]
    }
    assert {r.method for r in runs if r.cap > 2048} == {"strict"}
    assert not [
        r for r in runs if r.cap == 512 and r.options.get("compress_every") == 1024 and r.cap_accounting == "peak"
    ]
    assert len({(r.cap, r.label()) for r in runs}) == len(runs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caps": ()}, "--caps '' is not accepted; accepted: one or more"),
        ({"caps": (1.0, 1.0)}, "--caps 1,1 is not accepted; accepted: .*each once"),
        ({"caps": (0.0, 1.0)}, "--caps 0,1 is not accepted; accepted: above 0"),
        ({"caps": (float("nan"),)}, "--caps nan is not accepted; accepted: above 0"),
        ({"strides": (1,)}, "compress_every=1 is not accepted; accepted: at least 2"),
        ({"strides": ()}, "--compress-every '' is not"),
        ({"positions": ("cache", "cache")}, "--positions cache,cache is not"),
        ({"tokens": 4000}, "has 4000 tokens .*fills 3071 of them; accepted: at least 5120 tokens"),
        ({"sink": -1}, "sink=-1 is not accepted"),
        ({"block_tokens": 0}, "block_tokens=0 is not accepted"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(options, message):
    given = {"tokens": 20_000} | options
    with pytest.raises(ValueError, match=message):
        cliff_settings(2048, given.pop("tokens"), **given)


# ---- command line ----


@pytest.fixture
def here(tmp_path, monkeypatch):
    tiny_model.save_model(tmp_path / "tiny")
    tiny_model.write_text(tmp_path / "text.txt", 4000)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def line(*more: str, **options) -> list[str]:
    given = {
        "model": "tiny",
        "text": "text.txt",
        "tokens": 1900,
        "caps": "0.125,1",
        "compress-every": "64",
        "out": "out",
    }
    return ["cliff", *(f"--{name}={value}" for name, value in (given | options).items()), *more]


def test_the_command_runs_the_grid_and_takes_it_apart(here, capsys):
    assert main(line("--positions", "cache")) == 0
    records = load_records("out")
    assert len(records) == 6 and {r.protocol["prefill_tokens"] for r in records} == {1087}
    taken_apart = list(shares(grid(records)))
    assert [run.cap for run, _ in taken_apart] == [128, 1024]
    for run, its in taken_apart:
        parts = its.eviction.value + its.within.value + its.past.value
        assert its.total.value == pytest.approx(parts, abs=1e-9)
        assert (its.past.value != 0) == (run.cap == 1024)
    assert (here / "out" / "cliff.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "cap 128: strict" in shown and "outside cap" in shown and max(map(len, shown.splitlines())) <= PIPE_WIDTH
    assert main(line("--positions", "cache", "--resume")) == 0
    assert len(load_records("out")) == 6 and capsys.readouterr().out.count("taken from") == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 1200}, "has 1200 tokens .*fills 1087 of them; accepted: at least 1600 tokens"),
        ({"tokens": 9000}, "too short: it has 4000 tokens"),
        ({"caps": "1,x"}, "--caps: '1,x' is not accepted; accepted: a finite number, or several"),
        ({"compress-every": "2.5"}, "--compress-every: '2.5' is not accepted; accepted: a whole number"),
        ({"compress-every": "1"}, "compress_every=1 is not accepted"),
        ({"positions": "nosuch"}, "--positions: position mode 'nosuch' is not known; accepted: cache, original"),
        ({"cap": 3}, "unknown argument '--cap=3'"),
    ],
)
def test_a_mistake_is_told_in_one_line(here, capsys, options, message):
    try:
        code = main(line(**options))
    except SystemExit as stop:
        code = stop.code
    told = capsys.readouterr()
    assert code == 2 and re.fullmatch(r"sinkstream cliff: error: .+\n", told.err), told.err
    assert re.search(message, told.err), told.err
    assert not (here / "out").exists()
