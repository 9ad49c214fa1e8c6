"""The speed benchmark: real tiny runs on a CPU, the arithmetic against hand numbers, records, tables and headlines."""

import errno
import io
import json
import os
import re
import signal
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_model
import torch
from record_factory import GPU, make_arrays, make_bench_record, make_record
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

import sinkstream.bench.decoding as decoding
import sinkstream.cli.bench as command
from sinkstream.bench.record import BenchRecord, speed
from sinkstream.bench.rungs import rung_runs
from sinkstream.bench.selection import pairs, rival
from sinkstream.bench.session import BenchSession
from sinkstream.bench.settings import BenchConfig, Floor, Protocol, kv_token_bytes
from sinkstream.bench.summary import SPEED_HEADLINES
from sinkstream.bench.tables import BENCH_TABLES, NONE_YET, render_bench, slope_lines, speed_table
from sinkstream.cli import main
from sinkstream.data import random_tokens
from sinkstream.engine import Engine
from sinkstream.evaluation.backends import BACKENDS
from sinkstream.evaluation.decoders import step_weight_bytes
from sinkstream.evaluation.run import run
from sinkstream.evaluation.runner import Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.kernels.layout import TOKEN
from sinkstream.measure.bandwidth import Bandwidth, memory_bandwidth
from sinkstream.measure.memory import OWN
from sinkstream.measure.timing import TokenClock
from sinkstream.models import shape_sizes
from sinkstream.records.files import WriteError
from sinkstream.records.records import load_records, write_record
from sinkstream.report.precision import precision_runs
from sinkstream.report.summary import HEADLINES, write_summary
from sinkstream.show.table import EMPTY
from sinkstream.statistics.comparison import ratio_of_times, time_against_bytes

CAP = 24
CEILING = Bandwidth("host memcpy", 10.0, 11.0, 1 << 20)


@pytest.fixture
def session(tmp_path):
    """A benchmark of the tiny model; options are those of the protocol and of the session."""

    def make(*, resume=False, lenient=False, block_tokens=50_000, family="gpt_neox", **protocol) -> BenchSession:
        protocol = Protocol(**{"tokens": 20, "warmup": 3} | protocol)
        loaded = tiny_model.loaded(family)
        text = random_tokens(loaded.model.config.vocab_size, 200)
        request = Request(tmp_path, {}, ["bench"], 0, resume)
        return BenchSession(
            loaded, text, protocol, CEILING, 0.5, request, "s", lenient=lenient, block_tokens=block_tokens
        )

    return make


def configs(rung: str = "ring", *policies: str, streams: int = 1, cap: int = CAP) -> list[BenchConfig]:
    options = {"lazy": {"compress_every": 4}}
    runs = [RunSettings(name, cap=cap, options=options.get(name, {})) for name in policies or ("strict",)]
    return [BenchConfig(rung, run, streams) for run in runs]


def console() -> Console:
    return Console(file=io.StringIO())


# ---- real tiny runs ----


@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_policies_take_turns_and_leave_records(session, tmp_path, family):
    outcome = session(tokens=120, family=family).run([configs("ring", "strict", "lazy")], console())
    strict, lazy = outcome.records
    assert [r.policy["label"] for r in (strict, lazy)] == ["strict", "lazy R=4"]
    assert strict.chunks["tokens"] == lazy.chunks["tokens"] == [50, 50, 20]
    assert strict.protocol["turn"] == lazy.protocol["turn"] == strict.id and strict.protocol["in_turn"] == 2
    assert strict.latency_ms["event"]["tokens"] == 117, "strict evicts at every token; one of each chunk is left out"
    assert strict.latency_ms["other"] == {"tokens": 0} | dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    assert 27 <= lazy.latency_ms["event"]["tokens"] <= 30 and lazy.latency_ms["all"]["tokens"] == 117
    assert strict.floor["visible_mean"] == CAP and lazy.floor["visible_mean"] == CAP - 1.5
    assert strict.steady["tpot_ms"] == pytest.approx(1e3 * sum(strict.chunks["seconds"]) / 120, rel=1e-4)
    assert strict.latency_ms["all"]["max"] <= 1e3 * strict.steady["wall_sec"]
    assert BenchRecord.below(tmp_path) == [strict, lazy] and load_records(tmp_path) == []
    assert [(a.id, b.id) for a, b in pairs([lazy, strict])] == [(strict.id, lazy.id)]


def test_tokens_are_those_that_the_engine_generates(session, monkeypatch):
    """The loop is greedy generation: same tokens as `Engine.generate` after the same prompt."""
    fed = []
    advance = Engine.advance

    def watched(self: Engine, tokens: torch.Tensor | None, streams) -> None:
        advance(self, tokens, streams)
        assert tokens is None, "the step finds the token"
        fed.append(self.state.scalars[:, TOKEN].tolist())

    monkeypatch.setattr(Engine, "advance", watched)
    one = session(tokens=30)
    one.run([configs()], console())
    engine = Engine(tiny_model.tiny_model(), cap=CAP)
    prompt = one.text.ids[:CAP]
    timed = fed.copy()
    assert [[t] for t in engine.generate(prompt, max_new_tokens=33, stop_tokens=()).tokens] == timed


def test_a_fed_text_gives_the_nll_of_the_engine(session):
    one = session(tokens=30, teacher_forced=True, block_tokens=10)
    (record,) = one.run([configs()], console()).records
    engine = Engine(tiny_model.tiny_model(), cap=CAP)
    engine.prefill(one.text.ids[:CAP])
    nll = engine.score(one.text.ids[CAP : CAP + 33]).numpy()[3:]
    assert [b["first_token"] for b in record.blocks] == [0, 10, 20]
    assert [b["mean_nll"] for b in record.blocks] == pytest.approx(nll.reshape(3, 10).mean(1).tolist(), rel=1e-6)
    assert all(b["not_finite"] == 0 and b["memory_mb"] > 0 for b in record.blocks)
    assert record.protocol["feed"] == "text"


