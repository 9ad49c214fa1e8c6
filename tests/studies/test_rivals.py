"""Rivals: records, pairing with our own runs, tables that lead with the nearest, and the headline figure."""

import json

import numpy as np
import pytest
from record_factory import make_arrays, make_record

from sinkstream.records.records import load_records, write_record
from sinkstream.report.documents import NONE_YET, render_tables
from sinkstream.report.summary import write_summary
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.rivals.chat import SERVERS, ChatRecord
from sinkstream.studies.rivals.compare import comparisons, delta
from sinkstream.studies.rivals.recall import RivalRecallRecord
from sinkstream.studies.rivals.record import Measured, RivalRecord, check_same_prompt, not_measured
from sinkstream.studies.rivals.tables import HEADER, quality_table

CAP, TOKENS = 512, 1280


def measured(*, shift: float, seed: int = 0, scored: bool = True) -> Measured:
    """A rival whose loss is the text's, moved by `shift` nats per token."""
    arrays = make_arrays(TOKENS, seed=seed, shift=shift)
    return Measured(
        index=arrays["index"].tolist(),
        nll=arrays["nll"].tolist() if scored else [None] * TOKENS,
        seconds=arrays["seconds"].tolist(),
        kv_length=arrays["kv_length"].tolist(),
        prefill_tokens=CAP - 64,
        prefill_seconds=0.5,
        peak_memory_mb=900.0,
        peak_memory_kind="process_vm_hwm",
        prefill_nll=3.5,
    )


def rival(name: str, method: str, found: Measured | None, created: str = "2026-01-02T00:00:00+00:00") -> dict:
    """A rival record as `RivalRecord.write` takes it; without `found` one that cannot run."""
    own = make_record(name, cap=CAP, prefill_tokens=CAP, model="SmolLM2-135M")
    kept = ("id", "command", "arguments", "environment", "model")
    return {
        **{key: own[key] for key in kept},
        "data": own["data"],
        "created": created,
        "status": "complete" if found else "failed",
        "status_reason": None if found else "KeyError: 'cache_position'",
        "rival": {
            **{"name": "kvpress", "method": method, "label": f"kvpress {name}", "options": {}, "version": "0.5.5"},
            "positions": "original",
        },
        "protocol": {
            **{"dtype": "float32", "device": "cpu", "tf32": False, "seed": 0, "cap": CAP, "warmup_tokens": 64},
            **{"prefill_tokens": CAP - 64, "decode_tokens": TOKENS, "evaluate": "steps", "call": "forward"},
            **{"feed": "text", "peak_slots": max(found.kv_length) if found else None},
        },
        "summary": found.summary() if found else not_measured(),
        "blocks": found.blocks() if found else None,
        "checks": {},
    }


@pytest.fixture
def results(tmp_path):
    """Two SnapKV presses, one press of another kind that is nearer, one that cannot run, and our strict streaming."""
    for name, method, shift in (("snap-a", "SnapKVPress", 0.10), ("snap-b", "SnapKVPress", 0.04)):
        RivalRecord.write(rival(name, method, measured(shift=shift, seed=1)), tmp_path)
    RivalRecord.write(rival("tova", "TOVAPress", measured(shift=-0.02, seed=2)), tmp_path)
    RivalRecord.write(rival("broken", "SnapKVPress", None), tmp_path)
    for name, policy, shift in (("own-strict", "strict", 0.0), ("own-lazy", "lazy", 0.01)):
        arrays = make_arrays(TOKENS, seed=3, shift=shift)
        write_record(make_record(name, policy, arrays=arrays, cap=CAP, prefill_tokens=CAP), arrays, tmp_path)
    return tmp_path


def compared(folder):
    """The one comparison that a folder holds."""
    (found,) = comparisons(load_records(folder), RivalRecord.below(folder))
    return found


def test_random_weights_have_no_quality(results):
    timed = rival("timed", "TOVAPress", measured(shift=9.0))
    timed["model"] = timed["model"] | {"source": "random", "hash": "0" * 64}
    RivalRecord.write(timed, results)
    assert len(RivalRecord.below(results)) == 5, "control: the record is there"
    assert {r.id for r in compared(results).rivals} == {"snap-a", "snap-b", "tova", "broken"}


def test_a_rival_is_paired_token_by_token_with_strict(results):
    """The difference is the planted one, of the sums of blocks, and not of the means alone: the noise is out."""
    found = compared(results)
    nearest = next(r for r in found.rivals if r.id == "snap-b")
    paired = delta(found.control, nearest)
    here, there = make_arrays(TOKENS, seed=3), make_arrays(TOKENS, seed=1, shift=0.04)
    expected = 100 * np.expm1((here["nll"] - there["nll"]).mean())
    assert paired.delta_percent == pytest.approx(expected, abs=1e-3)
    assert paired.low < expected < paired.high
    unpaired = here["nll"].std() / np.sqrt(TOKENS)
    assert (paired.high - paired.low) / 100 < unpaired, "an interval of unpaired runs would be wider"


