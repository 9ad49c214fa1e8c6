"""The command line: ``sinkstream demo | eval | env | report``.

A user's mistake ends with one message on stderr and exit code 2, an interrupt with 130, a failed run with 1.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from sinkstream import __version__
from sinkstream.registry import Registry

COMMANDS: Registry = Registry("command")
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each command module adds its own options."""
    from sinkstream.cli import demo, env, eval, report  # noqa: F401  (they register their commands)

    parser = argparse.ArgumentParser(
        prog="sinkstream",
        description="Language models that stream for ever in a fixed amount of memory.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sinkstream {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=COMMANDS.summary(name),
            description=command.__doc__,
            allow_abbrev=False,
            usage=f"sinkstream {name} [options]",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    args = build_parser().parse_args(argv)
    args.argv = ["sinkstream", *(sys.argv[1:] if argv is None else argv)]
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(f"sinkstream {args.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        print(f"sinkstream {args.command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
