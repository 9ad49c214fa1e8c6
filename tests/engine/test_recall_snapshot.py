"""An engine with recall in a file: archive, frame and events go on bit for bit; what does not fit changes nothing."""

import os

import pytest
import torch
from oracle.models import build, token_ids
from oracle.network import Network
from oracle.recall import Recalled, run_recall
from oracle.rules import Rule
from recall_case import POLICIES, SMALL, STRICT, WORDS, WORDS_AGAIN, frames_of, repetitive
from stream_files import rewrite
from streams import TOLERANCE, feed

from sinkstream.cache import StreamingCache
from sinkstream.engine import Engine
from sinkstream.records.files import WriteError

AT = 262  # tokens before a snapshot: the frame is open then, keys and values have been copied out of the ring ahead
TEXT = {"recall": "lexical", **SMALL, **WORDS, "recall_archive": "text", "recall_behind": 5, "recall_lag": 2}
KINDS = {
    "strict": {"recall": "lexical", **SMALL, **WORDS, "recall_distance": 9},
    "slack": TEXT,
    "no-sink+overlap+max-drop": {"recall": "recent", **SMALL},
}


def fed(model, ids, policy: str = "strict", **more) -> Engine:
    """An engine that was fed `ids`, first as a prompt, then in steps."""
    engine = Engine(model, **POLICIES[policy], **KINDS[policy] | more, rebase_at=90)
    engine.prefill(ids[:235])
    if len(ids) > 235:
        engine.score(ids[235:])
    return engine


@pytest.mark.parametrize("policy", KINDS)
def test_a_restored_stream_goes_on_bit_for_bit(policy, tmp_path):
    model, ids, path = build("llama", layers=2), repetitive(), tmp_path / "stream"
    undisturbed, engine = fed(model, ids[:AT], policy), fed(model, ids[:AT], policy)
    assert engine.stats()["recalled"]
    engine.snapshot(path)
    other = fed(model, token_ids(130, seed=3), policy)  # something else was in the stream
    other.restore(path)
    wanted = undisturbed.score(ids[AT:])
    for one in (engine, other):
        assert torch.equal(one.score(ids[AT:]), wanted)
        assert one.stats() == undisturbed.stats() and one.recall_events == undisturbed.recall_events
    assert undisturbed.stats()["rebases"] > 1
    if policy == "strict":
        expected, frames = run_recall(Network(model), ids, Rule(**STRICT), WORDS_AGAIN, Recalled(8, hold=8, distance=9))
        assert frames_of(other) == frames
        assert (wanted - expected.nll[AT - 1 :]).abs().max() < TOLERANCE


def test_copies_of_before_a_rebase_would_show(monkeypatch):
    """The control: the comparison above must be able to fail."""
    from sinkstream.engine.leaving import Leaving

    monkeypatch.setattr(Leaving, "renew", lambda leaving: None)
    model, ids, policy = build("llama", layers=2), repetitive(), "no-sink+overlap+max-drop"
    engine, other = fed(model, ids[:AT], policy), fed(model, ids[:10], policy)
    other.undump(engine.dump())
    assert not torch.equal(other.score(ids[AT:]), engine.score(ids[AT:]))


@pytest.mark.parametrize("policy", ["strict", "slack"])
def test_an_engine_and_a_cache_read_each_others_files(policy, tmp_path):
    model, ids, path = build("llama", layers=2), repetitive(), tmp_path / "stream"
    engine = fed(model, ids[:AT], policy)
    engine.snapshot(path)
    cache = StreamingCache.load(model, path, rebase_at=90)
    assert cache.recall_events == engine.recall_events and cache.stats()["recalled"]
    cache.save(path)
    back = fed(model, ids[:10], policy)
    back.restore(path)
    wanted = torch.cat([engine.step([token]) for token in ids[AT:]])
    assert (feed(model, cache, ids[None, AT:])[0] - wanted).abs().max() < 2e-5
    assert (torch.cat([back.step([token]) for token in ids[AT:]]) - wanted).abs().max() < 2e-5
    assert frames_of(cache) == frames_of(back) == frames_of(engine)


