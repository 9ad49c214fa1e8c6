"""The archive alone: what goes in comes out, the oldest is lost first, and a file that fails says so."""

import gc
import json
import os
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from oracle.recall import Words

from sinkstream.archive import CHOOSERS, BlockFile, Evicted, Hits, KVArchive, Query, TextArchive, chosen_tokens, runs
from sinkstream.archive.choosers.base import LATEST
from sinkstream.archive.choosers.heads import FOLDER, Heads
from sinkstream.archive.choosers.lexical import Lexical
from sinkstream.archive.choosers.postings import numbers_of
from sinkstream.archive.choosers.trigrams import Trigrams
from sinkstream.archive.kv import BLOCK, block_shape
from sinkstream.records.files import WriteError

SHAPE = (2, 3, 5)  # layers, kv heads, head dim
BLOCK_SHAPE = block_shape(*SHAPE)
BLOCK_BYTES = 2 * 2 * 3 * BLOCK * 5 * 4


def entries(first: int, count: int) -> tuple[list[int], torch.Tensor, torch.Tensor]:
    """Ids, keys and values of tokens, which say which token they are of."""
    index = torch.arange(first, first + count).float()
    layers, heads, dim = SHAPE
    keys = index[:, None].expand(layers, 1, heads, count, dim) + torch.arange(dim) / 10
    return list(range(first, first + count)), keys, -keys


def fill(archive, tokens: int, at_once: int = 7) -> None:
    """Append that many tokens, a few at a time."""
    while archive.end < tokens:
        archive.append(*entries(archive.end, min(at_once, tokens - archive.end)))


def read(archive, indices: list[int]) -> None:
    """Every token that is read is the one that was appended."""
    keys, values = archive.read(indices, torch.device("cpu"))
    for place, index in enumerate(indices):
        _, key, value = entries(index, 1)
        assert torch.equal(keys[..., place : place + 1, :], key)
        assert torch.equal(values[..., place : place + 1, :], value)


@pytest.mark.parametrize("at_once", [1, 7, 200])
def test_what_goes_in_comes_out_and_the_oldest_is_lost_first(at_once):
    archive = KVArchive(4, budget_bytes=2 * BLOCK_BYTES)
    fill(archive, 4 + 4 * BLOCK + 9, at_once)
    assert archive.first == 4 + 2 * BLOCK and archive.lost == 2 * BLOCK and len(archive) == 2 * BLOCK + 9
    assert archive.ids[0] == archive.first
    read(archive, [archive.first, archive.first + BLOCK + 3, archive.end - 10, archive.end - 1])
    assert archive.bytes <= 3 * BLOCK_BYTES
    with pytest.raises(ValueError, match=f"token 5 is not in the archive; accepted: {archive.first} to"):
        archive.read([5], torch.device("cpu"))


@pytest.mark.parametrize("kind", ["kv", "kv and a file", "text", "text of a few tokens"])
@pytest.mark.parametrize("at_once", [1, 7, 200])
def test_what_will_be_lost_is_known_before(kind, at_once, tmp_path):
    def archive(name):
        if kind.startswith("text"):
            return TextArchive(4, sinks=[], reread=entries, budget_bytes=5_000 if kind == "text" else 40)
        file = BlockFile(tmp_path / name, 2 * BLOCK_BYTES, BLOCK_SHAPE, torch.float32) if "file" in kind else None
        return KVArchive(4, budget_bytes=BLOCK_BYTES, file=file)

    before, after = archive("before"), archive("after")
    fill(before, 150)
    ends = [before.end + more for more in (0, 1, 63, 64, 150, 1_150, 2_500)]
    foreseen = [before.first_after(end - before.end) for end in ends]
    fill(after, 150)
    for end, first in zip(ends, foreseen, strict=True):
        fill(after, end, at_once)
        assert after.first == first and after.first_after(0) == first
    assert foreseen[-1] > foreseen[0]


