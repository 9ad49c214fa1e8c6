"""``sinkstream streameval``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from sinkstream.cli import options
from sinkstream.cli.show import show_batch, wide_console
from sinkstream.data import load_text, tokenize
from sinkstream.evaluation.runner import check_writable
from sinkstream.evaluation.settings import RunSettings
from sinkstream.models import LoadedModel
from sinkstream.studies.facts.run import ExamBatch, check_answering
from sinkstream.studies.streameval.design import (
    DISTANCES,
    EVERY,
    FORMS_ASKED,
    QUESTIONS,
    FactStream,
    StreamEvalDesign,
)
from sinkstream.studies.streameval.record import StreamEvalRecord
from sinkstream.studies.streameval.reply import FACTS, ReplyBatch, ReplyDesign, ReplyRecord, reply_stream
from sinkstream.studies.streameval.reply_tables import draw_reply, reply_table
from sinkstream.studies.streameval.tables import draw_streameval, streameval_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OF_STREAM, OF_REPLY = ("--distances", "--every", "--questions"), ("--text", "--facts")  # options
PICTURE, REPLY_PICTURE = "streameval.png", "reply.png"


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
    options.add_backend(group)
    group = parser.add_argument_group("one endless reply, instead of a stream of facts")
    group.add_argument("--reply-tokens", type=int, help="tokens of the reply, in which facts are planted and asked")
    options.add_text(group, tokens=False)
    group.add_argument("--facts", type=int, default=FACTS, help="facts in the reply")
    options.add_output(group, "out/streameval")


def run(args: argparse.Namespace) -> int:
    """Run all policies, print the table, write records and picture."""
    if args.reply_tokens is None:
        options.refuse_options(args, OF_REPLY, "goes with --reply-tokens N, which is not given")
        return _stream(args)
    options.refuse_options(
        args, OF_STREAM, "is of a stream of facts, not of one reply; accepted: without --reply-tokens"
    )
    return _reply(args)


def _stream(args: argparse.Namespace) -> int:
    design = StreamEvalDesign(tuple(args.distances), args.every, args.questions, tuple(args.forms), seed=args.seed)
    settings = _settings(args)
    console, loaded = wide_console(), options.load_given_model(args)
    stream = FactStream.write(design, _tokenizer(loaded))
    records = ExamBatch(loaded, stream, options.request(args), StreamEvalRecord).run(settings, console)
    measured = [record for record in records if len(record.answers["lines"])]
    title = f"{loaded.name}, {len(stream.stream):,} tokens of facts, {len(stream.questions):,} questions"
    return show_batch(records, measured, console, args.out, title, streameval_table, draw_streameval, PICTURE)


def _reply(args: argparse.Namespace) -> int:
    if args.cap is None:
        raise ValueError("the nearest question is a cap after its statement; give --cap SLOTS")
    baselines = [method for method, _ in args.policy if method in options.BASELINES]
    if baselines:
        raise ValueError(f"policy {baselines[0]!r} does not fit a reply without end; accepted: eviction policies")
    design = ReplyDesign(args.reply_tokens, args.cap, args.facts, tuple(args.forms), args.seed)
    settings = _settings(args)
    console, text = wide_console(), load_text(args.text)
    loaded = options.load_given_model(args)
    tokenizer = _tokenizer(loaded)
    reply = reply_stream(design, lambda tokens: tokenize(text, tokenizer, tokens), tokenizer)
    records = ReplyBatch(loaded, reply, options.request(args), ReplyRecord).run(settings, console)
    measured = [record for record in records if len(record.answers["correct"])]
    title = f"{loaded.name}, one reply of {design.tokens:,} tokens over {text.name}, {design.facts} facts"
    return show_batch(records, measured, console, args.out, title, reply_table, draw_reply, REPLY_PICTURE)


def _settings(args: argparse.Namespace) -> list[RunSettings]:
    """Settings of every policy, after everything is checked that needs no model.

    Beside policies that an engine runs, a baseline is run by the model itself.
    """
    settings = options.policy_settings(
        args, evaluate="blocks", block_tokens=options.block_tokens(args), backend=args.backend
    )
    if len(settings) > 1:
        settings = [replace(one, backend="hf") if one.method in options.BASELINES else one for one in settings]
    options.check_backends(args, settings)
    for one in settings:
        check_answering(one)
    options.check_tokenizer(args.model, "to write facts with")
    check_writable(args.out, keep=False)
    return settings


def _tokenizer(loaded: LoadedModel) -> PreTrainedTokenizerBase:
    if loaded.tokenizer is None:
        raise ValueError(f"{loaded.name} has no tokenizer to write facts with; accepted: a model with one")
    return loaded.tokenizer