@pytest.mark.parametrize(
    "rung", ["hf-recompute-eager", "hf-recompute-sdpa", "hf-cut", "hf-full", "hf", "ring", "kernels"]
)
def test_a_fed_text_gives_the_nll_of_the_evaluation(session, rung):
    """One decoder serves both, in the benchmark's loop and in the evaluation's."""
    one = session(tokens=12, teacher_forced=True)
    (config,) = rung_runs(rung, [configs("ring", "lazy")[0].run])
    (record,) = one.run([[BenchConfig(rung, config)]], console()).records
    prompt = record.protocol["prefill_tokens"]
    end = prompt + 3 + 12 + 1
    found = run(one.loaded, one.text.ids[:end], replace(config, backend=rung, prefill=prompt)).arrays
    steady = found["index"] >= prompt + 3
    assert steady.sum() == 13 and found["index"][-1] == end - 1
    assert record.blocks[0]["mean_nll"] == pytest.approx(found["nll"][steady][:-1].mean(), rel=1e-5)
    assert record.blocks[0]["mean_nll"] != pytest.approx(found["nll"][steady][1:].mean(), rel=1e-3), "control"
    assert record.floor["visible_mean"] == pytest.approx(found["kv_length"][-12:].mean())


def test_streams_read_the_weights_once(session):
    one = session()
    single, several = (one.run([configs(streams=n)], console()).records[0] for n in (1, 3))
    assert several.floor["weight_bytes"] == single.floor["weight_bytes"]
    assert several.floor["kv_bytes"] == 3 * single.floor["kv_bytes"]
    assert several.steady["tokens_per_sec"] == pytest.approx(3e3 / several.steady["tpot_ms"])


def test_every_rung_of_a_cpu_runs_and_the_others_say_why_not(session):
    one = session(tokens=6, lenient=True)
    runs = {name: rung_runs(name, [configs()[0].run]) for name in BACKENDS}
    outcome = one.run([[BenchConfig(name, run) for run in runs[name]] for name in BACKENDS], console())
    done = {r.rung["name"]: r for r in outcome.records}
    assert {"hf-recompute-eager", "hf-recompute-sdpa", "hf-cut", "hf-full", "hf", "ring"} <= set(done)
    assert len(done) + len(outcome.refused) == len(BACKENDS) and not outcome.failed
    refused = " ".join(f"{what}: {why}" for what, why in outcome.refused)
    assert "hf-static" in refused and "graph" in refused and "accepted: cuda" in refused
    assert done["hf-recompute-eager"].rung["attention"] == "eager"
    assert one.loaded.model.config._attn_implementation == "sdpa", "a rung leaves the model as it was"
    assert done["hf-full"].floor["visible_mean"] == pytest.approx(CAP, abs=1)
    weights = {r.floor["weight_bytes"] for r in outcome.records}
    assert max(weights) < 1.01 * min(weights), "one floor, packed or not"


def test_generate_with_a_static_cache_is_timed_token_by_token(session, monkeypatch):
    """On a CPU generate() compiles nothing; its loop and the marks on the clock are those of a GPU."""
    monkeypatch.setattr(BACKENDS["hf-static"], "needs_gpu", False)
    (run,) = rung_runs("hf-static", [configs()[0].run])
    (record,) = session(tokens=6).run([[BenchConfig("hf-static", run)]], console()).records
    assert record.status == "complete" and record.steady["tokens"] == record.latency_ms["all"]["tokens"] == 6
    assert record.protocol["prefill_tokens"] == CAP - 6 - 3, "its slots are full at the end"
    assert record.floor["visible_mean"] == CAP - 2.5 and record.policy["name"] == "full"


def test_a_rung_asked_for_by_name_is_refused_before_anything_runs(session, tmp_path):
    with pytest.raises(ValueError, match="GPU"):
        session().run([configs(), configs("graph")], console())
    assert BenchRecord.below(tmp_path) == []
    with pytest.raises(ValueError, match=r"one stream; accepted: --streams 1"):
        session().run([configs("hf", streams=2)], console())


def test_a_rung_that_breaks_costs_the_ladder_only_that_rung(session, monkeypatch):
    def broken(self):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(BACKENDS["hf"], "open", broken)
    monkeypatch.setattr(BACKENDS["hf"], "check", lambda self: None)
    outcome = session(lenient=True).run([configs("hf"), configs()], console())
    assert outcome.failed == [(f"hf strict, cap {CAP}", "RuntimeError: no such kernel")]
    assert [r.rung["name"] for r in outcome.records] == ["ring"]
    with pytest.raises(RuntimeError, match="no such kernel"):
        session().run([configs("hf"), configs()], console())


def test_too_little_memory_is_said_before_anything_runs(session, monkeypatch):
    one = session()
    per_token = kv_token_bytes(one.loaded.model)
    monkeypatch.setattr("sinkstream.bench.session.free_bytes", lambda device: per_token * CAP * 3)
    one._check_memory(configs("ring", "strict"))
    with pytest.raises(ValueError, match=r"keys and values take .* GB beside .* GB of weights, and .* are free"):
        one._check_memory(configs("ring", "strict", "lazy"))


def test_a_time_limit_ends_a_configuration_early(session):
    (record,) = session(tokens=5000, seconds=1e-6).run([configs()], console()).records
    assert record.status == "complete" and record.steady["tokens"] == 50
    assert record.protocol["tokens"] == 5000 and len(record.blocks) == 1


def test_profile_accounts_for_the_step(session):
    (record,) = session(profile=True).run([configs()], console()).records
    assert sum(row["share"] for row in record.profile) == pytest.approx(1)
    assert record.profile == sorted(record.profile, key=lambda row: -row["us"])
    layers = tiny_model.tiny_model().config.num_hidden_layers
    assert next(row for row in record.profile if row["kernel"] == "aten::argmax")["calls"] == 1
    assert next(row for row in record.profile if row["kernel"] == "aten::gelu")["calls"] == layers


