"""The command line as a user meets it: complete records, one-line errors, exit codes, nothing lost.

Most tests call `main` in this process; the interrupt is sent to a real one.
"""

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import processes
import pytest
import tiny_model
import torch
from record_factory import make_arrays, make_record

import sinkstream.cli as cli_package
import sinkstream.evaluation.run as run_module
import sinkstream.records.files as files_module
import sinkstream.report.documents as documents
from sinkstream import __version__
from sinkstream.cli import COMMANDS, build_parser, main
from sinkstream.cli.show import PIPE_WIDTH
from sinkstream.evaluation.settings import method_names
from sinkstream.models import SHAPES
from sinkstream.policies import SCORERS, option_specs
from sinkstream.records.records import Record, load_records, write_record

TOKENS, CAP = 180, 48
POISON_AT = 120
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """A folder with models and texts that no test changes."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model.save_model(folder / "tiny")
    tiny_model.save_model(folder / "other", "llama")
    tiny_model.save_model(folder / "poisoned", poisoned=True)
    tiny_model.tiny_model().save_pretrained(folder / "mute")  # no tokenizer
    (folder / "nothing").mkdir()
    tiny_model.save_model(folder / "broken")
    (folder / "broken" / "model.safetensors").write_bytes(b"these are no weights")
    tiny_model.write_text(folder / "text.txt", 1200)
    tiny_model.write_text(folder / "poison.txt", 1200, POISON_AT)
    (folder / "other.txt").write_text("Another text altogether. " * 40)
    (folder / "text.json").write_text(json.dumps({"text": "Some words, over and over. " * 40}))
    (folder / "short.txt").write_text("abc")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(b"\x89PNG\0\0")
    (folder / "broken.json").write_text("{")
    (folder / "text.pdf").write_bytes(b"%PDF-1.7\xe2\xe3")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "notes.json").write_text("{}")
    return folder


@pytest.fixture
def here(shared, tmp_path, monkeypatch) -> Path:
    """A fresh working folder with links to the models and texts; rescued records go to its `rescued` folder."""
    for entry in shared.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "rescued").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "rescued"))
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TERM", "PYTHON_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def cli(here, capsys):
    """Run a command line; returns its exit code, stdout and stderr."""

    def call(line: str) -> SimpleNamespace:
        capsys.readouterr()
        try:
            code = main(shlex.split(line))
        except SystemExit as stop:
            code = stop.code
        told = capsys.readouterr()
        return SimpleNamespace(code=code, out=told.out, err=told.err)

    return call


def eval_line(more: str = "", *, policy: str = "strict", out: str = "out", **options: object) -> str:
    """An `eval` of the tiny model; an option that is None is left out."""
    given = {"model": "tiny", "text": "text.txt", "tokens": TOKENS, "cap": CAP, "policy": policy, "out": out} | options
    words = [f"--{k.replace('_', '-')}={shlex.quote(str(v))}" for k, v in given.items() if v is not None]
    return " ".join(["eval", *words, more])


def strings(value) -> list[str]:
    """Every string anywhere in a JSON value."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for part in parts for text in strings(part)]


def records_in(folder: Path | str) -> list[Record]:
    """The records of a folder in the order in which this process wrote them."""
    return sorted(load_records(folder), key=lambda record: record.summary["process_sec"])


def labels(records: list[Record]) -> list[str]:
    return [record.policy["label"] for record in records]


# ---- eval ----

EVERY_METHOD = {
    **{name: name for name in method_names()},
    "lazy": "lazy:compress_every=16",
    "overlap": "overlap:compress_every=8:overlap=4",
    "max-drop": "max-drop:compress_every=8:max_drop=3",
    "adaptive-entropy": "adaptive-entropy:adaptive_max=16:adaptive_every=8:adaptive_min=4",
    "adaptive-top1": "adaptive-top1:adaptive_max=16:adaptive_every=8:adaptive_min=4",
    **{f"refresh-{s}": f"refresh-{s}:compress_every=8:refresh=6" for s in SCORERS},
}


def test_eval_of_every_policy(cli, here):
    done = cli(eval_line(policy=",".join(EVERY_METHOD.values()), timed_tokens=30))
    assert (done.code, done.err) == (0, "")
    records = records_in(here / "out")
    assert [r.policy["name"] for r in records] == method_names()
    assert {r.status for r in records} == {"complete"}
    assert labels(records)[method_names().index("lazy")] == "lazy R=16"
    for record in records:
        assert record.summary["decode_tokens"] == TOKENS - CAP - 1
        assert record.summary["kv_length"]["max"] <= (TOKENS if record.policy["name"] == "full" else CAP)
        assert record.arrays["index"][-1] == TOKENS - 1
        assert record.command[:2] == ["sinkstream", "eval"]
    assert (here / "out" / "nll.png").read_bytes().startswith(PNG)
    assert sorted(p.suffix for p in (here / "out").iterdir()) == sorted([".json", ".npz"] * len(records) + [".png"])
    assert max(map(len, done.out.splitlines())) <= PIPE_WIDTH == 170
    table = re.sub(r"\s", "", done.out)
    assert all(name in re.sub(r"[│\s]", "", done.out) or name in table for name in ("full", "strict", "lazyR=16"))
    assert "records: out, picture: out/nll.png" in done.out


