"""Recall in a chat: turns that were evicted are read again before a question that has their words, exactly."""

import pytest
from openai import BadRequestError, InternalServerError
from serving import SYSTEM, Alone, client_of, loaded, make_service, opened, served, user
from tiny_model import tokenizer

from sinkstream.serve.lanes import Lane
from sinkstream.serve.recall import Recall
from sinkstream.serve.sessions import ForgottenTurn, Session, Turn
from sinkstream.serve.settings import ServeSettings

CAP, SLOTS = 160, 48
FACT, QUESTION = "my cat is called Zephyr", "how is my CAT called?"
OTHERS = ["one two three four five", "red green blue yellow", "monday and tuesday", "bread, butter, jam", "x y z w"]


@pytest.fixture(scope="module")
def model():
    return loaded()


def service(model, **settings):
    return make_service(model, cap=CAP, recall="lexical", recall_slots=SLOTS, **settings)


def say(client, session: str, text: str, **more):
    return client.chat.completions.create(
        model="tiny-llama", messages=[user(text)], temperature=0, max_tokens=6, logit_bias=Alone.bias,
        extra_body={"session_id": session}, **more,
    )  # fmt: skip


class Told(Alone):
    """The engine alone, which is told by hand what is read again."""

    def ask(self, text: str, *earlier: str) -> str:
        self._feed(self._left)
        self.engine.begin_turn()
        for turn in earlier:
            self._feed(turn)
        self._feed(f"<u>{text}\n<a>")
        return self.engine.generate([], max_new_tokens=6, logit_bias=self.bias).text


def talked(client, model) -> tuple[str, Told, str]:
    """A session that has forgotten the fact, the same by the engine, and the fact's turn as the stream held it."""
    session, alone = opened(client), Told(model, cap=CAP)
    turn = ""
    for text in [FACT, *OTHERS]:
        reply = alone.say(text, 6)
        turn = turn or f"<u>{text}\n<a>{reply}\n"
        answer = say(client, session, text)
        assert answer.choices[0].message.content == reply and not answer.usage.context["recalled"]
    return session, alone, turn


def told_turns(model) -> list[tuple[str, str]]:
    """Messages and replies of `talked`."""
    alone = Told(model, cap=CAP)
    return [(text, alone.say(text, 6)) for text in [FACT, *OTHERS]]


def test_a_question_is_answered_behind_the_turn_that_it_names(model, tmp_path):
    with served(service(model, spill=tmp_path)) as address:
        client = client_of(address)
        session, alone, turn = talked(client, model)
        fork = client.post(f"/sessions/{session}/fork", cast_to=object)["id"]
        answer = say(client, fork, QUESTION)
        context = answer.usage.context
        assert context["recalled"] == [{"turn": 1, "tokens": len(turn), "text": FACT}]
        expected = alone.ask(QUESTION, turn)
        assert answer.choices[0].message.content == expected and context["kept"] <= CAP
        assert context["kept"] == alone.engine.stats()["kept"]
        assert not say(client, fork, QUESTION).usage.context["recalled"], "what is there already is not read again"
        counted = f'sinkstream_tokens_total{{kind="recalled"}} {float(len(turn))}'
        assert counted in client.get("../metrics", cast_to=str)
    with served(service(model, spill=tmp_path)) as address:
        client = client_of(address)
        fork = client.post(f"/sessions/{session}/fork", cast_to=object)["id"]
        assert say(client, fork, QUESTION).choices[0].message.content == expected, "after a restart"
        client.post(f"/sessions/{fork}/undo", cast_to=object)
        view = client.get(f"/sessions/{session}", cast_to=object)
        assert view["recallable"]["turns"] == view["turns"]["evicted"] > 1
    with served(make_service(model, cap=CAP, spill=tmp_path)) as address:
        answer = say(client_of(address), session, QUESTION)
        assert answer.choices[0].message.content != expected, "control: without recall"
        assert not answer.usage.context["recalled"]


