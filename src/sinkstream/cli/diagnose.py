"""``sinkstream diagnose``."""

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from sinkstream.cli import options
from sinkstream.cli.show import exit_code, wide_console
from sinkstream.evaluation.batch import Batch
from sinkstream.records.records import Record, load_records
from sinkstream.show.progress import say
from sinkstream.studies.diagnosis.run import diagnosis_settings, pair_runs, write_diagnosis_files
from sinkstream.studies.diagnosis.tables import diagnosis_tables

RUNS = "runs"
BESIDE_RECORDS = ("--out", "--seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument(
        "records",
        nargs="*",
        type=Path,
        metavar="RECORD",
        help="diagnose these run records instead of running; only --out and --seed go with them",
    )
    options.add_model_options(parser)
    options.add_policy_options(parser)
    parser.set_defaults(policy="lazy")
    group = parser.add_argument_group("protocol")
    options.add_text(group)
    group.add_argument("--prefill", type=int, help="tokens fed before decoding (default: the cap)")
    group.add_argument("--timed-tokens", type=int, help="tokens timed one by one, the rest in blocks (default: none)")
    options.add_block_tokens(group)
    group.add_argument(
        "--sample-every", type=int, default=64, metavar="K", help="the recompute control scores every k-th token"
    )
    options.add_output(group, "out/diagnosis", "everything that is written")


def run(args: argparse.Namespace) -> int:
    """Run the policies and their controls, or read their records; write the diagnosis."""
    console = wide_console()
    if args.records:
        _check_alone(args)
        return _write(args, _given_records(args.records), None, console)
    protocol = {
        "prefill": args.prefill,
        "block_tokens": options.block_tokens(args),
        "timed_tokens": args.timed_tokens or None,
    }
    policies = options.policy_settings(args, evaluate="steps" if args.timed_tokens else "blocks", **protocol)
    loaded, stream = options.load_model_and_text(args, policies)
    settings = diagnosis_settings(
        policies,
        tokens=len(stream),
        trained_positions=loaded.trained_positions,
        sink=getattr(args, "sink", None),
        sample_every=args.sample_every,
    )
    asked = replace(options.request(args), out=args.out / RUNS)
    records = Batch(loaded, stream, asked).run(settings, console)
    last = records[-1]
    if last.status != "complete":
        say(console, f"{last.label}: {last.status}: {last.status_reason}; --resume continues", "bold red")
        return exit_code(records)
    assert loaded.tokenizer is not None, "`tokenize` has raised ValueError without a tokenizer"
    texts = loaded.tokenizer.batch_decode([[token] for token in stream.ids.tolist()])
    return _write(args, records, texts, console)


def _check_alone(args: argparse.Namespace) -> None:
    """Raise ValueError if an option is given that the records have settled already."""
    unused = options.unused_option(args, BESIDE_RECORDS)
    if unused is not None:
        raise ValueError(
            f"{unused} changes nothing about runs that are records already; accepted together with RECORD:"
            f" {', '.join(BESIDE_RECORDS)}"
        )


def _given_records(paths: list[Path]) -> list[Record]:
    """The run records at the given paths. Raises ValueError if there are none, or as `load_records`."""
    records = load_records(paths)
    if not records:
        raise ValueError(
            f"{', '.join(map(str, paths))}: there are no run records; accepted: records that sinkstream eval or"
            " diagnose wrote, or folders with them"
        )
    return records


def _write(args: argparse.Namespace, records: list[Record], texts: list[str] | None, console: Console) -> int:
    """Diagnose, write all files, print the tables, the verdicts and where the files are."""
    pairs = pair_runs(records)
    with console.status("computing intervals, drawing"):
        diagnosis, notes = write_diagnosis_files(pairs, texts, options.request(args))
    for table in diagnosis_tables(diagnosis):
        console.print(table)
    for line in [*(f"{entry['label']}: {entry['verdict']['line']}" for entry in diagnosis.policies), *notes]:
        say(console, line)
    return 0
