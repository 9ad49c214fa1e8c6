"""``python -m sinkstream``: the same as the ``sinkstream`` command."""

import sys

from sinkstream.cli import main

sys.exit(main())
