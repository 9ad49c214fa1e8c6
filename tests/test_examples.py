"""The examples run as a reader runs them: processes of their own, a tiny model on disk, real pipes for stdin."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tiny_model

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}|\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny model without and with a chat template, and a text."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_model.save_model(folder / "plain", "llama")
    tiny_model.save_model(folder / "chat", "llama")
    (folder / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    tiny_model.write_text(folder / "text.txt", 400)
    return folder


def example(name: str, folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess:
    """Run one example to its end in the folder of the models."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, cwd=folder)


def test_every_example_is_run_here():
    source = Path(__file__).read_text(encoding="utf-8")
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(re.findall(r'example\(\s*"(\w+\.py)"', source))


def test_the_chat_goes_on_past_its_cap(folder):
    turns = [f"Turn {number}: say something.\n" for number in range(5)]
    line = ["--model", "chat", "--cap", "96", "--reply-tokens", "20", "--system", "Be brief."]
    chat = example("chat.py", folder, *line, stdin="".join(turns))
    assert chat.returncode == 0, chat.stderr
    counts = [tuple(map(int, found)) for found in re.findall(r"\[(\d+) tokens seen, (\d+) of 96 slots", chat.stdout)]
    assert len(counts) == len(turns)
    seen, kept = zip(*counts)
    first = len("<system>Be brief.|\n<user>Turn 0: say something.|\n<assistant>")
    later = len("|\n<user>Turn 1: say something.|\n<assistant>")
    assert seen[0] <= first + 20 and all(later < b - a <= later + 20 for a, b in pairwise(seen)), "new tokens only"
    assert max(kept) == 96 < seen[-1]


def test_the_chat_refuses_a_model_without_a_template(folder):
    chat = example("chat.py", folder, "--model", "plain", stdin="Hello\n")
    assert chat.returncode == 2 and "--model plain has no chat template" in chat.stderr


def test_the_log_is_read_for_ever_and_each_line_gets_its_surprise(folder):
    lines = ["all is well\n"] * 12 + ["\n", "A disc has failed!\n"]
    log = example("endless_log.py", folder, "--model", "plain", "--cap", "64", stdin="".join(lines))
    assert log.returncode == 0, log.stderr
    shown = [re.match(r" *(\d+\.\d\d) +(\d+\.\d\d) [* ] (.*)$", line) for line in log.stdout.splitlines()]
    assert all(shown) and [found[3] for found in shown] == [line.rstrip() for line in lines]
    assert float(shown[0][1]) == float(shown[0][2]) > 0, "the running mean begins with the first line"
    assert f"{sum(map(len, lines))} tokens seen" in log.stderr
    assert int(re.search(r"(\d+) kept", log.stderr)[1]) <= 64


def test_policies_are_compared_with_intervals(folder):
    line = ["--model", "plain", "--text", "text.txt", "--tokens", "400", "--cap", "80"]
    compared = example("compare_policies.py", folder, *line)
    assert compared.returncode == 0, compared.stderr
    header, *rows = compared.stdout.splitlines()
    assert header.endswith("319 tokens scored, 80 KV slots")
    assert [row.split()[0] for row in rows] == ["strict", "window-only", "lazy", "refresh-uniform"]
    assert rows[0].endswith("control") and all(re.search(r"% against strict \[[+-].* … [+-].*\]", r) for r in rows[1:])


def test_what_left_the_window_comes_back(folder):
    for chooser in ("lexical", "bag-of-vectors"):
        line = ["--model", "plain", "--text", "text.txt", "--tokens", "300", "--cap", "160", "--chooser", chooser]
        recalled = example("recall.py", folder, *line)
        assert recalled.returncode == 0, recalled.stderr
        without, with_recall, *_ = recalled.stdout.splitlines()
        assert without.startswith("recall=None: 160 of 160") and with_recall.startswith(f"recall={chooser}: 160 of 160")


def test_a_scorer_of_ones_own_is_used(folder):
    line = ["--model", "plain", "--text", "text.txt", "--tokens", "200", "--cap", "80"]
    compared = example("new_scorer.py", folder, *line)
    assert compared.returncode == 0, compared.stderr
    rows = [row.split() for row in compared.stdout.splitlines()]
    assert [row[0] for row in rows] == ["uniform", "uncertainty", "fading-surprise"]
    assert len({row[-1] for row in rows}) == 3, "another choice gives another perplexity"
