"""Timing, memory, environment and summaries: exact figures from known input, and nothing personal in a bug report."""

import gc
import getpass
import json
import os
import platform
import socket
import subprocess
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from sinkstream.measure.environment import environment, format_environment, git_revision, tf32_switches
from sinkstream.measure.memory import (
    OWN,
    PeakMemory,
    free_unused,
    held_mb,
    old_objects_aside,
    set_old_objects_aside,
)
from sinkstream.measure.metrics import summarise
from sinkstream.measure.timing import distribution, latency_summary, timed
from sinkstream.records.files import WriteError, write_atomically
from sinkstream.records.schema import check_environment


def test_timed_returns_result_and_covers_the_call(monkeypatch):
    """On a clock that stands still but for the call."""
    now = [7.0]
    monkeypatch.setattr("sinkstream.measure.timing.time.perf_counter", lambda: now[0])

    def work(a: int, b: int) -> int:
        now[0] += 0.25
        return a - b

    assert timed(work, 5, b=3, device="cpu") == (2, 0.25)


def test_timed_synchronises_before_both_clock_reads(monkeypatch):
    calls = []
    monkeypatch.setattr("sinkstream.measure.timing.synchronise", lambda device: calls.append("sync"))
    monkeypatch.setattr("sinkstream.measure.timing.time.perf_counter", lambda: calls.append("clock") or 0.0)
    timed(lambda: calls.append("work"), device="cpu")
    assert calls == ["sync", "clock", "work", "sync", "clock"]


def test_latency_summary_leaves_the_warm_up_out():
    seconds = np.concatenate([np.full(64, 1.0), np.full(36, 0.010)])
    summary = latency_summary(seconds)
    assert summary["tpot_ms"] == pytest.approx(1e3 * (64 + 0.36) / 100)
    assert summary["steady_tpot_ms"] == pytest.approx({"mean": 10, "p50": 10, "p90": 10, "p99": 10})


def test_latency_percentiles_are_numpys():
    seconds = np.random.default_rng(0).exponential(0.02, 500)
    seconds[:100] *= 10
    steady = latency_summary(seconds, warmup_tokens=100)["steady_tpot_ms"]
    assert steady["p90"] == pytest.approx(1e3 * np.percentile(seconds[100:], 90))
    assert steady["p50"] != pytest.approx(1e3 * np.percentile(seconds, 50)), "control: the warm-up must matter here"


@pytest.mark.parametrize("n_tokens", [0, 1, 64])
def test_latency_without_steady_tokens_is_null(n_tokens):
    summary = latency_summary(np.full(n_tokens, 0.01))
    assert summary["steady_tpot_ms"] == {"mean": None, "p50": None, "p90": None, "p99": None}
    assert (summary["tpot_ms"] is None) == (n_tokens == 0)


def test_latency_skips_untimed_tokens_but_counts_them_as_warm_up():
    seconds = np.full(128, np.nan)
    seconds[::8] = np.where(np.arange(0, 128, 8) < 64, 1.0, 0.5)
    assert latency_summary(seconds)["steady_tpot_ms"]["mean"] == pytest.approx(500)


def test_negative_warm_up_is_refused():
    with pytest.raises(ValueError, match="warmup_tokens = -1"):
        latency_summary(np.ones(3), warmup_tokens=-1)


def test_distribution_of_nothing():
    assert distribution(np.array([np.nan]), with_max=True) == dict.fromkeys(("mean", "p50", "p90", "p99", "max"))


class HeldMemory:
    """Stands in for psutil's process: holds what it is told to, and knows when that has been read."""

    def __init__(self, held_mb: int):
        self.held_mb, self.lock, self.read = held_mb, threading.Lock(), threading.Event()

    def memory_info(self) -> SimpleNamespace:
        with self.lock:
            self.read.set()
            return SimpleNamespace(rss=self.held_mb * 2**20)

    def hold(self, held_mb: int) -> None:
        """From now on hold that many MB; returns once somebody has read it."""
        with self.lock:
            self.held_mb = held_mb
            self.read.clear()
        assert self.read.wait(timeout=600), "nobody reads while the body runs"


def test_peak_memory_on_cpu_sees_what_was_freed_again(monkeypatch):
    """A reading before and after would miss what is held inside the run only."""
    process = HeldMemory(100)
    monkeypatch.setattr("sinkstream.measure.memory.psutil.Process", lambda: process)
    with PeakMemory("cpu") as idle:
        process.hold(100)
    with PeakMemory("cpu") as busy:
        process.hold(300)
        process.hold(100)
    assert (idle.peak_mb, busy.peak_mb) == (100, 300)


