"""Why quality breaks after a prune, with evidence: the same as ``sinkstream diagnose``; see its --help."""

import sys

from sinkstream.cli import main

if __name__ == "__main__":
    sys.exit(main(["diagnose", *sys.argv[1:]]))