def test_a_stream_tells_what_comes_back_before_the_reply_and_a_client_may_send_everything_again(model):
    with served(service(model)) as address:
        client = client_of(address)
        messages = [SYSTEM]
        for text in [FACT, *OTHERS]:
            messages += [user(text), {"role": "assistant", "content": "ok"}]
        events = list(
            client.chat.completions.create(
                model="tiny-llama", messages=[*messages, user(QUESTION)], temperature=0, max_tokens=6, stream=True
            )
        )
        contexts = [(i, event.context) for i, event in enumerate(events) if getattr(event, "context", None)]
        first_text = next(i for i, event in enumerate(events) if event.choices and event.choices[0].delta.content)
        assert contexts[0][0] < first_text
        assert [turn["turn"] for turn in contexts[0][1]["recalled"]] == [1] and contexts[0][1]["kept"] <= CAP


PINNED = "x is 3"


class Repinned(Told):
    """The engine alone, which is told by hand which turns were held when a text was pinned."""

    def __init__(self, model, turns: list[str]):
        super().__init__(model, system=f"{SYSTEM['content']}\n{PINNED}", cap=CAP)
        for turn in turns:
            self.engine.begin_turn()
            self._feed(turn)


def test_a_pinned_text_leaves_what_may_be_recalled(model, monkeypatch):
    with served(service(model)) as address:
        client = client_of(address)
        session, _, fact = talked(client, model)
        before = client.get(f"/sessions/{session}", cast_to=object)
        held = before["turns"]["seen"] - before["turns"]["evicted"]
        fork = client.post(f"/sessions/{session}/fork", cast_to=object)["id"]
        after = client.post(f"/sessions/{session}/pin", body={"text": PINNED}, cast_to=object)
        assert after["recallable"]["turns"] >= before["recallable"]["turns"] > 1
        assert after["turns"]["seen"] == before["turns"]["seen"]
        assert after["tokens"]["evicted"] >= before["tokens"]["evicted"]
        answer = say(client, session, QUESTION)
        assert [turn["turn"] for turn in answer.usage.context["recalled"]] == [1]
        turns = [f"<u>{text}\n<a>{reply}\n" for text, reply in told_turns(model)[-held:]]
        turns[-1] = turns[-1].removesuffix("\n")
        alone = Repinned(model, turns)
        alone._left = "\n"
        assert answer.choices[0].message.content == alone.ask(QUESTION, fact)
        # what cannot be pinned, and what fails, leaves the session as it was
        with pytest.raises(BadRequestError, match=f"accepted: at most {CAP // 2} of the {CAP} slots"):
            client.post(f"/sessions/{fork}/pin", body={"text": "x" * CAP}, cast_to=object)
        again = client.post(f"/sessions/{fork}/fork", cast_to=object)["id"]
        begin_turn, calls = Lane.begin_turn, []

        def failing(lane, *place):
            calls.append(lane)
            if len(calls) == 2:
                raise RuntimeError("out of memory")
            begin_turn(lane, *place)

        monkeypatch.setattr(Lane, "begin_turn", failing)
        with pytest.raises(InternalServerError):
            client.post(f"/sessions/{fork}/pin", body={"text": PINNED}, cast_to=object)
        monkeypatch.undo()
        assert client.get(f"/sessions/{fork}", cast_to=object)["turns"] == before["turns"]
        expected = say(client, again, QUESTION)
        assert say(client, fork, QUESTION).choices[0].message.content == expected.choices[0].message.content


def test_a_text_is_pinned_before_the_first_turn_and_not_where_messages_find_the_session(model):
    with served(service(model)) as address:
        client = client_of(address)
        session = client.post("/sessions", body={}, cast_to=object)["id"]
        assert client.post(f"/sessions/{session}/pin", body={"text": "x"}, cast_to=object)["tokens"]["pinned"] == len(
            "<s>x\n"
        )
        other = opened(client, "x")
        replies = {say(client, one, FACT).choices[0].message.content for one in (session, other)}
        assert len(replies) == 1, "as if it had begun with it"
        found = client.chat.completions.create(model="tiny-llama", messages=[user("x")], max_tokens=2).usage
        with pytest.raises(BadRequestError, match="that its client knows by an id"):
            client.post(f"/sessions/{found.context['session']}/pin", body={"text": "x"}, cast_to=object)


