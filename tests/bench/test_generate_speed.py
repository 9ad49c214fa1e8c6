"""``bench --generate``: both caches are timed in turns, recorded, tabled, and give the headline figure."""

import io
import statistics

import pytest
import tiny_model
from record_factory import make_generate_record
from rich.console import Console
from transformers import DynamicCache

from sinkstream.bench import generate
from sinkstream.bench.generate import GenerateSession
from sinkstream.bench.generate_records import (
    CACHES,
    FIGURES,
    GENERATE_HEADLINES,
    GenerateRecord,
    generate_table,
    render_generate,
)
from sinkstream.cache import StreamingCache
from sinkstream.cli import main
from sinkstream.data import random_tokens
from sinkstream.evaluation.runner import Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.report.summary import write_summary
from sinkstream.show.table import NONE_YET

LLAMA = {"model": "random:llama-3.2-1b"}
RUNS = [RunSettings("strict", cap=32), RunSettings("lazy", cap=32, options={"compress_every": 4})]


def session(folder, tokens: int = 9, resume: bool = False) -> GenerateSession:
    request = Request(folder, {}, ["bench"], 0, resume)
    return GenerateSession(tiny_model.loaded("llama"), random_tokens(90, 20), tokens, 2, request, "s", turns=3)


def test_both_caches_are_timed_in_turns_and_recorded(tmp_path):
    records = session(tmp_path).run(RUNS, Console(file=io.StringIO()))
    assert records == GenerateRecord.below(tmp_path) and [r.policy["name"] for r in records] == ["strict", "lazy"]
    for record in records:
        assert len(record.turns) == 3 and record.protocol["tokens"] == 9
        assert min(t[f"{cache}_{name}_ms"] for t in record.turns for cache in CACHES for name in FIGURES) > 0
        ratios = [t["streaming_median_ms"] / t["dynamic_median_ms"] for t in record.turns]
        assert record.token["median_over"] == pytest.approx(statistics.median(ratios))
    assert generate_table(records).markdown().count("| strict |") == 1


def test_the_two_see_as_many_tokens_and_the_streaming_one_evicts(tmp_path, monkeypatch):
    """Order of the turns, hooks on the model, and what either cache holds behind a turn."""
    held, generated = [], generate.generated

    def watched(model, cache, given, tokens, warmup):
        times = generated(model, cache, given, tokens, warmup)
        assert len(times) == tokens
        streaming = isinstance(cache, StreamingCache)
        evicted = cache.stats()["evicted"] if streaming else 0
        hooks = len(model._forward_pre_hooks)
        held.append((type(cache), cache.kept_tokens if streaming else cache.get_seq_length(), evicted, hooks))
        return times

    monkeypatch.setattr(generate, "generated", watched)
    session(tmp_path, tokens=24).run(RUNS[:1], Console(file=io.StringIO()))
    dynamic, streaming = held[2], held[3]
    order = [kind for kind, *_ in held[2:]]
    assert order == [DynamicCache, StreamingCache, StreamingCache, DynamicCache, DynamicCache, StreamingCache]
    # 26 + 2 + 8 tokens, the last of which is never fed: from 29 to 35 while they are timed, 32 on average
    assert dynamic[1:] == (35, 0, 0)
    assert streaming[1:] == (32, 9, 1)


def test_a_command_that_is_resumed_takes_what_is_there(tmp_path):
    console = Console(file=io.StringIO())
    first = session(tmp_path).run(RUNS[:1], console)
    again = session(tmp_path, resume=True).run(RUNS[:1], console)
    other = session(tmp_path, resume=True, tokens=12).run(RUNS[:1], console)
    assert again == first and other != first and len(GenerateRecord.below(tmp_path)) == 2


def test_the_headline_is_the_worse_of_two_shapes(tmp_path):
    GenerateRecord.write(make_generate_record("a", over=1.0125), tmp_path)
    assert not set(write_summary(tmp_path).headlines) & set(GENERATE_HEADLINES), "one of two shapes"
    GenerateRecord.write(make_generate_record("b", over=1.025, **LLAMA), tmp_path)
    GenerateRecord.write(make_generate_record("c", over=2.0, policy="lazy R=64", **LLAMA), tmp_path)
    GenerateRecord.write(make_generate_record("d", over=3.0, cap=512), tmp_path)
    GenerateRecord.write(make_generate_record("e", over=4.0, device="cpu"), tmp_path)
    key = "dropin.strict_over_dynamic_generate"
    assert write_summary(tmp_path).headlines[key] == {"value": 1.025, "record": "b", "on": "Test GPU"}
    row = "| llama-3.2-1b float16 | strict | 10.000 | 10.250 | 1.025 | 1.025 – 1.076 | 1.025 |"
    assert row in render_generate(tmp_path)["bench-generate"]


def test_no_record_no_figure(tmp_path):
    assert set(render_generate(tmp_path).values()) == {NONE_YET}
    assert set(write_summary(tmp_path).missing) >= set(GENERATE_HEADLINES)


def test_a_record_lacks_no_time(tmp_path):
    record = make_generate_record("a")
    del record["turns"][1]["dynamic_mean_ms"]
    with pytest.raises(ValueError, match="field 'turns' lacks 'dynamic_mean_ms'"):
        GenerateRecord.write(record, tmp_path)


def test_the_command_shows_and_records(tmp_path, capsys):
    common = ["bench", "--model", "random:pythia-14m", "--cap", "32", "--policy", "strict", "--device", "cpu"]
    common += ["--generate"]
    assert main([*common, "--tokens", "10", "--warmup", "1", "--out", str(tmp_path / "out")]) == 0
    assert "tokens of generate()" in capsys.readouterr().out
    assert len(GenerateRecord.below(tmp_path / "out")) == 1
    for more, says in [
        (["--prefill", "9"], "exclude each other"),
        (["--sampling"], "exclude each other"),
        (["--backend", "hf"], "does not take --backend"),
        (["--streams", "2"], "does not take --streams"),
        (["--tokens", "9"], "--tokens 9 with --generate"),
        (["--warmup", "0"], "warmup=0"),
    ]:
        assert main([*common, *more, "--out", str(tmp_path / "none")]) == 2
        assert says in capsys.readouterr().err
