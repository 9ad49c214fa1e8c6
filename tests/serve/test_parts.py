"""The parts of a server by themselves: text as it comes, templates, the scheduler."""

import threading

import pytest
import tiny_model
from serving import SYSTEM, TEMPLATE, user

from sinkstream.serve.errors import APIError
from sinkstream.serve.scheduler import WAITING, Scheduler
from sinkstream.serve.sessions import digests_of, last_turn, new_id, split_head
from sinkstream.serve.template import ChatTemplate
from sinkstream.serve.text import TextStream

# ---- text ----


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_model.tokenizer()


def pieces(tokenizer, text: str, stop=(), ends=()) -> tuple[list[str], TextStream]:
    stream, found = TextStream(tokenizer, stop, ends), []
    for token in tokenizer(text)["input_ids"]:
        found.append(stream.push(token))
        if stream.stopped:
            break
    return [*found, stream.finish()], stream


@pytest.mark.parametrize(
    ("text", "stop", "sent", "tokens"),
    [
        ("abcdef", (), "abcdef", 6),
        ("abcdef", ("cd",), "ab", 2),
        ("abcdef", ("xyz", "ef"), "abcd", 4),
        ("abcabd", ("abd",), "abc", 3),
        ("aaab", ("aab",), "a", 1),
        ("abcd", ("a",), "", 0),
        ("abcd", ("cdx",), "abcd", 4),
    ],
)
def test_nothing_past_a_stop_string_is_sent(tokenizer, text, stop, sent, tokens):
    found, stream = pieces(tokenizer, text, stop)
    assert "".join(found) == stream.text == sent and stream.tokens_within() == tokens
    assert stream.stopped == (sent != text)


def test_text_is_held_back_only_while_a_stop_string_may_come(tokenizer):
    assert pieces(tokenizer, "a.b..c", ("..!",))[0] == ["a", "", ".b", "", "", "..c", ""]
    assert pieces(tokenizer, "ab", ())[0] == ["a", "b", ""]


def test_end_tokens_have_no_text(tokenizer):
    end = tokenizer.convert_tokens_to_ids("|")
    assert "".join(pieces(tokenizer, "ab|", ends=[end])[0]) == "ab"
    assert "".join(pieces(tokenizer, "ab|")[0]) == "ab|"


# ---- templates ----


def template(text: str) -> ChatTemplate:
    found = tiny_model.tokenizer()
    found.chat_template = text
    return ChatTemplate(found)


A = {"role": "assistant", "content": "yes"}
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<s>default\n{% endif %}" + TEMPLATE
MERGED = (  # the system prompt is a part of the first user message
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '|' %}{% set rest = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}[{{ (s if loop.first else '') + m['content'] }}]"
    "{% else %}{{ m['content'] }};{% endif %}{% endfor %}"
)
FORGETFUL = (  # writes only the last reply out
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' }}"
    "{{ m['content'] if m['role'] != 'assistant' or loop.last else '…' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.mark.parametrize(
    ("text", "head", "pinned", "turns"),
    [
        (TEMPLATE, [SYSTEM], "<s>Be brief.\n", ["<u>one\n<a>yes\n", "<u>two\n<a>"]),
        (TEMPLATE, [], "", ["<u>one\n<a>yes\n", "<u>two\n<a>"]),
        (DEFAULT_SYSTEM, [], "<s>default\n", ["<u>one\n<a>yes\n", "<u>two\n<a>"]),
        (MERGED, [SYSTEM], "[Be brief.|", ["one]yes;", "[two]"]),
    ],
)
def test_what_is_pinned_and_where_turns_begin(text, head, pinned, turns):
    found, parts = template(text).opening(head, None, [user("one"), A, user("two")], reply=True)
    assert found == pinned and [p.text for p in parts] == turns and all(p.turn for p in parts)


def test_what_is_new_of_a_conversation_that_goes_on():
    t, before = template(TEMPLATE), [SYSTEM, user("one"), A]
    new = t.continuing(before, None, "<s>Be brief.\n<u>one\n<a>yes", [user("two")], reply=True)
    assert [(p.text, p.turn) for p in new] == [("\n", False), ("<u>two\n<a>", True)]
    written = t.continuing(before, None, "<s>Be brief.\n<u>one\n<a>yes\n", [user("two")], reply=True)
    assert [(p.text, p.turn) for p in written] == [("<u>two\n<a>", True)]
    assert t.continuing(before, None, "<s>Be brief.\n<u>one\n<a>no", [user("two")], reply=True) is None
    resumed = t.resuming([SYSTEM], [user("one"), A], None, [user("two"), A, user("three")], reply=True)
    assert [(p.text, p.turn) for p in resumed] == [("<u>two\n<a>yes\n", True), ("<u>three\n<a>", True)]