def test_a_fork_goes_on_by_itself():
    archive = KVArchive(0, budget_bytes=10 * BLOCK_BYTES)
    fill(archive, 100)
    fork = archive.fork()
    fill(archive, 150)
    assert len(fork) == 100 and len(fork.ids) == 100
    read(fork, [0, 64, 99])
    fill(fork, 120)
    read(archive, [0, 64, 149])


def test_the_file_takes_what_memory_does_not(tmp_path):
    path = tmp_path / "deep" / "archive"
    file = BlockFile(path, 2 * BLOCK_BYTES + 5, BLOCK_SHAPE, torch.float32)
    archive = KVArchive(0, budget_bytes=BLOCK_BYTES, file=file)
    fill(archive, 5 * BLOCK)
    assert archive.stats() == {
        "archived": 3 * BLOCK,
        "archive_bytes": BLOCK_BYTES,
        "archive_file_bytes": 2 * BLOCK_BYTES,
        "archive_lost": 2 * BLOCK,
    }
    read(archive, [2 * BLOCK, 3 * BLOCK - 1, 3 * BLOCK, 4 * BLOCK + 2])
    assert os.path.getsize(path) == 2 * BLOCK_BYTES
    archive.close()
    assert not path.exists()


def test_a_fork_has_a_file_of_its_own(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    file = BlockFile(paths[0], 2 * BLOCK_BYTES, BLOCK_SHAPE, torch.float32)
    archive = KVArchive(0, budget_bytes=BLOCK_BYTES, file=file)
    fill(archive, 4 * BLOCK)  # the oldest has been overwritten
    fork = archive.fork(str(paths[1]))
    assert fork.stats() == archive.stats()
    fill(archive, 6 * BLOCK)
    read(fork, [BLOCK, 3 * BLOCK - 1, 4 * BLOCK - 1])
    archive.close()
    assert not paths[0].exists() and os.path.getsize(paths[1]) == 2 * BLOCK_BYTES
    fill(fork, 5 * BLOCK)
    read(fork, [2 * BLOCK, 5 * BLOCK - 1])
    with pytest.raises(ValueError, match="exists; accepted: the name of a file that does not"):
        fork.fork(str(paths[1]))
    with paths[1].open("r+b") as damaged:
        damaged.write(b"damage")
    with pytest.raises(ValueError, match=r"'.*c' is damaged"):
        fork.fork(str(tmp_path / "c")).blocks()
    os.truncate(paths[1], BLOCK_BYTES)
    with pytest.raises(ValueError, match=r"'.*b' is damaged"):
        fork.fork(str(tmp_path / "d"))


def test_a_file_that_fails_says_so(tmp_path, monkeypatch):
    path = tmp_path / "archive"
    archive = KVArchive(0, budget_bytes=1, file=BlockFile(path, 3 * BLOCK_BYTES, BLOCK_SHAPE, torch.float32))
    fill(archive, 2 * BLOCK)
    with path.open("r+b") as file:
        file.seek(BLOCK_BYTES + 17)
        file.write(b"damage")
    read(archive, [0])
    with pytest.raises(ValueError, match="is damaged: block 1 is not what was written"):
        archive.read([BLOCK], torch.device("cpu"))
    os.truncate(path, BLOCK_BYTES)
    with pytest.raises(ValueError, match="is damaged"):
        archive.read([0], torch.device("cpu"))
    with pytest.raises(ValueError, match="exists; accepted: the name of a file that does not"):
        BlockFile(path, BLOCK_BYTES, BLOCK_SHAPE, torch.float32)
    with pytest.raises(ValueError, match=f"is less than a block; accepted: at least {BLOCK_BYTES}"):
        BlockFile(tmp_path / "other", BLOCK_BYTES - 1, BLOCK_SHAPE, torch.float32)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WriteError) as error:
        BlockFile(tmp_path / "other", BLOCK_BYTES, BLOCK_SHAPE, torch.float32)
    assert "No space left on device; accepted: a smaller recall_file_bytes" in error.value.strerror
    assert not (tmp_path / "other").exists()


