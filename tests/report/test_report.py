"""Tables, plots, headline figures and generated document parts, from synthetic records with known content."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from record_factory import make_arrays, make_bench_record, make_record
from rich.console import Console

from sinkstream.bench.record import BenchRecord
from sinkstream.records.records import load_record, write_record
from sinkstream.records.selection import is_plain, select
from sinkstream.report.block_pairs import BlockPair, block_pairs
from sinkstream.report.docs import generated_names, update_document
from sinkstream.report.documents import quality_table
from sinkstream.report.readme import readme_speed
from sinkstream.report.summary import HEADLINES, SOURCES, write_summary
from sinkstream.show import plots
from sinkstream.show.comparison import compared_runs, comparison_table
from sinkstream.show.plots import COLOURS, kv_token_bytes, line_formats, memory_and_quality, new_figure, save
from sinkstream.show.table import EMPTY, plus_minus, with_interval
from sinkstream.studies.rivals.tables import RIVAL_HEADLINES


@pytest.fixture
def store(tmp_path):
    """Write a record and load it again."""

    def write(name, policy="strict", arrays=None, **keywords):
        arrays = make_arrays() if arrays is None else arrays
        return load_record(write_record(make_record(name, policy, arrays=arrays, **keywords), arrays, tmp_path))

    return write


def sampled(arrays, every):
    return {name: values[::every] for name, values in arrays.items()}


def test_rows_carry_paired_differences(store):
    control = store("control", "recompute")
    worse = store("worse", "window-only", make_arrays(seed=1, shift=0.1))
    same = store("same", "strict", make_arrays(seed=2))
    first, second, third = (run.delta for run in compared_runs([control, worse, same]))
    assert first is None
    assert second.low < 100 * np.expm1(0.1) < second.high
    assert third.low < 0 < third.high
    cells = comparison_table([control, worse, same]).rows[1]
    assert [cells[at] for at in (0, 3, 4)] == ["window-only", "225 / 240 / 256", "32.0 / 32.0"]


def test_sampled_runs_pair_on_the_token_index(store):
    """Pairing by place in the array instead of by token index would compare different tokens."""
    control = store("control", "recompute", sampled(make_arrays(), 8), sample_every=8)
    run = compared_runs([control, store("strict", arrays=make_arrays(seed=1, shift=0.1, noise=0.01))])[1]
    assert run.delta.n_tokens == 160
    assert run.delta.delta_percent == pytest.approx(100 * np.expm1(0.1), abs=1)
    assert "1 in 8 tokens" in comparison_table([control]).rows[0][0]


@pytest.mark.parametrize("other", [{"model": "pythia-70m"}, {"text": "wikitext"}])
def test_another_text_or_model_is_no_control(store, other):
    with pytest.raises(ValueError, match="another text or another model"):
        compared_runs([store("a"), store("b", **other)])


def test_records_without_common_tokens_are_refused(store):
    shifted = make_arrays()
    shifted["index"] = shifted["index"] + 100_000
    with pytest.raises(ValueError, match="no token in common"):
        compared_runs([store("a"), store("b", arrays=shifted)])


def test_tables_show_every_row_and_the_control(store):
    short = make_arrays(40)
    records = [store("a", "full"), store("b", "lazy", options={"R": 32}), store("c", "strict", short)]
    markdown = comparison_table(records).markdown()
    lines = markdown.splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert lines[2].startswith("| full | ") and "| control |" in lines[2]
    assert lines[3].startswith("| lazy R=32 | ")
    assert "[no interval]" in lines[4] and "No interval: 5 blocks of 8 tokens" in markdown
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(comparison_table(records, "Comparison"))
    text = console.export_text()
    assert "lazy R=32" in text and "[no interval]" in text and "Comparison" in text


def test_latency_is_shown_only_of_runs_that_took_turns(store):
    alone, beside = store("a", "full"), [store(name, "full", interleaved=2) for name in ("b", "c")]
    assert "TPOT" not in comparison_table([alone, alone]).markdown()
    assert "TPOT" not in comparison_table([alone, *beside]).markdown()
    shown = comparison_table(beside).markdown()
    assert "Steady TPOT mean" in shown and "TTFT" not in shown and "| 24.87 / 24.61 / 29.08 |" in shown


def test_plot_is_a_png_with_a_line_a_record(store, tmp_path):
    records = [store(f"r{i}", "lazy", make_arrays(seed=i), options={"R": i}) for i in range(1, 10)]
    path = memory_and_quality(records, tmp_path / "nll.png")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width > 1000 and height > 500
    alone = memory_and_quality(records[:1], tmp_path / "one.png")
    assert int.from_bytes(alone.read_bytes()[20:24], "big") < height, "one record needs no difference panel"
    with pytest.raises(ValueError, match="no records"):
        memory_and_quality([], tmp_path / "none.png")
    empty = replace(records[1], id="empty", block_sums=None)
    empty.__dict__["blocks"] = None  # cached: of a run that was stopped before its first token
    for pair in ([records[0], empty], [empty, records[0]]):
        with pytest.raises(ValueError, match="'empty' has no tokens"):
            memory_and_quality(pair, tmp_path / "none.png")


def test_the_picture_holds_what_fits_and_leaves_the_rest_to_the_table(store, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(plots, "_label_ends", lambda axis, labels: told.append([text for _, text, _ in labels]))
    grown = make_arrays() | {"kv_length": np.arange(10, 1290)}
    records = [store("full", "full", grown), store("collapsed", "window-only", make_arrays(seed=9, shift=2.0))]
    records += [store(f"r{i}", "lazy", make_arrays(seed=i, shift=i / 100), options={"R": i}) for i in range(1, 9)]
    sampled_nll = np.where(np.arange(1280) % 8 == 0, make_arrays()["nll"], np.nan)
    records.append(store("sampled", "recompute", make_arrays() | {"nll": sampled_nll}, sample_every=8))
    memory_and_quality(records, tmp_path / "p.png")
    memory, quality = told
    assert memory == ["full: 1,289 entries", "5 policies: 256 entries"]
    assert quality[0] == "full" and [line.split(":")[0] for line in quality[1:]] == [
        *(f"lazy R={i}" for i in (1, 3, 5, 7)),
        "window-only",
    ]
    assert "off the axis" in quality[-1] and not [line for line in quality[:-1] if "off" in line]


def test_an_unbounded_interval_is_shown_as_infinite():
    assert with_interval(1.0, -2.0, None, 1) == "+1.0 [-2.0, inf]" and plus_minus(1.0, -2.0, None, 1) == "+1.0 ±inf"
    assert plus_minus(1.0, -2.0, 4.0, 1) == "+1.0 ±3.0" and plus_minus(1.0, None, None, 1) == "+1.0"


@pytest.mark.parametrize(
    ("interval", "shown"),
    [((-2.0, 4.0), "[-2.0, +4.0]"), ((-2.0, None), "[-2.0, inf]"), ((None, None), "[no interval]")],
)
def test_a_unit_stands_behind_the_figure(interval, shown):
    assert with_interval(1.0, *interval, 1, unit=" %") == f"+1.0 % {shown}"
    assert with_interval(1.0, *interval, 1) == f"+1.0 {shown}", "control"
    assert with_interval(None, *interval, 1, unit=" %") == EMPTY


def test_bytes_of_a_token_come_from_the_shape(store):
    record = store("a", dtype="float16")
    assert kv_token_bytes(record) is None, "the record does not say the shape"
    record.model["shape"] = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3} | {
        "hidden_size": 576
    }
    assert kv_token_bytes(record) == 2 * 30 * 3 * 64 * 2


def test_pictures_keep_their_colours_in_a_palette(tmp_path):
    """Even of thin lines; a palette chosen by frequency would lose them beside what covers the picture."""
    figure, (axis,) = new_figure(1)
    for number, colour in enumerate(COLOURS):
        axis.axvline(number, color=colour, linewidth=2)
        axis.axhspan(number, number + 1, color=colour, alpha=0.2)
    picture = Image.open(save(figure, tmp_path / "colours.png"))
    assert picture.mode == "P" and (tmp_path / "colours.png").stat().st_size < 40_000
    seen = {colour for _, colour in picture.convert("RGB").getcolors()}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in COLOURS} <= seen


def test_many_lines_stay_distinct():
    formats = [tuple(line.items()) for line, _ in zip(line_formats(), range(35))]
    assert len(set(formats)) == 35
    assert len(set(COLOURS)) == 7


def test_selection_is_by_content(store):
    strict = store("x1", "strict", model="HuggingFaceTB/SmolLM2-135M", text="PG-19")
    window = store("x2", "window-only")
    refresh = store("x3", "strict", options={"refresh": 16})
    records = [strict, window, refresh]
    assert select(records, model="smollm2-135m", text="pg19", policy="strict", plain=True) == [strict]
    assert select(records, backend="engine") == []
    assert is_plain(strict) and not is_plain(refresh)


def test_summary_holds_each_headline_with_its_record(store, tmp_path):
    shape = {"model": "random:pythia-2.8b", "device": "cuda", "dtype": "float16", "interleaved": 2}
    slow, fast = make_arrays(), make_arrays()
    slow["seconds"], fast["seconds"] = np.full(1280, 0.0204), np.full(1280, 0.02)
    store("gpu-strict", "strict", slow, **shape)
    store("gpu-full", "full", fast, **shape)
    store("other-dtype", "full", slow, **shape | {"dtype": "float32"}, created="2026-01-09T00:00:00+00:00")
    alone = {**shape, "interleaved": 1}  # not measured in turn with the full cache: must not count
    store("alone-strict", "strict", fast, **alone, created="2026-01-09T00:00:00+00:00")
    store("alone-full", "full", slow, **alone, created="2026-01-09T00:00:00+00:00")
    store("ppl-strict", "strict", make_arrays(shift=0.1), command=("sinkstream", "demo"))
    store("ppl-recompute", "recompute")
    store("ppl-window", "window-only", make_arrays(shift=2))
    store("elsewhere", "strict", text="wikitext", created="2026-01-09T00:00:00+00:00")
    for device in ("cpu", "cuda"):
        for policy, every in (("strict", 1), ("lazy", 32)):
            for evaluate in ("steps", "blocks"):
                store_evaluated(store, f"{device}-{policy}-{evaluate}", policy, evaluate, every, device=device)
    summary = write_summary(tmp_path)
    here = [key for key in HEADLINES if key.startswith(("foundation.", "diagnosis.block_", "dropin."))]
    written = json.loads((tmp_path / "summary.json").read_text())
    assert set(written) == set(here), "the others are tested with their records"
    assert list(written) == [key for key in HEADLINES if key not in summary.missing]
    assert written["foundation.hf_strict_over_full_tpot"] == {
        **{"value": pytest.approx(1.02), "record": "gpu-strict"},
        "on": "Test GPU",
    }
    assert written["foundation.ppl_strict"]["record"] == "ppl-strict"
    assert written["foundation.ppl_window_only"]["value"] > written["foundation.ppl_recompute"]["value"]
    assert written["foundation.demo_seconds"]["record"] == "ppl-strict"
    assert write_summary(tmp_path).headlines == written, "summary.json itself is no record"


def store_evaluated(store, name, policy, evaluate, every=1, **more):
    """A run of 1,280 tokens: 0.02 s a step, or in blocks 2 s in all but the prefill of 0.5 s, with an NLL 1e-6 off."""
    arrays = make_arrays(noise=0.0)
    arrays["seconds"] = np.full(1280, 0.02 if evaluate == "steps" else np.nan)
    if evaluate == "blocks":
        arrays["nll"] = arrays["nll"].astype(np.float32) + np.float32(1e-6)
    total = 30.0 if evaluate == "steps" else 2.5
    made = {"text": "blocks", "evaluate": evaluate, "options": {"compress_every": every}, "total_seconds": total}
    return store(name, policy, arrays, **made | more)


def test_blocks_pair_with_the_same_run_step_by_step(store):
    steps = store_evaluated(store, "steps", "strict", "steps")
    blocks = store_evaluated(store, "blocks", "strict", "blocks")
    half = make_arrays(noise=0.0)
    half["seconds"][640:] = np.nan
    others = [
        store_evaluated(store, "lazy", "lazy", "steps"),
        store_evaluated(store, "another-R", "strict", "steps", 2),
        store_evaluated(store, "another-cap", "strict", "steps", cap=512),
        store_evaluated(store, "another-dtype", "strict", "steps", dtype="float16"),
        store("partly", "strict", half, text="blocks", evaluate="steps", options={"compress_every": 1}),
    ]
    (pair,) = block_pairs([steps, *others, blocks])
    assert pair == BlockPair(blocks, steps)
    assert pair.speedup == pytest.approx(1280 * 0.02 / 2)
    assert 1e-7 < pair.max_abs_nll_difference < 1e-5
    assert not block_pairs([*others, blocks])


def test_steps_may_be_the_beginning_of_the_blocks(store):
    short = make_arrays(noise=0.0)
    short = {name: values[:320] for name, values in short.items()}
    short["seconds"] = np.full(320, 0.02)
    made = {"evaluate": "steps", "options": {"compress_every": 1}}
    steps = store("short", "strict", short, text="blocks", **made)
    other = store("other", "strict", short, text="another", **made)
    later = {name: values[320:] for name, values in make_arrays(noise=0.0).items()} | {"seconds": np.full(960, 0.02)}
    end = store("end", "strict", later, text="blocks", **made)
    blocks = store_evaluated(store, "blocks", "strict", "blocks")
    (pair,) = block_pairs([steps, other, end, blocks])
    assert pair.steps == steps and pair.speedup == pytest.approx(0.02 / (2 / 1280))
    assert 1e-7 < pair.max_abs_nll_difference < 1e-5


def test_the_slower_of_two_block_speedups_counts_on_the_cpu(store, tmp_path):
    for policy, every, total in (("strict", 1, 2.5), ("lazy", 32, 4.5)):
        store_evaluated(store, f"{policy}-steps", policy, "steps", every)
        store_evaluated(store, f"{policy}-blocks", policy, "blocks", every, total_seconds=total)
    headlines = write_summary(tmp_path).headlines
    found = headlines["diagnosis.block_speedup_cpu"]
    assert (found["value"], found["record"]) == (pytest.approx(6.4), "lazy-blocks")
    assert "diagnosis.block_speedup_strict" not in headlines, "that one is the GPU's"
    assert headlines["diagnosis.block_max_abs_nll_difference"]["value"] < 1e-5


def test_summary_leaves_missing_headlines_out_and_says_so(store, tmp_path):
    store("ppl-strict", "strict")
    store("cpu", "full", model="random:pythia-2.8b")
    summary = write_summary(tmp_path)
    assert list(summary.headlines) == ["foundation.ppl_strict", "dropin.families"]
    others = [key for registry, _ in SOURCES for key in registry]
    keys = {*HEADLINES, *RIVAL_HEADLINES, *others, "evidence.verdicts"}
    assert set(summary.missing) == keys - set(summary.headlines)
    assert "window without sinks" in summary.missing["foundation.ppl_window_only"]
    with pytest.raises(ValueError, match="not a folder"):
        write_summary(tmp_path / "none")


def test_ppl_headlines_are_of_comparable_runs(store, tmp_path):
    """The newest strict run alone must not stand beside a recompute of another cap."""
    store("strict-256", "strict")
    store("recompute-256", "recompute")
    store("strict-512", "strict", cap=512, created="2026-01-09T00:00:00+00:00")
    assert write_summary(tmp_path).headlines["foundation.ppl_strict"]["record"] == "strict-256"


def test_a_table_holds_runs_of_one_way(store):
    """A newer run of the same policy in blocks, or in another dtype or backend, is another measurement."""
    way = {"model": "M", "device": "cuda", "cap": 256, "prefill_tokens": 256, "dtype": "float16"}
    records = [store("control", "recompute", **way), store("steps", "strict", make_arrays(seed=2), **way)]
    alone = quality_table(records, model="M", text="pg19", cap=256, device="cuda")
    for name, change in (("b", {"evaluate": "blocks"}), ("d", {"dtype": "float32"}), ("f", {"backend": "fused"})):
        later = store(name, "strict", make_arrays(shift=0.1), created="2026-01-09T00:00:00+00:00", **way | change)
        assert quality_table([*records, later], model="M", text="pg19", cap=256, device="cuda") == alone
    newer = store("newer", "strict", make_arrays(shift=0.1), created="2026-01-09T00:00:00+00:00", **way)
    assert quality_table([*records, newer], model="M", text="pg19", cap=256, device="cuda") != alone


DOCUMENT = """# Title
<!-- generated:one -->
old
<!-- /generated -->
between
<!-- generated:two -->
<!-- /generated -->
end
"""


def test_the_readme_names_a_reported_best_day_until_a_record_is_better(tmp_path):
    ways = (("strict", "fused", "strict", 2.2), ("hf", "hf", "strict", 30.0))
    ways += (("sdpa", "hf-recompute-sdpa", "recompute", 28.6), ("static", "hf-static", "full", 5.5))
    for name, rung, policy, ms in ways:
        BenchRecord.write(make_bench_record(name, rung, policy, tpot_ms=ms), tmp_path)
    reported = readme_speed(BenchRecord.below(tmp_path))
    assert "its best day\\*" in reported and "Reported, not a committed record" in reported
    day = make_bench_record("day", "hf-static", "full", tpot_ms=4.0, created="2026-02-02T00:00:00+00:00")
    BenchRecord.write(day, tmp_path)
    better = readme_speed(BenchRecord.below(tmp_path))
    assert "best day; evicts" in better and "4.00 | 2.0" in better and "Reported" not in better


def test_document_sections_are_replaced_and_checked(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(DOCUMENT)
    assert generated_names(path) == ["one", "two"]
    assert update_document(path, {"one": "| a |"}, check=True) == ["one"]
    assert path.read_text() == DOCUMENT, "check writes nothing"
    assert update_document(path, {"one": "| a |"}) == ["one"]
    assert update_document(path, {"one": "| a |\n"}, check=True) == []
    expected = DOCUMENT.replace("old\n", "\n| a |\n\n")
    assert path.read_text() == expected
    assert update_document(path, {"one": r"\1 stays"}) == ["one"]
    assert r"\1 stays" in path.read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (DOCUMENT, "no section 'three'; it has: one, two"),
        (DOCUMENT.replace("old\n<!-- /generated -->\n", ""), "section 'one' has no closing"),
        (DOCUMENT.replace("generated:two", "generated:one"), "section 'one' occurs twice"),
    ],
)
def test_malformed_documents_are_refused(tmp_path, text, message):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        update_document(path, {"three": "x"})
    assert path.read_text() == text
