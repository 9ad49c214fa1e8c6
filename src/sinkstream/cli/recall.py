"""``sinkstream recall``."""

import argparse
from functools import partial
from pathlib import Path

from rich.console import Console

from sinkstream.cli import COMMANDS
from sinkstream.cli.eval import exit_code, request
from sinkstream.cli.options import (
    add_block_tokens,
    add_model_options,
    add_output,
    add_policy_options,
    add_text,
    block_tokens,
    load_given_model,
    numbers,
    run_settings,
)
from sinkstream.cli.show import show_place, show_unfinished, wide_console
from sinkstream.data import load_text, tokenize
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.recall.run import PASSAGE_TOKENS, PASSAGES, RATIOS, RecallBatch, RecallDesign
from sinkstream.studies.recall.tables import draw_recall, recall_table

PICTURE = "recall.png"


@COMMANDS.register("recall")
class Recall:
    """Measure what each policy recalls of a passage, by how far back it was seen."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options of this command."""
        add_model_options(parser)
        add_policy_options(parser)
        group = parser.add_argument_group("recall")
        add_text(group, tokens=False)
        group.add_argument(
            "--distances",
            type=numbers(float),
            default=list(RATIOS),
            metavar="RATIO[,RATIO…]",
            help="distances between the two occurrences, in multiples of the cap",
        )
        group.add_argument("--passages", type=int, default=PASSAGES, help="passages at each distance")
        group.add_argument("--passage-tokens", type=int, default=PASSAGE_TOKENS, help="tokens of a passage")
        add_block_tokens(group)
        add_output(group, "out/recall")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Run all policies, print the table, write records and picture."""
        if args.cap is None:
            raise ValueError("distances are multiples of the cap; give --cap SLOTS")
        design = RecallDesign(args.cap, tuple(args.distances), args.passages, args.passage_tokens, args.seed)
        protocol = {"evaluate": "blocks", "block_tokens": block_tokens(args)}
        settings = [run_settings(args, method, options, **protocol) for method, options in args.policy]
        console = wide_console()
        text = load_text(args.text)
        loaded = load_given_model(args)
        streams = design.streams(lambda tokens: tokenize(text, loaded.tokenizer, tokens))
        records = RecallBatch(loaded, streams, request(args)).run(settings, console)
        _show(records, args.out, console, f"{loaded.name} over {text.name}, {len(streams.repeated):,} tokens")
        return exit_code(records)


def _show(records: list[RecallRecord], out: Path, console: Console, title: str) -> None:
    """Print the table, draw the picture of what was measured, and say where both and the records are."""
    measured = [r for r in records if len(r.passages["ratio"])]
    if measured:
        console.print(recall_table(measured, title=title))
    show_unfinished(records, console)
    show_place(out, console, partial(draw_recall, measured, out / PICTURE, title=title) if measured else None)
