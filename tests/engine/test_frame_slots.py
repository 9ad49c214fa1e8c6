"""Recalled tokens are written to their slots after the plan was made, and before the first step that reads them."""

import pytest
import torch
from oracle.models import build
from recall_case import SMALL, STRICT, WORDS, repetitive

from sinkstream.archive import KVArchive
from sinkstream.engine import Engine
from sinkstream.engine.frame_slots import FrameSlots

OPTIONS = {**STRICT, "recall": "lexical", **SMALL, **WORDS}


def logits_of(engine: Engine, ids: torch.Tensor) -> torch.Tensor:
    """After every token, (tokens, vocab)."""
    return torch.cat([engine.step([token]) for token in ids.tolist()])


def test_nothing_is_fetched_before_the_plan_is_made(monkeypatch):
    """So a thread has time for it."""
    told, fetch, put, write = list[str](), KVArchive.fetch, FrameSlots.put, FrameSlots.write
    engine = Engine(build("llama"), **OPTIONS)
    write_plan = engine.state._write_plan

    def fetched(self, indices, *more):
        wait = fetch(self, indices, *more)
        if indices:  # else the frame is emptied
            told.append("fetch")
        return lambda: told.append("wait") or wait()

    monkeypatch.setattr(KVArchive, "fetch", fetched)
    monkeypatch.setattr(FrameSlots, "put", lambda *args: told.append("put") or put(*args))
    monkeypatch.setattr(FrameSlots, "write", lambda self: (self._coming and told.append("write")) or write(self))
    engine.state._write_plan = lambda *args: told.append("plan") or write_plan(*args)  # type: ignore[method-assign]
    logits_of(engine, repetitive())
    where = [i for i, what in enumerate(told) if what == "fetch"]
    frames = [told[i : i + 5] for i in where]
    assert len(frames) >= 8 and all(frame == ["fetch", "put", "plan", "write", "wait"] for frame in frames)


def test_a_frame_that_is_not_written_would_show(monkeypatch):
    """The control: what stands in the slots matters."""
    ids, model = repetitive(), build("llama")
    wanted = logits_of(Engine(model, **OPTIONS), ids)
    monkeypatch.setattr(FrameSlots, "write", FrameSlots.forget)
    assert (logits_of(Engine(model, **OPTIONS), ids) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("saved", [False, True])
def test_a_fetch_that_fails_is_done_before_the_next_step(saved, monkeypatch):
    """A step that could not read what it needs has not taken place; nothing sees a frame that was never written."""
    ids, model, fetch = repetitive(), build("llama"), KVArchive.fetch
    wanted = logits_of(Engine(model, **OPTIONS), ids)
    engine, failures, found = Engine(model, **OPTIONS), 0, list[torch.Tensor]()

    def failing(self, *args):
        wait, tries = fetch(self, *args), [0]

        def once_more():
            tries[0] += 1
            if tries[0] == 1:
                raise OSError("no pages to lock")
            return wait()

        return once_more

    monkeypatch.setattr(KVArchive, "fetch", failing)
    for token in ids.tolist():
        try:
            found.append(engine.step([token]))
        except OSError:
            failures += 1
            if saved:
                engine.stats()  # takes in what has left, and writes what has come
            found.append(engine.step([token]))
    assert failures >= 8 and torch.equal(torch.cat(found), wanted)
