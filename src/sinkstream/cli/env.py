"""``sinkstream env``."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: the GPU if there is one)")


def run(args: argparse.Namespace) -> int:
    """Print the environment."""
    from sinkstream.measure.environment import environment, format_environment  # slow to import, as torch is
    from sinkstream.models import resolve_device

    print(format_environment(environment(resolve_device(args.device))))
    return 0
