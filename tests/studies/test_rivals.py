"""Rivals: records, pairing with our own runs, tables that lead with the nearest, and the headline figure."""

import json

import numpy as np
import pytest
from record_factory import make_arrays, make_record

from sinkstream.records.records import load_records, write_record
from sinkstream.report.documents import NONE_YET, render_tables
from sinkstream.report.summary import write_summary
from sinkstream.studies.rivals.compare import comparisons, delta
from sinkstream.studies.rivals.record import Measured, RivalRecord, check_same_prompt, not_measured
from sinkstream.studies.rivals.tables import HEADER, quality_table

CAP, TOKENS = 512, 1280


def measured(*, shift: float, seed: int = 0, scored: bool = True) -> Measured:
    """A rival whose loss is the text's, moved by `shift` nats a token."""
    arrays = make_arrays(TOKENS, seed=seed, shift=shift)
    return Measured(
        index=arrays["index"].tolist(),
        nll=arrays["nll"].tolist() if scored else [None] * TOKENS,
        seconds=arrays["seconds"].tolist(),
        kv_length=arrays["kv_length"].tolist(),
        prefill_tokens=CAP - 64,
        prefill_seconds=0.5,
        peak_memory_mb=900.0,
        peak_memory_kind="process_rss_peak",
        prefill_nll=3.5,
    )


def rival(name: str, method: str, found: Measured | None, created: str = "2026-01-02T00:00:00+00:00") -> dict:
    """A rival record as `RivalRecord.write` takes it; without `found` one that cannot run."""
    own = make_record(name, cap=CAP, prefill_tokens=CAP, model="SmolLM2-135M")
    kept = ("id", "command", "arguments", "environment", "model")
    return {
        **{key: own[key] for key in kept},
        "data": own["data"] | {"source": "file"},
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
