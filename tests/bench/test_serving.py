"""``bench --serve``: a server under load is timed, recorded, tabled, and gives the headline figures."""

import io
import json
from contextlib import suppress
from dataclasses import replace

import pytest
from record_factory import make_serve_record
from rich.console import Console
from serving import client_of, loaded, make_service, served

from sinkstream.bench.serving import recalling, soak
from sinkstream.bench.serving.client import Plan, begun
from sinkstream.bench.serving.hosting import converse, shares, with_tokenizer
from sinkstream.bench.serving.records import ServeRecord
from sinkstream.bench.serving.served import Load
from sinkstream.bench.serving.session import ServingSession, turn_figures
from sinkstream.bench.serving.tables import SERVE_HEADLINES, render_serve, serve_table, sessions_table
from sinkstream.cli import main
from sinkstream.evaluation.runner import Request
from sinkstream.models import load_model, resolve_dtype
from sinkstream.report.summary import write_summary
from sinkstream.show.table import NONE_YET

CAP = 64


def session(folder, *, resume: bool = False, **load) -> ServingSession:
    given = {"turns": 12, "reply": 3, "tokens": 4, "cap": CAP, "seconds": 3, "users": 3} | load
    loaded = with_tokenizer(load_model("random:pythia-14m", dtype=resolve_dtype("float32", "cpu"), device="cpu"))
    return ServingSession(loaded, "ring", Load(**given), Request(folder, {}, ["bench"], 0, resume), "s", True)


def console() -> Console:
    return Console(file=io.StringIO())


def a_turn(turn: int, *, first: float, last: float, tokens: int = 5, status: int = 200) -> dict:
    context = {"sent": 8, "reused": 3, "pinned": 4, "kept": 9, "cap": CAP, "evicted": 0, "evicted_turns": 0}
    usage = {"completion_tokens": tokens, "context": context}
    return {"turn": turn, "status": status, "begin": 0.0, "first": first, "last": last, "usage": usage}


@pytest.mark.slow
def test_turns_and_overhead_are_timed_recorded_and_resumed(tmp_path):
    turns, overhead = session(tmp_path).run(["turns", "overhead"], console())
    assert [turns, overhead] == ServeRecord.below(tmp_path)
    figures = turns.figures
    assert figures["turns"] == 12 and figures["errors"] == figures["length_errors"] == 0
    assert figures["context"]["evicted_turns"] > 0 and figures["context"]["kept"] <= CAP
    assert min(figures["tpot_ms"]["first"], figures["ttft_ms"]["late"], figures["rss_mb"]["last"]) > 0
    assert len(overhead.figures["server_ms"]) == overhead.figures["rounds"]
    shown = serve_table([turns, overhead]).markdown()
    assert "12 turns in one session" in shown and "over `Engine.generate`" in shown
    assert session(tmp_path, resume=True).run(["turns"], console()) == [turns]


@pytest.mark.slow
def test_a_soak_compares_every_reply_and_leaves_nothing(tmp_path):
    (record,) = session(tmp_path).run(["soak"], console())
    figures = record.figures
    assert figures["unexpected_5xx"] == figures["wrongly_answered"] == figures["differing"] == 0
    assert figures["compared"] > 0 and figures["leaked_sessions"] == figures["leaked_files"] == 0
    assert figures["requests"] >= figures["compared"] and figures["generator"].startswith("locust")


@pytest.mark.slow
def test_sessions_of_a_killed_server_go_on(tmp_path, monkeypatch):
    module = "sinkstream.bench.serving.session"
    for name, value in {"RESTART_SESSIONS": 3, "RESTART_TURNS": 2, "NEXT_TOKENS": 24}.items():
        monkeypatch.setattr(f"{module}.{name}", value)
    (record,) = session(tmp_path).run(["restart"], console())
    figures = record.figures
    assert figures["spilled"] == figures["continued"] == figures["same"] == figures["sessions"] == 3
    assert figures["turns_lost"] <= 1, "the one that was answered a moment before, whose file was being written"


def test_facts_are_told_evicted_and_asked_for(tmp_path, monkeypatch):
    """Statements that share rare words with their question are found; a message that shares none finds nothing."""
    facts = [f for f in recalling.FACTS if any(word in f.statement for word in ("Priscilla", "Kittiwake"))]
    unrelated = {kind: texts[:1] for kind, texts in recalling.UNRELATED.items()}
    for name, value in {"FACTS": facts, "UNRELATED": unrelated, "TALK_TURNS": 9, "TALK_TOKENS": 2}.items():
        monkeypatch.setattr(recalling, name, value)
    given = {"cap": 400, "talks": 1}
    session = ServingSession(loaded(), "ring", Load(12, 3, 4, **given), Request(tmp_path, {}, ["bench"], 0, False), "s")
    (record,) = session.run(["recall"], console())
    found = record.figures["facts"]["named"]
    assert found["asked"] == found["evicted"] == found["found"] == 2
    assert found["right"] == {"recall": 0, "none": 0, "whole": 0}, "random weights"
    assert sum(kind["asked"] for kind in record.figures["unrelated"].values()) == 4
    assert len(record.figures["rows"]) == 8


