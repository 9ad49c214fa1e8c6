"""``sinkstream eval``."""

import argparse
from pathlib import Path

from sinkstream.cli import COMMANDS, EXIT_FAILED, EXIT_INTERRUPTED
from sinkstream.cli.options import (
    add_block_tokens,
    add_model_options,
    add_output,
    add_policy_options,
    add_text,
    all_arguments,
    block_tokens,
    load_given_model,
    run_settings,
)
from sinkstream.cli.show import draw_nll, show_records, wide_console
from sinkstream.data import Text, TokenStream, load_text, random_tokens, tokenize
from sinkstream.evaluation.backends import BACKENDS, evaluation_backends
from sinkstream.evaluation.batch import Batch
from sinkstream.evaluation.runner import Request
from sinkstream.evaluation.settings import EVALUATE, RunSettings
from sinkstream.models import LoadedModel

RANDOM_TEXT = "random"


@COMMANDS.register("eval")
class Eval:
    """Stream a text through a model under one or several policies and record quality and speed."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options of this command."""
        add_model_options(parser)
        add_policy_options(parser)
        group = parser.add_argument_group("protocol")
        add_text(group, random=True)
        group.add_argument("--prefill", type=int, help="tokens fed before decoding (default: the cap)")
        backends = evaluation_backends()
        listed = "; ".join(f"{name}: {BACKENDS.summary(name)}" for name in backends)
        group.add_argument("--backend", default="hf", choices=backends, help=f"what runs the model; {listed}")
        described = "; ".join(f"{name}: {text}" for name, text in EVALUATE.items())
        group.add_argument("--evaluate", default="steps", choices=list(EVALUATE), help=described)
        group.add_argument(
            "--timed-tokens", type=int, help="tokens timed one by one, the rest in blocks (default: all)"
        )
        add_block_tokens(group)
        group.add_argument("--sample-every", type=int, default=1, help="recompute only: score every k-th token")
        group.add_argument("--repeats", type=int, default=1, help="runs; each token's time is the median over them")
        group.add_argument(
            "--interleave",
            action="store_true",
            help="run all policies in turn, token by token: fair on a noisy machine",
        )
        add_output(group, "out")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Run all policies, print the table, write records and picture."""
        settings = [_settings(args, method, options) for method, options in args.policy]
        console = wide_console()
        stream_first = None if args.text == RANDOM_TEXT else load_text(args.text)
        loaded = load_given_model(args)
        stream = _tokens(args, loaded, stream_first)
        batch = Batch(loaded, stream, request(args), args.interleave)
        records = batch.run(settings, console)
        title = f"{loaded.name} over {stream.name}, {len(stream)} tokens"
        show_records(records, console, title)
        draw_nll(records, args.out, console, title)
        return exit_code(records)


def request(args: argparse.Namespace, *, out: Path | None = None, seed: int | None = None) -> Request:
    """What the command was asked for; `out` and `seed` in place of its options of these names."""
    out, seed = args.out if out is None else out, args.seed if seed is None else seed
    return Request(out, all_arguments(args), args.argv, seed, args.resume)


def exit_code(records: list) -> int:
    """0 if every run is complete, 130 after an interrupt, 1 after a failure."""
    codes = {"complete": 0, "partial": EXIT_INTERRUPTED, "failed": EXIT_FAILED}
    return codes[records[-1].status]


def _settings(args: argparse.Namespace, method: str, options: dict) -> RunSettings:
    return run_settings(
        args,
        method,
        options,
        backend=args.backend,
        prefill=args.prefill,
        evaluate=args.evaluate,
        timed_tokens=args.timed_tokens,
        block_tokens=block_tokens(args),
        sample_every=args.sample_every if method == "recompute" or len(args.policy) == 1 else 1,
        repeats=args.repeats,
    )


def _tokens(args: argparse.Namespace, loaded: LoadedModel, text: Text | None) -> TokenStream:
    if text is not None:
        return tokenize(text, loaded.tokenizer, args.tokens)
    if args.tokens is None:
        raise ValueError("--text random has no length of its own; give --tokens N")
    return random_tokens(loaded.model.config.vocab_size, args.tokens, args.seed)
