"""Run records: what is written comes back, what is incomplete is refused, and no machine path gets in."""

import copy
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from record_factory import make_arrays, make_record

from sinkstream.matrix.record import PointRecord
from sinkstream.records.blocks import Blocks
from sinkstream.records.files import WriteError, write_atomically
from sinkstream.records.pairing import paired_delta
from sinkstream.records.pairs import PAIRS_FILE
from sinkstream.records.plain import new_record_id, plain_json, scrub_paths, short_name
from sinkstream.records.records import load_record, load_records, write_record
from sinkstream.records.schema import ARRAYS, NOT_NULL, REQUIRED, field_value
from sinkstream.statistics import block_sums


def dotted(required, prefix=""):
    """Every required field, nested ones as "a.b"."""
    for key, nested in required.items():
        yield prefix + key
        if nested:
            yield from dotted(nested, f"{prefix}{key}.")


@pytest.fixture
def written(tmp_path):
    return write_record(make_record("one"), make_arrays(), tmp_path)


def test_round_trip(tmp_path):
    record, arrays = make_record("one", options={"sink": 4}), make_arrays(200)
    arrays["nll"][7] = np.nan
    loaded = load_record(write_record(record, {**arrays, "entropy": np.ones(200)}, tmp_path))
    for field, value in record.items():
        assert getattr(loaded, field) == value
    for name, dtype in ARRAYS.items():
        assert loaded.arrays[name].dtype == dtype
        np.testing.assert_array_equal(loaded.arrays[name], arrays[name].astype(dtype))
    assert loaded.arrays["entropy"].dtype == np.float32
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "one.npz"]


def test_a_record_without_its_arrays_has_its_blocks_and_says_what_is_absent(tmp_path):
    arrays = make_arrays(1300, noise=0)
    paths = [write_record(make_record("one"), arrays, tmp_path)]
    paths += [write_record(make_record("two"), arrays | {"nll": arrays["nll"] + 0.25}, tmp_path)]
    before = paired_delta(*map(load_record, reversed(paths)))
    for path in paths:
        path.with_suffix(".npz").unlink()
    one, two = map(load_record, paths)
    index, sums, counts = block_sums(arrays["nll"].astype(np.float32), arrays["index"])
    assert one.blocks.first == index[0] and one.blocks.counts.tolist() == counts.tolist()
    np.testing.assert_allclose(one.blocks.sums, sums, atol=1e-5)
    assert paired_delta(two, one) == before and before.delta_percent == pytest.approx(100 * np.expm1(0.25), abs=1e-3)
    with pytest.raises(ValueError, match=r"'one': the per-token arrays \(index, nll, .*\) are absent: .*one\.npz"):
        one.arrays  # noqa: B018


def test_runs_that_scored_other_tokens_pair_by_what_was_kept_of_them(tmp_path):
    arrays = make_arrays(1300)
    sparse = np.where(np.arange(1300) % 8 == 0, arrays["nll"] + 0.1, np.nan)
    paths = [write_record(make_record("one"), arrays, tmp_path)]
    paths += [write_record(make_record("sampled", "recompute"), arrays | {"nll": sparse}, tmp_path)]
    one, sampled = load_records(tmp_path)
    before = paired_delta(sampled, one)
    (tmp_path / PAIRS_FILE).write_text(one.pairs.text())
    for path in paths:
        path.with_suffix(".npz").unlink()
    one, sampled = load_records(tmp_path)
    assert not sampled.blocks.whole and sampled.blocks.counts.sum() == 163
    assert paired_delta(sampled, one) == before and before.n_tokens == 163
    with pytest.raises(ValueError, match=r"pairs\.json does not hold 'paired blocks' of one sampled"):
        paired_delta(one, sampled)


def test_a_record_of_before_the_block_sums_loads(written):
    content = json.loads(written.read_text())
    blocks = content.pop("blocks")
    written.write_text(json.dumps(content))
    assert load_record(written).blocks.record() == blocks
    written.with_suffix(".npz").unlink()
    with pytest.raises(ValueError, match=r"one\.npz: .*can not be read"):
        load_record(written)


def test_a_record_that_was_cut_short_is_not_passed_over(tmp_path):
    (tmp_path / "point-0.json").write_text('{"schema": "sinkstream.po')
    with pytest.raises(ValueError, match=r"point-0\.json: not a JSON file"):
        PointRecord.below(tmp_path)
    (tmp_path / "point-0.json").write_text('{"schema": "other/1"}')
    assert PointRecord.below(tmp_path) == [], "control: another program's file is left alone"


def test_record_is_frozen(written):
    with pytest.raises(AttributeError):
        load_record(written).id = "other"


