"""``sinkstream recall``."""

import argparse

from sinkstream.cli import options
from sinkstream.cli.show import show_batch, wide_console
from sinkstream.data import load_text, tokenize
from sinkstream.studies.recall.run import PASSAGE_TOKENS, PASSAGES, RATIOS, RecallBatch, RecallDesign
from sinkstream.studies.recall.tables import draw_recall, recall_table

PICTURE = "recall.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    options.add_model_options(parser)
    options.add_policy_options(parser)
    options.add_recall_options(parser)
    group = parser.add_argument_group("recall")
    options.add_text(group, tokens=False)
    group.add_argument(
        "--distances",
        type=options.numbers(float),
        default=list(RATIOS),
        metavar="RATIO[,RATIO…]",
        help="distances between the two occurrences, in multiples of the cap",
    )
    group.add_argument("--passages", type=int, default=PASSAGES, help="passages at each distance")
    group.add_argument("--passage-tokens", type=int, default=PASSAGE_TOKENS, help="tokens of a passage")
    options.add_block_tokens(group)
    options.add_output(group, "out/recall")


def run(args: argparse.Namespace) -> int:
    """Run all policies, print the table, write records and picture."""
    if args.cap is None:
        raise ValueError("distances are multiples of the cap; give --cap SLOTS")
    design = RecallDesign(args.cap, tuple(args.distances), args.passages, args.passage_tokens, args.seed)
    settings = options.policy_settings(args, evaluate="blocks", block_tokens=options.block_tokens(args))
    console = wide_console()
    text = load_text(args.text)
    loaded = options.load_given_model(args)
    streams = design.streams(lambda tokens: tokenize(text, loaded.tokenizer, tokens))
    records = RecallBatch(loaded, streams, options.request(args)).run(settings, console)
    measured = [r for r in records if len(r.passages["ratio"])]
    title = f"{loaded.name} over {text.name}, {len(streams.repeated):,} tokens"
    return show_batch(records, measured, console, args.out, title, recall_table, draw_recall, PICTURE)
