"""A probe takes minutes on a CPU: a log says how far it is."""

import io

from rich.console import Console

from sinkstream.cli.probe_heads import told


def test_a_log_has_a_line_for_every_fifth():
    console = Console(file=io.StringIO(), force_terminal=False)
    with console.status("probing") as status:
        tell = told(console, status)
        for done in [*range(256, 9_984, 256), 10_000]:
            tell(done, 10_000)
    lines = console.file.getvalue().split("\n")
    assert lines[0] == "probing: 2,048 of 10,000 tokens" and lines[4] == "probing: 10,000 of 10,000 tokens"
    assert len(lines) == 6 and not lines[5]
