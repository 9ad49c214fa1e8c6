"""``sinkstream matrix``."""

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from sinkstream.cli import EXIT_FAILED
from sinkstream.cli.options import add_ray_option, check_with_ray
from sinkstream.cli.show import wide_console
from sinkstream.matrix.file import Matrix, read_matrix
from sinkstream.matrix.measure import Workbench
from sinkstream.matrix.run import Measure, dry_run, one_by_one, run_points, selected
from sinkstream.models.placement import DTYPES
from sinkstream.show.progress import is_live, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.usage = "sinkstream matrix FILE.toml [options]"
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="the points, as docs/matrix.md describes them")
    group = parser.add_argument_group("matrix")
    for kind in ("model", "text"):
        group.add_argument(
            f"--{kind}",
            action="append",
            default=[],
            metavar="[NAME=]PLACE",
            help=f"replaces the file's {kind}, or its {kind} NAME; as for sinkstream eval --{kind}",
        )
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")
    group.add_argument("--dtype", choices=list(DTYPES), help="default: float16 on a GPU, float32 on the CPU")
    group.add_argument(
        "--dry-run", action="store_true", help="list the points, what will fail and the estimated time; measure nothing"
    )
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="WORDS",
        help="only points whose name holds all these words, or an id; several: any of them",
    )
    group.add_argument("--retry-failed", action="store_true", help="measure failed points again")
    add_ray_option(group, "measure points as Ray tasks, one GPU each, on the cluster at ADDRESS")
    group.add_argument(
        "--gpus-per-point", type=float, help="with --ray: GPUs of a point, fractions allowed (default: 1)"
    )
    group.add_argument("--out", type=Path, help="folder of the records (default: out/matrix/ and the file's name)")


def run(args: argparse.Namespace) -> int:
    """Measure the points that have no record yet; list them, and what would fail, with ``--dry-run``."""
    check_with_ray(args, "gpus_per_point")
    console = wide_console()
    matrix = read_matrix(args.file, args.model, args.text, args.device, args.dtype)
    points, out = selected(matrix, args.only), args.out or Path("out/matrix") / args.file.stem
    if args.dry_run:
        return EXIT_FAILED if dry_run(matrix, points, out, console) else 0
    arguments = {name: value for name, value in vars(args).items() if name not in ("run", "argv")}
    measure = _on_ray(args, matrix, out, arguments) if args.ray is not None else None
    bars = console if is_live(console) else Console(quiet=True)  # a file gets one line a point
    bench = Workbench(out, matrix.name, arguments, args.argv, bars)
    measure = measure or one_by_one(matrix, bench)
    counts = run_points(points, out, measure, console, retry_failed=args.retry_failed)
    say(console, ", ".join(f"{number} {status}" for status, number in sorted(counts.items())) + f"; records: {out}")
    return EXIT_FAILED if counts["failed"] else 0


def _on_ray(args: argparse.Namespace, matrix: Matrix, out: Path, arguments: dict[str, Any]) -> Measure:
    from sinkstream.matrix.on_ray import on_ray  # which imports Ray

    gpus = 1.0 if args.gpus_per_point is None else args.gpus_per_point
    return on_ray(matrix, out, arguments, args.argv, args.ray, gpus)
