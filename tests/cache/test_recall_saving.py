"""A cache with recall in a file: archive, frame and index go on bit for bit; what does not fit is refused."""

from functools import partial

import pytest
import torch
from oracle.models import build
from recall_case import SMALL, STRICT, WORDS, frames_of, repetitive, token_bytes
from stream_files import rewrite
from streams import FakeTokenizer, feed

from sinkstream.archive.choosers.recent import Recent, RecentIndex
from sinkstream.cache import StreamingCache
from sinkstream.engine import Engine

KINDS = {
    "kv": {"recall": "lexical", **WORDS},
    "text": {"recall": "lexical", **WORDS, "recall_archive": "text", "recall_distance": 9, "recall_behind": 5},
    "heads": {"recall": "union", "recall_heads": [(0, 1), (2, 0)], "recall_row_level": 0.15, "recall_query_tokens": 8},
    "file": {"recall": "recent"},
}
COUNTED = ("calm_at", "sure")
AT = 263  # tokens fed before a save: the frame is open then, a block of the archive is not full


def opened(model, ids, tokens: int, **options) -> StreamingCache:
    small = SMALL if isinstance(options["recall"], str) else {}
    cache = StreamingCache.for_model(model, **STRICT, **small, **options, rebase_at=90)
    cache.prefill(model, ids[None, :tokens])
    return cache


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_cache_goes_on_bit_for_bit(kind, tmp_path):
    model, ids, path = build("llama"), repetitive(), tmp_path / "stream.safetensors"
    place = [{"recall_file": tmp_path / name, "recall_bytes": 70_000} if kind == "file" else {} for name in "ab"]
    cache = opened(model, ids, AT, **KINDS[kind], **place[0])
    before = cache.stats()
    assert before["recalled"] and before["archived"] % 64 and (kind != "file" or before["archive_file_bytes"])
    cache.save(path)
    loaded = StreamingCache.load(model, path, rebase_at=90, **place[1])
    assert loaded.stats() == before and loaded.recall_events == cache.recall_events
    wanted, found = (feed(model, one, ids[None, AT:]) for one in (cache, loaded))
    assert torch.equal(wanted, found) and frames_of(loaded) == frames_of(cache)
    assert loaded.stats() == cache.stats() and cache.stats()["recalls"] > before["recalls"]


def test_a_question_that_waits_is_in_the_file(tmp_path):
    model, ids, path = build("llama"), repetitive(), tmp_path / "stream.safetensors"
    cache = opened(model, ids, AT, **KINDS["heads"])
    cache.ask(model, ids[None, 60:75], replay=False)
    cache.save(path)
    loaded = StreamingCache.load(model, path, rebase_at=90)
    assert torch.equal(*(feed(model, one, ids[None, :30]) for one in (cache, loaded)))
    assert frames_of(loaded) == frames_of(cache) and cache.recall_events[-1].token >= AT + 15
    assert any(event.cause == "question" for event in loaded.recall_events)


def test_a_frame_that_is_coming_is_in_the_file(tmp_path):
    model, ids, path = build("llama"), repetitive(), tmp_path / "stream.safetensors"
    cache, at = opened(model, ids, 200, **KINDS["kv"], recall_lag=5), 200
    while cache.stream.recall.coming is None:
        feed(model, cache, ids[None, at : at + 1])
        at += 1
    cache.save(path)
    loaded = StreamingCache.load(model, path, rebase_at=90)
    assert torch.equal(*(feed(model, one, ids[None, at : at + 20]) for one in (cache, loaded)))
    assert frames_of(loaded) == frames_of(cache) and at <= cache.recall_events[-1].token


@pytest.mark.parametrize("archive", ["kv", "text"])
def test_a_frame_that_is_coming_is_in_the_file_even_if_its_archive_has_lost_it(archive, tmp_path):
    """A frame is fetched while it is chosen; until it is set a full archive may lose what it is made of."""
    model, ids, path = build("llama", layers=2), repetitive(), tmp_path / "stream.safetensors"
    options = {"recall": "recent", "recall_lag": 100, "recall_archive": archive}
    options["recall_bytes"] = 64 * token_bytes(model) if archive == "kv" else 40 * 4
    cache, at = StreamingCache.for_model(model, **STRICT, **SMALL, **options), 0
    recall = cache.stream.recall
    while recall.coming is None or recall.coming.tokens[0] >= recall.archive.first:
        feed(model, cache, ids[None, at : at + 1])
        at += 1
    cache.save(path)
    loaded = StreamingCache.load(model, path, recall_bytes=options["recall_bytes"])
    assert loaded.stats() == cache.stats()
    assert torch.equal(*(feed(model, one, ids[None, at:]) for one in (cache, loaded)))
    assert frames_of(loaded) == frames_of(cache) and cache.recall_events[-1].token > at


def test_an_archive_that_has_lost_all_is_loaded(tmp_path):
    model, ids, path = build("llama", layers=2), repetitive(), tmp_path / "stream.safetensors"
    cache = opened(model, ids, AT, recall="heads", recall_heads="1.1", recall_archive="text", recall_bytes=1)
    assert cache.stats()["archive_lost"] == cache.stats()["evicted"] > 0 and not cache.stats()["archived"]
    cache.save(path)
    loaded = StreamingCache.load(model, path, recall_bytes=1, rebase_at=90)
    assert torch.equal(*(feed(model, one, ids[None, AT:]) for one in (cache, loaded)))