def test_a_reply_that_differs_is_counted(tmp_path):
    """The control: one word of one reply is another."""
    service = make_service()
    user = [{"kind": "open", "status": 201, "expected": True, "session": "s", "system": "Be brief."}]
    with served(service) as address:
        client, head = client_of(address), {"messages": [{"role": "system", "content": "Be brief."}]}
        opened = client.post("/sessions", body=head, cast_to=object)
        for text in ("one", "two"):
            body = {
                "model": service.loaded.name,
                "messages": [{"role": "user", "content": text}],
                "session_id": opened["id"],
                "max_tokens": 4,
                "temperature": 0,
                "ignore_eos": True,
            }
            answer = client.post("/chat/completions", body=body, cast_to=object)
            context = answer["usage"]["context"]
            told = {"reply": answer["choices"][0]["message"]["content"], "text": text, "tokens": 4}
            place = {"sent": context["sent"], "reused": context["reused"]}
            user.append({"kind": "turn", "status": 200, "expected": True, **told, **place})
        compared = soak.compare(address, service.loaded.name, [user], lambda done: None)
        assert compared == (2, 0) and len(soak.comparable(user)) == 2
        assert soak.compare(address, service.loaded.name, [user], lambda done: None, seconds=0) == (0, 0)
        user[-1]["reply"] += "!"
        assert soak.compare(address, service.loaded.name, [user], lambda done: None) == (2, 1)


def test_what_a_broken_turn_has_written_is_told_by_the_next_one():
    turns = [
        {"kind": "turn", "tokens": 5, "sent": 10, "reused": 4},
        {"kind": "broken", "tokens": 200, "sent": 7, "reused": 19},
        {"kind": "turn", "tokens": 3, "sent": 6, "reused": 30},
        {"kind": "broken", "tokens": 200, "sent": 6, "reused": 39},
    ]
    assert soak.written_tokens(turns) == [5, 4, 3, None]
    events = [{"kind": "look", "status": 200}, *(turn | {"status": 200} for turn in turns)]
    assert [tokens for _, tokens in soak.comparable(events)] == [5, 4, 3], "the last one is not known"


def test_answers_are_counted_by_what_was_expected():
    def event(kind: str, status: int, expected: bool, **more) -> dict:
        return {"kind": kind, "status": status, "expected": expected, "tokens": 4, **more}

    events = [event("turn", 200, True), event("malformed", 400, True), event("malformed", 200, False)]
    events += [event("turn", 500, False), event("turn", 429, False), event("gone", 0, True)]
    events += [event("turn", 200, True, error={"message": "the server failed"})]
    figures = soak.soak_figures([events])
    assert figures["requests"] == 7 and figures["unexpected_5xx"] == 2 and figures["wrongly_answered"] == 1
    assert figures["disconnects"] == 1 and figures["refused_as_expected"] == figures["replies"] == 1


def test_early_and_late_turns_are_told_apart():
    """A planted slope: the last turns take twice as long a token, and three times to the first."""
    turns = [a_turn(i, first=0.1, last=0.5) for i in range(20)] + [a_turn(i, first=0.3, last=1.1) for i in range(20)]
    figures = turn_figures(turns, 5)
    assert figures["tpot_ms"]["ratio"] == pytest.approx(2) and figures["ttft_ms"]["ratio"] == pytest.approx(3)
    assert figures["errors"] == 0
    broken = turn_figures([*turns, {"status": 400}], 5)
    assert broken["errors"] == broken["length_errors"] == 1
    with pytest.raises(OSError, match="a turn was not answered: no template"):
        turn_figures([turns[0], {"status": 400, "body": "no template"}], 5)


def test_the_first_text_of_a_stream_is_found():
    role = b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n'
    assert not begun(role) and begun(role + b'data: {"choices": [{"delta": {"content": "w"}}]}\n')
    assert not begun(role + b'data: {"choices": [{"delta": {"content": "')