class Reads(TorchDispatchMode):
    """Counts the operations that wait for a device to hand a value to the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("forced", [False, True], ids=["greedy", "forced"])
@pytest.mark.parametrize("rung", ["hf", "hf-cut", "hf-full", "ring", "kernels"])
def test_nothing_in_the_timed_loop_waits_for_the_device(session, monkeypatch, rung, forced):
    decode, reads = decoding.ActiveRun.decode, Reads()

    def counted(self, tokens):
        with reads:
            return decode(self, tokens)

    monkeypatch.setattr(decoding.ActiveRun, "decode", counted)
    one = session(teacher_forced=forced)
    (config,) = rung_runs(rung, [configs()[0].run])
    one.run([[BenchConfig(rung, config)]], console())
    assert reads.count == 0
    with reads:
        torch.ones(1).item()
    assert reads.count == 1, "the control is not seen"


# ---- interrupt and resume ----


class Killed(BaseException):
    """Nothing that runs may catch it: the process is gone."""


def interrupt_after(monkeypatch, turns: int, by: type[BaseException] = KeyboardInterrupt) -> None:
    turn, count = decoding.ActiveRun.turn, [0]

    def stopping(self, tokens):
        count[0] += 1
        if count[0] > turns:
            raise by
        turn(self, tokens)

    monkeypatch.setattr(decoding.ActiveRun, "turn", stopping)


def test_an_interrupted_run_goes_on_where_its_last_block_ended(session, tmp_path, monkeypatch):
    how = {"tokens": 250, "teacher_forced": True, "block_tokens": 100}
    (whole,) = session(**how).run([configs()], console()).records
    whole.path.unlink()
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)  # 150 tokens: one block and a half
        outcome = session(**how).run([configs(), configs("ring", "lazy")], console())
    assert outcome.interrupted and len(outcome.records) == 1
    (partial,) = outcome.records
    assert (partial.status, partial.steady["tokens"]) == ("partial", 150) and "150 of 250" in partial.status_reason
    assert list(tmp_path.glob("*-100.safetensors")) and len(list(tmp_path.glob("*.npz"))) == 1

    (resumed,) = session(**how, resume=True).run([configs()], console()).records
    assert (resumed.id, resumed.status, resumed.steady["tokens"]) == (partial.id, "complete", 250)
    nll = [[b["mean_nll"] for b in record.blocks] for record in (resumed, whole)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-6), "it goes on with the very same stream"
    assert resumed.floor["visible_mean"] == CAP and resumed.latency_ms["all"]["tokens"] == 245
    assert [p.name for p in tmp_path.iterdir()] == [resumed.path.name], "nothing is left over"

    (again,) = session(**how, resume=True).run([configs()], console()).records
    assert again == resumed, "a complete record is taken as it is"
    (other,) = session(**how | {"tokens": 150}, resume=True).run([configs()], console()).records
    assert other.id != resumed.id, "another protocol is another run"


def test_a_run_that_was_killed_goes_on_where_its_last_block_ended(session, tmp_path, monkeypatch):
    """It has a checkpoint and no record, not even a partial one."""
    how = {"tokens": 250, "teacher_forced": True, "block_tokens": 100}
    (whole,) = session(**how).run([configs()], console()).records
    whole.path.unlink()
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3, Killed)
        with pytest.raises(Killed):
            session(**how).run([configs()], console())
    (progress,) = tmp_path.glob("*.progress.npz")
    assert not list(tmp_path.glob("*.json"))
    (other,) = session(**how | {"tokens": 150}, resume=True).run([configs()], console()).records
    (anew,) = session(**how).run([configs("ring", "lazy")], console()).records
    assert not progress.name.startswith((other.id, anew.id)), "control: another run, and one that does not resume"
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)  # 100 of 250 tokens are done; these are all that is left
        (resumed,) = session(**how, resume=True).run([configs()], console()).records
    assert resumed.status == "complete" and progress.name.startswith(resumed.id)
    nll = [[b["mean_nll"] for b in record.blocks] for record in (resumed, whole)]
    assert nll[0] == pytest.approx(nll[1], rel=1e-6)
    assert not list(tmp_path.glob("*.npz")) and not list(tmp_path.glob("*.safetensors")), "nothing is left over"


@pytest.mark.parametrize(
    "change", [lambda data: data[:-40], lambda data: b"", lambda data: data[:90] + b"damage" + data[96:]]
)
def test_a_damaged_checkpoint_is_told_by_its_name(session, tmp_path, monkeypatch, change):
    how = {"tokens": 250, "block_tokens": 100}
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        session(**how).run([configs()], console())
    (progress,) = tmp_path.glob("*.progress.npz")
    progress.write_bytes(change(progress.read_bytes()))
    with pytest.raises(ValueError, match=r"progress\.npz: damaged, so that the run cannot be resumed"):
        session(**how, resume=True).run([configs()], console())
    progress.unlink()
    (record,) = session(**how, resume=True).run([configs()], console()).records
    assert record.status == "complete", "control"


def test_an_interrupted_turn_keeps_what_all_have(session, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_after(patched, 3)
        outcome = session(tokens=200).run([configs("ring", "strict", "lazy")], console())
    assert [r.steady["tokens"] for r in outcome.records] == [50, 50] and outcome.interrupted
    with monkeypatch.context() as patched:
        interrupt_after(patched, 0)
        with pytest.raises(KeyboardInterrupt):
            session(tokens=200).run([configs()], console())


# ---- what would lose figures ----


@pytest.fixture
def rescued(tmp_path_factory, monkeypatch):
    """The folder that takes what its own folder does not."""
    folder = tmp_path_factory.mktemp("rescued")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def fill_disk(monkeypatch, folder: Path, kinds: str = ".json .npz .safetensors") -> None:
    """No file of these kinds can be put into a folder any more."""
    replace = os.replace

    def full(source, target):
        if Path(target).parent == folder and Path(target).suffix in kinds.split():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(source, target)

    monkeypatch.setattr("sinkstream.records.files.os.replace", full)


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_runs(session, tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 0)
    one = session()
    with pytest.raises(KeyboardInterrupt):
        one.run([configs()], console())  # the control: without the mistake it would run
    (tmp_path / "file").write_text("")
    one.request = replace(one.request, out=tmp_path / "file" / "x")
    with pytest.raises(ValueError, match="file/x: cannot be written: Not a directory"):
        one.run([configs()], console())


def test_a_full_disk_keeps_every_record_of_a_turn_elsewhere(session, tmp_path, monkeypatch, rescued):
    fill_disk(monkeypatch, tmp_path)
    with pytest.raises(WriteError) as failed:
        session().run([configs("ring", "strict", "lazy")], console())
    told = re.findall(
        r"could not write \S+ .*?No space left on device.*?; the record was kept as (\S+?\.json)", str(failed.value)
    )
    assert [BenchRecord.read(path).policy["name"] for path in told] == ["strict", "lazy"]
    assert all(rescued in Path(path).parents for path in told) and BenchRecord.below(tmp_path) == []


def test_a_disk_that_fills_in_a_long_run_ends_it_with_what_was_measured(session, tmp_path, monkeypatch):
    fill_disk(monkeypatch, tmp_path, ".safetensors")
    outcome = session(tokens=250, block_tokens=100).run([configs(), configs("ring", "lazy")], console())
    (record,) = outcome.records
    assert outcome.interrupted and (record.status, record.steady["tokens"]) == ("partial", 100)
    assert re.search(
        r"interrupted after 100 of 250 steady tokens: could not write .*No space left", record.status_reason
    )


def test_a_checkpoint_stays_until_the_record_is_in_its_folder(session, tmp_path, monkeypatch, rescued):
    how = {"tokens": 250, "block_tokens": 100}
    with monkeypatch.context() as patched:
        fill_disk(patched, tmp_path, ".json")
        with pytest.raises(WriteError, match="the record was kept as"):
            session(**how).run([configs()], console())
    assert list(tmp_path.glob("*-200.safetensors")) and BenchRecord.below(rescued)
    session(**how).run([configs()], console())
    (record,) = BenchRecord.below(tmp_path)
    assert not list(tmp_path.glob(f"{record.id}*.safetensors")), "the control: once it is written nothing is left"


def test_ctrl_c_while_a_record_is_written_acts_afterwards(session, tmp_path, monkeypatch):
    write = BenchRecord.write

    def pressed(record, folder):
        signal.raise_signal(signal.SIGINT)
        return write(record, folder)

    monkeypatch.setattr(BenchRecord, "write", pressed)
    with pytest.raises(KeyboardInterrupt):
        session().run([configs("ring", "strict", "lazy"), configs()], console())
    assert [r.policy["name"] for r in BenchRecord.below(tmp_path)] == ["strict", "lazy"], "the turn is whole, no more"


# ---- arithmetic ----


def test_floor_and_speed_against_hand_numbers():
    floor = Floor(weight_bytes=5_000_000, kv_token_bytes=1000, visible_mean=500.0, streams=4)
    assert (floor.kv_bytes, floor.bytes) == (2_000_000, 7_000_000)
    samples = decoding.Samples(chunk_tokens=[50, 50], chunk_seconds=[0.05, 0.15])
    found = speed(samples, floor, CEILING)
    assert found["floor"]["ms"] == pytest.approx(0.7), "7 MB at 10 GB/s"
    assert found["steady"]["tpot_ms"] == pytest.approx(2.0) and found["steady"]["gbs"] == pytest.approx(3.5)
    assert found["steady"]["over_floor"] == pytest.approx(2 / 0.7)
    assert found["steady"]["share_of_floor"] == pytest.approx(0.35)
    assert found["steady"]["tokens_per_sec"] == pytest.approx(2000)


def test_bytes_of_the_pythia_2_8b_step_are_the_published_ones():
    """5.293 GB of weights and 0.672 GB of KV at 2,052 tokens, float16: 1.98 ms at 3,013 GB/s."""
    parameters = shape_sizes("pythia-2.8b")[0] - 50304 * 2560
    assert shape_sizes("pythia-2.8b")[1] == 2 * 32 * 32 * 80 and shape_sizes("llama-3.2-1b")[1] == 2 * 16 * 8 * 64
    floor = Floor(2 * parameters, 2 * 32 * 32 * 80 * 2, 2052, 1)
    assert floor.weight_bytes == pytest.approx(5.293e9, rel=1e-3) and floor.kv_bytes == pytest.approx(6.72e8, rel=1e-3)
    assert Bandwidth("", 3013, 0, 0).milliseconds(floor.bytes) == pytest.approx(1.98, abs=0.005)


def test_bytes_of_a_cached_token():
    config = tiny_model.tiny_model("llama").config
    heads = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    assert kv_token_bytes(tiny_model.tiny_model("llama")) == 2 * config.num_hidden_layers * heads * 4


def test_the_input_embedding_counts_only_where_it_is_the_head():
    neox = tiny_model.tiny_model()
    size = sum(p.numel() * p.element_size() for p in neox.parameters())
    embedding = neox.get_input_embeddings().weight
    assert step_weight_bytes(neox) == size - embedding.numel() * embedding.element_size()
    neox.get_output_embeddings().weight = embedding
    assert step_weight_bytes(neox) == sum(p.numel() * p.element_size() for p in neox.parameters())


def test_the_slope_is_that_of_the_planted_line():
    sizes = [0.2e9, 0.7e9, 2.7e9, 10.7e9]
    line = time_against_bytes(sizes, [1.8 + size / 1e9 / 2.5 for size in sizes])
    assert (line.gbs, line.fixed_ms, line.r_squared) == (pytest.approx(2500), pytest.approx(1.8), pytest.approx(1))
    assert time_against_bytes(sizes[:2], [1, 2]) is None and time_against_bytes([1e9] * 5, [1] * 5) is None


def test_the_interval_of_a_ratio_covers_the_planted_one_and_ignores_a_shared_drift():
    rng = np.random.default_rng(1)
    drift = np.linspace(1, 3, 200)
    base = 0.1 * drift
    ratio = ratio_of_times(1.02 * base * (1 + 0.01 * rng.standard_normal(200)), base)
    assert ratio.low < 1.02 < ratio.high and ratio.high - ratio.low < 0.01
    shuffled = ratio_of_times(rng.permutation(1.02 * base), base)
    assert shuffled.high - shuffled.low > 5 * (ratio.high - ratio.low), "without pairs the drift would hide it"
    few = ratio_of_times([1.0] * 7, [2.0] * 7)
    assert (few.value, few.low, few.high) == (0.5, None, None) and "no interval" in str(few)
    with pytest.raises(ValueError, match="expected equally many"):
        ratio_of_times([1.0], [1.0, 2.0])


def test_clock_and_bandwidth_of_a_cpu():
    clock = TokenClock("cpu")
    for _ in range(2):  # a second start forgets the first
        clock.start()
        clock.tick()
        clock.tick()
    assert clock.seconds().shape == (2,) and (clock.seconds() >= 0).all()
    found = memory_bandwidth("cpu", size=1 << 20, repeats=3)
    assert found.kind == "host memcpy" and found.copy_gbs > 0 and found.read_gbs > 0
    assert found.milliseconds(found.copy_gbs * 1e9) == pytest.approx(1e3)


# ---- records ----


def test_a_record_of_another_kind_or_version_is_refused_by_name(tmp_path):
    path = BenchRecord.write(make_bench_record("one"), tmp_path)
    content = json.loads(path.read_text())
    assert BenchRecord.read(path).steady["over_floor"] == pytest.approx(1.1)
    with pytest.raises(ValueError, match="exists already"):
        BenchRecord.write(make_bench_record("one"), tmp_path)
    for field, value, told in (
        ("schema", "sinkstream.bench/9", "'schema' is 'sinkstream.bench/9'"),
        ("schema", "sinkstream.run/1", "'schema' is 'sinkstream.run/1'"),
        ("floor", {}, "'floor.weight_bytes' is missing"),
        ("status", "partial", "status_reason"),
        ("chunks", {"tokens": [1], "seconds": []}, "different lengths"),
    ):
        path.write_text(json.dumps(content | {field: value}))
        with pytest.raises(ValueError, match=told):
            BenchRecord.read(path)
    path.write_text(json.dumps(content | {"schema": "sinkstream.bench/9"}))
    with pytest.raises(ValueError, match=r"one\.json.*reads 'sinkstream.bench/1'"):
        BenchRecord.below(tmp_path)


def test_a_partial_record_is_replaced_by_its_continuation(tmp_path):
    BenchRecord.write(make_bench_record("one", status="partial", chunks=3), tmp_path)
    BenchRecord.write(make_bench_record("one"), tmp_path)
    (record,) = BenchRecord.below(tmp_path)
    assert (record.status, record.steady["tokens"]) == ("complete", 600)


# ---- tables and headlines ----


def planted(tmp_path) -> None:
    """A GPU's records with known figures."""
    late = "2026-02-01T00:00:00+00:00"

    def store(*args, **more):
        BenchRecord.write(make_bench_record(*args, **more), tmp_path)

    plant_policies(tmp_path, "2025-01-01T00:00:00+00:00", adaptive=1.02, window=1.08)
    store("old", tpot_ms=9.0)
    store("strict", tpot_ms=2.2, turn="strict", created=late)
    store("lazy", "graph", "lazy R=64", tpot_ms=2.0, turn="strict", created=late)
    store("ring", "ring", tpot_ms=20.0, created=late)
    store("hf-strict", "hf", tpot_ms=30.0, turn="hf-strict", created=late)
    store("hf-lazy", "hf", "lazy R=64", tpot_ms=24.2, turn="hf-strict", created=late)
    store("hf-lazy-elsewhere", "hf", "lazy R=64", tpot_ms=11.0, created=late, session="other")
    store("sdpa", "hf-recompute-sdpa", "recompute", tpot_ms=28.6, created=late)
    store("static", "hf-static", "full", tpot_ms=5.5, created=late)
    store("bf16", tpot_ms=1.0, created=late, dtype="bfloat16")
    store("cpu", tpot_ms=99.0, created=late, device="cpu")
    store("llama", model="random:llama-3.2-1b", tpot_ms=1.1, floor_ms=1.0, dtype="bfloat16", created=late)
    store("tail", chunks=400, p99_over_p50=1.03, created=late)
    for cap, size in ((512, 1.7e8), (4096, 1.3e9), (8192, 2.7e9)):
        store(f"cap-{cap}", tpot_ms=2.2 + (size - 6.7e8) / 1e9 / 3, kv_bytes=size, cap=cap, created=late)
    store("streams-4", tpot_ms=3.0, streams=4, created=late)
    store("streams-8", tpot_ms=4.8, floor_ms=4.0, streams=8, created=late)
    llama = {"model": "random:llama-3.2-1b", "dtype": "bfloat16", "streams": 8, "created": late}
    store("llama-8", tpot_ms=1.5, floor_ms=1.0, **llama)
    block = {"first_token": 0, "tokens": 500_000, "memory_mb": 9.0, "mean_nll": 2.5, "not_finite": 0, "tpot_ms": 0.3}
    speeds = [0.30] * 16 + [0.5] * 1984 + [0.303] * 2000
    store(
        "long",
        model="builtin",
        chunk_tokens=250,
        chunk_seconds=[0.25 * ms for ms in speeds],
        blocks=[block, block | {"first_token": 500_000}],
        created=late,
        feed="text",
    )


