"""``sinkstream streameval``."""

import argparse

from sinkstream.cli import options
from sinkstream.cli.show import show_batch, wide_console
from sinkstream.studies.facts.run import ExamBatch
from sinkstream.studies.streameval.design import (
    DISTANCES,
    EVERY,
    FORMS_ASKED,
    QUESTIONS,
    FactStream,
    StreamEvalDesign,
)
from sinkstream.studies.streameval.record import StreamEvalRecord
from sinkstream.studies.streameval.tables import draw_streameval, streameval_table

PICTURE = "streameval.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    options.add_model_options(parser)
    options.add_policy_options(parser)
    options.add_recall_options(parser)
    group = parser.add_argument_group("stream")
    group.add_argument(
        "--distances",
        type=options.numbers(int),
        default=list(DISTANCES),
        metavar="LINES[,LINES…]",
        help="lines from a statement to its question",
    )
    group.add_argument("--every", type=int, default=EVERY, help="every so many lines a question")
    group.add_argument("--questions", type=int, default=QUESTIONS, help="questions at each distance, at least")
    group.add_argument(
        "--forms", type=lambda text: text.split(","), default=list(FORMS_ASKED), help="cue, open, or both with a comma"
    )
    options.add_block_tokens(group)
    options.add_output(group, "out/streameval")


def run(args: argparse.Namespace) -> int:
    """Run all policies, print the table, write records and picture."""
    design = StreamEvalDesign(tuple(args.distances), args.every, args.questions, tuple(args.forms), seed=args.seed)
    settings = options.policy_settings(args, evaluate="blocks", block_tokens=options.block_tokens(args))
    console = wide_console()
    loaded = options.load_given_model(args)
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.name} has no tokenizer to write facts with; accepted: a model with one")
    stream = FactStream.write(design, loaded.tokenizer)
    records = ExamBatch(loaded, stream, options.request(args), StreamEvalRecord).run(settings, console)
    measured = [record for record in records if len(record.answers["lines"])]
    title = f"{loaded.name}, {len(stream.stream):,} tokens of facts, {len(stream.questions):,} questions"
    return show_batch(records, measured, console, args.out, title, streameval_table, draw_streameval, PICTURE)