@pytest.mark.parametrize("field", list(dotted(REQUIRED)))
def test_loader_refuses_a_record_that_lacks_any_field(written, field):
    content = json.loads(written.read_text())
    parent, _, key = field.rpartition(".")
    del (field_value(content, parent) if parent else content)[key]
    written.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"one\.json: .*'{field}'"):
        load_record(written)


@pytest.mark.parametrize("field", NOT_NULL)
def test_loader_refuses_null_where_the_origin_would_be_lost(written, field):
    content = json.loads(written.read_text())
    parent, _, key = field.rpartition(".")
    (field_value(content, parent) if parent else content)[key] = None
    written.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"one\.json: .*'{field}'"):
        load_record(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "sinkstream.run/2"}, "'schema' is 'sinkstream.run/2'"),
        ({"status": "done"}, "'status' is 'done'"),
        ({"status": "partial"}, "'status_reason'"),
        ({"status_reason": "stopped"}, "'status_reason'"),
        ({"tokens_file": {"name": "../one.npz", "sha256": "0"}}, "without folders"),
        ({"tokens_file": {"name": "two.npz", "sha256": "0"}, "blocks": None}, "can not be read"),
        ({"tokens_file": {"name": "one.npz", "sha256": "0"}}, "'tokens_file.sha256' is 0"),
        ({"summary": []}, "'summary' must be an object"),
        ({"arguments": {"temperature": float("nan")}}, "not a JSON file: NaN is no number of JSON"),
        ({"arguments": {"temperature": float("-inf")}}, "not a JSON file: -Infinity is no number of JSON"),
        ({"blocks": {"tokens": 4}}, "required field 'blocks.first' is missing"),
        ({"blocks": []}, "field 'blocks' must be an object"),
        (
            {"blocks": {"tokens": 4, "first": 0, "last": 3, "nll": 1.0, "scored": None}},
            "field 'blocks.nll' must be a list, got float",
        ),
    ],
)
def test_loader_names_what_is_wrong(written, change, message):
    written.write_text(json.dumps(json.loads(written.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_record(written)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00\x01", "[" * 100_000], ids=range(5))
def test_loader_refuses_other_files(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=r"bad\.json"):
        load_record(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="no such record"):
        load_record(tmp_path / "none.json")


def test_gpu_run_must_name_its_gpu_and_driver(tmp_path):
    record = make_record("gpu", device="cuda")
    write_record(record, make_arrays(), tmp_path)
    record["environment"]["gpu"]["driver"] = None
    with pytest.raises(ValueError, match=r"environment\.gpu\.driver"):
        write_record(record | {"id": "gpu-2"}, make_arrays(), tmp_path)


def test_unknown_commit_needs_a_reason(tmp_path):
    record = make_record("one")
    record["environment"]["git"] = {"commit": None, "dirty": None, "reason": "not a checkout"}
    write_record(record, make_arrays(), tmp_path)
    record["environment"]["git"]["reason"] = None
    with pytest.raises(ValueError, match=r"environment\.git\.commit"):
        write_record(record | {"id": "two"}, make_arrays(), tmp_path)


def test_writer_refuses_what_the_loader_would(tmp_path):
    record = make_record("one")
    del record["data"]["sha256"]
    with pytest.raises(ValueError, match=r"data\.sha256"):
        write_record(record, make_arrays(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nll": np.zeros(3)}, r"'nll' has shape \(3,\)"),
        ({"index": np.zeros(1280)}, "increase strictly"),
        ({"surprise": np.zeros(1280)}, "unknown per-token array 'surprise'"),
    ],
)
def test_writer_refuses_odd_arrays(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_record(make_record("one"), make_arrays() | change, tmp_path)


def test_writer_never_overwrites(tmp_path, written):
    before = written.read_bytes()
    with pytest.raises(ValueError, match="never overwritten"):
        write_record(make_record("one"), make_arrays(seed=1), tmp_path)
    assert written.read_bytes() == before
    load_record(written)


@pytest.mark.parametrize("failing_call", [1, 2])
def test_full_disk_leaves_no_half_record(tmp_path, monkeypatch, failing_call):
    calls = []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == failing_call:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sinkstream.records.files.os.fsync", fsync)
    with pytest.raises(WriteError, match=r"bytes\): No space left on device"):
        write_record(make_record("one"), make_arrays(), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_empty_partial_run_is_kept(tmp_path):
    arrays = {name: value[:0] for name, value in make_arrays().items()}
    record = make_record("stopped", arrays=arrays) | {"status": "partial", "status_reason": "interrupted"}
    loaded = load_record(write_record(record, arrays, tmp_path))
    assert loaded.summary["ppl"] is None and loaded.arrays["nll"].size == 0


def test_load_records_from_folders_and_paths(tmp_path):
    late = write_record(make_record("a", created="2026-01-02T00:00:00+00:00"), make_arrays(), tmp_path / "deep" / "er")
    early = write_record(make_record("b"), make_arrays(), tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    (tmp_path / "ledger.json").write_text('{"schema": "sinkstream.ledger/1"}')
    assert [record.id for record in load_records(tmp_path)] == ["b", "a"]
    assert [record.id for record in load_records([late, early, tmp_path])] == ["b", "a"]
    (tmp_path / "stray.json").write_text("{}")
    with pytest.raises(ValueError, match=r"stray\.json"):
        load_records(tmp_path)
    with pytest.raises(ValueError, match="no such record or folder"):
        load_records(tmp_path / "nowhere")


def test_record_ids_are_readable_safe_and_distinct():
    ids = {new_record_id("SmolLM2-135M", "a/b c", "lazy R=32") for _ in range(20)}
    assert len(ids) == 20
    assert all(name.startswith("smollm2-135m-a-b-c-lazy-r-32-") for name in ids)
    assert new_record_id("..", "/").startswith("run-")


def test_a_long_name_is_cut_to_what_fits_every_listing():
    parts = ("SmolLM2-135M-Instruct.Q4_1", "pg19_dragons_blood", "lazy R=1024 S=4 growth outside cap", "blocks")
    names = [short_name(*parts), short_name(*parts[:3], "steps")]
    assert names[0] != names[1] and names[0].startswith("smollm-pg19-dr-lazy-r-blocks-")
    assert all(len(f"{new_record_id(*parts[:n])}.json") <= 60 for n in range(1, 5))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/someone/texts/book.txt", "book.txt"),
        ("/home/someone/my texts/", "my texts"),
        (Path("/home/someone/model"), "model"),
        ("--out=/home/someone/runs", "--out=runs"),
        ("C:\\Users\\someone\\book.txt", "book.txt"),
        ("could not read /home/someone/book.txt: denied", "could not read book.txt: denied"),
        (["--text", ("/a/b",), {"dir": "/c/d"}], ["--text", ["b"], {"dir": "d"}]),
        ("results/run", "results/run"),
        ("../shared/book.txt", "../shared/book.txt"),
        ("HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M"),
        ("random:pythia-2.8b", "random:pythia-2.8b"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("tokens/s and 3/4", "tokens/s and 3/4"),
        (7, 7),
        (None, None),
    ],
)
def test_scrub_paths(value, expected):
    assert scrub_paths(value) == expected


def test_no_absolute_path_enters_a_record(tmp_path):
    record = make_record("one", command=("/usr/local/bin/sinkstream", "eval", "--text", "/home/someone/book.txt"))
    record["arguments"] |= {"out": tmp_path, "model": Path("/home/someone/models/small")}
    record["model"]["source"] = "/home/someone/models/small"
    untouched = copy.deepcopy(record)
    path = write_record(record, make_arrays(), tmp_path)
    text = path.read_text()
    assert "/home" not in text and "/usr" not in text and str(tmp_path) not in text
    assert load_record(path).command == ["sinkstream", "eval", "--text", "book.txt"]
    assert record == untouched, "the caller's record must not change"


def test_plain_json_has_no_nan():
    value = {"a": np.float32("nan"), 2: [np.int64(3), float("inf")], "c": np.arange(2), "d": True}
    assert plain_json(value) == {"a": None, "2": [3, None], "c": [0, 1], "d": True}


def test_threads_that_write_leave_the_umask_as_it_was(tmp_path, monkeypatch):
    """Between reading the umask, which sets it to 0, and restoring it no other thread reads it."""
    umask, set_to_0 = os.umask, threading.Event()

    def slow(mask: int) -> int:
        found = umask(mask)
        if mask == 0 and not set_to_0.is_set():
            set_to_0.set()
            time.sleep(0.2)
        return found

    monkeypatch.setattr(os, "umask", slow)
    before = umask(0o027)
    try:
        first = threading.Thread(target=write_atomically, args=(tmp_path / "first", b"1"))
        first.start()
        assert set_to_0.wait(60)
        write_atomically(tmp_path / "second", b"2")
        first.join()
        assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("first", "second")] == [0o640, 0o640]
    finally:
        assert umask(before) == 0o027


def test_the_middle_of_a_shorter_last_block_lies_inside_the_text():
    """Of 60 tokens from index 100 on, in blocks of 25: 25, 25 and 10 tokens."""
    blocks = Blocks(25, 100, 159, np.zeros(3), np.array([25, 25, 10]), True)
    assert blocks.centres.tolist() == [112.5, 137.5, 155.0]
