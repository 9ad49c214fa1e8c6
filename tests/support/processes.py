"""Processes that are forked from one that has imported everything: real ones, without the seconds of the imports.

A process has its own pid, signals, standard streams, working directory, environment and memory. What a fresh
interpreter would show and a fork does not, the imports themselves, is left to tests that start one by `subprocess`.
"""

import atexit
import contextlib
import functools
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TextIO

import pytest

CONTEXT = multiprocessing.get_context("forkserver")
COMMANDS = ["sinkstream.cli.eval", "sinkstream.cli.matrix", "sinkstream.cli.serve", "uvicorn"]
MODELS = ["transformers.modeling_utils", "transformers.generation.utils", "transformers.models.auto.modeling_auto"]
CONTEXT.set_forkserver_preload([*COMMANDS, *MODELS])


@dataclass
class Forked:
    """A process that runs, with its standard output and error."""

    process: BaseProcess
    stdout: TextIO
    stderr: TextIO

    @property
    def pid(self) -> int:
        """Process id."""
        assert self.process.pid is not None
        return self.process.pid

    def wait(self) -> int:
        """The exit status once the process has ended: minus the signal that ended it, as in `subprocess`."""
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode


def start(*command: str | Path, cwd: Path | None = None, stdin: str = "") -> Forked:
    """Start ``-m MODULE``, ``-c PROGRAM`` or a file, with its arguments, as `python` does."""
    _begin()
    given, written = CONTEXT.Pipe(duplex=False)
    streams = [CONTEXT.Pipe(duplex=False) for _ in ("stdout", "stderr")]
    words = [str(word) for word in command]
    pipes = (given, *(written_end for _, written_end in streams))
    process = CONTEXT.Process(target=_run, args=(words, str(cwd or Path.cwd()), dict(os.environ), pipes), daemon=True)
    process.start()
    for end in pipes:
        end.close()
    with contextlib.suppress(BrokenPipeError), os.fdopen(os.dup(written.fileno()), "w", encoding="utf-8") as text:
        written.close()
        text.write(stdin)
    return Forked(process, *(_reader(read_end) for read_end, _ in streams))


def run(*command: str | Path, cwd: Path | None = None, stdin: str = "") -> subprocess.CompletedProcess:
    """Run such a process to its end; what it writes may fill no more than a pipe, 64 KiB a stream."""
    forked = start(*command, cwd=cwd, stdin=stdin)
    out, err = forked.stdout.read(), forked.stderr.read()
    return subprocess.CompletedProcess(list(command), forked.wait(), out, err)


@functools.cache
def _begin() -> None:
    """Start the process that will be forked; it finds modules where this one does.

    Its socket lies in the system's own folder: in that of a test its name would be longer than a socket may have.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", None)
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        ensure_running()


def _reader(end: Connection) -> TextIO:
    with end:
        return os.fdopen(os.dup(end.fileno()), encoding="utf-8")


def _run(words: list[str], folder: str, environment: dict[str, str], pipes: tuple[Connection, ...]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, pipe in enumerate(pipes):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, encoding="utf-8") for number in (1, 2))
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