def test_a_template_that_writes_earlier_messages_in_another_way_is_seen():
    t = template(FORGETFUL)
    assert t.continuing([user("one"), A], None, "<u>one\n<a>yes", [user("two")], reply=True) is None
    again = t.resuming([], [], None, [user("one"), A, user("two")], reply=True)
    assert "".join(p.text for p in again) == "<u>one\n<a>…\n<u>two\n<a>"


def test_a_template_that_refuses_messages_is_told():
    t = template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(APIError, match="roles must alternate"):
        t.render([user("x")])


def test_digests_tell_conversations_apart():
    messages = [SYSTEM, user("one"), A]
    assert digests_of(messages, None)[:3] == digests_of(messages[:2], None)
    assert len(set(digests_of(messages, None) + digests_of(messages, [{"name": "f"}]))) == 8
    assert split_head(messages) == ([SYSTEM], [user("one"), A]) and last_turn(messages) == [user("one"), A]
    assert len({new_id("sess") for _ in range(100)}) == 100 and len(new_id("sess")) > 32


# ---- the scheduler ----


@pytest.fixture
def scheduler():
    found = Scheduler(3)
    yield found
    found.stop()


def test_jobs_take_turns(scheduler):
    order, done = [], threading.Event()

    def job(name: str, steps: int):
        for _ in range(steps):
            order.append(name)
            yield
        if name == "a":
            done.set()

    for name, steps in (("a", 4), ("b", 2), ("c", 3)):
        scheduler.submit(job(name, steps))
    scheduler.start()
    assert done.wait(30)
    assert "".join(order) == "abcabcaca"


def test_too_many_jobs_and_a_stopped_scheduler_are_refused():
    scheduler = Scheduler(1)
    scheduler.submit(_ for _ in range(10**9))
    with pytest.raises(APIError) as error:
        scheduler.submit(iter(()))
    assert error.value.status == 429 and error.value.headers["Retry-After"]
    scheduler.start()
    scheduler.stop()
    with pytest.raises(APIError) as error:
        scheduler.submit(iter(()))
    assert error.value.status == 503


def test_a_scheduler_that_has_failed_refuses_what_it_cannot_do():
    begun, fails = threading.Event(), threading.Event()

    def step():
        begun.set()
        assert fails.wait(30)
        raise RuntimeError("broken")

    scheduler = Scheduler(4, step=step)
    scheduler.start()
    scheduler.submit(_ for _ in range(10**9))
    assert begun.wait(30)
    waiting = scheduler.call(lambda: 5)
    fails.set()
    with pytest.raises(APIError) as error:
        waiting.result(30)
    assert error.value.status == 503 and not scheduler.counts()["waiting"]
    for ask in (lambda: scheduler.submit(iter(())), lambda: scheduler.call(lambda: 5)):
        with pytest.raises(APIError) as error:
            ask()
        assert error.value.status == 503


def test_a_cancelled_job_is_closed_and_a_failed_one_hurts_nobody(scheduler):
    closed, failed = threading.Event(), threading.Event()

    def endless():
        try:
            while True:
                yield WAITING
        finally:
            closed.set()

    def fails():
        failed.set()
        raise RuntimeError("broken")
        yield

    scheduler.start()
    job = scheduler.submit(endless())
    scheduler.submit(fails())
    assert failed.wait(30) and not closed.is_set()
    job.cancel()
    assert closed.wait(30)
    assert scheduler.call(lambda: 5).result(30) == 5
    with pytest.raises(ZeroDivisionError):
        scheduler.call(lambda: 1 / 0).result(30)


def test_stopping_closes_jobs_first(scheduler):
    order = []

    def endless():
        try:
            while True:
                yield
        finally:
            order.append("closed")

    scheduler.start()
    scheduler.submit(endless())
    scheduler.call(lambda: None).result(30)
    scheduler.submit(endless(), lambda: order.append("dropped"))
    scheduler.stop(lambda: order.append("last"))
    assert order in (["closed", "dropped", "last"], ["closed", "closed", "last"]), "before or after it has begun"
