"""``sinkstream cliff``."""

import argparse

from sinkstream.cache import POSITIONS
from sinkstream.cli import options
from sinkstream.cli.show import show_batch, wide_console
from sinkstream.evaluation.batch import Batch
from sinkstream.studies.cliff.run import CAPS, SINK, STRIDES, cliff_settings
from sinkstream.studies.cliff.tables import cliff_table, draw_cliff

PICTURE = "cliff.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    options.add_model_options(parser)
    group = parser.add_argument_group("grid")
    options.add_text(group)
    group.add_argument(
        "--caps",
        type=options.numbers(float),
        default=list(CAPS),
        metavar="RATIO[,RATIO…]",
        help="caps, in multiples of the trained positions",
    )
    group.add_argument(
        "--compress-every",
        type=options.numbers(int),
        default=list(STRIDES),
        metavar="R[,R…]",
        help="R of the lazy runs; strict (R = 1) is always run",
    )
    group.add_argument(
        "--positions",
        nargs="+",
        type=options.names_of(POSITIONS, "position mode"),
        action=options.Pooled,
        default=list(POSITIONS),
        metavar="MODE",
        help=f"one or both of {', '.join(POSITIONS)}, with a comma or a space between them",
    )
    group.add_argument("--sink", type=int, default=SINK, help="first tokens, never evicted")
    options.add_block_tokens(group)
    options.add_output(group, "out/cliff")


def run(args: argparse.Namespace) -> int:
    """Run the grid, print both tables, write records and picture."""
    console = wide_console()
    loaded, stream = options.load_model_and_text(args)
    if loaded.trained_positions is None:
        raise ValueError(f"{loaded.name} does not say how many positions it was trained on; accepted: one that does")
    settings = cliff_settings(
        loaded.trained_positions,
        len(stream),
        caps=args.caps,
        strides=args.compress_every,
        positions=args.positions,
        sink=args.sink,
        block_tokens=options.block_tokens(args),
    )
    records = Batch(loaded, stream, options.request(args)).run(settings, console)
    complete = [record for record in records if record.status == "complete"]
    title = f"{loaded.name} over {stream.name}, {len(stream):,} tokens"
    return show_batch(records, complete, console, args.out, title, cliff_table, draw_cliff, PICTURE)