def test_text_is_read_behind_the_sinks():
    asked = []

    def reread(ids):
        asked.append(list(ids))
        return entries(0, len(ids))[1:]

    archive = TextArchive(2, sinks=[90, 91], reread=reread, budget_bytes=4_000)
    fill(archive, 500)
    keys, values = archive.read([10, 20, 21], torch.device("cpu"))
    assert asked == [[90, 91, 10, 20, 21]] and keys.shape[3] == values.shape[3] == 3
    fill(archive, 1_500)
    assert archive.bytes <= 4_000 and archive.lost and archive.ids[0] == archive.first


# ---- spans ----


def spans_of(scores, *, budget, borders=(), whole=False, held=range(1000), block=4):
    hits = Hits(np.arange(len(scores)), np.array(scores))
    tokens = chosen_tokens(hits, block, held=held, budget=budget, least=0.5, border=borders.__contains__, whole=whole)
    return runs(tokens)


def test_a_hit_comes_with_its_neighbours():
    scores = np.zeros(20)
    scores[[5, 12]] = 3.0, 2.0
    assert spans_of(scores, budget=24) == [(16, 28), (44, 56)]
    assert spans_of(scores, budget=12) == [(16, 28)]
    assert spans_of(scores, budget=16) == [(16, 28), (48, 52)], "the hit before its neighbours"
    assert spans_of(scores, budget=24, held=range(18, 50)) == [(18, 28), (44, 50)]


