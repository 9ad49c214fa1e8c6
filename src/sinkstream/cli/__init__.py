"""The command line: ``sinkstream demo | eval | bench | diagnose | recall | cliff | env | report``.

A user's mistake ends with one message on stderr and exit code 2, an interrupt with 130, a failed run with 1.
"""

import argparse
import ast
import os
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from sinkstream import __version__
from sinkstream.records.files import WriteError
from sinkstream.registry import Registry

COMMANDS: Registry = Registry("command")
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> None:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names stay in one piece, so that they can be copied, and only defaults that say something are shown."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [part for line in text.splitlines() for part in textwrap.wrap(line, width, break_on_hyphens=False)]

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_something = action.default is not None and action.default is not False
        return super()._get_help_string(action) if says_something else action.help


class CommandParser(Parser):
    """The parser of one command: imports its module and adds its options when it is first asked to parse.

    The modules take seconds to import, because of torch, and only one of them is needed.
    """

    def __init__(self, *, command: str, **options: Any):
        super().__init__(**options)
        self.command = command

    def load(self) -> "CommandParser":
        """Import the command and add its options, once; returns itself."""
        if self.get_default("run") is None:
            import_module(f"{__name__}.{self.command}")
            command = COMMANDS[self.command]
            self.description = command.__doc__
            command.add_arguments(self)
            self.set_defaults(run=command.run)
        return self

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        self.load()
        return super().parse_known_args(args, namespace)


def command_summaries() -> dict[str, str]:
    """Name of every command -> what it does, from the sources of this folder's modules, none of which is imported."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(Path(__file__).parent.glob("*.py"))]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    registered = [
        (mark.args[0].value, ast.get_docstring(node))
        for node in classes
        for mark in node.decorator_list
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "COMMANDS.register"
    ]
    return {name: docstring.splitlines()[0].rstrip(".") for name, docstring in registered}


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each command module adds its own options once it is needed."""
    parser = Parser(
        prog="sinkstream",
        description="Language models that stream for ever in a fixed amount of memory.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sinkstream {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    for name, summary in command_summaries().items():
        commands.add_parser(
            name,
            command=name,
            help=summary,
            allow_abbrev=False,
            usage=f"sinkstream {name} [options]",
            formatter_class=HelpFormatter,
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = build_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.exit(
            EXIT_USAGE,
            f"sinkstream {args.command}: error: unknown argument {unknown[0]!r};"
            f" accepted: see sinkstream {args.command} --help\n",
        )
    args.argv = ["sinkstream", *(sys.argv[1:] if argv is None else argv)]
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"sinkstream {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        message = error.strerror if isinstance(error, WriteError) else error
        print(f"sinkstream {args.command}: error: {message}", file=sys.stderr)
        return EXIT_USAGE
