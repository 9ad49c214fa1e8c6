"""Make an environment for each rival: ``python scripts/rivals/environments.py [NAME ...] [--into .rivals]``.

Every environment is a venv with the pinned release of torch; kvpress needs a release of transformers that sinkstream
does not run on, so none of them can be this project's own. An environment that is there is left alone.
"""

import argparse
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

from catalogue import ENVIRONMENTS, WITH_TORCH

CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"


def main() -> int:
    """Make the environments; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--into", type=Path, default=Path(".rivals"), help="folder of the environments")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"unknown environment {unknown[0]!r}; accepted: {', '.join(ENVIRONMENTS)}")
    failed = 0
    for name in args.names or ENVIRONMENTS:
        folder = args.into / name
        if (folder / "bin" / "python").exists():
            print(f"{name}: {folder} is there")
            continue
        failed += not make(name, folder)
    return min(failed, 1)


def make(name: str, folder: Path) -> bool:
    """Make one environment; a failed one is removed."""
    print(f"{name}: making {folder}", flush=True)
    venv.create(folder, with_pip=True)
    wanted = [*ENVIRONMENTS[name], *([_pinned_torch()] if name in WITH_TORCH else [])]
    done = subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", *wanted], check=False)
    if done.returncode:
        print(f"{name}: pip failed", file=sys.stderr)
        shutil.rmtree(folder)
    return not done.returncode


def _pinned_torch() -> str:
    return re.findall(r"^torch==\S+", CONSTRAINTS.read_text(encoding="utf-8"), flags=re.MULTILINE)[0]


if __name__ == "__main__":
    raise SystemExit(main())
