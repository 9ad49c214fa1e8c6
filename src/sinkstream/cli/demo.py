"""``sinkstream demo``."""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console

from sinkstream.cli import options
from sinkstream.cli.show import exit_code, show_runs, wide_console
from sinkstream.data import TokenStream, load_text, tokenize
from sinkstream.evaluation.batch import Batch
from sinkstream.evaluation.demo import CAP, FULL_FITS, SAMPLE_EVERY, TIMED_TOKENS, TITLE, TOKENS, demo_settings
from sinkstream.evaluation.demo_plan import (
    SECONDS,
    Plan,
    Size,
    Speed,
    check_choice,
    choose,
    measure_speed,
    size_of_records,
    tokens_measured,
)
from sinkstream.evaluation.runner import check_writable
from sinkstream.measure.numerics import set_numerics
from sinkstream.models import LoadedModel, load_model
from sinkstream.show.comparison import RowLines
from sinkstream.show.progress import say

TALK = "Talk to this model: sinkstream chat. For other programs, behind the OpenAI API: sinkstream serve"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=float, default=SECONDS, help="time for the runs; the speed of the machine says how much fits"
    )
    length.add_argument("--tokens", type=int, help=f"tokens of the built-in text, however long it takes ({TOKENS})")
    parser.add_argument("--cap", type=int, default=CAP, help="KV slots of every method")
    every = f"recompute scores every k-th token ({SAMPLE_EVERY}, or what fits --seconds)"
    parser.add_argument("--sample-every", type=int, help=every)
    options.add_output(parser, "out/demo")


def run(args: argparse.Namespace) -> int:
    """Run the demo on the CPU in float32, so that it gives the same figures everywhere."""
    console = wide_console()
    set_numerics(tf32=False, cudnn_attention=False)
    demo_settings(args.cap, SAMPLE_EVERY if args.sample_every is None else args.sample_every)
    if args.tokens is None:
        check_choice(args.seconds, args.cap)
    check_writable(args.out)
    loaded = load_model("builtin", dtype=torch.float32, device="cpu")
    streams = partial(tokenize, load_text("builtin"), loaded.tokenizer)
    size, plan = _size(args, loaded, streams, console)
    args.tokens, args.sample_every = size.tokens, size.sample_every
    settings = size.settings(args.cap)
    batch = Batch(loaded, streams(size.tokens), options.request(args))
    lines = RowLines([one.label() for one in settings], console.width)
    late = (lambda records: plan.is_late([r.summary["total_sec"] for r in records])) if plan else None
    records = batch.run(settings, console, lines.line, late)
    if len(records) < len(settings) and exit_code(records) == 0:
        left_out = ", ".join(one.label() for one in settings[len(records) :])
        say(console, f"The machine became slower. Left out: {left_out}. The same command with --resume runs them.")
    code = show_runs(records, console, args.out, f"{TITLE}, {args.tokens} tokens, cap {args.cap}")
    say(console, TALK)
    return code


def _size(
    args: argparse.Namespace, loaded: LoadedModel, streams: Callable[[int], TokenStream], console: Console
) -> tuple[Size, Plan | None]:
    """The size that was asked for, that of a demo that is resumed, or one that fits the time; prints which.

    There is a plan only in the last case.
    """
    if args.tokens is not None:
        size = Size(args.tokens, SAMPLE_EVERY if args.sample_every is None else args.sample_every)
        if args.tokens > FULL_FITS:
            say(
                console,
                f"The control is strict: a full cache of {args.tokens:,} tokens goes past the {FULL_FITS:,} positions"
                f" that the model was trained on. With --tokens {FULL_FITS} or fewer it takes part as the control.",
            )
        return size, None
    found = size_of_records(args.out, loaded, streams, args.cap, args.sample_every) if args.resume else None
    if found:
        say(console, f"Resuming: {found.tokens:,} tokens, as in the records of {args.out}.")
        return found, None
    speed = measure_speed(loaded, streams(tokens_measured(args.cap)).ids, args.cap)
    plan = choose(speed, args.seconds, args.cap, args.sample_every)
    say(console, plan_message(speed, plan, args.cap))
    return plan.size, plan


def plan_message(speed: Speed, plan: Plan, cap: int) -> str:
    """The speed, what was chosen and what that leaves out, in one line."""
    size, whole = plan.size, Size()
    pieces = (
        f"{1e3 * speed.step:.0f} ms per step, {speed.block:.2f} s per block, {speed.window:.2f} s per recomputed window"
    )
    fits = "which fits" if plan.fits else "the least there is, which does not fit"
    seconds = f"about {sum(plan.expected):.0f} s, {fits} --seconds {plan.seconds:g}"
    chosen = f"Measured: {pieces}. {size.tokens:,} tokens take {seconds}."
    cut = [
        f"{now:,} of {all_of_it:,} {what}"
        for now, all_of_it, what in (
            (size.tokens, whole.tokens, "tokens"),
            (size.windows(cap), whole.windows(cap), "recomputed windows"),
            (size.timed_tokens or TIMED_TOKENS, TIMED_TOKENS, "timed tokens a run"),
        )
        if now < all_of_it
    ]
    if not cut:
        return f"{chosen} Nothing is cut."
    return f"{chosen} Cut to {', '.join(cut)}. All of it, about {plan.whole_seconds:.0f} s: --tokens {whole.tokens}"