def test_hits_that_bring_nothing_leave_the_slots_to_others():
    """Of a question also blocks of the window have scores; and what a neighbour has brought is taken once."""
    scores = np.full(40, 2.0)
    scores[3] = 1.5
    scores[[0, 1, 2, *range(4, 10)]] = 0.0
    hits = Hits(np.arange(40), scores)  # block 3 of the archive, and 30 blocks of the window, which outrank it
    border = frozenset().__contains__
    assert chosen_tokens(hits, 4, held=range(0, 32), budget=12, least=1.0, border=border, whole=True) == list(
        range(8, 20)
    )
    for seed in range(200):
        draw = np.random.default_rng(seed)
        block, budget, first = (int(draw.integers(1, high)) for high in (6, 16, 30))
        held = range(first, first + int(draw.integers(1, 60)))
        numbers = np.arange(held.start // block, -(-(held.stop + int(draw.integers(0, 90))) // block))
        scores = draw.integers(0, 5, len(numbers)) / 4
        best, expected = sorted(zip(scores.tolist(), numbers.tolist(), strict=True), reverse=True), set()
        for _, number in [hit for hit in best if hit[0] >= 0.5]:
            hit = range(number * block, (number + 1) * block)
            new = {t for t in held if hit[0] - block <= t <= hit[-1] + block} - expected
            expected |= set(sorted(new, key=lambda t: (max(0, hit[0] - t, t - hit[-1]), t))[: budget - len(expected)])
        found = chosen_tokens(
            Hits(numbers, scores), block, held=held, budget=budget, least=0.5, border=border, whole=False
        )
        assert found == sorted(expected), seed


def test_spans_are_cut_where_sentences_begin():
    scores = np.zeros(20)
    scores[5] = 3.0  # tokens 20 to 23
    assert spans_of(scores, budget=24, borders={18, 26}) == [(18, 28)]
    assert spans_of(scores, budget=24, borders={18, 26}, whole=True) == [(18, 26)]
    assert spans_of(scores, budget=24, borders={20, 24}, whole=True) == [(20, 24)]


# ---- choosers ----


def test_the_order_of_the_latest_words_counts():
    """Two blocks have the same words; only one has them in the order of the query."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1_000, 50_000, 640).tolist()
    row = list(range(100, 112))
    ids[160:172], ids[400:412] = row, rng.permutation(row).tolist()
    index = Lexical().start()
    index.add(Evicted(0, ids))
    query = Query(now=700, ids=row, asked=False, first=0, end=640)
    found = index.scores(query)
    assert found.argmax() == 172 // 16 and found[172 // 16] > 1.2 * found[400 // 16]
    early = index.scores(Query(now=700, ids=row, asked=False, first=0, end=160))
    assert early.shape == (10,) and early.max() == 0, "what has not left is not found"
    late = index.scores(Query(now=700, ids=row, asked=False, first=320, end=640))
    assert late.shape == (20,) and late.argmax() == (400 - 320) // 16


def test_words_are_counted_as_by_brute_force_however_little_is_looked_at():
    """Tokens leave the archive meanwhile; below `least` a score may be any number that is lower still."""
    rng, opened, ended, options = np.random.default_rng(0), 0, 0, {"block": 4, "rare": 0.1, "row_rare": 0.3}
    for level, row_level, run_level in ((1.0, 0.8, 3.0), (2.0, 2.6, 1.2), (3.0, 1.5, 0.9)):
        ids = rng.zipf(1.3, 400) % 90
        ids[300:330] = ids[60:90]
        levels = {"level": level, "row_level": row_level, "run_level": run_level}
        index, done = Lexical(**options, **levels).start(), 2
        again = Words(4, 12, rare=0.1, row_rare=0.3, **levels)
        for now in range(40, 400, 12):
            index.add(Evicted(done, ids[done : now - 20].tolist()))
            done, first = now - 20, max(2, now - 319)
            index.forget(first)
            held, query = range(first, done), ids[max(0, now - 32) : now].tolist()
            for way, least in (("asked", 0.0), ("", 0.0), ("", 0.5), ("", 1.0), ("brief", 0.0), ("brief", 1.0)):
                how = {"asked": way == "asked", "brief": way == "brief"}
                wanted = again.scores(ids.tolist(), list(held), query, **how)
                asked = Query(now=now, ids=query, first=first, end=done, least=least, **how)
                found = index.scores(asked)
                assert len(found) == len(wanted)
                blocks = asked.blocks(4)
                hits = index.hits(asked, blocks)
                assert (np.diff(hits.blocks) > 0).all() and (found[hits.blocks - blocks.start] == hits.scores).all()
                for score, (_, other) in zip(found, sorted(wanted.items())):
                    assert abs(score - other) < 1e-9 or score <= other < least + 1e-9
                opened += max(wanted.values()) >= least > 0
                if way == "brief" and not index.may_hit(query[-LATEST:], least):
                    ended += 1
                    assert max(wanted.values()) < least
    assert opened > 30 and ended > 10


def test_an_index_forgets_with_its_archive():
    """Nothing grows in a stream without end: what is held follows the archive, every few ids at a time."""
    rng, index, most = np.random.default_rng(0), Lexical().start(), 0
    for first in range(0, 40_000, 50):
        index.add(Evicted(first, rng.integers(0, 200, 50).tolist()))
        index.forget(first - 5_000)
        most = max(most, sum(len(numbers_of(places)) for places, *_ in index.postings.held.values()))
    assert 5_000 < most < 5_050 + 2_000
    for posting in index.postings.held.values():
        places, blocks, counts = map(numbers_of, posting)
        assert dict(zip(blocks, counts, strict=True)) == Counter(place // 16 for place in places)
    for gone in (60_000, 70_000):
        index.forget(gone)
    assert not index.postings.held


def test_the_garbage_collector_does_not_walk_the_postings():
    """A collection of everything comes the sooner, and takes the longer, the more objects there are."""
    index, before = Lexical().start(), len(gc.get_objects())
    index.add(Evicted(0, np.random.default_rng(0).integers(0, 50_000, 4_000).tolist()))
    gc.collect()
    assert len(index.postings.held) > 3_500
    assert not any(gc.is_tracked(posting) for posting in index.postings.held.values())
    assert len(gc.get_objects()) < before + 500
    assert gc.is_tracked([b"a list, for one, is walked"])


def heads_query(keys: torch.Tensor, like: list[int], asked: bool = False) -> Query:
    """Queries that attend to these tokens, one each."""
    queries = {(0, 0): 6 * keys[like][:, None]}
    return Query(now=900, ids=[0] * len(like), asked=asked, first=3, end=3 + len(keys), queries=queries)


def test_heads_open_the_gate_for_tokens_in_a_row():
    """A row lies in two blocks, neither of which has much attention; the same tokens in another order are no row."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(800, 32, generator=generator), dim=1) * 2
    index = Heads(heads=[(0, 0)], level=0.2, row_level=0.5).start()
    index.add(Evicted(3, range(800), {(0, 0): keys}))
    row = list(range(405, 421))  # tokens 408 to 423 of the stream: half of block 25, half of block 26
    found = index.scores(heads_query(keys, row))
    assert found.shape == (51,) and found.argmax() == 26 and found[26] > 1.2
    mixed = index.scores(heads_query(keys, [row[i] for i in torch.randperm(16, generator=generator).tolist()]))
    assert mixed.max() < 0.5
    assert index.scores(heads_query(keys, [77] * 16)).max() < 0.5, "one token that all queries attend to"
    assert index.scores(heads_query(keys, row[:4])).max() < 0.5, "too few queries for a row"
    asked = index.scores(heads_query(keys, [100, 101, 300], asked=True))
    assert sorted(asked.argsort()[-2:]) == [103 // 16, 303 // 16] and asked[6] > 1.5 * asked[18]
    assert asked.sum() == pytest.approx(1 / 0.2, abs=1e-3), "attention is shared out"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_heads_that_are_shipped_are_found_by_shape_and_weights(path):
    content = json.loads(path.read_text())
    layers, kv_heads = content["shape"]

    def model(mean: float):
        config = SimpleNamespace(
            model_type=content["model_type"], num_hidden_layers=layers, num_key_value_heads=kv_heads
        )
        weight = torch.full((3, 4), mean)
        return SimpleNamespace(config=config, get_input_embeddings=lambda: SimpleNamespace(weight=weight))

    found = Heads.for_model(model(1.001 * content["signature"]))
    assert [list(head) for head in found.heads] == content["heads"] and found.row_level == content["row_level"]
    with pytest.raises(ValueError, match="no retrieval heads are known"):
        Heads.for_model(model(1.5 * content["signature"]))


def test_every_chooser_is_registered_with_a_source():
    for name, chooser in CHOOSERS.items():
        assert "Source:" in chooser.__doc__, name
        assert CHOOSERS.summary(name)


def test_trigrams_that_were_taken_in_are_found_and_few_others():
    rng, trigrams = np.random.default_rng(0), Trigrams()
    ids = rng.integers(0, 50_000, 40_000).tolist()
    for first in range(0, 40_000, 500):
        trigrams.add(first, ids[first : first + 1])
        trigrams.add(first + 1, ids[first + 1 : first + 500])
    assert all(trigrams.has(*three) for three in zip(ids, ids[1:], ids[2:]))
    others = rng.integers(0, 50_000, (5_000, 3)).tolist()
    assert 0 < sum(trigrams.has(*three) for three in others) < 0.15 * len(others)
    fork = trigrams.copy()
    fork.add(40_000, [1, 2, 3])
    assert fork.has(1, 2, 3) and not trigrams.has(1, 2, 3)
    held = sum(len(part.bits) for part in trigrams._parts)
    trigrams.forget(25_000)
    assert held < 3 * 40_000 and sum(len(part.bits) for part in trigrams._parts) < held
    assert all(trigrams.has(*three) for three in zip(ids[25_000:], ids[25_001:], ids[25_002:]))
