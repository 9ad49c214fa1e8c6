"""``sinkstream eval``."""

import argparse

from sinkstream.cli import options
from sinkstream.cli.show import show_runs, wide_console
from sinkstream.evaluation.batch import Batch, check_interleaved
from sinkstream.evaluation.settings import EVALUATE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    options.add_model_options(parser)
    options.add_policy_options(parser)
    options.add_recall_options(parser)
    group = parser.add_argument_group("protocol")
    options.add_text(group, random=True)
    group.add_argument("--prefill", type=int, help="tokens fed before decoding (default: the cap)")
    options.add_backend(group)
    described = "; ".join(f"{name}: {text}" for name, text in EVALUATE.items())
    group.add_argument("--evaluate", default="steps", choices=list(EVALUATE), help=described)
    group.add_argument("--timed-tokens", type=int, help="tokens timed one by one, the rest in blocks (default: all)")
    options.add_block_tokens(group)
    group.add_argument("--sample-every", type=int, default=1, help="recompute only: score every k-th token")
    group.add_argument("--repeats", type=int, default=1, help="runs; each token's time is the median over them")
    group.add_argument(
        "--interleave", action="store_true", help="run all policies in turn, token by token: fair on a noisy machine"
    )
    options.add_output(group, "out")


def run(args: argparse.Namespace) -> int:
    """Run all policies, print the table, write records and picture."""
    names = ("backend", "prefill", "evaluate", "timed_tokens", "sample_every", "repeats")
    protocol = {name: getattr(args, name) for name in names}
    settings = options.policy_settings(args, block_tokens=options.block_tokens(args), **protocol)
    options.check_backends(args, settings)
    if args.interleave:
        check_interleaved(settings, args.resume)
    console = wide_console()
    loaded, stream = options.load_model_and_text(args, settings, random=True)
    records = Batch(loaded, stream, options.request(args), args.interleave).run(settings, console)
    return show_runs(records, console, args.out, f"{loaded.name} over {stream.name}, {len(stream)} tokens")
