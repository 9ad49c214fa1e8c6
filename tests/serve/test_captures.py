"""CUDA graphs are captured before the server answers, and a capture that a request waits for is counted and said."""

import logging
import re
import threading

import pytest
from fake_graphs import without_gpu
from serving import CAP, SYSTEM, client_of, loaded, served, user

from sinkstream.serve import ServeSettings, Service

NUCLEUS = {"temperature": 1.0, "top_p": 0.5}


def service(captures: str) -> Service:
    return Service(loaded(), ServeSettings(cap=CAP, resident=2, recall="none", captures=captures), backend="graph")


def captures(client) -> dict[str, float]:
    text = client.get("../metrics", cast_to=str)
    return {when: float(count) for when, count in re.findall(r'graph_captures_total{when="(\w+)"} (\S+)', text)}


def ask(client, **options) -> str:
    given = {"temperature": 0, "max_tokens": 6} | options
    answer = client.chat.completions.create(model="tiny-llama", messages=[SYSTEM, user("Hello you")], **given)
    return answer.choices[0].message.content


def ask_together(client, *options: dict) -> None:
    threads = [threading.Thread(target=ask, args=(client,), kwargs={"max_tokens": 40, **given}) for given in options]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.mark.parametrize(("which", "start"), [("none", 1), ("common", 6), ("all", 27)])
def test_what_is_captured_at_the_start_no_request_waits_for(monkeypatch, caplog, which, start):
    """Two lanes are three blocks, each for every kind of draw."""
    without_gpu(monkeypatch)
    caplog.set_level(logging.INFO, "sinkstream.serve.captures")
    with served(service(which)) as address:
        client = client_of(address)
        assert captures(client) == {"start": start, "traffic": 0}
        assert ("captured 6 CUDA graphs in" in caplog.text) == (which == "common")
        ask(client)
        ask(client, temperature=1.0)
        ask_together(client, {}, {"temperature": 0.7})
        if which == "none":
            assert captures(client)["traffic"] >= 2 and "for a request, which has waited" in caplog.text
            return
        assert captures(client)["traffic"] == 0
        ask(client, **NUCLEUS)
        ask(client, frequency_penalty=1.0)
        assert captures(client)["traffic"] == {"common": 2, "all": 0}[which]


def test_where_nothing_is_captured_nothing_is_counted(monkeypatch):
    given = ServeSettings(cap=CAP, recall="none")
    with served(Service(loaded(), given, backend="ring")) as address:
        client = client_of(address)
        ask(client, **NUCLEUS)
        assert captures(client) == {"start": 0, "traffic": 0}
