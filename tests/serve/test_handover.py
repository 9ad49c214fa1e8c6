"""From the scheduler's thread to a client's socket: one wake-up a round, and text that came together in one event."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from serving import SYSTEM, client_of, loaded, make_service, served, user

from sinkstream.serve.completions import Chat, Text
from sinkstream.serve.events import Context, Ended, Failed, Started, TextPiece, TokenLogprob
from sinkstream.serve.listen import Listener
from sinkstream.serve.planning import Call
from sinkstream.serve.post import Post
from sinkstream.serve.service import CANCELLED
from sinkstream.serve.sse import sse
from sinkstream.serve.token_texts import TokenText
from sinkstream.serve.tools import tool_format

Z = TokenText("z", b"z")
HERMES = "{{ tools }} <tool_call>"


class Told:
    """A service that keeps what it is to tell: the test tells it."""

    def __init__(self):
        self.post, self.emits, self.cancelled = Post(), [], 0

    def submit(self, call: Call, emit):
        self.emits.append(emit)
        return SimpleNamespace(cancel=self._cancel)

    def _cancel(self) -> None:
        self.cancelled += 1


def counted(loop, monkeypatch) -> list[int]:
    """The wake-ups of a loop from other threads."""
    calls, wake = [], loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: calls.append(1) or wake(*given))
    return calls


def heard(monkeypatch, told, *, whole: bool = False) -> tuple[list[list], int, int]:
    """What each of two requests hears; the wake-ups and cancellations. `told` are the events of each round."""

    async def run():
        service = Told()
        listeners = [Listener(service, [Call("me")], whole=whole) for _ in range(2)]
        calls, found = counted(asyncio.get_running_loop(), monkeypatch), [[], []]

        async def listen(i: int) -> None:
            async for events in listeners[i].events():
                found[i].append(events)

        tasks = [asyncio.create_task(listen(i)) for i in range(2)]
        await asyncio.sleep(0)
        for events in told:
            for emit in service.emits:
                for event in events:
                    emit(event)
            service.post.deliver()
            service.post.deliver()  # nothing is told twice
            for _ in range(4):
                await asyncio.sleep(0)
        for task in tasks:
            await task
        return found, len(calls), service.cancelled

    return asyncio.run(run())


ROUNDS = [
    [Started("s"), TextPiece(0, "a"), TextPiece(0, "b"), TextPiece(1, "x")],
    [TextPiece(1, "y"), TextPiece(1, "z", (TokenLogprob(Z, -1.0),)), Ended(1, "stop")],
    [Failed(CANCELLED)],
]


def test_a_round_wakes_the_loop_once_for_all_requests(monkeypatch):
    found, wakes, cancelled = heard(monkeypatch, ROUNDS)
    expected = [
        [Started("s"), TextPiece(0, "ab"), TextPiece(1, "x")],
        [TextPiece(1, "yz", (TokenLogprob(Z, -1.0),)), Ended(1, "stop")],
        [Failed(CANCELLED)],
    ]
    assert found == [expected, expected]
    assert wakes == len(ROUNDS) and cancelled == 2


def test_text_of_a_whole_reply_wakes_nobody(monkeypatch):
    rounds = [[Started("s")], *([TextPiece(0, letter)] for letter in "abc"), [Failed(CANCELLED)]]
    found, wakes, _ = heard(monkeypatch, rounds, whole=True)
    assert found[0] == [[Started("s")], [TextPiece(0, "abc"), Failed(CANCELLED)]] and wakes == 2


def test_who_only_begins_is_told_after_the_prompts_of_the_round(monkeypatch):
    """A response that begins takes this thread's time; text that others wait for is told before a prompt is fed."""

    async def run() -> list[int]:
        service, found = Told(), []
        listener = Listener(service, [Call("me")])
        calls = counted(asyncio.get_running_loop(), monkeypatch)
        context = Context("s", 1, 0, 0, 0, 1, 1, 96)
        for event in (Started("s"), context, TextPiece(0, "a"), context):
            service.emits[0](event)
            service.post.deliver_urgent()
            found.append(len(calls))
        service.post.deliver()
        listener.cancel()
        return [*found, len(calls)]

    assert asyncio.run(run()) == [0, 0, 1, 1, 2]


def test_a_loop_that_has_ended_hears_nothing():
    post, loop = Post(), asyncio.new_event_loop()
    loop.close()
    post.add(loop, lambda: pytest.fail("nobody listens"))
    post.deliver()


@pytest.mark.parametrize("text", ["plain", '"quoted"\n\\ and {braces}', "grüße \u2028 \x00 🎉", ""])
@pytest.mark.parametrize("kind", [Chat, Text])
def test_events_of_text_are_what_json_would_write(kind, text):
    """The first one tells the role, and those behind it are filled into one that was written beforehand."""
    one, other = kind("id", "model"), kind("id", "model")
    other.created = one.created
    for index, logprobs in (
        (0, ()),
        (0, ()),
        (1, ()),
        (0, (TokenLogprob(Z, -0.5, ((Z, -0.5),)),)),
        (0, ()),
        (1, ()),
    ):
        written = one.text(TextPiece(index, text, logprobs))
        assert written == sse(other.chunk([other.piece(index, text, logprobs, None)]))
        event, end = written.split(b"\n\n")
        assert not end and json.loads(event.removeprefix(b"data: "))["choices"][0]["index"] == index


def test_text_that_may_be_a_call_is_not_filled_in():
    chat = Chat("id", "model", tool_format(HERMES))
    written = [chat.text(TextPiece(0, text)) for text in ("say ", "<tool", "_call> x")]
    assert b"say" in written[0] and b"<tool" not in b"".join(written)


def test_a_turn_is_fed_in_one_piece(monkeypatch):
    """The end of the last turn and the beginning of the next one are one forward; the reply is that of the engine."""
    service = make_service(loaded())
    fed, prefill = [], type(service.lanes[0]).prefill
    monkeypatch.setattr(type(service.lanes[0]), "prefill", lambda self, ids: fed.append(len(ids)) or prefill(self, ids))
    with served(service) as address:
        client = client_of(address)
        messages = [SYSTEM]
        for text in ("one", "two", "three"):
            messages.append(user(text))
            answer = client.chat.completions.create(model="tiny-llama", messages=messages, max_tokens=5, temperature=0)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            assert answer.usage.context["sent"] == fed[-1]
    assert len(fed) == 3
