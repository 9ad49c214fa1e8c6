"""Continuous batching: sessions join and leave between two steps, and each reply is that of the session alone."""

import threading
from itertools import pairwise

import pytest
from serving import BIAS, CAP, SYSTEM, Alone, client_of, loaded, make_service, served, user

from sinkstream.engine.sampling import Sampler
from sinkstream.serve.events import Done, Failed, TextPiece
from sinkstream.serve.planning import Call
from sinkstream.serve.reply import ReplyOptions
from sinkstream.serve.scheduler import STEP, Scheduler

SYSTEMS = ["a", "Be brief.", "You are a ship that sails, and knows it", "x y z w", "no"]
TURNS = [("Hello you", 9), ("And then what?", 31), ("Tell me about 12 foxes, please, and of what they eat", 17)]


@pytest.fixture(scope="module")
def model():
    return loaded()


class Told:
    """What a call tells."""

    def __init__(self):
        self.events, self.ended = [], threading.Event()

    def __call__(self, event) -> None:
        self.events.append(event)
        if isinstance(event, (Done, Failed)):
            self.ended.set()

    @property
    def text(self) -> str:
        assert self.ended.wait(60) and isinstance(self.events[-1], Done), self.events
        return self.events[-1].texts[0]


def ask(service, messages: list[dict], tokens: int, **more) -> Told:
    told = Told()
    options = ReplyOptions(sampler=Sampler(logit_bias=BIAS, **more), max_tokens=tokens)
    told.job = service.submit(Call("me", tuple(messages), reply=options), told)
    return told


def counted(service, monkeypatch) -> list[int]:
    """How many sessions each step was for."""
    widths, step = [], service.lanes.batch.step

    def counting(streams, meanwhile):
        widths.append(len(streams))
        return step(streams, meanwhile)

    monkeypatch.setattr(service.lanes.batch, "step", counting)
    return widths


def test_every_reply_is_that_of_the_session_alone(model, monkeypatch):
    """Five sessions with system prompts of five lengths in three lanes: some wait, some are spilled meanwhile."""
    service = make_service(model, resident=3)
    widths = counted(service, monkeypatch)
    service.start()
    try:
        talks = [([{"role": "system", "content": system}], Alone(model, system)) for system in SYSTEMS]
        for text, tokens in TURNS:
            told = []
            for i, (messages, _) in enumerate(talks):
                messages.append(user(text + str(i)))
                told.append(ask(service, messages, tokens + 3 * i))
            for i, (messages, alone) in enumerate(talks):
                assert told[i].text == alone.say(text + str(i), tokens + 3 * i)
                messages.append({"role": "assistant", "content": told[i].text})
    finally:
        service.stop()
    whole = sum(tokens + 3 * i for _, tokens in TURNS for i in range(len(talks)))
    assert sum(widths) == whole and max(widths) == 3 and len(widths) < 0.6 * whole


def test_a_client_that_goes_away_frees_its_step(model, monkeypatch):
    service = make_service(model, resident=2)
    widths = counted(service, monkeypatch)
    service.start()
    try:
        leaving = ask(service, [SYSTEM, user("for ever")], 5000)
        staying = ask(service, [SYSTEM, user("a while")], 60)
        while not any(isinstance(event, TextPiece) for event in leaving.events):
            leaving.ended.wait(0.001)
        leaving.job.cancel()
        assert leaving.ended.wait(60) and isinstance(leaving.events[-1], Failed)
        assert staying.text == Alone(model).say("a while", 60)
        assert not service.lanes.batch.members and sum(widths) < 1000
    finally:
        service.stop()


def test_a_step_that_fails_is_told_to_all_that_took_part(model, monkeypatch):
    service = make_service(model, resident=2)
    step = service.lanes.batch.step
    service.start()
    try:
        first = ask(service, [SYSTEM, user("one")], 4)
        assert first.text

        def fail(streams, meanwhile):
            raise RuntimeError("out of luck")

        monkeypatch.setattr(service.lanes.batch, "step", fail)
        told = [ask(service, [SYSTEM, user(text)], 12) for text in ("two", "three")]
        assert all(one.ended.wait(60) and one.events[-1].error.status == 500 for one in told)
        monkeypatch.setattr(service.lanes.batch, "step", step)
        assert ask(service, [SYSTEM, user("four")], 12).text == Alone(model).say("four")
    finally:
        service.stop()


