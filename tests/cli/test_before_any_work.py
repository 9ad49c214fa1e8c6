"""What can be refused without a model is refused before one is loaded, and before anything is timed."""

import re
import sys

import pytest

from sinkstream.bench.estimate import long_run
from sinkstream.bench.settings import BenchConfig, Protocol
from sinkstream.cli import bench as bench_command
from sinkstream.cli import bench_serve, main, options
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.bandwidth import Bandwidth

BENCH = "bench --device cpu --shape pythia-14m"
RANDOM = "--model random:pythia-14m"

REFUSED = [
    (f"{BENCH} --cap 128 --recall lexical --streams 1,2", r"ring strict.*streams=1$"),
    (f"{BENCH} --cap 128 --recall lexical --backend hf-cut", "has no recall"),
    (
        f"{BENCH} --cap 128 --policy adaptive-entropy:recall=lexical --backend ring",
        "recall with adaptive",
    ),
    (f"{BENCH} --cap 128 --backend hf --streams 2", "runs one stream; accepted"),
    (f"{BENCH} --cap 128 --text builtin", "no tokenizer for --text builtin; accepted"),
    (f"{BENCH} --cap 16 --text repeats", "accepted: a --cap of at least 22$"),
    (f"{BENCH} --cap 128 --serve turns --pinned 80", "pinned=80 .*at most 64"),
    (f"{BENCH} --cap 128 --serve turns --backend fused", "captures for a GPU"),
    ("eval --device cpu --cap 64 --backend ring --policy full", "'full' is a baseline, which --backend ring"),
    ("eval --device cpu --cap 64 --backend fused", "captures for a GPU and the device is cpu"),
    ("eval --device cpu --cap 128 --backend ring --policy adaptive-entropy --recall lexical", "recall with adaptive"),
    ("eval --device cpu --cap 64 --tokens 65", "leaves nothing to decode; accepted: at least 66 tokens"),
    ("eval --device cpu --cap 64 --text random", "give --tokens N"),
    ("eval --device cpu --cap 64 --interleave --resume", "--interleave and --resume exclude each other"),
    ("eval --device cpu --cap 64 --interleave --evaluate blocks", "interleaved runs are timed token by token"),
    (f"eval --device cpu --cap 64 {RANDOM}", "no tokenizer for --text builtin; accepted"),
    ("eval --device cpu --cap 64 --out file/x", "--out file/x: cannot be written"),
    ("diagnose --device cpu --cap 64 --tokens 65", "leaves nothing to decode"),
    (f"cliff --device cpu {RANDOM}", "no tokenizer for --text builtin"),
    ("recall --device cpu --cap 256 --policy recompute", "inside the window it recalls what the full cache does"),
    ("recall --device cpu --cap 256 --facts 2 --policy recompute", "it answers what the full cache of a window"),
    (f"recall --device cpu --cap 256 {RANDOM}", "no tokenizer for texts"),
    ("recall --device cpu --cap 256 --out file/x", "--out file/x: cannot be written"),
    ("streameval --device cpu --cap 256 --policy recompute", "it answers what the full cache of a window"),
    ("streameval --device cpu --cap 256 --policy full --backend ring", "'full' is a baseline"),
    ("streameval --device cpu --cap 256 --backend fused", "captures for a GPU"),
    (f"streameval --device cpu --cap 256 {RANDOM}", "no tokenizer to write facts with"),
    ("streameval --device cpu --cap 256 --out file/x", "--out file/x: cannot be written"),
    (f"probe-heads {RANDOM} --device cpu", "no tokenizer for a text"),
    ("serve --device cpu --port 0 --no-spill --backend fused", "captures for a GPU"),
    (f"serve --device cpu --port 0 --no-spill {RANDOM}", "no tokenizer to read and write text with"),
]


@pytest.fixture
def idle(tmp_path, monkeypatch):
    """An empty folder, in which no command may load a model or time anything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for module in (bench_command, bench_serve, options):
        monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    for name in ("memory_bandwidth", "matmul_rate"):
        monkeypatch.setattr(bench_command, name, lambda *_: pytest.fail("something was timed"))
    return tmp_path


@pytest.mark.parametrize(("line", "message"), REFUSED, ids=[line for line, _ in REFUSED])
def test_a_command_is_refused_before_any_work(line, message, idle, capsys):
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(line.split()))
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err.strip())
    assert [path.name for path in idle.iterdir()] == ["file"], "nothing is left behind"


def test_packages_of_a_server_that_are_missing_are_told_before_any_work(idle, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(f"{BENCH} --cap 128 --serve turns".split()) != 0
    assert "needs uvicorn: pip install 'sinkstream[serve]'" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("sinkstream.bench.serving.soak.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(bench_serve, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(f"{BENCH} --cap 128 --serve turns,soak".split()) != 0
    assert "needs locust" in capsys.readouterr().err


LOADS, TIMES = ("a model was loaded", "something was timed")  # where a command that is not refused ends


@pytest.mark.parametrize(
    ("line", "ends"),
    [
        ("eval --device cpu --cap 64 --tokens 66", LOADS),
        ("recall --device cpu --cap 512", LOADS),
        ("streameval --device cpu --cap 256 --policy full,strict --backend ring", LOADS),
        (f"{BENCH} --cap 128 --serve turns --pinned 64", LOADS),
        (f"{BENCH} --cap 128 --recall lexical", TIMES),
        (f"{BENCH} --cap 128 --recall lexical --streams 2 --ladder", TIMES),  # which lists refusals in the end
    ],
)
def test_what_is_right_goes_on(line, ends, idle):
    with pytest.raises(pytest.fail.Exception, match=ends):
        main(line.split())


# ---- how long it will take ----

CEILING = Bandwidth("host memcpy", 10.0, 12.0, 1 << 20)
STRICT = BenchConfig("ring", RunSettings("strict", 64))


@pytest.mark.parametrize(
    ("protocol", "configs", "words"),
    [
        (
            Protocol(tokens=536, warmup=64),
            [STRICT],
            "each of 600 tokens reads 11.0 GB .* 1.10 s .* least 11 min,",
        ),
        (Protocol(tokens=536, warmup=64), [STRICT] * 2, "each of 1,200 tokens .* at least 22 min"),
        (Protocol(tokens=536, warmup=64, seconds=49.6), [STRICT], "at least 2 min"),
        (Protocol(tokens=48, warmup=2), [STRICT], None),
    ],
)
def test_a_long_benchmark_says_how_long_it_takes(protocol, configs, words):
    told = long_run("m", 11 * 10**9, CEILING, protocol, configs)
    assert told is None if words is None else re.search(rf"^m: .*{words}", told), told
    assert long_run("m", None, CEILING, protocol, configs) is None


def test_the_benchmark_says_it_before_a_model_is_loaded(idle, monkeypatch, capsys):
    monkeypatch.setattr(bench_command, "memory_bandwidth", lambda device: CEILING)
    monkeypatch.setattr("sinkstream.bench.estimate.free_bytes", lambda device: 10**12)
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        main(["bench", "--device", "cpu", "--dtype", "float32", "--shape", "pythia-2.8b"])
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"random:pythia-2.8b: each of 1,328 tokens reads 11.1 GB of weights.*a smaller --shape", said)
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        main(BENCH.split())
    assert "each of" not in capsys.readouterr().out
