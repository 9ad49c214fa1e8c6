"""``sinkstream verdict``."""

import argparse
import difflib
from pathlib import Path

from sinkstream.cli import EXIT_FAILED
from sinkstream.cli.show import wide_console
from sinkstream.records.files import write_atomically
from sinkstream.show.progress import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--criteria", type=Path, default=Path("experiments/criteria.toml"), help="file of the criteria")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records")
    parser.add_argument("--ledger", type=Path, default=Path("docs/LEDGER.md"), help="page of the verdicts")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a record contradicts the page")


def run(args: argparse.Namespace) -> int:
    """Write (or check) the ledger."""
    # slow to import, as torch is
    from sinkstream.records.records import check_holds_records
    from sinkstream.report.ledger import counts, read_ledger

    console = wide_console()
    page, found = read_ledger(args.criteria, args.results)
    check_holds_records(args.results)
    before = args.ledger.read_text(encoding="utf-8") if args.ledger.is_file() else ""
    if args.check:
        differing = [
            line for line in difflib.unified_diff(before.splitlines(), page.splitlines(), lineterm="", n=0)
            if line[:1] in "+-" and line[:3] not in ("+++", "---")
        ]  # fmt: skip
        for line in differing:
            say(console, f"{'records say' if line[0] == '+' else 'printed'}: {line[1:]}")
        if differing:
            say(console, f"{args.ledger}: contradicted by the records; run sinkstream verdict")
        return EXIT_FAILED if differing else 0
    if page != before:
        write_atomically(args.ledger, page)
    state = "written" if page != before else "as it was"
    say(console, f"{args.ledger} {state}: " + ", ".join(f"{number} {name}" for name, number in counts(found).items()))
    return 0
