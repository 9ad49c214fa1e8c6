"""The chat in the terminal: with a local engine and with a server, the same conversation; every command."""

import io
import json
import re
from types import MappingProxyType

import pytest
import tiny_model
from rich.console import Console
from serving import CAP, SYSTEM, TEMPLATE, Alone, client_of, loaded, make_service, served

from sinkstream.cli import main
from sinkstream.serve.talk import LocalTalk, RemoteTalk, TalkError
from sinkstream.serve.terminal import HELP, Terminal, bar

SYSTEM_TEXT = SYSTEM["content"]
#: A template that writes the system prompt into the first user message.
IN_FIRST_MESSAGE = (
    "{% set system = messages[0]['content'] + '\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}"
    "{{ '<' + m['role'][0] + '>' + (system if loop.first else '') + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


class Plain(Alone):
    """Without a bias, which the chat does not set."""

    bias = MappingProxyType({})


@pytest.fixture(scope="module")
def model():
    return loaded()


@pytest.fixture(params=["local", "remote"])
def talk(request, model, tmp_path):
    if request.param == "local":
        found = LocalTalk(make_service(model, spill=tmp_path), SYSTEM_TEXT)
        yield found
        found.close()
        assert not list(tmp_path.glob("sess_*")), "nothing of a chat is left that was not saved"
        return
    with served(make_service(model)) as address:
        found = RemoteTalk(f"{address}/v1", None, "none", SYSTEM_TEXT, tmp_path)
        found.options["temperature"] = 0.0
        yield found
        found.close()


def chat(talk, *lines: str) -> str:
    out = io.StringIO()
    Terminal(talk, Console(file=out, width=200)).run(iter(lines))
    return out.getvalue()


def says(alone: Alone, text: str) -> str:
    return alone.say(text).replace("<unk>", "")


def test_a_conversation_and_its_figures(talk, model):
    alone = Plain(model)
    out = chat(talk, *["Hello you", "And then what?", "x"] * 2, "/quit", "never sent")
    for text in ["Hello you", "And then what?", "x"] * 2:
        assert says(alone, text) in out
    assert "TTFT" in out and "tok/s" in out and f"/{CAP}" in out and "never sent" not in out
    assert out.count("forgotten from now on") == 1


def test_what_was_recalled_is_named(model):
    talk = LocalTalk(make_service(model, cap=160, recall="lexical", recall_slots=48, max_tokens=6), SYSTEM_TEXT)
    try:
        out = chat(talk, "my cat is called Zephyr", *["one two three four", "red green blue yellow"] * 3, "my CAT?")
    finally:
        talk.close()
    assert out.count("recalled turn 1: my cat is called Zephyr") == 1


def test_turns_are_taken_back_and_written_anew(talk, model):
    alone = Plain(model)
    expected = [says(alone, "one"), says(alone, "two")]
    out = chat(talk, "one", "a mistake", "/undo", "two", "/regen")
    assert expected[0] in out and out.count(expected[1]) == 2, "greedy: written anew, the same"
    assert "taken back" in out
    assert "error" in chat(talk, "/undo", "/undo", "/undo")


def test_every_reply_that_is_written_anew_has_a_seed_of_its_own(talk, monkeypatch):
    seeds: list[int | None] = []
    monkeypatch.setattr(talk, "reply", lambda text: iter([str(seeds.append(talk.options.get("seed")))]))
    monkeypatch.setattr(talk, "undo", lambda: None)
    chat(talk, "one", "/regen", "/regen")
    assert seeds == [None, 1, 2] and "seed" not in talk.options
    talk.options["seed"] = 5
    chat(talk, "two", "/regen", "/regen", "three", "/regen")
    assert seeds[3:] == [5, 6, 7, 5, 6] and talk.options["seed"] == 5


def test_a_conversation_that_is_loaded_has_its_own_system_prompt(talk):
    chat(talk, "one", "/save first", "/system Another one.", "two", "/load first")
    assert talk.system == SYSTEM_TEXT
    chat(talk, "/pin x is 3", "three")
    assert talk.system == f"{SYSTEM_TEXT}\nx is 3"


def test_a_pinned_text_is_never_evicted_and_the_turns_that_are_there_stay(talk, model):
    talk.options["max_tokens"] = 8
    chat(talk, "one", "two", "/pin x is 3")
    assert talk.system == f"{SYSTEM_TEXT}\nx is 3"
    out = chat(talk, "three")
    pinned = talk.context["pinned"]
    assert pinned == len(f"<s>{SYSTEM_TEXT}\nx is 3\n")
    chat(talk, *["and more of it"] * 4)
    assert talk.context["pinned"] == pinned and talk.context["evicted"] > 0
    assert "error" not in out
    assert "nothing to pin" in chat(talk, "/pin")


def test_what_was_evicted_is_recalled_behind_a_pinned_text(model, tmp_path):
    """Saved, loaded and pinned: the turn of the fact is still there to be recalled."""
    settings = {"cap": 160, "recall": "lexical", "recall_slots": 48, "max_tokens": 6, "spill": tmp_path}
    talk = LocalTalk(make_service(model, **settings), SYSTEM_TEXT)
    lines = ["my cat is called Zephyr", *["one two three four", "red green blue yellow"] * 3]
    try:
        out = chat(talk, *lines, "/save a", "/reset", "/load a", "/pin x is 3", "my CAT?")
        assert "error" not in out and out.count("recalled turn 1: my cat is called Zephyr") == 1
        assert talk.context["evicted_turns"] > 4 and talk.context["pinned"] == len(f"<s>{SYSTEM_TEXT}\nx is 3\n")
        assert "my CAT?" not in chat(talk, "/undo", "/pin " + "long " * 40, "/stats") and "x is 3" in talk.system
    finally:
        talk.close()


@pytest.mark.parametrize(
    ("template", "system"), [(TEMPLATE, "Be brief."), (IN_FIRST_MESSAGE, "Be brief."), (IN_FIRST_MESSAGE, None)]
)
def test_turns_behind_a_pinned_text_are_those_of_a_conversation_that_began_with_it(template, system):
    model = loaded(template=template)
    talk = LocalTalk(make_service(model, cap=256), system)
    try:
        said = [list(talk.say(text)) for text in ("one", "two")]
        talk.pin("x is 3")
        messages = [{"role": "system", "content": f"{system}\nx is 3" if system else "x is 3"}]
        for text, pieces in zip(("one", "two"), said):
            messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(pieces)}]
        pinned, context = "".join(talk.say("three")), talk.context
    finally:
        talk.close()
    with served(make_service(model, cap=256)) as address:
        given = [*messages, {"role": "user", "content": "three"}]
        answer = client_of(address).chat.completions.create(model="tiny-llama", messages=given, temperature=0)
    assert pinned == answer.choices[0].message.content
    assert context["pinned"] == answer.usage.context["pinned"] > len("x is 3")