def test_draws_and_log_probabilities_do_not_depend_on_the_others(model):
    """Through the API, at the same time: the same seeds give the same replies as one after the other."""

    def reply(client, i: int) -> tuple:
        answer = client.chat.completions.create(
            model="tiny-llama", messages=[{"role": "system", "content": SYSTEMS[i]}, user(f"say {i}")], seed=i,
            temperature=1.0, top_p=(None, 0.7)[i % 2], max_tokens=25, logprobs=i > 1, top_logprobs=i if i > 1 else None,
        )  # fmt: skip
        choice = answer.choices[0]
        found = choice.logprobs.content if choice.logprobs else []
        return choice.message.content, [len(one.top_logprobs) for one in found], [one.logprob for one in found]

    def replies(together: bool) -> dict[int, tuple]:
        found: dict[int, tuple] = {}
        with served(make_service(model, resident=4)) as address:
            client = client_of(address)
            threads = [threading.Thread(target=lambda i=i: found.update({i: reply(client, i)})) for i in range(4)]
            for thread in threads:
                thread.start()
                if not together:
                    thread.join()
            for thread in threads:
                thread.join()
        return found

    found = [replies(True), replies(False)]
    for i in range(4):
        assert found[0][i][:2] == found[1][i][:2]
        assert found[0][i][2] == pytest.approx(found[1][i][2], abs=1e-3)
        assert found[0][i][1] == ([i] * 25 if i > 1 else [])


def test_a_long_prompt_holds_others_up_for_one_chunk_a_round(model, monkeypatch):
    service = make_service(model, resident=2)
    service.conversations.prefill_tokens = 8
    order, step, lane = [], service.lanes.batch.step, type(service.lanes[0])
    prefill = lane.prefill
    monkeypatch.setattr(service.lanes.batch, "step", lambda *given: order.append("step") or step(*given))
    monkeypatch.setattr(lane, "prefill", lambda self, ids: order.append("chunk") or prefill(self, ids))
    service.start()
    try:
        writing = ask(service, [SYSTEM, user("a")], 200)
        while "step" not in order:
            writing.ended.wait(0.001)
        long = ask(service, [SYSTEM, user("word " * 100)], 3)
        assert long.text is not None and writing.text == Alone(model).say("a", 200)
    finally:
        service.stop()
    chunks = [i for i, what in enumerate(order) if what == "chunk"]
    late = [i for i in chunks if i > order.index("step")]
    assert len(late) > 40 and max(b - a for a, b in pairwise(late)) == 2, "a step follows each chunk"


def test_the_step_comes_once_a_round_after_all_jobs():
    order, ended = [], threading.Event()

    def job(name: str, units: int):
        for _ in range(units):
            order.append(name)
            yield STEP
        if name == "b":
            ended.set()

    scheduler = Scheduler(9, step=lambda: order.append("|"))
    for name, units in (("a", 2), ("b", 3)):
        scheduler.submit(job(name, units))
    scheduler.start()
    assert ended.wait(20)
    scheduler.stop()
    assert "".join(order).startswith("ab|ab|b|")


def test_a_server_takes_the_memory_of_all_lanes_at_the_start(model, monkeypatch):
    monkeypatch.setattr("sinkstream.engine.memory.free_bytes", lambda device: 10**6)
    with pytest.raises(ValueError, match=r"3000 streams of 96 slots need .* accepted: fewer streams"):
        make_service(model, resident=3000)
    monkeypatch.undo()
    service = make_service(model, resident=3, cap=CAP)
    assert service.residence.bytes == service.lanes.decoder.state.bytes > 0


@pytest.mark.parametrize(("words", "units"), [(1, [STEP]), (40, [None, None, STEP])])
def test_a_reply_begins_with_the_step_of_its_prompts_last_chunk(model, monkeypatch, words, units):
    """Others have their turn between two chunks only."""
    service = make_service(model, resident=1)
    monkeypatch.setattr(service.conversations, "prefill_tokens", 100)
    call = Call("me", (SYSTEM, user("many " * words)), reply=ReplyOptions(max_tokens=2))
    work = service.conversations.run(call, lambda event: None)
    assert [next(work) for _ in units] == units
    work.close()


def test_a_session_goes_on_as_asked_once_when_a_request_for_several_choices_is_cancelled(model):
    """Choices are written last one first: what was written of another choice is no part of the session."""
    service = make_service(model, resident=1)
    service.start()
    try:
        told, first = Told(), [SYSTEM, user("one")]
        options = ReplyOptions(sampler=Sampler(logit_bias=BIAS), max_tokens=5000, choices=2)
        job = service.submit(Call("me", tuple(first), reply=options), told)
        while not any(isinstance(event, TextPiece) for event in told.events):
            told.ended.wait(0.001)
        job.cancel()
        assert told.ended.wait(60) and told.events[-1].error.code == "cancelled"
        assert ask(service, first, 12).text == Alone(model).say("one")
        assert len(service.store.sessions) == 1, "the same session, asked again"
    finally:
        service.stop()