def test_other_tokens_cannot_be_paired(results):
    """A rival that scored one token less is refused."""
    found = compared(results)
    path = next(results.glob("snap-b.json"))
    content = json.loads(path.read_text())
    content["blocks"]["first"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="can not be paired with rival 'snap-b'"):
        delta(found.control, RivalRecord.read(path))


def test_the_table_leads_with_the_nearest_rival(results):
    """Lowest perplexity first, then ours, then the other rivals, at the end those that cannot run, with the reason."""
    rows = quality_table(compared(results)).rows
    names = [row[0] for row in rows]
    assert names[0] == "kvpress tova"
    assert names[1:3] == ["**sinkstream** `strict`", "**sinkstream** `lazy`"]
    assert names[3:] == ["kvpress snap-b", "kvpress snap-a", "kvpress broken"]
    assert rows[-1][1] == "cannot run: KeyError: 'cache_position'"
    assert all(len(row) == len(HEADER) for row in rows)


def test_the_headline_is_that_of_the_best_snapkv(results):
    """Strict against the SnapKV press of lowest perplexity, with its interval; without one there is no figure."""
    key = "evidence.delta_ppl_strict_vs_kvpress_snapkv"
    figure = write_summary(results).headlines[key]
    assert figure["record"] == "snap-b"
    assert figure["low"] < figure["value"] < figure["high"] < 0
    for path in results.glob("snap-*.json"):
        path.unlink()
    assert key in write_summary(results).missing


def test_tables_of_documents(results, tmp_path):
    """They are rendered by name; without records there is none."""
    tables = render_tables(results)
    assert "kvpress tova" in tables["rivals-pg19"] and tables["rivals-wikitext"] == NONE_YET
    empty = tmp_path / "empty"
    empty.mkdir()
    assert render_tables(empty)["rivals-speed"] == NONE_YET


def test_a_rival_that_cannot_score_has_no_perplexity():
    """Times stay; a figure that was not measured is none."""
    summary = measured(shift=0.0, scored=False).summary()
    assert summary["ppl"] is None and summary["scored_tokens"] == 0
    assert summary["timed_tokens"] == TOKENS and 20 < summary["steady_tpot_ms"]["p50"] < 30
    assert measured(shift=0.0, scored=False).blocks() is None
    assert not_measured()["steady_tpot_ms"]["p50"] is None


@pytest.mark.parametrize(("kind", "apart"), [("float32", 0.002), ("float16", 0.03), ("quantised", 0.06)])
def test_another_model_is_found_out(kind, apart):
    """The prompt's loss, which no rival evicts from, must be ours; NaN is not."""
    check_same_prompt(3.5, 3.5 + apart / 4, kind)
    with pytest.raises(ValueError, match="another model or other tokens"):
        check_same_prompt(3.5, 3.5 + apart, kind)
    with pytest.raises(ValueError, match="another model or other tokens"):
        check_same_prompt(float("nan"), 3.5, kind)


def test_a_record_says_what_it_lacks(tmp_path):
    """As every kind of record."""
    content = rival("one", "SnapKVPress", measured(shift=0.0))
    del content["rival"]["options"]
    with pytest.raises(ValueError, match=r"required field 'rival.options' is missing"):
        RivalRecord.write(content, tmp_path)


# ---- times on a CPU ----


def timed(name: str, load: float | None, milliseconds: float, **more) -> dict:
    """A rival's record with the load of its machine, or without it as older ones are."""
    found = rival(name, "TOVAPress", measured(shift=0.0), **more)
    found["environment"]["cpu"] |= {"load_average": load}
    if load is None:
        del found["environment"]["cpu"]["load_average"]
    found["summary"]["steady_tpot_ms"] = dict.fromkeys(("mean", "p50", "p90", "p99"), milliseconds)
    return found


def test_times_on_a_cpu_come_with_its_load(tmp_path):
    """Fastest first, ours among them; a record that does not know its load is left out."""
    for name, load, ms in (("slow", 1.5, 70.0), ("fast", 2.5, 17.0), ("unknown", None, 1.0)):
        RivalRecord.write(timed(name, load, ms), tmp_path)
    broken = rival("broken", "TOVAPress", None)
    broken["environment"]["cpu"]["load_average"] = 1.0
    RivalRecord.write(broken, tmp_path)
    arrays = make_arrays(TOKENS)
    own = make_record("own", "strict", arrays=arrays, cap=CAP)
    own["environment"]["cpu"]["load_average"] = 3.0
    own["summary"]["steady_tpot_ms"] = dict.fromkeys(("mean", "p50", "p90", "p99"), 40.0)
    write_record(own, arrays, tmp_path)
    rows = [line.split(" | ") for line in render_tables(tmp_path)["rivals-speed-cpu"].splitlines()[4:]]
    assert [row[0].removeprefix("| ") for row in rows] == [
        *("kvpress fast", "**sinkstream** `strict`, in transformers", "kvpress slow", "kvpress broken")
    ]
    assert [row[3] for row in rows[:3]] == ["2.5", "3.0", "1.5"] and rows[0][5] == "17.0"
    assert rows[3][1] == "cannot run: KeyError: 'cache_position'"


