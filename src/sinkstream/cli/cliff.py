"""``sinkstream cliff``."""

import argparse
from functools import partial
from pathlib import Path

from rich.console import Console

from sinkstream.cache import POSITIONS
from sinkstream.cli import COMMANDS
from sinkstream.cli.eval import exit_code, request
from sinkstream.cli.options import (
    add_block_tokens,
    add_model_options,
    add_output,
    add_text,
    block_tokens,
    load_given_model,
    numbers,
)
from sinkstream.cli.show import show_place, show_unfinished, wide_console
from sinkstream.data import load_text, tokenize
from sinkstream.evaluation.batch import Batch
from sinkstream.records.records import Record
from sinkstream.studies.cliff.run import CAPS, SINK, STRIDES, cliff_settings
from sinkstream.studies.cliff.tables import cliff_table, draw_cliff

PICTURE = "cliff.png"


@COMMANDS.register("cliff")
class Cliff:
    """Split the loss of perplexity at a large R into hard eviction and visible length past the trained positions."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options of this command."""
        add_model_options(parser)
        group = parser.add_argument_group("grid")
        add_text(group)
        group.add_argument(
            "--caps",
            type=numbers(float),
            default=list(CAPS),
            metavar="RATIO[,RATIO…]",
            help="caps, in multiples of the trained positions",
        )
        group.add_argument(
            "--compress-every",
            type=numbers(int),
            default=list(STRIDES),
            metavar="R[,R…]",
            help="R of the lazy runs; strict (R = 1) is always run",
        )
        group.add_argument(
            "--positions", nargs="+", default=list(POSITIONS), choices=POSITIONS, help="one or both position modes"
        )
        group.add_argument("--sink", type=int, default=SINK, help="first tokens, never evicted")
        add_block_tokens(group)
        add_output(group, "out/cliff")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Run the grid, print both tables, write records and picture."""
        console = wide_console()
        text = load_text(args.text)
        loaded = load_given_model(args)
        if loaded.trained_positions is None:
            raise ValueError(
                f"{loaded.name} does not say how many positions it was trained on; accepted: one that does"
            )
        stream = tokenize(text, loaded.tokenizer, args.tokens)
        settings = cliff_settings(
            loaded.trained_positions,
            len(stream),
            caps=args.caps,
            strides=args.compress_every,
            positions=args.positions,
            sink=args.sink,
            block_tokens=block_tokens(args),
        )
        records = Batch(loaded, stream, request(args)).run(settings, console)
        _show(records, args.out, console, f"{loaded.name} over {stream.name}, {len(stream):,} tokens")
        return exit_code(records)


def _show(records: list[Record], out: Path, console: Console, title: str) -> None:
    complete = [record for record in records if record.status == "complete"]
    if complete:
        console.print(cliff_table(complete, title=title))
    show_unfinished(records, console)
    show_place(out, console, partial(draw_cliff, complete, out / PICTURE, title=title) if complete else None)