def plant_policies(folder, created, adaptive, window):
    """Three policies that took turns on each of two shapes."""
    for model, dtype, factor in (("random:pythia-2.8b", "float16", 1.0), ("random:llama-3.2-1b", "bfloat16", 0.9)):
        turn = f"{created[:4]}-{dtype}-strict"
        rows = (("strict", 2.0), ("adaptive-entropy", 2 * adaptive * factor))
        for policy, tpot_ms in (*rows, ("refresh-window-attention R=64 B=64", 2 * window / factor)):
            more = dict(session=f"policies {created}", created=created, model=model, dtype=dtype, turn=turn, in_turn=3)
            name = turn if policy == "strict" else f"{created[:4]}-{dtype}-{policy.split()[0]}"
            BenchRecord.write(make_bench_record(name, "graph", policy, tpot_ms=tpot_ms, **more), folder)


def test_policies_over_strict_are_the_worse_of_two_shapes(tmp_path):
    plant_policies(tmp_path, "2025-02-01T00:00:00+00:00", adaptive=1.07, window=1.5)
    plant_policies(tmp_path, "2026-02-01T00:00:00+00:00", adaptive=1.01, window=1.08)
    found = write_summary(tmp_path).headlines
    assert found["engine.adaptive_over_strict"]["value"] == pytest.approx(1.01)
    assert found["engine.window_attention_over_strict"]["value"] == pytest.approx(1.2)
    table = render_bench(tmp_path)["bench-over-strict"]
    assert "| adaptive-entropy | 2.020 | 1.0100 [1.0100 – 1.0100] | 1.0700 [1.0700 – 1.0700] |" in table
    assert "| llama-3.2-1b bfloat16 | graph | 2,052 | refresh-window-attention R=64 B=64 | 2.400 | 1.2000" in table
    assert render_bench(tmp_path)["bench-policies"] == NONE_YET, "only two that took turns with nobody else"