# ---- recall ----


def recall_of(gain: float, seed: int = 0) -> dict[str, list]:
    """Passages at two distances, which recall `gain` nats inside the window and nothing past it."""
    noise = np.random.default_rng(seed).normal(0, 0.01, 16)
    ratio = np.repeat([0.5, 2.0], 8)
    columns = {"ratio": ratio, "distance": (ratio * CAP).astype(int), "first": np.arange(16), "second": np.arange(16)}
    columns |= {"nll_unseen": np.full(16, 4.0), "nll_again": 4.0 - gain * (ratio < 1) + noise}
    return {name: column.tolist() for name, column in columns.items()}


LAYOUT = {"ratios": [0.5, 2.0], "passages": 8, "passage_tokens": 64, "control_sha256": "of the control"}


def test_recall_of_rivals_stands_beside_ours_on_the_same_streams(tmp_path):
    """A table a pair of streams; one row a rival, with the reason where it cannot run."""
    other = {"control_sha256": "another"}
    one = measured(shift=0.0)
    for name, found, streams in (("shift", one, {}), ("broken", None, {}), ("b", one, other)):
        content = rival(name, "context shift", found)
        del content["summary"], content["blocks"]
        content["protocol"] |= LAYOUT | streams
        content["passages"] = recall_of(2.5) if found else {column: [] for column in recall_of(0.0)}
        RivalRecallRecord.write(content, tmp_path)
    for label, control in (("strict", "of the control"), ("lazy", "another")):
        own = make_record(label, label, cap=CAP)
        own["policy"]["label"], own["passages"] = label, recall_of(1.5, seed=1)
        own["protocol"] |= LAYOUT | {"control_sha256": control}
        RecallRecord.write({name: part for name, part in own.items() if name != "tokens_file"}, tmp_path)
    table = render_tables(tmp_path)["rivals-recall"]
    tables = [[line.strip("| ").split(" | ") for line in one.splitlines()[2:]] for one in table.split("\n\n")[1::2]]
    alone, rows = sorted(tables, key=len)
    assert [row[0] for row in alone] == ["kvpress b", "**sinkstream** `lazy`"]
    assert [row[0] for row in rows] == ["kvpress shift", "**sinkstream** `strict`", "kvpress broken"]
    assert rows[0][2].lstrip("+").startswith("2.5") and rows[1][2].lstrip("+").startswith("1.5")
    assert rows[2][1].startswith("cannot run")


# ---- a chat longer than the context ----


def chat(name: str, refused_from: int | None, turns: int = 4) -> dict:
    """A server's record; from a turn on it refuses, if it does."""
    own = make_record(f"chat-{name}", model="SmolLM2-135M")
    ended = turns + 1 if refused_from is None else refused_from
    right = [turn < ended for turn in range(1, turns + 1)]

    def column(answered, refused=None) -> list:
        return [answered if ok else refused for ok in right]

    return {
        **{key: own[key] for key in ("id", "status", "status_reason", "created", "command", "arguments")},
        **{"environment": own["environment"], "model": own["model"]},
        "server": {"name": name, "label": SERVERS[name].label, "options": SERVERS[name].options, "version": "1"},
        "protocol": {
            **{"dtype": "float32", "device": "cpu", "tf32": False, "seed": 0, "cap": 64, "turns": turns},
            **{"max_tokens": 8, "threads": 1, "client": "openai 1"},
        },
        "turns": {
            **{"status": column(200, 400), "error": column(None, "too_long"), "reply": column(" Ada. ")},
            **{"prompt_tokens": column(100), "cached_tokens": column(80), "completion_tokens": column(3)},
            **{"finish_reason": column("stop"), "ttft_ms": column(9.0), "seconds": column(0.1)},
        },
        "long_reply": {
            **{"asked": 128, "status": 200, "completion_tokens": 30, "finish_reason": "length"},
            **{"next_status": 200 if refused_from is None else 400, "next_error": "too_long", "next_reply": "Ada"},
        },
    }


def test_the_chat_table_says_who_refuses_and_from_when(tmp_path):
    for name, refused_from in (("sinkstream", None), ("llamacpp", 3)):
        ChatRecord.write(chat(name, refused_from), tmp_path)
    table = render_tables(tmp_path)["rivals-chat"]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[4:]]
    assert rows[0][1:4] == ["2, from turn 3 on", "HTTP 400 `too_long`", "–"]
    assert rows[0][4:] == ["30 of 128 tokens", "HTTP 400 `too_long`"]
    assert rows[1][1:4] == ["none", "100 tokens, of which 20 are computed", "“Ada.”"] and rows[1][5] == "answered"
    short = chat("llamacpp", 3)
    short["turns"]["status"] = [200]
    with pytest.raises(ValueError, match=r"turns\.status.*1 values of 4 turns"):
        ChatRecord.write(short | {"id": "short"}, tmp_path)