def test_memory_of_this_process_is_in_mb():
    with PeakMemory("cpu") as memory:
        held = held_mb("cpu")
    assert memory.kind == "process_rss_sampled"
    total = psutil.virtual_memory().total / 2**20
    assert 1 < held < total and 1 < memory.peak_mb < total, "bytes or GB would be outside"


@pytest.fixture
def nothing_aside(monkeypatch):
    """As in a process of its own; afterwards what the session had set aside is so again."""
    monkeypatch.setattr("sinkstream.measure.memory._contexts_open", 0)
    gc.unfreeze()
    yield
    set_old_objects_aside()


def test_one_that_sets_old_objects_aside_within_another_undoes_nothing(nothing_aside):
    with old_objects_aside():
        outside = gc.get_freeze_count()
        with old_objects_aside():
            assert gc.get_freeze_count() == outside
        assert gc.get_freeze_count() == outside > 1_000
    assert gc.get_freeze_count() == 0


def test_the_garbage_collector_passes_over_old_objects_and_frees_new_ones(nothing_aside):
    class Ring:
        def __init__(self):
            self.me = self

    freed = []

    def ring(name: str) -> weakref.finalize:
        return weakref.finalize(Ring(), freed.append, name)

    with old_objects_aside():
        inside = gc.get_freeze_count()
        ring("new")
        gc.collect()
        assert inside > 1_000
        assert freed == ["new"]
    assert gc.get_freeze_count() == 0
    with pytest.raises(KeyError), old_objects_aside():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_environment_is_complete_and_serialisable():
    info = environment("cpu")
    assert json.loads(json.dumps(info)) == info
    assert info["timestamp"].endswith("+00:00")
    assert info["versions"]["torch"] == torch.__version__
    assert info["cpu"]["model"] and info["cpu"]["torch_threads"] == torch.get_num_threads()
    assert info["git"]["commit"] or info["git"]["reason"]


def test_environment_tells_nothing_personal(monkeypatch):
    """The machine and its user get names that no version or CPU has."""
    real = os.uname()
    named = os.uname_result((real.sysname, "host-of-ann", *real[2:]))
    monkeypatch.setattr(os, "uname", lambda: named)
    monkeypatch.setattr(platform, "uname", lambda: platform.uname_result(*named))
    monkeypatch.setattr(socket, "gethostname", lambda: named.nodename)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOSTNAME"):
        monkeypatch.setenv(name, "ann-of-host")
    monkeypatch.setenv("HOME", "/homes/ann-of-host")
    personal = (platform.node(), getpass.getuser(), str(Path.home()), str(Path(__file__).parents[2]))
    assert personal[:3] == ("host-of-ann", "ann-of-host", "/homes/ann-of-host"), "control: whoever asks is told"
    text = format_environment(environment("cpu"))
    assert not [name for name in personal if name in text]
    assert "versions torch" in text


def _git(directory, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=directory, check=True, capture_output=True)


def test_git_revision_of_a_checkout(tmp_path, monkeypatch):
    """Only the package's own folder makes a run dirty, whatever the user's git is set to: records beside it do not."""
    monkeypatch.delenv("SINKSTREAM_GIT_COMMIT", raising=False)
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):  # set in a git hook
        monkeypatch.delenv(name, raising=False)
    settings = tmp_path / "gitconfig"
    settings.write_text("[status]\n\tshowUntrackedFiles = no\n")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    package = tmp_path / "src" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert git_revision(package)["commit"] is None, "no checkout yet"
    _git(tmp_path, "init")
    assert git_revision(package)["commit"] is None, "an untracked package is not of this checkout"
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "-m", "first")
    (tmp_path / "record.json").write_text("{}")
    clean = git_revision(package)
    assert len(clean["commit"]) == 40 and clean["dirty"] is False and clean["reason"] is None
    (package / "new.py").write_text("x = 1\n")
    assert git_revision(package) == {**clean, "dirty": True}


def test_commit_may_be_stated_where_there_is_no_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("SINKSTREAM_GIT_COMMIT", "a" * 40 + "-dirty")
    found = git_revision(tmp_path)
    assert (found["commit"], found["dirty"]) == ("a" * 40, True)
    assert "SINKSTREAM_GIT_COMMIT" in found["reason"]
    monkeypatch.setenv("SINKSTREAM_GIT_COMMIT", "main")
    with pytest.raises(ValueError, match="40 hex digits"):
        git_revision(tmp_path)