def plant_recall(folder, archive, gate_open=0.03, slow=1.0, **options):
    """Strict with and without recall, which took turns on each of two shapes."""
    for model, dtype, tpot_ms in (("random:pythia-2.8b", "float16", 2.02), ("random:llama-3.2-1b", "bfloat16", 1.0)):
        kind, name = (
            archive or ("text" if "pythia" in model else "kv"),
            f"{archive}-{gate_open}-{dtype}{''.join(options)}",
        )
        more = {"model": model, "dtype": dtype, "turn": name, "chunks": 200, "p99_over_p50": tpot_ms}
        strict = make_bench_record(name, policy="strict", tpot_ms=tpot_ms / 1.01, **more)
        recall = make_bench_record(f"{name}-recall", policy=f"strict {kind}", tpot_ms=slow * tpot_ms, **more)
        recall["policy"]["options"] = (
            options | {"recall": "lexical"} | ({} if kind == "kv" else {"recall_archive": kind})
        )
        recall["recall"] = {"gate_open": gate_open}
        for record in (strict, recall):
            BenchRecord.write(record, folder)


def test_recall_over_strict_is_the_worse_of_two_shapes_with_the_gate_live(tmp_path):
    plant_recall(tmp_path, "kv")
    plant_recall(tmp_path, None, gate_open=0.0)
    assert {f"recall.{key}_over_{other}" for key, other in (("tpot", "strict"), ("p99", "p50"))} <= set(
        write_summary(tmp_path).missing
    )
    plant_recall(tmp_path, None)
    plant_recall(tmp_path, None, slow=1.5, recall_lag=2)  # newer, and not what recall does by default
    found = write_summary(tmp_path).headlines
    assert found["recall.tpot_over_strict"]["value"] == pytest.approx(1.01)
    assert found["recall.p99_over_p50"] == {"value": 2.02, "record": "None-0.03-float16-recall", "on": "Test GPU"}