def test_every_argument_is_in_the_record(cli, here):
    folder = here / "records"
    given = {"model": here / "tiny", "text": here / "text.txt", "out": folder, "seed": 3, "block_tokens": 20}
    policy = "refresh-uncertainty:refresh=4:compress_every=6:uncertainty=entropy"
    assert cli(eval_line("--sink 5 --positions original --prefill=30", policy=policy, **given)).code == 0
    (record,) = records_in(folder)
    namespace = vars(build_parser().parse_args(["eval"]))
    assert set(namespace) - {"run"} <= set(record.arguments)
    expected = {"model": "tiny", "text": "text.txt", "out": "records", "seed": 3, "block_tokens": 20, "sink": 5}
    expected |= {"tokens": TOKENS, "cap": CAP, "prefill": 30, "positions": "original", "evaluate": "steps"}
    assert expected.items() <= record.arguments.items()
    options = {"sink": 5, "refresh": 4, "compress_every": 6, "scorer": "uncertainty", "uncertainty": "entropy"}
    assert (options | {"positions": "original", "peak": CAP}).items() <= record.policy["options"].items()
    protocol = {"seed": 3, "cap": CAP, "prefill_tokens": 30, "dtype": "float32", "device": "cpu", "evaluate": "steps"}
    assert protocol.items() <= record.protocol.items()
    assert record.data["tokens"] == TOKENS and record.model["family"] == "gpt_neox"


def test_heads_of_a_file_are_named_in_the_record(cli, here):
    (here / "heads.json").write_text(
        json.dumps({"heads": [[0, 1], [1, 0]], "level": 0.25, "row_level": 0.5}), encoding="utf-8"
    )
    policy = "strict:recall=heads:recall_heads=heads.json,strict:recall=heads:recall_heads=0.1,1.0:recall_level=0.3"
    assert cli(eval_line(f"--out={here}/records --recall-slots=8 --cap=40", policy=policy)).code == 0
    first, second = (record.policy["options"] for record in records_in(here / "records"))
    heads = {"recall": "heads", "recall_heads": "0.1+1.0", "recall_slots": 8}
    assert (heads | {"recall_level": 0.25, "recall_row_level": 0.5}).items() <= first.items()
    assert (heads | {"recall_level": 0.3}).items() <= second.items()
    refused = cli(eval_line(policy="strict:recall=heads:recall_heads=text.json"))
    assert refused.code == 2 and "'text.json' holds no heads" in refused.err


def test_no_record_names_a_path_of_the_machine(cli, here):
    line = eval_line(f"--out={here}/records", model=f"{here}/tiny", text=here / "text.txt", out=here / "elsewhere")
    assert cli(line).code == 0
    (path,) = (here / "records").glob("*.json")
    found = [s for s in strings(json.loads(path.read_text())) if s.startswith(("/", "~")) or str(here) in s]
    assert not found
    assert "--out=records" in json.loads(path.read_text())["command"]


def test_options_for_all_policies_leave_alone_what_they_would_change_into_another(cli, here):
    policy = "full,recompute,window-only,strict,lazy,lazy:compress_every=4:sink=2"
    assert cli(eval_line("--sink 6 --compress-every 8", policy=policy, evaluate="blocks")).code == 0
    expected = ["full", "recompute", "window-only", "strict S=6", "lazy R=8 S=6", "lazy R=4 S=2"]
    records = records_in(here / "out")
    assert labels(records) == expected
    assert [r.policy["options"].get("sink") for r in records[2:]] == [0, 6, 6, 2]
    assert [r.policy["options"].get("compress_every") for r in records[2:]] == [1, 1, 8, 4]


def test_sampling_is_for_recompute_only(cli, here):
    assert cli(eval_line("--sample-every 5", policy="recompute,strict", evaluate="blocks")).code == 0
    records = records_in(here / "out")
    assert [r.protocol["sample_every"] for r in records] == [5, 1]
    assert [r.summary["scored_tokens"] for r in records] == [27, TOKENS - CAP - 1]


def test_other_texts_and_models(cli, here):
    for out, options in enumerate(
        (
            {"text": "text.json"},
            {"text": "builtin", "policy": "recompute"},
            {"text": "random", "model": "mute"},
            {"tokens": None, "text": "other.txt", "policy": "full"},
            {"dtype": "bfloat16", "attention": "eager"},
        )
    ):
        done = cli(eval_line(evaluate="blocks", **{"out": f"out{out}"} | options))
        assert (done.code, done.err) == (0, ""), options
        (record,) = records_in(f"out{out}")
        assert record.data["name"] == Path(str(options.get("text", "text"))).stem
        assert record.protocol["dtype"] == options.get("dtype", "float32")
    assert records_in("out3")[0].data["tokens"] == 25 * 40, "without --tokens the whole file"


def test_names_with_brackets_are_shown_as_they_are(cli, here):
    (here / "a[red]b.txt").write_text(tiny_model.SENTENCE * 5)
    done = cli(eval_line(text="a[red]b.txt", out="o[bold]", evaluate="blocks"))
    assert done.code == 0
    assert "tiny over a[red]b" in done.out and "records: o[bold], picture: o[bold]/nll.png" in done.out


