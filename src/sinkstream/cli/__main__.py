"""``python -m sinkstream.cli``: the same as the ``sinkstream`` command."""

import sys

from sinkstream.cli import main

sys.exit(main())
