"""``sinkstream recall``."""

import argparse
from collections.abc import Callable
from functools import partial

from sinkstream.cli import options
from sinkstream.cli.show import show_batch, wide_console
from sinkstream.data import load_text, tokenize
from sinkstream.evaluation.runner import check_writable
from sinkstream.evaluation.settings import RunSettings
from sinkstream.studies.facts.run import ExamBatch, check_answering
from sinkstream.studies.facts.statements import FORMS
from sinkstream.studies.recall.facts import FactsDesign, FactsRecord
from sinkstream.studies.recall.facts_tables import draw_facts, facts_table
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.recall.run import PASSAGE_TOKENS, PASSAGES, RATIOS, RecallBatch, RecallDesign, check_recalling
from sinkstream.studies.recall.tables import chooser_table, curve_table, draw_recall, has_recall, recall_table

OF_PASSAGES, OF_FACTS = ("--passages", "--passage-tokens"), ("--forms",)  # options
PICTURE, FACTS_PICTURE = "recall.png", "facts.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    options.add_model_options(parser)
    options.add_policy_options(parser)
    options.add_recall_options(parser)
    group = parser.add_argument_group("recall study")
    group.add_argument(
        "--text",
        nargs="+",
        type=options.texts,
        action=options.Pooled,
        default=["builtin"],
        metavar="TEXT",
        help="pg19, wikitext, builtin, or a text file; several, with commas or spaces between them, are pooled",
    )
    group.add_argument(
        "--distances",
        type=options.numbers(float),
        default=list(RATIOS),
        metavar="RATIO[,RATIO…]",
        help="distances between the two occurrences, in multiples of the cap",
    )
    group.add_argument("--passages", type=int, default=PASSAGES, help="passages at each distance, in each text")
    group.add_argument("--passage-tokens", type=int, default=PASSAGE_TOKENS, help="tokens of a passage")
    group.add_argument(
        "--facts", type=int, help="ask facts instead of passages: so many at each distance, in each form and text"
    )
    forms = "; ".join(f"{name}: {what}" for name, what in FORMS.items())
    group.add_argument(
        "--forms", type=lambda text: text.split(","), default=list(FORMS), help=f"how facts are asked; {forms}"
    )
    options.add_block_tokens(group)
    options.add_output(group, "out/recall")


def run(args: argparse.Namespace) -> int:
    """Run all policies over all texts, print the table, write records and picture."""
    if args.cap is None:
        raise ValueError("distances are multiples of the cap; give --cap SLOTS")
    if args.facts is None:
        options.refuse_options(args, OF_FACTS, "goes with --facts N, which is not given")
    else:
        options.refuse_options(
            args, OF_PASSAGES, "is of passages, and --facts asks facts instead; accepted: one of both"
        )
    return _passages(args) if args.facts is None else _facts(args)


def _passages(args: argparse.Namespace) -> int:
    design = RecallDesign(args.cap, tuple(args.distances), args.passages, args.passage_tokens, args.seed)
    settings = _settings(args, check_recalling)
    console, texts = wide_console(), [load_text(name) for name in args.text]
    loaded = options.load_given_model(args)
    streams = [design.streams(partial(tokenize, text, loaded.tokenizer)) for text in texts]
    records: list[RecallRecord] = []
    for its in streams:
        records += RecallBatch(loaded, its, options.request(args)).run(settings, console)
        if records[-1].status != "complete":
            break
    measured = [r for r in records if len(r.passages["ratio"])]
    if has_recall(measured):
        for table in (chooser_table, curve_table):
            console.print(table(measured))
    title = f"{loaded.name} over {_names(texts)}, {sum(len(its.repeated) for its in streams):,} tokens"
    return show_batch(records, measured, console, args.out, title, recall_table, draw_recall, PICTURE)


def _facts(args: argparse.Namespace) -> int:
    design = FactsDesign(args.cap, tuple(args.distances), args.facts, tuple(args.forms), args.seed)
    settings = _settings(args, check_answering)
    console, texts = wide_console(), [load_text(name) for name in args.text]
    loaded = options.load_given_model(args)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"{loaded.name} has no tokenizer to write facts with; accepted: a model with one")
    streams = [design.streams(partial(tokenize, text, tokenizer), tokenizer) for text in texts]
    records: list[FactsRecord] = []
    for its in streams:
        records += ExamBatch(loaded, its, options.request(args), FactsRecord).run(settings, console)
        if records[-1].status != "complete":
            break
    measured = [r for r in records if len(r.answers["ratio"])]
    title = f"{loaded.name}, facts in {_names(texts)}, {sum(len(its.stream) for its in streams):,} tokens"
    return show_batch(records, measured, console, args.out, title, facts_table, draw_facts, FACTS_PICTURE)


def _settings(args: argparse.Namespace, check: Callable[[RunSettings], None]) -> list[RunSettings]:
    """Settings of every policy, after everything is checked that needs neither the texts nor the model."""
    settings = options.policy_settings(args, evaluate="blocks", block_tokens=options.block_tokens(args))
    for one in settings:
        check(one)
    options.check_tokenizer(args.model, "for texts")
    check_writable(args.out, keep=False)
    return settings


def _names(texts: list) -> str:
    return ", ".join(text.name for text in texts)