def test_a_narrow_terminal_gets_every_figure(cli, here, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    done = cli(eval_line(policy="full,strict", evaluate="blocks"))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", done.out)
    assert max(len(line) for part in plain.splitlines() for line in part.split("\r")) <= 80
    ppl = [f"{r.summary['ppl']:.2f}" for r in records_in(here / "out")]
    assert all(figure in plain for figure in ppl)


def test_without_matplotlib_the_records_are_there_all_the_same(cli, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = cli(eval_line(evaluate="blocks"))
    assert done.code == 0
    assert "no picture: plots need matplotlib" in done.out
    assert len(records_in(here / "out")) == 1


# ---- resume ----


def test_resume_takes_complete_records_and_runs_the_rest(cli, here):
    base = {"evaluate": "blocks", "policy": "strict,lazy"}
    assert cli(eval_line(**base)).code == 0
    first = {r.id for r in records_in(here / "out")}
    done = cli(eval_line("--resume", **base | {"policy": "lazy,window-only,strict"}))
    assert done.code == 0
    records = records_in(here / "out")
    assert len(records) == 3 and first < {r.id for r in records}
    taken = re.findall(r"^(.+): taken from (\S+)$", done.out, flags=re.MULTILINE)
    assert [label for label, _ in taken] == ["lazy R=32", "strict"] and {i for _, i in taken} == first
    assert done.out.index("lazy R=32 ") < done.out.index("│ window-only") < done.out.index("│ strict")


@pytest.mark.parametrize(
    "changed",
    [
        {"cap": CAP - 1},
        {"tokens": TOKENS - 1},
        {"policy": "strict:sink=3"},
        {"prefill": 40},
        {"positions": "original"},
        {"block_tokens": 17},
        {"text": "other.txt"},
        {"model": "other"},
        {"dtype": "bfloat16"},
        {"attention": "eager"},
        {"evaluate": "steps"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_resume_runs_again_what_is_another_run(cli, here, changed):
    for options in ({}, changed):
        done = cli(eval_line("--resume", **{"evaluate": "blocks"} | options))
        assert done.code == 0 and "taken from" not in done.out
    assert len(records_in(here / "out")) == 2


def test_resume_does_not_take_a_failed_run(cli, here):
    for _ in range(2):
        assert cli(eval_line("--resume", model="poisoned", text="poison.txt")).code == 1
    assert [r.status for r in records_in(here / "out")] == ["failed", "failed"]


# ---- mistakes ----

MISTAKES = [  # options of eval_line, what else is typed, what the message must say
    ({"policy": "nosuch"}, "", "--policy: policy 'nosuch' is not known; accepted: full, recompute, .*strict"),
    ({"policy": ","}, "", "--policy: ',' names no policy; accepted: full"),
    ({"policy": "lazy:bogus=1"}, "", "'bogus=1' in 'lazy:bogus=1'; accepted: OPTION=VALUE with .*compress_every"),
    ({"policy": "lazy:sink"}, "", "'sink' in 'lazy:sink'; accepted: OPTION=VALUE"),
    ({"policy": "lazy:compress_every=x"}, "", "'compress_every=x' .*'x' is not accepted; accepted: a whole number"),
    ({"policy": "lazy:compress_every=0"}, "", "compress_every=0 is not accepted; accepted: .* at least 1"),
    ({"policy": "lazy:adaptive=nosuch"}, "", "adaptive='nosuch' is not accepted; accepted: entropy, top1"),
    ({"policy": "lazy:refresh=4:scorer=nosuch"}, "", "unknown scorer 'nosuch'; accepted: .*key-norm"),
    ({"policy": "strict:compress_every=8"}, "", "compress_every=8 .*'strict'.*accepted"),
    ({"policy": "window-only:sink=4"}, "", "sink=4 .*'window-only'.*accepted"),
    ({"policy": "full"}, "--sink 3", "policy 'full' takes no policy options, but sink is given"),
    ({"policy": "recompute:sink=3"}, "", "policy 'recompute' takes no policy options, but sink is given"),
    ({"policy": "full,strict:sink=70"}, "", f"cap={CAP} is too small: sink 70 .*accepted: cap of at least 71"),
    ({}, "--nosuch 1", "unknown argument '--nosuch'; accepted: see sinkstream eval --help"),
    ({}, "something", "unknown argument 'something'; accepted"),
    ({}, "--sin 4", r"unknown argument '--sin' \(did you mean '--sink'\?\); accepted: see sinkstream eval --help"),
    ({"policy": "strikt"}, "", r"policy 'strikt' is not known \(did you mean 'strict'\?\); accepted: full"),
    ({"policy": "lazy:compres_every=3"}, "", r"\(did you mean 'compress_every'\?\); accepted: OPTION=VALUE"),
    ({"policy": "strict:recall=lexcal"}, "", r"unknown chooser 'lexcal' \(did you mean 'lexical'\?\); accepted"),
    ({"policy": "strict:recall=lexical:recall_gate=nan"}, "", "'recall_gate=nan' in .*accepted: a finite number"),
    ({"policy": "strict:recall=lexical:recall_lag=-1"}, "", "error: recall_lag=-1 is not accepted; accepted: .* 0"),
    ({}, "--recall lexical --recall-lag=-1", "error: --recall-lag -1 is not accepted; accepted: a whole number of at"),
    (
        {"policy": "strict,strict:recall_gate=-2"},
        "--recall lexical --recall-gate 2",
        "policy 'strict': recall_gate=-2.0 is not accepted; accepted: a finite number",
    ),
    (
        {},
        "--recall lexical --recall-every 6 --recall-empty-every 4",
        "--recall-empty-every 4 is not accepted; accepted: a divisor of --recall-every 6",
    ),
    ({}, f"--recall lexical --recall-slots {CAP}", f"error: --recall-slots {CAP} leave nothing of a window of"),
    ({}, "--recall-lag 1", "error: --recall-lag goes with recall=CHOOSER, which is not given"),
    ({"policy": "strict:recall=oracle:recall_rare=1"}, "", "unknown option .recall_rare.*; accepted: .*recall_ahead"),
    ({"policy": "strict,lazy", "cap": 35}, "", "policy 'lazy': cap=35 is too small"),
    ({"policy": "strict:evict=turns"}, "", "sink and window only, and compress_every=1 is given; accepted: without"),
    ({"text": ""}, "", "the text is empty; accepted: builtin, pg19, wikitext, or a file"),
    ({"seed": 2**63}, "", f"seed={2**63} is not accepted; accepted: 0 to {2**63 - 1}"),
    ({"tokens": "x"}, "", "argument --tokens: 'x' is not accepted; accepted: a whole number"),
    ({}, "--scorer nosuch", "--scorer: invalid choice: 'nosuch' .choose from .*uniform"),
    ({}, "--scorer uniform", "refresh=0 leaves a scorer no token .*accepted: refresh of at least 1"),
    ({}, "--refresh 4", "refresh=4 goes with a scorer, .*accepted: .*uniform"),
    ({}, "--sink -1", "sink=-1 is not accepted; accepted: a whole number of at least 0"),
    ({}, "--max-drop 1", "max_drop=1 is not accepted; accepted: a whole number of at least 2"),
    ({}, "--slack -1", "slack=-1 is not accepted"),
    ({}, "--window 46", f"window=46 fills 50 slots .*cap={CAP}; accepted: window of at most 44"),
    ({}, "--backend nosuch", "--backend: invalid choice: 'nosuch' .choose from"),
    ({}, "--positions nosuch", "--positions: invalid choice: 'nosuch' .choose from 'cache', 'original'"),
    ({}, "--cap-accounting x", "--cap-accounting: invalid choice: 'x' .choose from 'peak', 'published'"),
    ({"cap": None}, "", "policy 'strict' needs a cap; give --cap SLOTS"),
    ({"cap": 0}, "", "cap=0 is not accepted; accepted: a whole number of at least 1"),
    ({"cap": -5}, "", "cap=-5 is not accepted"),
    ({"cap": "many"}, "", "--cap: .many. is not accepted; accepted: a whole number"),
    ({"cap": 4}, "", "cap=4 is too small: .*accepted: cap of at least 5"),
    ({"cap": 35, "policy": "lazy"}, "", "cap=35 is too small: .*growth 31 .*accepted: cap of at least 36"),
    *(
        (
            {"cap": 1025, "tokens": 1100, "policy": policy},
            "",
            r"1025 .*1024 .*trained on; accepted: at most 1024|"
            r"hold up to 1025 entries .*trained on 1024 .*accepted",
        )
        for policy in ("strict", "lazy", "recompute", "strict,recompute")
    ),
    ({"cap": 64, "tokens": 1100, "policy": "strict,full"}, "", "full cache of 1100 tokens .*1024 .*accepted: --tokens"),
    ({"tokens": 0}, "", "tokens=0 is not accepted; accepted: a whole number of at least 1"),
    ({"tokens": -1}, "", "tokens=-1 is not accepted"),
    ({"tokens": 5000}, "", "text 'text' is too short: it has 1200 tokens, 5000 were asked for"),
    ({"tokens": CAP + 1}, "", f"has {CAP + 1} tokens and {CAP} of them .*accepted: at least {CAP + 2} tokens"),
    ({"tokens": None, "text": "short.txt"}, "", "the text has 3 tokens .*smaller --cap or --prefill"),
    ({"text": "empty.txt"}, "", "text file 'empty.txt' is empty"),
    ({"text": "binary.txt"}, "", "text file 'binary.txt' .*binary"),
    ({"text": "nosuch.txt"}, "", "text file 'nosuch.txt' does not exist"),
    ({"text": "nosuch"}, "", "unknown text 'nosuch'; accepted: builtin, pg19, wikitext, or a file"),
    ({"text": "text.pdf"}, "", "text.pdf' is binary or not in UTF-8: byte 8 is invalid"),
    ({"text": "broken.json"}, "", "'broken.json' is not valid JSON"),
    ({"text": "random", "tokens": None}, "", "--text random has no length of its own; give --tokens N"),
    ({"text": "pg19"}, "", "text 'pg19'.*--text FILE"),
    ({"model": "nosuch"}, "", "model 'nosuch' is neither here nor .*accepted: 'builtin', 'random:SHAPE'"),
    ({"model": "./nosuch"}, "", "model './nosuch' does not exist"),
    ({"model": "nothing"}, "", "model 'nothing' has no config.json"),
    ({"model": "broken"}, "", "model 'broken' cannot be loaded"),
    ({"model": "mute"}, "", "text 'text' cannot be tokenized: this model has no tokenizer"),
    ({"model": "random:nosuch"}, "", "unknown random shape 'random:nosuch'; accepted: .*random:pythia-2.8b"),
    ({"model": "nosuch.gguf"}, "", "model 'nosuch.gguf' does not exist"),
    ({"prefill": 0}, "", "prefill=0 is not accepted"),
    ({"prefill": TOKENS - 1}, "", f"{TOKENS - 1} of them are prefill .*accepted: at least {TOKENS + 1} tokens"),
    ({"timed_tokens": -1}, "", "timed_tokens=-1 is not accepted"),
    ({"block_tokens": 0}, "", "block_tokens=0 is not accepted"),
    ({"sample_every": 0}, "", "sample_every=0 is not accepted"),
    ({"sample_every": 4}, "", "sample_every=4 is for recompute only, not for 'strict'"),
    ({"repeats": 0}, "", "repeats=0 is not accepted"),
    ({"repeats": 2, "evaluate": "blocks"}, "", "repeats=2 is about timings; evaluate='blocks'"),
    ({"evaluate": "all"}, "", "--evaluate: invalid choice: 'all' .choose from 'steps', 'blocks'"),
    ({"seed": -1}, "", "seed=-1 is not accepted; accepted: 0 to "),
    ({"dtype": "int8"}, "", "--dtype: invalid choice: 'int8' .choose from 'float16'"),
    ({"device": "nosuch"}, "", "unknown device 'nosuch'; accepted: cpu, cuda, cuda:N"),
    ({"device": "cuda:99"}, "", "device 'cuda:99' is not there: .*accepted: cpu"),
    ({"attention": "eager", "policy": "refresh-last-query:refresh=4:compress_every=4"}, "", "'sdpa'.*'eager'"),
]


def told_as(mistake: tuple) -> str:
    """A mistake as the name of its test."""
    options, more, _ = mistake
    return " ".join([*(f"--{name} {value}" for name, value in options.items()), more]).strip()


@pytest.mark.parametrize(("options", "more", "message"), MISTAKES, ids=map(told_as, MISTAKES))
def test_a_mistake_is_told_in_one_line_and_nothing_is_written(cli, here, options, more, message):
    before = sorted(here.rglob("*"))
    done = cli(eval_line(more, **options))
    assert done.code == 2
    assert re.fullmatch(r"sinkstream eval: error: .+\n", done.err), done.err
    assert re.search(message, done.err), done.err
    assert "Traceback" not in done.err and done.out == ""
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("text.txt", "cannot be written: File exists"),
        ("text.txt/x", "Not a directory"),
        ("/proc/nosuch", "--out /proc"),
    ],
)
def test_a_folder_that_cannot_be_written_to_is_told_before_the_run(cli, here, monkeypatch, out, message):
    monkeypatch.setattr("sinkstream.evaluation.batch.run", lambda *_: pytest.fail("it ran"))
    done = cli(eval_line(out=out))
    assert done.code == 2
    assert re.fullmatch(rf"sinkstream eval: error: --out {out}: cannot be written: .+\n", done.err)
    assert message in done.err


def test_a_full_disk_is_told_before_the_run(cli, here, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    done = cli(eval_line())
    assert done.code == 2
    assert re.fullmatch("sinkstream eval: error: --out out: cannot be written: No space left on device; .+\n", done.err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("line", [eval_line(device="cuda"), "env --device cuda"])
def test_a_gpu_that_is_not_there(cli, line):
    done = cli(line)
    assert done.code == 2
    assert re.fullmatch(r"sinkstream \w+: error: device 'cuda' is not there: .* accepted: cpu, cuda:N\n", done.err)


def test_a_broken_record_stops_resuming_before_anything_runs(cli, here):
    done = cli(eval_line("--resume", out="foreign"))
    assert done.code == 2
    assert re.fullmatch(r"sinkstream eval: error: foreign/notes.json: field 'schema' is None; .*\n", done.err)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "sinkstream: error: .*COMMAND"),
        ("nosuch", "sinkstream: error: .*'nosuch' .choose from .*'eval'"),
        ("demo --tokens -4", "sinkstream demo: error: tokens=-4 is not accepted"),
        ("demo --cap 3", "sinkstream demo: error: cap=3 is too small: .*accepted: cap of at least"),
        ("demo --sample-every 0", "sinkstream demo: error: sample_every=0 is not accepted"),
        ("env --device nosuch", "sinkstream env: error: unknown device 'nosuch'; accepted"),
        ("report --results nosuch", "sinkstream report: error: nosuch: not a folder with records"),
        (
            "report --results foreign",
            "sinkstream report: error: foreign: holds no record \\(foreign/notes.json: schema None\\)",
        ),
        ("report --docs nosuch.md --results foreign", "sinkstream report: error: nosuch.md: cannot be read"),
        ("report --check --docs nosuch.md", "sinkstream report: error: nosuch.md: cannot be read"),
        ("report --check --docs binary.txt", "sinkstream report: error: binary.txt: not in UTF-8: byte 0 is invalid"),
        ("verdict --criteria binary.txt", "sinkstream verdict: error: binary.txt: not in UTF-8: byte 0 is invalid"),
        ("demo --out text.txt", "sinkstream demo: error: --out text.txt: cannot be written: File exists"),
        ("probe-heads nosuch", "sinkstream probe-heads: error: model 'nosuch' is neither here nor"),
        (
            "bench --seconds -1",
            "sinkstream bench: error: seconds=-1.0 is not accepted; accepted: a finite number above 0",
        ),
        ("bench --cap 0", "sinkstream bench: error: --cap 0 is not accepted; accepted: whole numbers of at least 1"),
        ("bench --streams 2,0", "sinkstream bench: error: --streams 2,0 is not accepted; accepted: whole numbers"),
        ("bench --prefill ''", "sinkstream bench: error: --prefill '' is not accepted; accepted: whole numbers"),
        ("bench --model builtin --text nosuch.txt", "sinkstream bench: error: text file 'nosuch.txt' does not exist"),
        ("serve --replicas 2", "sinkstream serve: error: --replicas 2 goes with --ray, which is not given"),
        ("serve --no-spill --spill x", "sinkstream serve: error: --spill x and --no-spill exclude each other"),
        (
            "serve --model tiny --cap 64 --port 0 --spill text.txt",
            "sinkstream serve: error: --spill text.txt: cannot be written: File exists; accepted: a folder",
        ),
        ("chat --url ''", "sinkstream chat: error: --url '' is not accepted; accepted: an address"),
        ("chat --url localhost:8000/v1", "sinkstream chat: error: --url 'localhost:8000/v1' is not accepted; accepted"),
        (
            "eval --cap 64 --policy strict:recall=lexical:recall=recent",
            "sinkstream eval: error: argument --policy: 'recall=recent' in 'strict:recall=lexical:recall=recent':"
            " recall is given twice; accepted: once",
        ),
        (
            "chat --url http://127.0.0.1:1/v1 --system x --cap 3 --tf32",
            "sinkstream chat: error: --cap 3 changes nothing about the server at --url; accepted together with --url: ",
        ),
        ("chat --url=http://127.0.0.1:1/v1 --tf32 --cap=3", "sinkstream chat: error: --tf32 changes nothing"),
        ("chat --remote-model x", "sinkstream chat: error: --remote-model x goes with --url, which is not given"),
        ("chat --temperature -1", "sinkstream chat: error: --temperature -1.0 is not accepted; accepted: a number"),
        (
            "probe-heads tiny --model nosuch",
            "sinkstream probe-heads: error: MODEL tiny and --model nosuch exclude each other",
        ),
        (
            "probe-heads tiny --out foreign",
            "sinkstream probe-heads: error: --out foreign is a folder; accepted: the path",
        ),
        (
            "probe-heads tiny --text text.txt",
            "sinkstream probe-heads: error: --text text.txt: text 'text' is too short: it has 1200 tokens, 16000 were"
            " asked for; accepted: a text of at least 16,000 tokens",
        ),
        ("probe-heads tiny --out text.txt/x.json", "sinkstream probe-heads: error: --out text.txt: cannot be written"),
        (
            "recall --cap 64 --forms cue",
            "sinkstream recall: error: --forms cue goes with --facts N, which is not given",
        ),
        (
            "recall --cap 64 --facts 1 --passages 9",
            "sinkstream recall: error: --passages 9 is of passages, and --facts",
        ),
        ("streameval --cap 64 --facts=3", "sinkstream streameval: error: --facts=3 goes with --reply-tokens N, which"),
        (
            "streameval --cap 64 --reply-tokens 99999 --questions 3",
            "sinkstream streameval: error: --questions 3 is of a stream of facts, not of one reply; accepted: without",
        ),
        (
            "streameval --model nosuch --policy full --backend ring",
            "sinkstream streameval: error: policy 'full' is a baseline, which --backend ring does not run; accepted",
        ),
        (
            "streameval --model nosuch --cap 512 --recall lexical --recall-lag=-1",
            "sinkstream streameval: error: --recall-lag -1 is not accepted; accepted: a whole number of at least 0",
        ),
        (
            "bench --model nosuch --cap 512 --policy strict --recall lexical --recall-archive text --recall-file x",
            "sinkstream bench: error: --recall-file goes with --recall-archive 'kv', not with 'text'",
        ),
        ("bench --turns 3", "sinkstream bench: error: --turns 3 goes with --serve PART, which is not given"),
        (
            "serve --port 0 --recall none --recall-tokens 8",
            "sinkstream serve: error: --recall-tokens 8 goes with --recall lexical, not with none",
        ),
        ("chat --recall none --recall-slots 8", "sinkstream chat: error: --recall-slots 8 goes with --recall lexical"),
        ("matrix m.toml --gpus-per-point 1", "sinkstream matrix: error: --gpus-per-point 1.0 goes with --ray"),
    ],
)
def test_mistakes_of_the_other_commands(cli, here, monkeypatch, line, message):
    monkeypatch.setattr("sinkstream.cli.demo.load_model", lambda *_, **__: tiny_model.loaded())
    done = cli(line)
    assert done.code == 2
    assert re.fullmatch(message + ".*\n", done.err), done.err


@pytest.mark.parametrize("command", COMMANDS)
def test_no_number_with_a_fraction_is_nan_or_infinite(cli, here, command):
    parser = build_parser()._subparsers._group_actions[0].choices[command].load()
    for action in parser._actions:
        if action.type in (float, "float") or "RATIO" in str(action.metavar):
            option = action.option_strings[0]
            for typed in ("nan", "inf", "-inf"):
                done = cli(f"{command} {option}={typed}")
                assert done.code == 2
                assert f"argument {option}: '{typed}' is not accepted; accepted: a finite number" in done.err


def test_texts_and_position_modes_are_listed_with_commas_or_spaces(here):
    Path("a,b.txt").write_text("A text.")
    for typed in (["x.txt,y.txt,builtin"], ["x.txt, y.txt", "builtin"], ["x.txt", "y.txt", "builtin"]):
        assert build_parser().parse_args(["recall", "--text", *typed]).text == ["x.txt", "y.txt", "builtin"]
    assert build_parser().parse_args(["recall", "--text", "a,b.txt"]).text == ["a,b.txt"], "a file of that name"
    for typed in (["cache,original"], ["cache", "original"]):
        assert build_parser().parse_args(["cliff", "--positions", *typed]).positions == ["cache", "original"]


# ---- runs that end early ----


def test_nan_logits_keep_what_was_measured(cli, here):
    policy = "recompute,strict,lazy"
    done = cli(eval_line("--sample-every 200", model="poisoned", text="poison.txt", policy=policy))
    assert done.code == 1
    records = records_in(here / "out")
    assert [(r.policy["name"], r.status) for r in records] == [("recompute", "complete"), ("strict", "failed")]
    reason = f"the logits that predict token {POISON_AT + 1} are not finite"
    assert records[1].status_reason == reason and f"strict: failed: {reason}" in done.out
    assert records[1].arrays["index"].tolist() == list(range(CAP + 1, POISON_AT + 1))
    assert records[1].summary["ppl"] > 1
    assert (here / "out" / "nll.png").read_bytes().startswith(PNG)


def test_nan_logits_in_the_prefill(cli, here):
    done = cli(eval_line(model="poisoned", text="poison.txt", prefill=POISON_AT + 5))
    assert done.code == 1
    (record,) = records_in(here / "out")
    assert record.status == "failed" and record.summary["decode_tokens"] == 0
    assert "strict: failed: the logits after the prefill of 125 tokens are not finite" in done.out
    assert "picture" not in done.out


def press_ctrl_c(monkeypatch, *, run: int, step: int) -> None:
    """Ctrl-C at a decode step of the n-th run."""
    timed, at = run_module.timed, {"run": 0, "step": 0}

    def pressed(fn, *args, **kwargs):
        if fn.__name__ == "decode":
            at.update(run=at["run"] + 1, step=0)
        at["step"] += fn.__name__ == "step"
        if (at["run"], at["step"]) == (run, step):
            raise KeyboardInterrupt
        return timed(fn, *args, **kwargs)

    monkeypatch.setattr(run_module, "timed", pressed)


def test_ctrl_c_keeps_and_marks_what_was_measured(cli, here, monkeypatch):
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, run=2, step=41)
        done = cli(eval_line(policy="strict,lazy:compress_every=8,window-only"))
    assert done.code == 130
    records = records_in(here / "out")
    assert [(r.policy["name"], r.status) for r in records] == [("strict", "complete"), ("lazy", "partial")]
    assert records[1].status_reason == f"interrupted after token {CAP + 40}"
    assert records[1].arrays["index"].tolist() == list(range(CAP + 1, CAP + 41))
    assert "lazy R=8: partial: interrupted after token" in done.out and "lazy R=8 (partial)" in done.out
    done = cli(eval_line("--resume", policy="strict,lazy:compress_every=8,window-only"))
    assert done.code == 0 and done.out.count("taken from") == 1
    statuses = [(r.policy["name"], r.status) for r in records_in(here / "out")]
    assert sorted(statuses[2:]) == [("lazy", "complete"), ("window-only", "complete")]


def test_ctrl_c_at_the_first_token(cli, here, monkeypatch):
    press_ctrl_c(monkeypatch, run=2, step=2)
    assert cli(eval_line(policy="full,strict")).code == 130
    assert [r.summary["decode_tokens"] for r in records_in(here / "out")] == [TOKENS - CAP - 1, 1]


def test_ctrl_c_while_a_record_is_written_waits_for_it(cli, here, monkeypatch):
    replace = os.replace

    def pressed(*args):
        signal.raise_signal(signal.SIGINT)
        return replace(*args)

    monkeypatch.setattr(files_module.os, "replace", pressed)
    before = signal.getsignal(signal.SIGINT)
    done = cli(eval_line(policy="strict,lazy", evaluate="blocks"))
    assert (done.code, done.err) == (130, "sinkstream eval: interrupted\n")
    assert [(r.policy["name"], r.status) for r in records_in(here / "out")] == [("strict", "complete")]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_run(cli, here, monkeypatch):
    def pressed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("sinkstream.cli.options.load_model", pressed)
    done = cli(eval_line())
    assert (done.code, done.err) == (130, "sinkstream eval: interrupted\n")
    assert not (here / "out").exists()


STEPS_UNTIL_SIGINT = 20  # of the second run
PROGRAM = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # some callers start their children with it ignored
import sinkstream.evaluation.run as run_module
from sinkstream.cli import main
timed, steps = run_module.timed, 0

def interrupted(fn, *args, **how):
    global steps
    steps += fn.__name__ == "step"
    if steps == {TOKENS - 1 - CAP + STEPS_UNTIL_SIGINT + 1}:
        signal.raise_signal(signal.SIGINT)
    return timed(fn, *args, **how)

run_module.timed = interrupted
sys.exit(main())
"""


def test_ctrl_c_while_a_command_is_imported(cli, here, monkeypatch):
    def pressed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_package.CommandParser, "load", pressed)
    done = cli(eval_line())
    assert (done.code, done.err) == (130, "sinkstream eval: interrupted\n")


def test_sigint_to_a_real_process(here):
    """The process gets the signal at a token, not at a time: whatever it is as fast as."""
    process = processes.run("-c", PROGRAM, *shlex.split(eval_line(policy="lazy,strict")))
    assert (process.returncode, process.stderr) == (130, "")
    assert [r.status for r in records_in(here / "out")] == ["complete", "partial"]
    partial = records_in(here / "out")[1]
    assert partial.summary["decode_tokens"] == STEPS_UNTIL_SIGINT
    assert f"strict: partial: {partial.status_reason}" in process.stdout


def fill_disk(monkeypatch, *, under: Path) -> None:
    """No file can be put in place anywhere under a folder any more."""
    replace = os.replace

    def full(source, target):
        if Path(target).resolve().is_relative_to(under.resolve()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(source, target)

    monkeypatch.setattr(files_module.os, "replace", full)


def test_a_full_disk_leaves_a_copy_elsewhere(cli, here, monkeypatch):
    assert cli(eval_line(evaluate="blocks")).code == 0
    fill_disk(monkeypatch, under=here / "out")
    done = cli(eval_line(policy="lazy,strict", evaluate="blocks"))
    assert done.code == 2
    told = (
        r"sinkstream eval: error: could not write out/\S+ .*No space left on device.*; the record was kept as (\S+)\n"
    )
    kept = Path(re.fullmatch(told, done.err).group(1))
    assert kept.parent.parent == here / "rescued"
    (rescued,) = records_in(kept.parent)
    assert (rescued.policy["name"], rescued.status) == ("lazy", "complete")
    assert [r.policy["name"] for r in records_in(here / "out")] == ["strict"], "what was there before is there still"
    assert not [p for p in (here / "out").iterdir() if p.suffix not in (".json", ".npz", ".png")]


def test_a_full_disk_everywhere_is_told(cli, here, monkeypatch):
    fill_disk(monkeypatch, under=here)
    done = cli(eval_line(evaluate="blocks"))
    assert done.code == 2
    assert re.fullmatch(r"sinkstream eval: error: could not write .*; and its copy could not be kept .*\n", done.err)


# ---- other commands ----


def test_env_prints_versions(cli):
    done = cli("env --device cpu")
    assert (done.code, done.err) == (0, "")
    lines = [re.split(r"\s{2,}", line, maxsplit=1) for line in done.out.splitlines()]
    found = {label: text for label, text in lines}
    assert found["versions torch"] == torch.__version__
    assert found["versions sinkstream"] == __version__
    assert {"git commit", "versions transformers", "gpu name", "cpu model", "device"} <= set(found)


def test_version(cli):
    assert cli("--version").out == f"sinkstream {__version__}\n"


def help_text(cli, command: str) -> str:
    """Help with the lines joined again."""
    done = cli(f"{command} --help")
    assert (done.code, done.err) == (0, "")
    return " ".join(done.out.split())


def named(word: str, text: str) -> bool:
    """Whether a text has a word, not merely as part of a longer name."""
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


IMPORTS_PROBE = """
import contextlib, importlib, io, sys
from sinkstream.cli import main
for line in LINES:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(line.split())
print(sorted(SLOW & set(sys.modules)))
for module in CONTROL:
    importlib.import_module(module)
print(sorted(SLOW & set(sys.modules)))
"""


def slow_imports(lines: list[str], slow: set[str], control: tuple[str, ...] = ()) -> list[str]:
    """Which of the modules `slow` command lines import in a fresh interpreter, and which are there after `control`."""
    program = IMPORTS_PROBE.replace("LINES", repr(lines)).replace("SLOW", repr(slow)).replace("CONTROL", repr(control))
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_what_needs_no_command_imports_none():
    """Torch and transformers take seconds to import; the records and their pages need neither before they are read."""
    slow = {"torch", "transformers", "sinkstream.cli.eval"}
    lines = [f"{command} {option}" for command in ("env", "report", "verdict") for option in ("--help", "--nosuch")]
    assert slow_imports(["--help", "--version", "nosuch"], slow | {"numpy"})[0] == slow_imports(lines, slow)[0] == "[]"


def test_help_and_usage_errors_import_no_model():
    """A command's own help does need torch, for its choices, and neither models nor a compiler nor statistics."""
    slow = {"transformers.modeling_utils", "transformers.generation.utils", "torch._dynamo", "sympy", "scipy.stats"}
    lines = [f"{command} {option}" for command in COMMANDS for option in ("--help", "--nosuch")]
    found, after = slow_imports(lines, slow, control=tuple(slow))
    assert (found, after) == ("[]", str(sorted(slow)))


@pytest.mark.parametrize("columns", ["60", "80", "200"])
def test_help_names_everything_that_is_registered(cli, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = help_text(cli, "")
    assert all(named(name, text) and summary[:20] in text for name, summary in COMMANDS.items())
    text = help_text(cli, "eval")
    wanted = [*method_names(), *SCORERS, "--policy", "--cap"]
    wanted += ["--" + spec.name.replace("_", "-") for spec in option_specs()]
    wanted += [choice for spec in option_specs() for choice in spec.choices or []]
    assert not [word for word in wanted if not named(word, text)]
    assert not named("nosuch", text) and not named("refresh-last", text)
    assert (
        "(default: None)" not in text
        and "(default: steps)" in text
        and "(default: cpu 256" in text
        and "(default: 0)" in text
    )


def test_the_table_of_commands_is_true():
    """Every command of the literal table has its module, and the table has every module that is a command."""
    folder = Path(cli_package.__file__).parent
    modules = [
        path.stem.replace("_", "-") for path in folder.glob("*.py") if "\ndef run(" in path.read_text(encoding="utf-8")
    ]
    assert sorted(modules) == sorted(COMMANDS)
    assert all(callable(import_module(f"sinkstream.cli.{name.replace('-', '_')}").add_arguments) for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text_and_its_default_as_typed(cli, command):
    text = help_text(cli, command)
    assert not re.search(r"\(default: [\[({]", text)
    parser = next(a for a in build_parser()._actions if a.dest == "command").choices[command].load()
    for action in parser._actions:
        assert action.help, action.dest
        assert all(named(flag, text) for flag in action.option_strings)


def test_the_sources_of_texts_and_models_can_be_found(cli):
    text = help_text(cli, "eval")
    assert all(named(word, text) for word in ("pg19", "wikitext", "builtin", "random"))
    assert re.search("pythia-2.8b", cli(eval_line(model="random:x")).err) and "pythia-2.8b" in SHAPES


def test_report_writes_the_summary_and_the_tables(cli, here, monkeypatch):
    record = make_record("demo-run", command=("sinkstream", "demo"))
    write_record(record, make_arrays(), here / "results" / "foundation")
    monkeypatch.setattr(documents, "render_tables", lambda results, pairs: {"figures": "| new |"})
    done = cli("report")
    assert (done.code, done.err) == (0, "")
    summary = json.loads((here / "results" / "summary.json").read_text())
    assert summary["foundation.demo_seconds"]["record"] == "demo-run"
    assert f"results/summary.json: {len(summary)} headline figures" in done.out
    assert "foundation.hf_strict_over_full_tpot is missing: no record for" in done.out

    page = here / "page.md"
    page.write_text("# Page\n<!-- generated:figures -->\nold\n<!-- /generated -->\n")
    before = page.read_text()
    done = cli("report --check --docs page.md")
    assert done.code == 1 and "page.md: figures is out of date; run sinkstream report" in done.out
    assert page.read_text() == before
    assert cli("report --docs page.md").code == 0
    assert "| new |" in page.read_text() and "old" not in page.read_text()
    assert cli("report --check --docs page.md").code == 0


def test_report_of_a_table_that_is_not_known(cli, here):
    (here / "page.md").write_text("<!-- generated:nosuch -->\n<!-- /generated -->\n")
    done = cli("report --check --docs page.md")
    assert done.code == 2
    assert re.fullmatch(r"sinkstream report: error: page.md: table 'nosuch' is not known; accepted: .*\n", done.err)


@pytest.mark.parametrize("line", ["env --device cpu", eval_line(evaluate="blocks")])
def test_a_reader_that_has_enough_is_no_error(here, capsys, monkeypatch, line):
    """As in `sinkstream env | true`: neither a message nor a traceback, and records stay."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        try:
            code = main(shlex.split(line))
        except SystemExit as stop:
            code = stop.code
        print("more", file=gone, flush=True)  # as Python does at its end
    assert code == 1 and capsys.readouterr().err == ""
    assert line.startswith("env") or load_records(here / "out")[0].status == "complete"
