"""``sinkstream probe-heads``."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.status import Status

from sinkstream.cli import options
from sinkstream.cli.show import wide_console
from sinkstream.data import ShortTextError, load_text, tokenize
from sinkstream.evaluation.probe_heads import probe_heads
from sinkstream.evaluation.runner import check_file_writable
from sinkstream.records.files import write_atomically
from sinkstream.show.progress import is_live, say

TOKENS = 16_000  # of ordinary text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.usage = "sinkstream probe-heads [MODEL] [options]"
    parser.add_argument("probed", nargs="?", metavar="MODEL", help="as --model")
    options.add_model_options(parser)
    group = parser.add_argument_group("probe")
    options.add_text(group, tokens=False)
    group.add_argument("--out", type=Path, default=Path("heads.json"), help="the file, for recall_heads=FILE")


def told(console: Console, status: Status) -> Callable[[int, int], None]:
    """How far the probe is, as its callback: what turns on a terminal, and in a file a line for every fifth."""
    fifths = 0

    def tell(done: int, total: int) -> None:
        nonlocal fifths
        line = f"probing: {done:,} of {total:,} tokens"
        status.update(line)
        if not is_live(console) and 5 * done // total > fifths:
            fifths = 5 * done // total
            say(console, line)

    return tell


def run(args: argparse.Namespace) -> int:
    """Probe, print what was found, write the file."""
    console, default = wide_console(), "builtin"
    if args.probed is not None and args.model not in (default, args.probed):
        raise ValueError(f"MODEL {args.probed} and --model {args.model} exclude each other; give one of them")
    args.model = args.probed or args.model
    check_file_writable(args.out)
    options.check_tokenizer(args.model, "for a text")
    text = load_text(args.text)
    loaded = options.load_given_model(args)
    try:
        ids = tokenize(text, loaded.tokenizer, TOKENS).ids.tolist()
    except ShortTextError as error:
        accepted = f"a text of at least {TOKENS:,} tokens"
        raise ValueError(f"--text {args.text}: {error.reason}; accepted: {accepted}") from None
    with console.status("probing") as status:
        found = probe_heads(loaded, ids, args.seed, told(console, status))
    write_atomically(args.out, json.dumps(found | {"text": text.name, "seed": args.seed}, indent=2) + "\n")
    names = ", ".join(f"{layer}.{head}" for layer, head in found["heads"])
    console.print(
        f"{loaded.name}: heads {names} (layer.kv_head) find {found['passages_found']:.0%} of the passages and"
        f" {found['facts_found']:.0%} of the facts; levels {found['level']} and {found['row_level']} (in a row)."
        f" Written: {args.out}"
    )
    return 0