def test_headlines_are_computed_from_the_records(tmp_path):
    planted(tmp_path)
    summary = write_summary(tmp_path)
    found = {key: figure["value"] for key, figure in summary.headlines.items()}
    assert found == pytest.approx(
        {
            "engine.tpot_over_floor": 1.1,
            "engine.strict_over_lazy": 1.1,
            "engine.adaptive_over_strict": 1.02,
            "engine.window_attention_over_strict": 1.2,
            "engine.p99_over_p50": 1.03,
            "engine.speedup_over_hf_lazy": 11.0,
            "engine.speedup_over_recompute_sdpa": 13.0,
            "engine.speedup_over_static_compile": 2.5,
            "engine.llama_1b_tpot_over_floor": 1.1,
            "engine.million_token_tpot_ratio": 1.01,
            "engine.streams8_over_floor": 1.5,
        }
    )
    assert summary.headlines["engine.tpot_over_floor"]["record"] == "strict"
    assert summary.headlines["engine.million_token_tpot_ratio"]["record"] == "long"
    assert {key for key in SPEED_HEADLINES if not key.startswith("recall.")} == set(found)
    assert "engine.ppl_relative_error" in summary.missing


def test_no_record_no_figure(tmp_path):
    assert set(write_summary(tmp_path).missing) >= set(SPEED_HEADLINES)
    assert set(render_bench(tmp_path).values()) == {NONE_YET}
    BenchRecord.write(make_bench_record("cpu", device="cpu"), tmp_path)
    BenchRecord.write(make_bench_record("short", chunks=3), tmp_path)
    BenchRecord.write(make_bench_record("cut", status="partial"), tmp_path)
    assert not write_summary(tmp_path).headlines, "a CPU, too few tokens and an interrupted run make no headline"


def test_a_rival_of_other_conditions_is_none(tmp_path):
    planted(tmp_path)
    records = {r.id: r for r in BenchRecord.below(tmp_path)}
    everything = list(records.values())
    assert rival(everything, records["strict"], "hf").id == "hf-lazy", "of the same command, and the faster policy"
    assert rival(everything, records["bf16"], "hf") is None
    assert rival(everything, records["cap-512"], "hf-static") is None
    BenchRecord.write(make_bench_record("quick", "hf", tpot_ms=24.1, created=records["hf-strict"].created), tmp_path)
    assert rival(BenchRecord.below(tmp_path), records["strict"], "hf").id == "quick", "strict, where that is faster"


def test_what_is_compared_comes_from_one_command(tmp_path):
    planted(tmp_path)
    before, ladder = write_summary(tmp_path).headlines, render_bench(tmp_path)["bench-ladder"]
    again = make_bench_record("again", tpot_ms=3.3, session="later", created="2026-03-01T00:00:00+00:00")
    BenchRecord.write(again, tmp_path)
    after = write_summary(tmp_path).headlines
    assert render_bench(tmp_path)["bench-ladder"] == ladder and "| 2.200 |" in ladder
    assert after["engine.speedup_over_hf_lazy"] == before["engine.speedup_over_hf_lazy"]
    assert after["engine.tpot_over_floor"]["record"] == "again", "compared with nothing, so the newest"