def test_a_conversation_is_saved_and_loaded(talk, model):
    alone = Plain(model)
    says(alone, "one")
    expected = says(alone, "two")
    out = chat(talk, "one", "/save my-chat", "/reset", "something else", "/load my-chat", "two")
    assert "pinned" in chat(talk, "/pin x") and talk.system == f"{SYSTEM_TEXT}\nx"
    assert expected in out and "'my-chat'" in out
    assert "error: " in chat(talk, "/load nothing") and "error: " in chat(talk, "/save ../x")


def test_system_options_and_stats(talk, model):
    alone = Plain(model, "Be long.")
    out = chat(talk, "x", "/system Be long.", "/set max_tokens 5", "one", "/stats", "/set", "/set max_tokens")
    assert alone.say("one", 5) + "\n" in out and "max_tokens" in out
    assert "max_tokens" not in talk.options
    told = dict(re.findall(r"^  (\w+) +(\w+)$", out, re.MULTILINE))
    assert (told["kept"], told["evicted"]) == ("27", "0") and int(told["pinned"]) == 12, "the new conversation's"
    assert told.get("turns") == "1" or told["messages"] == "3", "a talk of our own counts turns, a server's messages"


def test_mistakes_are_told_and_the_chat_goes_on(talk):
    out = chat(talk, "/dance", "/set colour red", "/set seed x", "/regen", "/help", "/set temperature -1", "hi")
    assert out.count("error:") == 5 and all(name in out for name in HELP)
    assert "/dance is no command" in out and "colour" in out and "a whole number" in out


def test_no_server_is_told(tmp_path):
    with pytest.raises(TalkError, match="lists no model"):
        RemoteTalk("http://127.0.0.1:9/v1", None, "none", None, tmp_path)


@pytest.mark.parametrize(
    ("pinned", "kept", "shown"), [(0, 0, "[|····]"), (1, 4, "[█|█··]"), (2, 8, "[█|███]"), (4, 8, "[██|██]")]
)
def test_the_bar_shows_pinned_kept_and_free_slots(pinned, kept, shown):
    assert bar(pinned, kept, 8, 4).plain == shown


def test_the_command_talks_to_a_local_model(tmp_path, monkeypatch, capsys):
    folder = tiny_model.save_model(tmp_path / "model", "llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    monkeypatch.setenv("SINKSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/stats\n"))
    arguments = ["--model", str(folder), "--cap", str(CAP), "--max-tokens", "12", "--device", "cpu"]
    assert main(["chat", *arguments, "--system", SYSTEM_TEXT]) == 0
    out = capsys.readouterr().out
    assert says(Plain(loaded()), "one") in out and "evicted turns" in out