def test_headlines_of_speed_are_those_of_a_gpu(tmp_path):
    for device, ratio in (("cpu", 1.09), ("cuda", 1.03)):
        part = {"tpot_ms": {"turns": 100, "first": 10.0, "last": 10 * ratio, "ratio": ratio}}
        ServeRecord.write(make_serve_record(f"turns-{device}", "turns", device=device, **part), tmp_path)
        ServeRecord.write(
            make_serve_record(f"overhead-{device}", "overhead", device=device, over_engine=ratio - 1), tmp_path
        )
    ServeRecord.write(make_serve_record("soak", "soak"), tmp_path)
    headlines = write_summary(tmp_path).headlines
    assert headlines["serve.thousand_turn_tpot_ratio"] == {"value": 1.03, "record": "turns-cuda", "on": "Test GPU"}
    assert headlines["serve.overhead_over_engine"]["value"] == pytest.approx(0.03)
    assert headlines["serve.soak_requests"] == {"value": 1200, "record": "soak", "on": "Test GPU"}
    assert headlines["serve.replies_differing"]["value"] == 0
    tables = render_serve(tmp_path)
    assert "0 of 900 replies differ" in tables["serve-figures"] and tables["serve-sessions"] == NONE_YET


def test_a_short_conversation_gives_no_headline_of_a_thousand_turns(tmp_path):
    ServeRecord.write(make_serve_record("short", "turns", turns=100), tmp_path)
    assert "serve.thousand_turn_tpot_ratio" not in write_summary(tmp_path).headlines


def test_no_record_no_figure(tmp_path):
    assert set(render_serve(tmp_path).values()) == {NONE_YET}
    assert set(write_summary(tmp_path).missing) >= set(SERVE_HEADLINES)


def test_throughput_has_a_row_a_number_of_sessions(tmp_path):
    rows = [
        {"sessions": s, "streamed": True, "tokens_per_second": 10.0 * s, "engine_tokens_per_second": 20.0 * s}
        | {"over_one": float(s), "over_engine": 0.5}
        for s in (1, 8)
    ]
    ServeRecord.write(make_serve_record("sessions", "sessions", rows=rows), tmp_path)
    assert sessions_table(ServeRecord.below(tmp_path)).markdown().count("streamed") == 2


def test_chats_with_facts_have_a_table_and_headlines(tmp_path):
    ServeRecord.write(make_serve_record("facts", "recall"), tmp_path)
    headlines = write_summary(tmp_path).headlines
    assert headlines["serve.recall_found"] == {"value": 0.75, "record": "facts", "on": "Test GPU"}
    assert headlines["serve.recall_right"]["value"] == headlines["serve.recall_false_alarms"]["value"] == 0.25
    shown = render_serve(tmp_path)
    assert "75 % [60, 86] | 25 % [14, 40] | 0 % [0, 9] | 5 % [1, 17]" in shown["serve-recall"]
    assert "6 chats of 48 turns" in shown["serve-recall"] and shown["serve-figures"] == NONE_YET


def test_a_record_lacks_no_figure(tmp_path):
    record = make_serve_record("soak", "soak")
    del record["figures"]["differing"]
    with pytest.raises(ValueError, match="field 'figures' lacks 'differing'"):
        ServeRecord.write(record, tmp_path)
    with pytest.raises(ValueError, match="field 'part' is 'dance'"):
        ServeRecord.write(make_serve_record("x", "soak") | {"part": "dance"}, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--serve", "dance"], "'dance' is no part; accepted: turns, overhead, sessions, soak, restart"),
        (["--serve", "turns", "--turns", "1"], "--turns 1 with --serve; accepted: at least 4"),
        (
            ["--serve", "soak", "--soak-seconds", "nan"],
            "--soak-seconds: 'nan' is not accepted; accepted: a finite number",
        ),
        (["--serve", "turns", "--streams", "1,2"], "--serve times one stream and does not take --streams"),
    ],
)
def test_wrong_options_are_refused(capsys, arguments, words):
    with suppress(SystemExit):
        assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_many_sessions_are_shared_by_several_clients(monkeypatch):
    plan = Plan("http://x", "m", sessions=11, turns=2, text="hi", tokens=3)
    assert [(p.first, p.sessions) for p in shares(plan, 16)] == [(0, 5), (5, 6)]
    assert shares(plan, 4) == [plan] and [p.sessions for p in shares(replace(plan, sessions=32), 64)] == [4] * 8
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    service = make_service(resident=8)
    with served(service) as address:
        plan = replace(plan, address=address, model=service.loaded.name, sessions=8, warm_turns=1)
        turns = converse(plan)
        with pytest.raises(OSError, match="client of the server failed"):
            converse(replace(plan, address="http://127.0.0.1:1"))
    assert sorted((turn["session"], turn["turn"]) for turn in turns) == [(i, j) for i in range(8) for j in range(2)]
    edges = [max(t["last"] for t in turns if not t["turn"]), min(t["begin"] for t in turns if t["turn"])]
    assert edges[0] < edges[1], "no timed turn begins before the last warm one has ended"


def test_the_client_needs_no_torch():
    from sinkstream.bench.serving.hosting import CLIENT

    source = CLIENT.read_text(encoding="utf-8")
    assert "sinkstream" not in json.dumps([line for line in source.splitlines() if "import" in line])