def test_a_run_on_another_card_changes_no_figure_and_has_a_table_of_its_own(tmp_path):
    """The planted figures are of the reference card; two others have some of them, and later."""

    def elsewhere(gpu, day, name, *args, **more):
        created, name = f"2026-03-0{day}T00:00:00+00:00", f"{day}-{name}"
        content = make_bench_record(name, *args, created=created, session=gpu, **more)
        content["environment"] |= {"gpu": GPU | {"name": gpu}}
        BenchRecord.write(content, tmp_path)

    def rename(gpu):
        for record in BenchRecord.below(tmp_path):
            content = json.loads(record.path.read_text())
            content["environment"]["gpu"]["name"] = gpu
            record.path.write_text(json.dumps(content))

    planted(tmp_path)
    rename("NVIDIA H100 80GB HBM3")
    before, tables = write_summary(tmp_path).headlines, render_bench(tmp_path)
    for day, gpu in ((1, "NVIDIA H200"), (2, "Test GPU")):
        elsewhere(gpu, day, "strict", tpot_ms=1.2, turn=f"{day}-strict")
        elsewhere(gpu, day, "lazy", "graph", "lazy R=64", tpot_ms=0.2, turn=f"{day}-strict")
        elsewhere(gpu, day, "hf", "hf", "lazy R=64", tpot_ms=50.0)
        elsewhere(gpu, day, "streams-8", tpot_ms=9.0, floor_ms=4.0, streams=8)
        elsewhere(gpu, day, "streams-2", tpot_ms=9.0, floor_ms=4.0, streams=2)
    after, both = write_summary(tmp_path).headlines, render_bench(tmp_path)
    assert after == before and after["engine.tpot_over_floor"]["on"] == "NVIDIA H100 80GB HBM3"
    for name in ("headline-speed", "bench-ladder", "bench-caps", "bench-streams", "bench-long"):
        assert both[name] == tables[name], name
    for name in ("bench-policies", "bench-shapes"):
        assert both[name].startswith(tables[name]), name
        lines = [line for line in both[name].splitlines() if "commit" in line]
        assert [line.partition(",")[0] for line in lines] == ["NVIDIA H100 80GB HBM3", "Test GPU", "NVIDIA H200"]
    for record in BenchRecord.below(tmp_path):
        if record.hardware == "NVIDIA H100 80GB HBM3":
            record.path.unlink()
    alone = write_summary(tmp_path).headlines
    assert alone["engine.tpot_over_floor"]["value"] == pytest.approx(0.6), "control: without the card of the figure"
    assert alone["engine.tpot_over_floor"]["on"] == "Test GPU"


def test_tables_of_the_documents_show_the_records(tmp_path):
    planted(tmp_path)
    tables = render_bench(tmp_path)
    assert set(tables) == set(BENCH_TABLES) and NONE_YET not in tables.values()
    ladder = [line.split(" | ") for line in tables["bench-ladder"].splitlines() if line.startswith("| ")][2:]
    assert [(row[0][2:], row[1], row[4]) for row in ladder] == [
        ("hf", "strict", "30.000"),
        ("hf-recompute-sdpa", "recompute", "28.600"),
        ("hf", "lazy R=64", "24.200"),
        ("ring", "strict", "20.000"),
        ("hf-static", "full", "5.500"),
        ("graph", "strict", "2.200"),
        ("graph", "lazy R=64", "2.000"),
    ], "of the command that timed most, there the newest; the slowest first"
    for figure in ("**2.20 ms**", "1.10 × the time", "2.5 × faster", "11.0 × faster", "costs 1.100 ×"):
        assert figure in tables["headline-speed"]
    assert "1.1000 [1.1000 – 1.1000]" in tables["bench-policies"]
    assert "llama-3.2-1b bfloat16" in tables["bench-shapes"] and "| 9.0 |" in tables["bench-long"]
    assert "(3,000 GB/s, R² 1.0000)" in tables["bench-caps"]
    assert "| pythia-2.8b float16 | 4 | 1,333 |" in tables["bench-streams"]
    assert slope_lines([]) == []


def test_streams_of_both_shapes_stand_in_one_table_each_of_the_command_that_timed_most(tmp_path):
    planted(tmp_path)

    def row(shape, streams, tpot_ms, created, session):
        model, dtype = shape.split()
        more = {"model": f"random:{model}", "dtype": dtype, "created": f"2026-0{created}-01T00:00:00+00:00"}
        name = f"{model}-{streams}-{session}"
        more |= {"tpot_ms": tpot_ms, "streams": streams, "session": session}
        BenchRecord.write(make_bench_record(name, **more), tmp_path)

    for shape, session in (("pythia-2.8b float16", "wide"), ("llama-3.2-1b bfloat16", "wide llama")):
        for streams in (16, 2, 4, 8):
            row(shape, streams, streams / 10, 3, session)
        row(shape, 8, 7.0, 4, f"{session}, later")
    row("llama-3.2-1b float16", 8, 9.0, 5, "another dtype")
    table = [line.split(" | ") for line in render_bench(tmp_path)["bench-streams"].splitlines() if line[:2] == "| "]
    assert [(cells[0][2:], cells[1], cells[4]) for cells in table[2:]] == [
        ("pythia-2.8b float16", "1", "2.200"),
        *(("pythia-2.8b float16", f"{streams}", f"{streams / 10:.3f}") for streams in (2, 4, 8, 16)),
        ("llama-3.2-1b bfloat16", "1", "1.100"),
        *(("llama-3.2-1b bfloat16", f"{streams}", f"{streams / 10:.3f}") for streams in (2, 4, 8, 16)),
    ], "8 streams of the wide command, not the later 7 ms; what it lacks is the latest of its kind"


@pytest.mark.parametrize(
    ("peak_mb", "kind", "in_turn", "shown"),
    [
        (6084.3, OWN, 1, "6,084"),
        (6084.3, OWN, 2, "≤ 6,084"),
        (6084.3, "cuda_allocated", 1, "≤ 6,084"),
        (None, "cuda_allocated", 1, EMPTY),
    ],
)
def test_the_ladder_has_the_memory_of_a_rung_or_its_bound(tmp_path, peak_mb, kind, in_turn, shown):
    record = make_bench_record("one", in_turn=in_turn) | {"memory": {"peak_mb": peak_mb, "kind": kind}}
    BenchRecord.write(record, tmp_path)
    header, _, row = (
        line.split(" | ") for line in render_bench(tmp_path)["bench-ladder"].splitlines() if line[:2] == "| "
    )
    assert row[header.index("peak memory (MB)")] == shown


def test_precision_compares_half_with_single_on_the_same_tokens(tmp_path):
    arrays = make_arrays(noise=0.0)
    worse = arrays | {"nll": arrays["nll"] + np.log(1.002)}
    top = np.arange(1280, dtype=np.int32)
    other = np.where(np.arange(1280) % 128 == 0, 0, top)
    write_record(make_record("control", arrays=arrays), arrays | {"top1": top}, tmp_path)
    half = {"backend": "ring", "dtype": "float16"}
    write_record(make_record("half", arrays=worse, **half), worse | {"top1": other}, tmp_path)
    write_record(make_record("other-cap", arrays=worse, **half, cap=512), worse, tmp_path)
    write_record(make_record("other-policy", "lazy", arrays=worse, **half), worse, tmp_path)
    (found,) = precision_runs(load_records(tmp_path))
    assert (found.record.id, found.control.id, found.tokens) == ("half", "control", 1280)
    assert found.relative_error == pytest.approx(0.002, rel=1e-3)
    assert found.agreement == pytest.approx(1 - 9 / 1280)
    worst = HEADLINES["engine.ppl_relative_error"]
    assert worst(load_records(tmp_path))[:2] == (pytest.approx(0.002, rel=1e-3), "half") and worst([]) is None