# ---- which turns ----


def turn(number: int, text: str, start: int = 0) -> Turn:
    return Turn(start, "", "", [], None, number=number, text=text, ids=tokenizer()(text)["input_ids"])


def session_of(*texts: str) -> Session:
    return Session("me", archive=[ForgottenTurn.of(turn(i, text)) for i, text in enumerate(texts, 1)])


def chosen(session: Session, question: str, slots: int = 100, leaving=()) -> list[int]:
    return [found.number for found in Recall(tokenizer(), slots).choose(session, question, leaving)]


def test_turns_come_back_whole_and_in_order_within_the_slots():
    others = [f"something {word}" for word in ("red", "small", "old", "dear", "far", "new", "wet", "dry", "hot")]
    session = session_of("the blue whale", "an orange lamp", "a green pear", "the lamp is on the table", *others)
    assert chosen(session, "lamp and whale") == [1, 2, 4]
    assert chosen(session, "LAMP!", slots=30) == [4], "the latest of equal ones"
    assert chosen(session, "LAMP!", slots=20) == [2], "a turn that has no room stays where it is"
    assert chosen(session, "lamp", slots=3) == [] == chosen(session, "completely different")
    session.turns = [turn(14, "lamp?")]
    session.turns[0].recalled = [4]
    assert chosen(session, "lamp") == [2], "what is held is not read again"


def test_a_common_word_says_nothing():
    texts = [f"the colour number{i} of many" for i in range(20)]
    session = session_of(*texts)
    assert chosen(session, "which colour of the many?") == []
    assert chosen(session, "which colour has number7?") == [8]


def test_a_turn_that_the_question_pushes_out_counts_as_gone():
    session, leaving = session_of("a pear"), [turn(2, "the lamp is blue", start=30)]
    session.turns = [*leaving, turn(3, "something", start=50)]
    assert chosen(session, "lamp?") == [] and chosen(session, "lamp?", leaving=leaving) == [2]


def test_what_may_be_recalled_is_bounded():
    session = Session("me", turns=[turn(i, "x" * 10, start=10 * i) for i in range(1, 9)], turns_seen=8)
    session.forget_evicted(75, 9, 100)
    assert not session.archive and len(session.turns) == 1, "turns longer than the slots are not kept"
    session.turns = [turn(i, "x" * 10, start=10 * i) for i in range(1, 9)]
    session.forget_evicted(75, 10, 35)
    assert [t.number for t in session.archive] == [5, 6, 7] and session.archive[0].ids == turn(5, "x" * 10).ids
    assert Session.of(session.record()).archive == session.archive and len(session.archive[0]) == 10


@pytest.mark.parametrize("cleared", [False, True])
def test_a_prompt_that_breaks_off_leaves_what_it_pushed_out_to_be_recalled(model, monkeypatch, cleared):
    """A long prompt fails: the turn before it is out of the window, or the engine has cleared the stream."""
    with served(service(model)) as address:
        client = client_of(address)
        session = opened(client)
        say(client, session, FACT)
        prefill, fed = Lane.prefill, []

        def failing(lane, ids):
            fed.append(len(ids))
            if sum(fed) > 2 * CAP:
                if cleared:
                    lane.reset(lane.sink)
                raise RuntimeError("out of memory")
            prefill(lane, ids)

        monkeypatch.setattr(Lane, "prefill", failing)
        with pytest.raises(InternalServerError):
            say(client, session, "x" * 3 * CAP)
        monkeypatch.undo()
        view = client.get(f"/sessions/{session}", cast_to=object)
        assert view["turns"] == {"seen": 1, "evicted": 1} and view["recallable"]["turns"] == 1
        assert say(client, session, QUESTION).usage.context["recalled"][0]["text"] == FACT


def test_more_slots_than_half_the_cap_are_refused():
    with pytest.raises(ValueError, match="recall_slots=33 is not accepted; accepted: at most 32"):
        ServeSettings(cap=64, recall_slots=33)
    assert ServeSettings(cap=64).recalled == 16 and ServeSettings(cap=64, recall="none").recalled == 0
