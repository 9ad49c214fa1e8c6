"""The examples run as a reader runs them: processes of their own, a tiny model on disk, real pipes for stdin.

One of them starts a fresh interpreter, the others fork one that has imported the package (`processes`).
"""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import processes
import pytest
import tiny_model
from serving import client_of, make_service, served

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


def example(
    name: str, folder: Path, *arguments: str, stdin: str = "", fresh: bool = False
) -> subprocess.CompletedProcess:
    """Run one example to its end in the folder of the models."""
    if not fresh:
        return processes.run(EXAMPLES / name, *arguments, cwd=folder, stdin=stdin)
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
    chat = example("chat.py", folder, "--model", "plain", stdin="Hello\n", fresh=True)
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


def test_a_digest_names_the_most_surprising_lines(folder):
    lines = ["all is well\n"] * 9 + ["A disc has failed!\n"]
    log = example("endless_log.py", folder, "--model", "plain", "--digest", "5", stdin="".join(lines))
    assert log.returncode == 0, log.stderr
    shown = log.stdout.splitlines()
    heads = [i for i, line in enumerate(shown) if line.startswith("# 5 lines")]
    surprises = [float(line.split()[0]) for line in shown if not line.startswith("#")]
    digests = [[float(line.split()[1]) for line in shown[i + 1 : i + 4]] for i in heads]
    assert digests == [sorted(surprises[:5], reverse=True)[:3], sorted(surprises[5:], reverse=True)[:3]]


def test_a_conversation_is_saved_and_goes_on(folder):
    line = ["--model", "chat", "--cap", "96", "--reply-tokens", "8"]
    texts = ["One.\n", "Two.\n"]
    whole = example("save_conversation.py", folder, "whole.safetensors", *line, stdin="".join(texts))
    assert whole.returncode == 0, whole.stderr
    pieces = [example("save_conversation.py", folder, "parts.safetensors", *line, stdin=text) for text in texts]
    said = [[row for row in run.stdout.split("\n") if not row.startswith("[")] for run in (whole, *pieces)]
    assert [row for rows in said[1:] for row in rows if row] == [row for row in said[0] if row]
    assert re.search(r"\[\d+ tokens seen before\]", pieces[1].stdout)


def test_the_official_client_talks_in_a_session(folder):
    with served(make_service()) as address:
        line = ["--url", f"{address}/v1", "--reply-tokens", "8", "--system", "Be brief."]
        talk = example("openai_client.py", folder, *line, stdin="One.\nTwo.\n" * 4)
        assert talk.returncode == 0, talk.stderr
        assert client_of(address).get("/sessions", cast_to=object)["data"] == [], "the session is closed"
    places = re.findall(r"\[(\d+) sent, (\d+) reused, (\d+) turns evicted\]", talk.stdout)
    assert len(places) == 8 and int(places[-1][2]) > 0
    later = len("\n<u>Two.\n<a>")
    assert {int(sent) for sent, _, _ in places[1:]} <= {later, later - 1}, "new tokens only"


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
        assert without.startswith("recall=None: 160 of 160")
        held = re.match(f"recall={chooser}: ([0-9]+) of 160", with_recall)
        assert held and 120 <= int(held[1]) <= 160, "the window grows again behind a frame that was emptied"


def test_a_sentence_encoder_chooses_what_comes_back(folder):
    tiny_model.save_model(folder / "encoder", "llama")  # what it says means nothing, but all of the way to it is real
    padded = tiny_model.tokenizer()
    padded.pad_token = padded.convert_ids_to_tokens(0)
    padded.save_pretrained(folder / "encoder")
    line = ["encoder", "eval", "--model", "plain", "--text", "text.txt", "--tokens", "300", "--cap", "120"]
    run = example("embedding_recall.py", folder, *line, "--policy", "strict,strict:recall=encoder:recall_level=0.01")
    assert run.returncode == 0, run.stderr
    ppl = [float(found) for found in re.findall(r"PPL ([0-9.]+)", run.stdout)]
    assert len(ppl) == 2 and ppl[0] != ppl[1], f"what came back changed nothing: {run.stdout}"
    wrong = example("embedding_recall.py", folder, *line, "--policy", "strict:recall=encoding")
    assert wrong.returncode == 2 and "union, encoder" in wrong.stderr, "the registry knows the example's chooser"
    nowhere = example("embedding_recall.py", folder, "nowhere", "eval")
    assert nowhere.returncode == 2 and "encoder 'nowhere' is not accepted" in nowhere.stderr


def test_a_scorer_of_ones_own_is_used(folder):
    line = ["--model", "plain", "--text", "text.txt", "--tokens", "200", "--cap", "80"]
    compared = example("new_scorer.py", folder, *line)
    assert compared.returncode == 0, compared.stderr
    rows = [row.split() for row in compared.stdout.splitlines()]
    assert [row[0] for row in rows] == ["uniform", "uncertainty", "fading-surprise"]
    assert len({row[-1] for row in rows}) == 3, "another choice gives another perplexity"