def test_a_question_that_waits_is_in_the_file():
    model, ids = build("llama", layers=2), repetitive()
    engine, other = fed(model, ids[:AT]), fed(model, ids[:10])
    engine.ask(ids[60:75], replay=False)
    other.undump(engine.dump())
    assert torch.equal(engine.score(ids[:30]), other.score(ids[:30]))
    assert other.recall_events == engine.recall_events and other.recall_events[-1].token >= AT + 15


def test_an_archive_with_a_file_takes_the_place_of_another(tmp_path, monkeypatch):
    model, ids, path = build("llama", layers=2), repetitive(), tmp_path / "stream"
    policy, small = "no-sink+overlap+max-drop", {"recall_bytes": 1, "recall_file_bytes": 400_000}
    engines = [fed(model, ids[:n], policy, recall_file=tmp_path / str(n), **small) for n in (AT, 200)]
    engine, other = engines
    assert engine.stats()["archive_file_bytes"]
    engine.snapshot(path)
    before = other.stats()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        with pytest.raises(WriteError, match=r"could not make .*200\.fork1 .* No space left on device"):
            other.restore(path)
    assert other.stats() == before and sorted(os.listdir(tmp_path)) == ["200", str(AT), "stream"]
    other.restore(path)
    assert sorted(os.listdir(tmp_path)) == ["200.fork2", str(AT), "stream"], "that of the stream before is gone"
    assert torch.equal(*(one.score(ids[AT:]) for one in engines))
    assert other.stats() == engine.stats()
    engine.close()
    other.reset()
    assert os.listdir(tmp_path) == ["stream"]


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({"recall_slots": 9}, {}, "other recall: slots=12; accepted: slots=9"),
        ({"recall_archive": "text"}, {}, "other recall: archive='kv'; accepted: archive='text'"),
        ({"recall_bytes": 60_000}, {}, "an archive of .* tokens does not fit recall_bytes=60000; accepted: a larger"),
        (None, {}, "other recall: recall='lexical'; accepted: recall=None"),
        ({}, {"tensors": lambda t: t.pop("archive_000001")}, "damaged: archive_000001 is not what was written"),
        ({}, {"header": lambda h: h["recall"].pop("turns")}, "damaged: its recall does not fit together"),
        ({}, {"header": lambda h: h["recall"]["frame"].pop()}, "damaged: its recall does not fit together"),
    ],
)
def test_damage_and_other_recall_are_refused(options, change, words, tmp_path):
    model, ids, path = build("llama", layers=2), repetitive(), tmp_path / "stream"
    fed(model, ids[:AT]).snapshot(path)
    rewrite(path, **change)
    engine = Engine(model, **STRICT) if options is None else fed(model, ids[:10], **options)
    seen, events = engine.stats()["seen"], engine.recall_events
    with pytest.raises(ValueError, match=words):
        engine.restore(path)
    assert engine.stats()["seen"] == seen and engine.recall_events == events


@pytest.mark.gpu
@pytest.mark.parametrize("archive", ["kv", "text"])
def test_on_a_gpu_a_restored_stream_goes_on_bit_for_bit(archive):
    model, ids = build("llama", torch.float16).cuda(), repetitive(900).cuda()
    options = {**STRICT, "recall": "lexical", **SMALL, **WORDS, "recall_archive": archive, "backend": "fused"}
    engine, other = (Engine(model, **options, rebase_at=200) for _ in range(2))
    engine.score(ids[:470])
    other.score(ids[:30])
    other.undump(engine.dump())
    wanted = engine.score(ids[470:])
    assert torch.equal(other.score(ids[470:]), wanted) and other.recall_events == engine.recall_events
    assert engine.stats()["recalls"] > 20