def test_what_the_gate_counts_is_in_the_file_and_an_older_file_has_a_gate_that_does_not_rise(tmp_path):
    model, path = build("llama"), tmp_path / "stream.safetensors"
    cache = opened(model, repetitive(), AT, **KINDS["kv"])
    assert cache.stream.recall.sure, "what comes back is a passage"
    cache.stream.recall.calm_at = 999
    cache.save(path)
    recall = StreamingCache.load(model, path).stream.recall
    assert (recall.calm_at, recall.sure) == (999, 1)

    def older(header):
        for said, names in (
            (header["recall"]["settings"], ("alarms", "behind")),
            (header["recall"]["counts"], COUNTED),
        ):
            for name in names:
                del said[name]

    rewrite(path, header=older)
    recall = StreamingCache.load(model, path).stream.recall
    assert (recall.calm_at, recall.sure, recall.settings.alarms) == (0, 0, 0)


def test_a_stream_goes_on_with_the_sentence_borders_that_it_had(tmp_path):
    """The borders cut what comes back: without them a loaded stream would go on otherwise, and say nothing."""
    model, path = build("llama"), tmp_path / "stream.safetensors"

    class Other(FakeTokenizer):
        pieces = FakeTokenizer.pieces[::-1]

    makers = (lambda known: StreamingCache.load(model, path, tokenizer=known), partial(restored, model, path))
    for saved_with, words in (
        (FakeTokenizer(), "was saved with a tokenizer, .*; accepted: tokenizer=TOKENIZER, the same one"),
        (Other(), "was saved with another tokenizer, whose sentence borders cut what comes back"),
        (None, "was saved with no tokenizer, .*; accepted: tokenizer=None"),
    ):
        cache = opened(model, repetitive(), AT, **KINDS["kv"], tokenizer=saved_with)
        cache.save(path)
        for load in makers:
            load(saved_with)
            with pytest.raises(ValueError, match=words):
                load(FakeTokenizer() if saved_with is None or isinstance(saved_with, Other) else None)
    rewrite(path, header=lambda header: header["recall"].pop("borders"))
    StreamingCache.load(model, path, tokenizer=FakeTokenizer())  # a file of before


def restored(model, path, tokenizer) -> Engine:
    """An engine with the recall of `KINDS["kv"]` that goes on with a file."""
    engine = Engine(model, **STRICT, **SMALL, **KINDS["kv"], tokenizer=tokenizer)
    engine.restore(path)
    return engine


class Own(Recent):
    """A chooser of a user's own, whose index wants keys of a head and does not give them back."""

    heads = ((0, 0),)

    def start(self) -> RecentIndex:
        return RecentIndex(self)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recall": "recent"}, "other recall: recall='lexical'; accepted: recall='recent'"),
        ({"recall_slots": 9}, "other recall: slots=12; accepted: slots=9"),
        ({"recall_archive": "text"}, "other recall: archive='kv'; accepted: archive='text'"),
        ({"recall_bytes": 60_000}, "an archive of .* tokens does not fit recall_bytes=60000; accepted: a larger"),
    ],
)
def test_other_recall_and_too_little_room_are_refused(options, words, tmp_path):
    model, path = build("llama"), tmp_path / "stream.safetensors"
    opened(model, repetitive(), AT, **KINDS["kv"]).save(path)
    with pytest.raises(ValueError, match=words):
        StreamingCache.load(model, path, **options)


def test_recall_where_the_file_or_the_cache_has_none_is_refused(tmp_path):
    model, ids, path = build("llama"), repetitive(), tmp_path / "stream.safetensors"
    plain = StreamingCache.for_model(model, **STRICT)
    plain.prefill(model, ids[None, :90])
    plain.save(path)
    with pytest.raises(ValueError, match="other recall: recall=None; accepted: recall='lexical'"):
        StreamingCache.load(model, path, recall="lexical")
    cache = opened(model, ids, 90, **KINDS["kv"])
    cache.save(path)
    with pytest.raises(ValueError, match="other recall: recall='lexical'; accepted: recall=None"):
        Engine(model, **STRICT).restore(path)
    cache = opened(model, ids, 90, recall=Own())
    with pytest.raises(ValueError, match="the index of Own does not give back the keys of its heads"):
        cache.save(path)
    assert StreamingCache.load(model, path).stats()["archived"], "the older file is as it was"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"tensors": lambda t: t["archive_000001"].view(torch.uint8).view(-1)[77].bitwise_xor_(1)},
            "archive_000001 is not what",
        ),
        ({"tensors": lambda t: t.pop("archive_ids")}, "archive_ids is not what was written"),
        (
            {"header": lambda h: h["recall"]["archive"].update(tokens=64)},
            r"damaged: archive_ids is \(227,\) .*; accepted: \(64,\)",
        ),
        ({"header": lambda h: h["recall"].pop("frame")}, "damaged: its recall does not fit together"),
        ({"header": lambda h: h["recall"]["counts"].pop("until")}, "damaged: its recall does not fit together"),
        ({"header": lambda h: h["recall"].update(settings={})}, "own, None; give recall=CHOOSER"),
        ({"header": lambda h: h["recall"]["events"][0].pop("spans")}, "damaged: its recall does not fit together"),
    ],
)
def test_a_damaged_archive_is_refused(change, words, tmp_path):
    model, path = build("llama"), tmp_path / "stream.safetensors"
    opened(model, repetitive(), AT, **KINDS["kv"]).save(path)
    rewrite(path, **change)
    with pytest.raises(ValueError, match=words):
        StreamingCache.load(model, path)
