"""``sinkstream report``."""

import argparse
from pathlib import Path

from sinkstream.cli import EXIT_FAILED
from sinkstream.cli.show import wide_console
from sinkstream.records.files import write_atomically
from sinkstream.records.pairs import PAIRS_FILE, Pairs
from sinkstream.show.progress import say

CRITERIA_HELP = "criteria whose verdicts the page shows (default: experiments/criteria.toml beside RECORDS, if there)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("records", type=Path, nargs="?", help="folder of records for the page of -o")
    parser.add_argument("-o", "--output", type=Path, help="write one self-contained HTML page of RECORDS, nothing else")
    parser.add_argument("--criteria", type=Path, help=CRITERIA_HELP)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the records")
    parser.add_argument("--docs", type=Path, nargs="*", default=[], help="Markdown files with generated tables")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document is out of date")


def run(args: argparse.Namespace) -> int:
    """Write the page, or write (or check) summary and tables."""
    # slow to import, as torch is
    from sinkstream.records.records import check_holds_records
    from sinkstream.report.docs import generated_names, update_document
    from sinkstream.report.documents import render_tables
    from sinkstream.report.summary import summary_is_current, write_summary

    if args.output is not None:
        return _page(args)
    for name in ("records", "criteria"):
        if getattr(args, name) is not None:
            raise ValueError(f"{name} {getattr(args, name)} is for the page; accepted: with -o PAGE.html")
    wanted = {path: generated_names(path) for path in args.docs}  # a document that cannot be read costs no time then
    console, pairs = wide_console(), Pairs.load(args.results)
    if not args.check:
        check_holds_records(args.results)
        summary = write_summary(args.results, pairs)
        console.print(f"{summary.path}: {len(summary.headlines)} headline figures")
        for key, why in summary.missing.items():
            console.print(f"  {key} is missing: {why}")
    stale, tables = [], render_tables(args.results, pairs)
    for path, names in wanted.items():
        sections = {name: _table(tables, name, path) for name in names}
        stale += [f"{path}: {name}" for name in update_document(path, sections, check=args.check)]
    if args.check:
        check_holds_records(args.results)
    if args.check and not summary_is_current(args.results, pairs):
        stale.append(f"{args.results}: summary.json")
    path = args.results / PAIRS_FILE
    if pairs.used and not (path.is_file() and path.read_text(encoding="utf-8") == pairs.text()):
        stale.append(str(path))
        if not args.check:
            write_atomically(path, pairs.text())
    for name in stale:
        console.print(f"{name} {'is out of date; run sinkstream report' if args.check else 'written'}")
    return EXIT_FAILED if args.check and stale else 0


def _page(args: argparse.Namespace) -> int:
    """Write the page of a folder."""
    from sinkstream.report.evidence import CRITERIA
    from sinkstream.report.page.build import write_page  # which needs the libraries of the extra `report`

    if args.docs or args.check:
        raise ValueError("-o writes the page and nothing else; accepted: without --docs and --check")
    folder = args.results if args.records is None else args.records
    beside = folder.resolve().parent / CRITERIA
    size = write_page(folder, args.output, args.criteria or (beside if beside.is_file() else None))
    say(wide_console(), f"{args.output}: {size / 1e6:.2f} MB")
    return 0


def _table(tables: dict[str, str], name: str, path: Path) -> str:
    if name not in tables:
        raise ValueError(f"{path}: table {name!r} is not known; accepted: {', '.join(tables) or 'none yet'}")
    return tables[name]
