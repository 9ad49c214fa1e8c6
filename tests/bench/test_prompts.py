"""``bench --prefill``: prompts are timed in every way, recorded, tabled, and give the headline figures."""

import io

import pytest
import tiny_model
import torch
from record_factory import make_prompt_record
from rich.console import Console

from sinkstream.bench.prompt_records import PromptRecord
from sinkstream.bench.prompt_tables import PROMPT_HEADLINES, PROMPT_TABLES, append_table, prompt_table, render_prompts
from sinkstream.bench.prompts import APPEND_TOKENS, PromptSession, prompt_flops
from sinkstream.cli import main
from sinkstream.data import random_tokens
from sinkstream.engine import Engine
from sinkstream.evaluation.runner import Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.matmul import MatmulRate, matmul_rate
from sinkstream.policies import EvictionPolicy
from sinkstream.report.summary import write_summary
from sinkstream.show.table import NONE_YET

RATE = MatmulRate(0.5, 256, "float32")
LLAMA = {"model": "random:llama-3.2-1b", "dtype": "bfloat16"}


def session(folder, family: str = "gpt_neox", lengths=(40, 90), resume: bool = False) -> PromptSession:
    loaded = tiny_model.loaded(family)
    request = Request(folder, {}, ["bench"], 0, resume)
    return PromptSession(loaded, random_tokens(90, 60), lengths, "ring", RATE, request, "s", repeats=1)


def runs(*policies: str) -> list[RunSettings]:
    options = {"lazy": {"compress_every": 4}, "refresh-uniform": {"refresh": 8, "compress_every": 4}}
    return [RunSettings(name, cap=32, options=options.get(name, {})) for name in policies]


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_every_way_is_timed_and_recorded(family, tmp_path):
    records = session(tmp_path, family).run(runs("strict", "refresh-uniform"), Console(file=io.StringIO()))
    assert records == PromptRecord.below(tmp_path) and [r.policy["name"] for r in records] == [
        "strict",
        "refresh-uniform",
    ]
    strict, refresh = records
    assert [p["tokens"] for p in strict.prompts] == [40, 90]
    for prompt, same in zip(strict.prompts, refresh.prompts):
        assert min(prompt[f"{name}_ms"] for name in ("forward", "dynamic", "drop_in", "engine")) > 0
        assert prompt["floor_ms"] == pytest.approx(prompt["flops"] / 0.5e9)
        assert prompt["forward_ms"] == same["forward_ms"], "no policy changes it: it is timed once"
    assert strict.append["tokens"] == APPEND_TOKENS
    assert strict.append["over_step"] == pytest.approx(strict.append["ms"] / strict.append["step_ms"])
    shown = prompt_table(records, "title").markdown() + append_table(records).markdown()
    assert shown.count("strict") == 3 and f"{strict.append['over_step']:.3f}" in shown


def test_turns_with_and_without_a_prune_are_fed_before_one_is_timed(tmp_path, monkeypatch):
    """A capture, or a kernel that is compiled, must not fall into what is timed."""
    fed, marks = [], []

    class Counting(Engine):
        def prefill(self, ids, **options):
            evicted = self.stats()["evicted"]
            super().prefill(ids, **options)
            fed.append((len(ids), self.stats()["evicted"] > evicted))

    def mark(self, call, repeats=None):
        marks.append(len(fed))
        call()
        return 1.0

    monkeypatch.setattr(PromptSession, "_median", mark)
    one = session(tmp_path)
    one._append(
        Counting(one.loaded.model, policy=EvictionPolicy.build(cap=120, compress_every=64), backend="ring"),
        random_tokens(90, 60).ids,
    )
    steps, turns = marks
    before = [crosses for size, crosses in fed[steps:turns] if size == APPEND_TOKENS]
    assert set(before) == {False, True} and len(fed) == turns + 1


def test_a_policy_that_reads_the_tokenizer_is_timed(tmp_path):
    structural = RunSettings("refresh-structural", cap=32, options={"refresh": 8, "compress_every": 4})
    (record,) = session(tmp_path).run([structural], Console(file=io.StringIO()))
    assert record.policy["name"] == "refresh-structural" and len(record.prompts) == 2


def test_a_command_that_is_resumed_takes_what_is_there(tmp_path):
    console = Console(file=io.StringIO())
    first = session(tmp_path).run(runs("strict"), console)
    again = session(tmp_path, resume=True).run(runs("strict"), console)
    other = session(tmp_path, resume=True, lengths=(41,)).run(runs("strict"), console)
    assert again == first and other != first and len(PromptRecord.below(tmp_path)) == 2


