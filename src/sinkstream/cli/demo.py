"""``sinkstream demo``."""

import argparse

import torch

from sinkstream.cli import COMMANDS
from sinkstream.cli.eval import exit_code
from sinkstream.cli.options import add_output, all_arguments
from sinkstream.cli.show import draw_nll, show_records, wide_console
from sinkstream.data import load_text, tokenize
from sinkstream.evaluation.numerics import set_numerics
from sinkstream.experiments.batch import Batch
from sinkstream.experiments.demo import CAP, FULL_FITS, SAMPLE_EVERY, TITLE, TOKENS, demo_settings
from sinkstream.models import load_model


@COMMANDS.register("demo")
class Demo:
    """Compare all kinds of policy on a small real model, offline, in minutes."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options of this command."""
        parser.add_argument("--tokens", type=int, default=TOKENS, help="tokens of the built-in text")
        parser.add_argument("--cap", type=int, default=CAP, help="KV slots of every method")
        parser.add_argument("--sample-every", type=int, default=SAMPLE_EVERY, help="recompute scores every k-th token")
        add_output(parser, "out/demo")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Run the demo on the CPU in float32, so that it gives the same figures everywhere."""
        console = wide_console()
        set_numerics(tf32=False, cudnn_attention=False)
        settings = demo_settings(args.cap, args.sample_every, args.tokens)
        if args.tokens > FULL_FITS:
            console.print(
                f"The control is strict: a full cache of {args.tokens:,} tokens goes past the {FULL_FITS:,} positions"
                f" that the model was trained on. With --tokens {FULL_FITS} or fewer it takes part as the control.",
                highlight=False,
            )
        loaded = load_model("builtin", dtype=torch.float32, device="cpu")
        stream = tokenize(load_text("builtin"), loaded.tokenizer, args.tokens)
        batch = Batch(loaded, stream, args.out, all_arguments(args), args.argv, 0, args.resume)
        records = batch.run(settings, console)
        title = f"{TITLE}, {args.tokens} tokens, cap {args.cap}"
        show_records(records, console, title)
        draw_nll(records, args.out, console, title)
        return exit_code(records)