# ---- the command ----


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "memory_bandwidth", lambda device: CEILING)

    def call(line: str) -> SimpleNamespace:
        capsys.readouterr()
        try:
            code = main(["bench", *line.split()])
        except SystemExit as ended:
            code = ended.code
        return SimpleNamespace(code=code, **dict(zip(("out", "err"), capsys.readouterr())))

    return call


def test_the_command_prints_the_ceiling_and_the_tables_and_writes_records(bench, tmp_path, monkeypatch):
    tiny_model.save_model(tmp_path / "tiny")
    read, load = [], command.load_text
    monkeypatch.setattr(command, "load_text", lambda spec: read.append(spec) or load(spec))
    done = bench(
        "--model tiny --cap 16,24,32 --tokens 5 --warmup 1 --policy strict,lazy:compress_every=4"
        " --backend ring,hf --text builtin --streams 1 --out out"
    )
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("CPU: host memcpy 10.0 GB/s") and "R² " in done.out and "records: out" in done.out
    assert read == ["builtin"], "a pipe can be read once only"
    records = BenchRecord.below(tmp_path / "out")
    assert len(records) == 12 and {r.session for r in records} == {records[0].session}
    assert records[0].rung["name"] == "hf", "transformers first: it must not see packed weights"
    resumed = [replace(records[0], ceiling=records[0].ceiling | {"copy_gbs": 8.25}), *records[1:]]
    for table, copied in ((records, "10.0"), (resumed, "8.2 – 10.0")):
        assert f"at the speed of the host memcpy {copied} GB/s;" in speed_table(table, "").notes[0], "of each command"
    assert all(r.hardware.startswith("CPU (") and r.protocol["text"] == "builtin" for r in records)
    assert (
        bench("--model tiny --cap 16 --tokens 5 --warmup 1 --policy strict --ladder --out out").out.count("refused: ")
        >= 2
    )


def test_passages_come_again_and_the_record_says_what_recall_did(bench, tmp_path):
    tiny_model.save_model(tmp_path / "tiny")
    recall = "recall=lexical:recall_slots=32:recall_row_level=1.5:recall_row_rare=1:recall_every=4"
    line = "--model tiny --cap 256 --tokens 150 --warmup 1 --backend ring --text repeats --out out"
    done = bench(f"{line} --policy strict,strict:{recall}:recall_archive=text")
    assert (done.code, done.err) == (0, "")
    strict, recalled = BenchRecord.below(tmp_path / "out")
    assert strict.recall is None and strict.protocol["prefill_tokens"] == recalled.protocol["prefill_tokens"] == 1_024
    found = recalled.recall
    assert 0 < found["gate_open"] < 1 and 0 < found["framed"] < 1 and found["frames"] > 1
    assert 0 < found["recalled_mean"] <= 32 and found["archived"] > 900 and recalled.floor["visible_mean"] <= 256


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--shape pythia-3b", "shape 'pythia-3b' is not known; accepted: pythia-14m,"),
        ("--model random:nope", "unknown random shape"),
        ("--backend warp", "rung 'warp' is not known; accepted: hf-recompute-eager,"),
        ("--policy nosuch", "policy 'nosuch' is not known"),
        ("--policy full", "policy 'full' is a baseline, which has a rung of its own"),
        ("--shape pythia-14m --model builtin", "exclude each other"),
        ("--ladder --backend ring", "--ladder times every rung"),
        ("--cap 64,x", "'64,x' is not accepted; accepted: a whole number, or several"),
        ("--cap 0", "accepted: whole numbers of at least 1"),
        ("--streams 1,0", "accepted: whole numbers of at least 1"),
        ("--tokens 1", "tokens=1 is not accepted"),
        ("--warmup 0", "warmup=0 is not accepted"),
        ("--seconds 0", "seconds=0.0 is not accepted"),
        ("--shape pythia-14m --backend graph", "accepted: cuda"),
        ("--shape pythia-14m --cap 32", "cap=32 is too small"),
        ("--device tpu", "unknown device"),
        ("--prefill 9 --policy strict:recall=lexical", "--prefill times policies without recall"),
        ("--prefill 9 --recall lexical", "--prefill times policies without recall"),
        ("--shape pythia-14m --recall-slots 9", "--recall-slots goes with recall=CHOOSER"),
        ("--shape pythia-14m --cap 128 --recall lexical --recall-slots 200", "--recall-slots 200 leave nothing"),
    ],
)
def test_mistakes_are_one_line(bench, line, told):
    done = bench(line)
    assert done.code == 2 and told in done.err and done.err.count("\n") == 1, done.err


def test_a_folder_that_cannot_be_written_to_is_told_before_a_model_is_loaded(bench, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("nothing may be loaded"))
    done = bench("--shape pythia-14m --cap 128 --out file/x")
    assert (done.code, done.err) == (
        2,
        "sinkstream bench: error: --out file/x: cannot be written: Not a directory; accepted: a folder with room,"
        " or one that can be made\n",
    )


def test_weights_that_cannot_fit_are_refused_before_they_are_made(bench, monkeypatch):
    monkeypatch.setattr("sinkstream.bench.estimate.free_bytes", lambda device: 10e9)
    monkeypatch.setattr(command, "load_model", lambda *a, **k: pytest.fail("nothing may be loaded"))
    done = bench("--shape pythia-6.9b")
    told = "takes 27.43 GB of weights and 8.61 GB of keys and values, and 10.00 GB are free on cpu"
    assert done.code == 2 and told in done.err
    done = bench("--shape pythia-2.8b --backend graph")
    assert done.code == 2 and "captures for a GPU" in done.err, "the device comes first"