def test_the_floor_counts_every_product_and_what_the_policy_shows():
    loaded = tiny_model.loaded("llama")
    policy, config = EvictionPolicy.build(cap=16), loaded.model.config
    linear = sum(m.weight.numel() for m in loaded.model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    head = loaded.model.lm_head.weight.numel()
    norms = sum(p.numel() for p in loaded.model.model.parameters() if p.ndim == 1)
    seen = sum(min(t + 1, 16) for t in range(50))
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * 16 * seen
    found = prompt_flops(loaded, policy, 50)
    assert 2 * (50 * linear + head) + attention <= found <= 2 * (50 * (linear + norms) + head) + attention
    assert prompt_flops(loaded, EvictionPolicy.build(cap=60), 50) > found


def test_the_headlines_are_the_worse_of_two_shapes(tmp_path):
    PromptRecord.write(make_prompt_record("a", engine_ms=120.0, over_step=1.5), tmp_path)
    assert not set(write_summary(tmp_path).headlines) & set(PROMPT_HEADLINES), "one of two shapes"
    PromptRecord.write(make_prompt_record("b", engine_ms=110.0, over_step=2.25, **LLAMA), tmp_path)
    PromptRecord.write(make_prompt_record("c", policy="lazy R=64", engine_ms=900.0, **LLAMA), tmp_path)
    headlines = write_summary(tmp_path).headlines
    assert headlines["engine.prefill_8192_over_forward"] == {"value": 1.2, "record": "a", "on": "Test GPU"}
    assert headlines["engine.prefill_32768_over_forward"] == {"value": 1.2, "record": "a", "on": "Test GPU"}
    assert headlines["engine.append_50_over_step"] == {"value": 2.25, "record": "b", "on": "Test GPU"}
    tables = render_prompts(tmp_path)
    assert set(tables) == set(PROMPT_TABLES) and NONE_YET not in tables.values()
    row = "| llama-3.2-1b bfloat16 | strict | 8,192 | 100.00 | 110.00 | 1.100 | 150.00 | 1.250 | 60.00 | 1.83 |"
    assert row + "\n" in tables["bench-prompts"], "no measurement before: no column for it"
    PromptRecord.write(make_prompt_record("d", engine_ms=110.0, **LLAMA), tmp_path)
    assert row + " 1.100 |" in render_prompts(tmp_path)["bench-prompts"], "the measurement before"


def test_no_record_no_figure(tmp_path):
    assert set(render_prompts(tmp_path).values()) == {NONE_YET}
    assert set(write_summary(tmp_path).missing) >= set(PROMPT_HEADLINES)


def test_a_record_lacks_no_time(tmp_path):
    record = make_prompt_record("a")
    del record["prompts"][1]["drop_in_ms"]
    with pytest.raises(ValueError, match="field 'prompts' lacks 'drop_in_ms'"):
        PromptRecord.write(record, tmp_path)


def test_the_command_shows_and_records(tmp_path, capsys):
    folder = tiny_model.save_model(tmp_path / "tiny")
    common = ["bench", "--model", str(folder), "--cap", "32", "--policy", "strict", "--device", "cpu"]
    assert main([*common, "--prefill", "20,40", "--text", "random", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "engine" in shown and "a turn on a full stream" in shown
    assert [p["drop_in_ms"] > 0 for p in PromptRecord.below(tmp_path / "out")[0].prompts] == [True, True]
    common[common.index("strict")] = "adaptive-entropy:adaptive_min=4:adaptive_every=8:adaptive_max=12"
    assert main([*common, "--prefill", "40", "--engine-only", "--text", "random", "--out", str(tmp_path / "own")]) == 0
    (record,) = PromptRecord.below(tmp_path / "own")
    assert record.over("drop_in", "dynamic", 40) is None and record.over("engine", "forward", 40) > 0
    assert "| – | – |" in prompt_table([record]).markdown()
    for more, says in [
        (["--prefill", "0"], "--prefill"),
        (["--prefill", "9", "--backend", "hf"], "one of the engine's"),
    ]:
        assert main([*common, *more, "--out", str(tmp_path / "none")]) == 2
        assert says in capsys.readouterr().err


def test_the_rate_of_products_is_measured():
    rate = matmul_rate("cpu", torch.float32, size=64)
    assert rate.tflops > 0 and rate.milliseconds(2e9 * rate.tflops) == pytest.approx(2.0)
    assert "64 x 64 float32" in str(rate)
