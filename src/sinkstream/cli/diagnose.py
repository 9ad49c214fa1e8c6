"""``sinkstream diagnose``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sinkstream.cli import COMMANDS
from sinkstream.cli.eval import exit_code, request
from sinkstream.cli.options import (
    add_block_tokens,
    add_model_options,
    add_output,
    add_policy_options,
    add_text,
    block_tokens,
    load_given_model,
    run_settings,
)
from sinkstream.cli.show import wide_console
from sinkstream.data import load_text, tokenize
from sinkstream.evaluation.batch import Batch
from sinkstream.records.records import Record, load_records
from sinkstream.studies.diagnosis.record import Diagnosis
from sinkstream.studies.diagnosis.run import diagnosis_settings, pair_runs, write_diagnosis_files
from sinkstream.studies.diagnosis.tables import diagnosis_tables

RUNS = "runs"
BESIDE_RECORDS = ("--out", "--seed")


@COMMANDS.register("diagnose")
class Diagnose:
    """Show why a policy's quality differs from strict streaming's: spikes, drift, attribution, verdict."""

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add the options of this command."""
        parser.add_argument(
            "records",
            nargs="*",
            type=Path,
            metavar="RECORD",
            help="diagnose these run records instead of running; only --out and --seed go with them",
        )
        add_model_options(parser)
        add_policy_options(parser)
        parser.set_defaults(policy="lazy")
        group = parser.add_argument_group("protocol")
        add_text(group)
        group.add_argument("--prefill", type=int, help="tokens fed before decoding (default: the cap)")
        group.add_argument(
            "--timed-tokens", type=int, help="tokens timed one by one, the rest in blocks (default: none)"
        )
        add_block_tokens(group)
        group.add_argument(
            "--sample-every",
            type=int,
            default=64,
            metavar="K",
            help="the recompute control scores every k-th token",
        )
        add_output(group, "out/diagnosis", "everything that is written")

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Run the policies and their controls, or read their records; write the diagnosis."""
        console = wide_console()
        if args.records:
            _check_alone(args.argv)
            return _write(args, _given_records(args.records), None, console)
        timing = (
            {"evaluate": "steps", "timed_tokens": args.timed_tokens} if args.timed_tokens else {"evaluate": "blocks"}
        )
        protocol = {"prefill": args.prefill, "block_tokens": block_tokens(args), **timing}
        policies = [run_settings(args, method, options, **protocol) for method, options in args.policy]
        text = load_text(args.text)
        loaded = load_given_model(args)
        stream = tokenize(text, loaded.tokenizer, args.tokens)
        settings = diagnosis_settings(
            policies,
            tokens=len(stream),
            trained_positions=loaded.trained_positions,
            sink=getattr(args, "sink", None),
            sample_every=args.sample_every,
        )
        records = Batch(loaded, stream, request(args, out=args.out / RUNS)).run(settings, console)
        if records[-1].status != "complete":
            told = f"{records[-1].policy['label']}: {records[-1].status}: {records[-1].status_reason}"
            console.print(f"{told}; --resume continues", style="bold red", markup=False, highlight=False)
            return exit_code(records)
        assert loaded.tokenizer is not None, "`tokenize` has raised ValueError without a tokenizer"
        texts = loaded.tokenizer.batch_decode([[token] for token in stream.ids.tolist()])
        return _write(args, records, texts, console)


def _check_alone(argv: Sequence[str]) -> None:
    """Raise ValueError if an option is given that the records have settled already."""
    given = [word.partition("=")[0] for word in argv if word.startswith("--")]
    unused = [option for option in given if option not in BESIDE_RECORDS]
    if unused:
        raise ValueError(
            f"{unused[0]} changes nothing about runs that are records already; accepted together with RECORD:"
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
    """Diagnose, write all files, print the table and the verdicts."""
    pairs = pair_runs(records)
    with console.status("computing intervals, drawing"):
        diagnosis, notes = write_diagnosis_files(pairs, texts, request(args))
    _show(diagnosis, console)
    for note in notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    return 0


def _show(diagnosis: Diagnosis, console: Console) -> None:
    for table in diagnosis_tables(diagnosis):
        console.print(table)
    for entry in diagnosis.policies:
        console.print(f"{entry['label']}: {entry['verdict']['line']}", markup=False, highlight=False, soft_wrap=True)