def test_tf32_switch_is_read_after_the_newer_setting():
    """Reading `allow_tf32` raises once `fp32_precision` has been set; a record must be possible all the same."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for precision, expected in (("tf32", True), ("ieee", False)):
            matmul.fp32_precision = precision
            assert tf32_switches()["matmul"] is expected
    finally:
        matmul.fp32_precision = before


def test_summary_of_known_arrays():
    arrays = {
        "nll": np.array([1.0, np.nan, 3.0]),
        "seconds": np.array([0.1, np.nan, 0.3]),
        "kv_length": np.array([5, 0, 7]),
        "event": np.array([False, False, True]),
        "drop_size": np.array([0, 0, 4]),
    }
    summary = summarise(arrays, 0.5, 0.6, 2.0, None, warmup_tokens=2)
    assert (summary["decode_tokens"], summary["scored_tokens"], summary["timed_tokens"]) == (3, 2, 2)
    assert summary["ppl"] == pytest.approx(np.exp(2))
    assert summary["tpot_ms"] == pytest.approx(200) and summary["steady_tpot_ms"]["mean"] == pytest.approx(300)
    assert summary["decode_sec"] == pytest.approx(0.4) and summary["ttft_ms"] == pytest.approx(600)
    assert summary["kv_length"] == {"min": 5, "mean": 6.0, "max": 7}
    assert summary["events"] == 1
    assert summary["drop_size"] == {"mean": 4, "p50": 4, "p90": 4, "p99": 4, "max": 4}


def test_summary_of_nothing_is_null_and_valid_json():
    empty = {name: np.array([]) for name in ("nll", "seconds", "kv_length", "event", "drop_size")}
    summary = summarise(empty, None, float("nan"), None, None)
    json.dumps(summary, allow_nan=False)
    assert summary["ppl"] is None and summary["ttft_ms"] is None and summary["drop_size"]["max"] is None


def test_a_perplexity_too_large_for_a_float_is_null():
    arrays = {name: np.array([1.0]) for name in ("seconds", "kv_length", "event", "drop_size")}
    assert summarise({"nll": np.array([1e4]), **arrays}, None, None, None, None)["ppl"] is None


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    target = write_atomically(tmp_path / "a.txt", "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sinkstream.records.files.os.fsync", full)
    with pytest.raises(WriteError, match=r"a\.txt \(1,000 bytes\): No space left"):
        write_atomically(target, "x" * 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "old"


def test_on_a_gpu_nothing_is_freed_that_a_captured_graph_may_write_to(monkeypatch):
    """Without a graph the workspaces go, and the kind of the peak says so; with one they stay, and it does not."""
    freed = []

    class Graph:
        """In place of a captured graph."""

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("pool"))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: freed.append("workspaces"), raising=False)
    assert free_unused("cuda") and freed == ["workspaces", "pool"]
    assert PeakMemory("cuda", alone=True).kind == OWN
    freed.clear()
    graph = Graph()
    assert not free_unused("cuda") and freed == ["pool"] and graph
    assert PeakMemory("cuda").kind == "cuda_allocated"
    freed.clear()
    assert not free_unused("cpu") and not freed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_memory_of_a_run_does_not_grow_with_the_runs_before_it():
    """Graphs on streams of their own, each with a product: every one leaves a workspace of cuBLAS."""

    def capture() -> torch.cuda.CUDAGraph:
        graph, matrix = torch.cuda.CUDAGraph(), torch.ones(256, 256, device="cuda")
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            torch.mm(matrix, matrix)
        return graph

    torch.mm(
        torch.ones(8, 8, device="cuda"), torch.ones(8, 8, device="cuda")
    )  # a capture may not create cuBLAS' handle
    capture()
    assert free_unused("cuda"), "control: the graph is gone"
    first = held_mb("cuda")
    graphs = [capture() for _ in range(4)]
    assert not free_unused("cuda"), "a graph is alive"
    graphs.clear()
    for _ in range(4):
        capture()
    assert free_unused("cuda") and held_mb("cuda") <= first


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_time_memory_and_environment():
    """A launch returns at once; without synchronisation the product would seem to take microseconds."""
    check_environment(environment("cuda"), "cuda", "this machine")
    with PeakMemory("cuda") as memory:
        matrix = torch.ones(8192, 8192, device="cuda")
        timed(torch.mm, matrix, matrix, device="cuda")
        _, seconds = timed(lambda: [torch.mm(matrix, matrix) for _ in range(10)], device="cuda")
    assert memory.kind == "cuda_allocated" and memory.peak_mb >= 3 * 256
    assert seconds > 10 * 2 * 8192**3 / 5e15, "faster than any device of today: the work was not waited for"
