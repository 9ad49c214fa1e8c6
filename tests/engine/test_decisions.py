"""Adaptive prunes that the device decides: the host, which asks late or never, comes to the same ones."""

import pytest
import torch
from oracle.models import build, token_ids
from streams import feed, make_cache, small_policy

from sinkstream.engine import Engine
from sinkstream.engine.buffers import PLAN_TOKENS
from sinkstream.kernels import decide

POLICY = small_policy("adaptive-entropy")


def engine(backend: str = "kernels", **more) -> Engine:
    return Engine(build("llama", layers=1), backend=backend, **POLICY | more)


def write(e: Engine, tokens: int) -> torch.Tensor:
    """Append the likeliest token again and again; ids ``(tokens,)``."""
    with torch.no_grad(), e.state.recording() as recorder:
        for _ in range(tokens):
            e.advance(None, [0])
        return recorder.tokens()[:, 0]


@pytest.mark.parametrize("backend", ["ring", "kernels"])
def test_asking_late_and_asking_at_every_token(backend):
    """Over more tokens than two plans hold, rebases included; and the cache of transformers agrees."""
    late, asked = engine(backend, rebase_at=300), engine(backend, rebase_at=300)
    late.state.take_journal()
    prompt, tokens, steps = token_ids(30), 2 * PLAN_TOKENS + 90, []
    for e in (late, asked):
        e.score(prompt)
    written = write(late, tokens)
    for token in written.tolist():
        asked.step([token])
        steps.append(asked.last_steps[0])
    assert torch.equal(late.state.logits, asked.state.logits)
    assert late.state.take_journal()[len(prompt) :] == steps and late.state.take_journal() == []
    assert late.stats() == asked.stats() and late.stats()["events"] > 30 and late.stats()["rebases"] >= 1
    gaps = {b - a for a, b in zip(*[[i for i, s in enumerate(steps) if s.event][k:] for k in (0, 1)])}
    assert len(gaps) > 2, "control: prunes come earlier and later"
    cache = make_cache(late.model, POLICY)
    feed(late.model, cache, torch.cat([prompt, written])[None])
    assert {k: cache.stats()[k] for k in ("events", "kept", "seen")} == {
        k: late.stats()[k] for k in ("events", "kept", "seen")
    }


def test_a_snapshot_in_the_middle_of_a_plan(tmp_path):
    e, path = engine(), tmp_path / "stream.safetensors"
    e.score(token_ids(30))
    write(e, 301)
    e.snapshot(path)
    other = engine()
    other.restore(path)
    assert torch.equal(write(e, 60), write(other, 60)) and e.stats() == other.stats()


def test_an_interrupt_between_a_step_and_its_count():
    e, other = engine(), engine()
    for one in (e, other):
        one.score(token_ids(60))

    def interrupted():
        step()
        raise KeyboardInterrupt

    step = e._step
    e._step = interrupted
    with pytest.raises(KeyboardInterrupt):
        e.advance(None, [0])
    e._step = step
    assert e.stats() == other.stats(), "the step is not counted"
    tokens = token_ids(80, seed=3)
    assert (e.score(tokens)[1:] - other.score(tokens)[1:]).abs().max() < 1e-5 and e.stats() == other.stats()


def test_a_device_that_decides_otherwise_is_an_error():
    e = engine()
    e.score(token_ids(60))
    e.state.decisions_table[0, decide.CACHED] += 1
    with pytest.raises(RuntimeError, match="its schedule says"):
        e.stats()
    e.reset()
    e.score(token_ids(20))
    assert e.stats()["seen"] == 20
