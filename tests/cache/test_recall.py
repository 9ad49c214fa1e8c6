"""Recall in the drop-in against brute force: who comes back, where it stands, and what every token then sees."""

import os
from functools import partial

import pytest
import torch
from oracle.forward import run
from oracle.models import build, token_ids
from oracle.network import Network
from oracle.recall import Recalled, run_recall
from oracle.rules import Rule
from recall_case import POLICIES, READING, SMALL, STRICT, TOKENS, WORDS, WORDS_AGAIN, frames_of, repetitive, token_bytes
from streams import TOLERANCE, FakeTokenizer, feed, generate_text, nll_of, prompt_of

from sinkstream.archive.choosers.heads import Heads
from sinkstream.archive.choosers.lexical import Lexical, LexicalIndex
from sinkstream.archive.choosers.mean_key import MeanKey
from sinkstream.archive.choosers.oracle import Oracle
from sinkstream.cache import StreamingCache
from sinkstream.compat import with_cache
from sinkstream.engine import Engine
from sinkstream.records.files import WriteError

JOBS = list(zip(POLICIES, ("llama", "gpt_neox", "qwen3", "gpt_neox"), strict=True))


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()


def told_frames(cache: StreamingCache):
    """A recaller that repeats what a cache chose, so that only attention and positions are judged."""
    frames = frames_of(cache)
    return lambda past, t, archived, question: next((tokens for token, tokens in frames[::-1] if token <= t), None)


def cut(cache: StreamingCache):
    """Sizes of forwards that a cache with recall accepts, odd where they may be."""
    while True:
        for size in (1, 7, 64, 33, 2):
            yield min(size, cache.max_chunk_tokens())


def foreseen(model, cache: StreamingCache, ids: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Logits of announced ids (1, T), and how many forwards they took."""
    cache.announce(ids)
    sizes = []

    def longest():
        while True:
            sizes.append(cache.max_chunk_tokens())
            yield sizes[-1]

    return feed(model, cache, ids, longest()), len(sizes)


@pytest.mark.parametrize(("distance", "lag"), [(None, 0), (9, 2)])
@pytest.mark.parametrize(("policy", "family"), JOBS)
def test_every_token_sees_what_brute_force_sees(policy, family, distance, lag):
    model, ids, options = build(family), repetitive(), POLICIES[policy]
    more = {"recall_distance": distance or 0, "recall_lag": lag}
    step_tokens = 5 if policy in ("strict", "slack") and not lag else 12  # of at most 12: two tokens late, or at once
    more["recall_step_bytes"] = step_tokens * token_bytes(model)
    alarms = 4 if policy == "lazy" else 0
    more["recall_alarms"] = alarms
    rules = Recalled(8, hold=8, distance=distance, lag=lag, step_tokens=step_tokens, alarms=alarms)
    expected, frames = run_recall(Network(model), ids, Rule(**options), WORDS_AGAIN, rules)
    assert sum(bool(tokens) for _, tokens in frames) >= 8 and any(not tokens for _, tokens in frames)
    for way in ("single", "chunks", "generate"):
        cache = StreamingCache.for_model(model, **options, recall="lexical", **SMALL | WORDS | more)
        if way == "generate":
            logits = generate_text(model, cache, ids[None])
            logits = torch.cat([logits, logits[:, -1:]], 1)
        else:
            logits = feed(model, cache, ids[None], cut(cache) if way == "chunks" else ())
        assert frames_of(cache) == frames, way
        assert worst(nll_of(logits, ids[None])[0], expected.nll) < TOLERANCE, way
        assert cache.stats()["kept"] <= cache.policy.peak


def test_under_adaptive_eviction_every_token_sees_what_brute_force_sees():
    """When to prune is the cache's word; what comes back, where it stands and what is seen is brute force's."""
    model, ids, events = build("llama"), repetitive(), []
    options = {"adaptive": "entropy", "adaptive_min": 3, "adaptive_every": 6, "adaptive_max": 14}
    cache = StreamingCache.for_model(model, sink=4, window=34, **options, recall="lexical", **SMALL, **WORDS)
    logits = feed(model, cache, ids[None], seen=lambda c: events.extend(step.event for step in c.last_steps))
    assert 20 < sum(events) < 100
    rule = Rule(sink=4, window=34, adaptive=True, compress_every=14)
    expected, frames = run_recall(
        Network(model), ids, rule, WORDS_AGAIN, Recalled(8, hold=8, distance=65), want_prune=lambda t, _: events[t]
    )
    assert frames_of(cache) == frames and sum(bool(tokens) for _, tokens in frames) >= 20
    assert worst(nll_of(logits, ids[None])[0], expected.nll) < TOLERANCE
    again = StreamingCache.for_model(model, sink=4, window=34, **options, recall="lexical", **SMALL, **WORDS)
    assert worst(again.prefill(model, ids[None]), logits[:, -1]) < 2e-5 and frames_of(again) == frames


def test_forty_choices_of_a_long_stream_agree():
    """Rebases, copies back of the buffer, and an archive that loses its oldest tokens on the way."""
    model, ids = build("llama"), token_ids(900)
    options = {"recall": "random", **SMALL, "recall_distance": 6, "recall_seed": 3}
    cache = StreamingCache.for_model(model, **STRICT, **options, rebase_at=90, recall_bytes=200_000)
    logits = feed(model, cache, ids[None], cut(cache))
    stats = cache.stats()
    assert stats["rebases"] >= 1 and stats["recalls"] >= 40 and stats["archive_lost"] > 0
    expected, _ = run_recall(Network(model), ids, Rule(**STRICT), told_frames(cache), Recalled(8, hold=8, distance=6))
    assert worst(nll_of(logits, ids[None])[0], expected.nll) < TOLERANCE


@pytest.mark.parametrize("policy", POLICIES)
def test_announced_tokens_are_fed_up_to_the_next_choice_that_changes_something(policy):
    model, ids, options = build("llama"), repetitive(480), {"recall": "lexical", **SMALL, **WORDS}
    options["recall_alarms"] = 20
    options["recall_bytes"] = 128 * token_bytes(model)  # from token 250 on the archive loses its oldest
    ids[320:460] = torch.arange(140) % 97  # nothing is found for a while
    step = StreamingCache.for_model(model, **POLICIES[policy], **options)
    wanted = feed(model, step, ids[None])
    cache = StreamingCache.for_model(model, **POLICIES[policy], **options)
    found, forwards = foreseen(model, cache, ids[None])
    assert frames_of(cache) == frames_of(step) and worst(found, wanted) < 2e-5
    assert cache.stats()["archive_lost"] == step.stats()["archive_lost"] > 0
    assert forwards < len(ids) / 4, "while nothing is recalled, there is a choice before every token"
    cache.announce(ids[None])
    with pytest.raises(ValueError, match="other tokens came than were announced"):
        for _ in range(30):
            size = max(SMALL["recall_every"] + 1, cache.max_chunk_tokens())
            model(ids[None, 1 : 1 + size], past_key_values=cache)


@pytest.mark.parametrize("shift", [0, 1])
def test_a_recalled_key_one_place_beside_its_own_would_show(shift, monkeypatch):
    """The control: the comparison above must be able to fail."""
    from sinkstream.cache.ring import SoftRing

    places = SoftRing.frame_places
    monkeypatch.setattr(SoftRing, "frame_places", lambda ring: places(ring) + shift * (places(ring) >= ring.sink))
    model, ids = build("llama"), repetitive()
    cache = StreamingCache.for_model(model, **STRICT, recall="lexical", **SMALL, **WORDS, recall_distance=9)
    logits = feed(model, cache, ids[None])
    expected, _ = run_recall(Network(model), ids, Rule(**STRICT), WORDS_AGAIN, Recalled(8, hold=8, distance=9))
    assert (worst(nll_of(logits, ids[None])[0], expected.nll) < TOLERANCE) == (shift == 0)


def test_an_index_that_says_too_soon_that_it_finds_nothing_would_show(monkeypatch):
    model, ids, options = build("llama"), repetitive(), {"recall": "lexical", **SMALL, **WORDS}
    frames = []
    for _ in range(2):
        cache = StreamingCache.for_model(model, **STRICT, **options)
        cache.prefill(model, ids[None])
        frames.append(frames_of(cache))
        monkeypatch.setattr(LexicalIndex, "may_hit", lambda self, latest, least: False)
    right, wrong = ([token for token, tokens in found if tokens] for found in frames)
    assert right and wrong and all(token % 8 == 0 for token in wrong) and any(token % 8 for token in right)


def test_a_gate_that_stays_shut_changes_nothing():
    model, ids = build("llama"), repetitive()
    plain = StreamingCache.for_model(model, **STRICT)
    shut = StreamingCache.for_model(model, **STRICT, recall="lexical", recall_slots=12, recall_gate=1e9)
    wanted = feed(model, plain, ids[None])
    assert torch.equal(wanted, feed(model, shut, ids[None]))
    stats = shut.stats()
    assert stats["archived"] == stats["evicted"] > 200 and not stats["recalls"] and not shut.recall_events
    assert {name: stats[name] for name in plain.stats()} == plain.stats()


def test_recall_brings_a_passage_back_that_strict_forgets():
    """The oracle chooser, told where the passage is: the passage costs about what it costs the full cache."""
    model = build("gpt_neox")
    ids = prompt_of(300, seed=4)[0]
    ids[250:282] = ids[100:132]
    nlls = {}
    for name, more in {
        "strict": {},
        "oracle": {"recall": "oracle", "recall_told": [(250, 282, 100, 132)], "recall_slots": 40, "recall_block": 4},
        "late": {"recall": "late-oracle", "recall_told": [(250, 282, 100, 132)], "recall_slots": 40, "recall_block": 4},
    }.items():
        cache = StreamingCache.for_model(model, sink=4, window=76, **more)
        nlls[name] = nll_of(feed(model, cache, ids[None]), ids[None])[0]
        if more:
            events = cache.recall_events
            assert events[0].token == (243 if name == "oracle" else 255)
            assert events[0].spans[0].first <= 100 and events[0].spans[0].end >= 132
    assert torch.equal(nlls["strict"][:240], nlls["oracle"][:240])
    assert worst(nlls["strict"][250:], nlls["oracle"][250:]) > 1e-2


@pytest.mark.parametrize(("name", "late"), [("oracle", 0), ("late-oracle", 5)])
def test_an_oracle_goes_along_a_passage_that_does_not_fit_its_slots(name, late):
    model, ids = build("llama", layers=2), token_ids(330)
    told = {"recall_told": [(250, 314, 100, 164)], "recall_slots": 24, "recall_block": 8}
    cache = StreamingCache.for_model(model, sink=4, window=76, recall=name, **told)
    cache.prefill(model, ids[None, :250])
    for t in range(250, 314):
        model(ids[None, t : t + 1], past_key_values=cache)
        assert t < 256 + late or t - 150 in cache.stream.recall.frame, "the token that the next one repeats"


def test_a_question_is_chosen_by_itself_and_computed_with_what_comes_back():
    model, ids = build("llama"), token_ids(TOKENS, seed=5)
    question, more = ids[120:130].clone(), token_ids(20, seed=8)
    text = torch.cat([ids, question, more])
    borders = [t + 1 for t in range(TOKENS) if FakeTokenizer.weight(int(ids[t])) >= 2]

    def recaller(past, t, archived, asked):
        return WORDS_AGAIN(past, t, archived, asked, borders)

    for replay in (True, False, None):  # None: by generate()
        at = TOKENS + len(question) if replay is False else TOKENS
        expected, frames = run_recall(
            Network(model), text, Rule(**STRICT), recaller, Recalled(8, hold=8), {at: question.tolist()}
        )
        cache = StreamingCache.for_model(model, **STRICT, recall="lexical", **SMALL, **WORDS, tokenizer=FakeTokenizer())
        cache.stream.recall.decode = None  # the tokenizer of the tests has no text
        if replay is None:
            cache.recall_ask = len(question)
            logits = generate_text(model, cache, text[None], TOKENS + len(question)).unbind(1)
            assert not cache.recall_ask, "the next prompt has no question"
        else:
            cache.prefill(model, ids[None])
            logits = [cache.ask(model, question[None], replay=replay)]
            logits += [model(token.view(1, 1), past_key_values=cache).logits[:, -1] for token in more]
        assert frames_of(cache) == frames and frames[-1][0] >= at
        assert any(e.cause == "question" for e in cache.recall_events)
        first = TOKENS + len(question) - 1
        wanted = expected.logits[first : first + len(logits)]
        assert worst(torch.cat(logits).double(), wanted) < 2e-4


@pytest.mark.parametrize("kind", [StreamingCache.for_model, Engine])
def test_the_latest_tokens_that_left_come_back_for_a_question_too(kind):
    """A chooser that does not look at the question: the tokens of the window do not compete."""
    model, ids = build("llama", layers=2), token_ids(56)
    for chooser in ("recent", "random"):
        recalled = kind(model, **STRICT, recall=chooser, **SMALL | {"recall_gate": 9.0, "recall_block": 2})
        if kind is Engine:
            recalled.prefill(ids)
            recalled.ask(ids[:3])
        else:
            recalled.prefill(model, ids[None])
            recalled.ask(model, ids[None, :3])
        [(token, back)] = frames_of(recalled)
        assert token == 56 and back and set(back) <= set(range(4, 12)), "tokens 12 to 55 are in the window"
        assert chooser == "random" or back == list(range(4, 12))


@pytest.mark.parametrize("archive", ["kv", "text"])
@pytest.mark.parametrize("kind", [StreamingCache.for_model, Engine])
def test_without_a_tokenizer_whole_blocks_come_back_and_events_have_no_text(kind, archive):
    model, ids = build("llama"), repetitive()
    options = {"recall": "lexical", **SMALL, **WORDS, "recall_archive": archive}
    one, cut_at_sentences = (kind(model, **STRICT, **options, tokenizer=known) for known in (None, FakeTokenizer()))
    for recalled in (one, cut_at_sentences):
        feed_all = recalled.prefill if kind is Engine else partial(recalled.prefill, model)
        feed_all(ids if kind is Engine else ids[None])
    spans, sentences = ([s for e in r.recall_events for s in e.spans] for r in (one, cut_at_sentences))
    assert spans and all(span.text is None and span.first % 4 == 0 for span in spans)
    assert any(span.text for span in sentences) and any(span.first % 4 for span in sentences)
    if kind is Engine:
        with pytest.raises(ValueError, match="a prompt of text needs a tokenizer; give the engine tokenizer=TOKENIZER"):
            one.ask("What was the code word?")


def test_generate_asks_as_ask_does_with_a_chooser_that_reads_queries():
    model, ids = build("llama", layers=2), token_ids(210, seed=5)
    ids[200:] = ids[60:70]
    options = {"recall": "heads", **SMALL, "recall_heads": "1.1", "recall_query_tokens": 8}
    found = []
    for asked, fed in ((10, 0), (10, 150), (0, 0)):
        cache = StreamingCache.for_model(model, **STRICT, **options)
        if fed:
            cache.prefill(model, ids[None, :fed])
        cache.recall_ask = asked
        given = cache.continuation(ids[None, fed:])
        model.generate(**given, **with_cache(model, cache), max_new_tokens=1, do_sample=False, pad_token_id=0)
        found.append(frames_of(cache))
    cache = StreamingCache.for_model(model, **STRICT, **options)
    cache.prefill(model, ids[None, :200])
    cache.ask(model, ids[None, 200:])
    assert found[0] == found[1] == frames_of(cache) != found[2], "what is not asked chooses something else"


def test_a_question_is_fed_again_while_a_prune_is_under_way_and_not_under_adaptive_eviction():
    """Its queries are read first, so it is taken back; a cache that refuses that is as it was."""
    model, ids = build("llama", layers=2), repetitive()
    options = {"recall": "heads", **SMALL, "recall_heads": "1.1", "recall_query_tokens": 8}
    cache = StreamingCache.for_model(model, **POLICIES["no-sink+overlap+max-drop"], **options)
    engine = Engine(model, **POLICIES["no-sink+overlap+max-drop"], **options)
    under_way = 0
    for first in range(0, 300, 15):
        cache.prefill(model, ids[None, first : first + 12])
        engine.prefill(ids[first : first + 12])
        under_way += cache.stream.schedule.copy().seen > 44 and cache.stream.schedule.pruning
        wanted, found = cache.ask(model, ids[None, first : first + 3])[0], engine.ask(ids[first : first + 3])
        assert worst(wanted, found) < 2e-5 and frames_of(cache) == frames_of(engine)
    assert under_way
    cache = StreamingCache.for_model(model, sink=4, window=40, adaptive="top1", **options)
    cache.prefill(model, ids[None, :100])
    with pytest.raises(ValueError, match=r"under adaptive eviction, and Heads reads .* replay=False"):
        cache.ask(model, ids[None, :9])
    cache.recall_ask = 9
    with pytest.raises(ValueError, match="under adaptive eviction, and Heads reads"):
        model.generate(**cache.continuation(ids[None, :20]), **with_cache(model, cache), max_new_tokens=1)
    assert cache.seen_tokens == 100 and cache.stream.recall.log.end == 100
    cache.ask(model, ids[None, :9], replay=False)


def test_a_question_that_cannot_be_one_is_refused_before_anything_is_fed():
    model, ids = build("llama", layers=2), token_ids(50)[None]
    cache = StreamingCache.for_model(model, **STRICT, recall="lexical")
    refused = [
        (51, {}, "recall_ask=51, and the prompt has 50 new tokens; accepted: at most 50"),
        (5, {"input_ids": ids.expand(2, -1)}, "batch of 2: recall serves one row"),
        (5, {"prefill_chunk_size": 20}, "recall_ask=5 and prefill_chunk_size exclude each other"),
    ]
    for asked, more, words in refused:
        cache.recall_ask = asked
        with pytest.raises(ValueError, match=words):
            model.generate(**{"input_ids": ids} | more, **with_cache(model, cache), max_new_tokens=1)
        assert not cache.seen_tokens and cache.recall_ask == asked
    with pytest.raises(ValueError, match="recall_ask=-1 is not accepted"):
        cache.recall_ask = -1
    with pytest.raises(ValueError, match="this cache has no recall"):
        StreamingCache.for_model(model, **STRICT).recall_ask = 5


@pytest.mark.parametrize("behind", [0, 6])
def test_text_is_read_again_and_comes_back_in_its_own_company(behind):
    """A text archive: keys of tokens behind the sinks and the latest tokens, from a plain forward of brute force."""
    model, ids = build("llama"), repetitive()
    options = {"recall": "lexical", **SMALL, **WORDS, "recall_archive": "text", "recall_behind": behind}
    cache = StreamingCache.for_model(model, **STRICT, **options)
    feed(model, cache, ids[None])
    ring, recall = cache.stream.ring, cache.stream.recall
    if not recall.frame:
        recall.ask(ids[-20:].tolist())
        model(ids[None, :1], past_key_values=cache)
        ring = cache.stream.ring
    now = recall.events[-1].token
    read = torch.cat([ids[:4], ids[now - behind : now], ids[torch.tensor(recall.frame)]])
    alone = run(Network(model), read).past
    found, wanted = ring.pinned_keys[:, 0, :, 4:].double(), alone.keys[:, 0, :, 4 + behind :]
    assert len(recall.frame) and worst(found, wanted) < 1e-5
    if behind:
        bare = run(Network(model), torch.cat([ids[:4], ids[torch.tensor(recall.frame)]])).past
        assert worst(found, bare.keys[:, 0, :, 4:]) > 1e-3, "the text in front changes them"
    assert cache.stats()["archive_bytes"] == 4 * cache.stats()["archived"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recall": "lexicon"}, "unknown chooser 'lexicon'"),
        ({"recall": 3}, "recall=3 is not accepted"),
        ({"recall_slots": 4}, "recall_slots goes with recall=CHOOSER"),
        (
            {"recall": "lexical", "recall_slots": 44},
            "recall_slots=44 leave nothing of a window of 44 tokens; accepted: 1 to 43",
        ),
        ({"recall": "lexical", "recall_slots": 0}, "^recall_slots=0 is not accepted"),
        (
            {"recall": "lexical", "recall_lag": -1},
            "^recall_lag=-1 is not accepted; accepted: a whole number of at least",
        ),
        ({"recall": "lexical", "recall_level": "x"}, "^recall_level='x' is not accepted; accepted: a finite number"),
        ({"recall": "lexical", "recall_rarity": 1}, "'recall_rarity' (did you mean 'recall_rare'[?]"),
        ({"recall": "lexical", "recall_archive": "disk"}, "^recall_archive='disk' is not accepted; accepted: kv, text"),
        ({"recall": "lexical", "recall_archive": "text", "recall_file": "a"}, "recall_file goes with"),
        ({"recall": "lexical", "recall_behind": 8}, "^recall_behind=8 goes with recall_archive='text', not with 'kv'"),
        ({"recall": "lexical", "refresh": 4, "scorer": "uniform"}, "recall and a policy that pins tokens"),
        ({"recall": "lexical", "evict": "turns"}, "recall and evict='turns' exclude each other"),
        ({"recall": "lexical", "positions": "original"}, "recall and positions='original' exclude each other"),
        ({"recall": "oracle", "recall_told": [(5, 3, 0, 2)]}, "recall_told row"),
        ({"recall": "late-oracle"}, "an oracle must be told what is wanted; accepted: recall_told"),
    ],
)
def test_mistakes_are_named(options, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        StreamingCache.for_model(build("llama"), **STRICT, **options)


def test_a_file_of_an_archive_that_cannot_be_made_is_refused_before_anything_is_fed(tmp_path):
    model = build("llama", layers=2)
    (tmp_path / "taken").write_text("mine")
    for place, more, words in (
        ("taken", {}, "recall_file=.*taken' exists; accepted: the name of a file that does not"),
        ("taken/file", {}, "could not make the archive file .*Not a directory; accepted: a smaller"),
        ("new", {"recall_file_bytes": 1 << 60}, "No space left on device; accepted: a smaller recall_file_bytes"),
        ("new", {"recall_file_bytes": 99}, "recall_file_bytes=99 is less than a block; accepted: at least"),
    ):
        for kind in (StreamingCache.for_model, Engine):
            with pytest.raises((ValueError, WriteError), match=words):
                kind(model, **STRICT, recall="lexical", recall_file=tmp_path / place, **more)
    assert (tmp_path / "taken").read_text() == "mine" and os.listdir(tmp_path) == ["taken"]


def test_hybrid_models_and_batches_are_refused():
    with pytest.raises(ValueError, match="sliding layers exclude each other"):
        StreamingCache.for_model(build("qwen2_sliding"), **STRICT, recall="lexical")
    model = build("llama")
    cache = StreamingCache.for_model(model, **STRICT, recall="lexical")
    with pytest.raises(ValueError, match="recall serves one row"):
        model(token_ids(3, batch=2), past_key_values=cache)
    model(token_ids(3)[None], past_key_values=cache)
    words = r"batch of 2: recall serves one row, since rows have different archives; accepted: .*cache\.fork\(\)"
    for refused in (
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0, 0])),
        lambda: model(token_ids(3, batch=2), past_key_values=cache),
        lambda: model.generate(
            token_ids(9)[None], **with_cache(model, cache), num_return_sequences=2, do_sample=True, max_new_tokens=1
        ),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
        assert cache.stream.batch == 1 and cache.seen_tokens == 3
    cache.reset()
    with pytest.raises(ValueError, match="recall reads token ids"):
        model(inputs_embeds=torch.zeros(1, 3, 64), past_key_values=cache)
    with pytest.raises(ValueError, match="this cache has no recall"):
        StreamingCache.for_model(model, **STRICT).ask(model, token_ids(3)[None])
    with pytest.raises(ValueError, match="one row without pads"):
        ids = token_ids(3)[None]
        model(ids, attention_mask=torch.tensor([[0, 1, 1]]), past_key_values=cache)


def test_heads_that_a_model_does_not_have_are_refused():
    model = build("llama")
    with pytest.raises(ValueError, match="no retrieval heads are known of this llama of 3 layers"):
        StreamingCache.for_model(model, **STRICT, recall="heads")
    with pytest.raises(ValueError, match=r"^recall_heads: head 3\.0 is not one .* layers 0 to 2, kv heads 0 to 1"):
        StreamingCache.for_model(model, **STRICT, recall="heads", recall_heads="3.0")
    for chooser, words in (  # the user's own ones, made without the model
        (Heads(heads=((9, 0),)), r"recall_heads: head 9\.0 is not one of the model's; accepted: layers 0 to 2"),
        (Heads(), "recall_heads: no retrieval head is given; accepted: layers 0 to 2"),
        (MeanKey(), "recall_heads: no retrieval head is given"),
        (Oracle(), "an oracle must be told what is wanted"),
    ):
        for kind in (StreamingCache.for_model, Engine):
            with pytest.raises(ValueError, match=words):
                kind(model, **STRICT, recall=chooser)


@pytest.mark.parametrize("place", ["memory", "file"])
def test_a_fork_goes_on_by_itself(place, tmp_path):
    model, ids = build("llama", layers=2), repetitive()
    options = {"recall": "lexical", **SMALL, **WORDS}
    if place == "file":
        options |= {"recall_bytes": 1, "recall_file_bytes": 400_000}
    names = [{"recall_file": tmp_path / name} if place == "file" else {} for name in "ab"]
    whole = StreamingCache.for_model(model, **STRICT, **options, **names[0])
    wanted = feed(model, whole, ids[None])
    cache = StreamingCache.for_model(model, **STRICT, **options, **names[1])
    early = cache.fork()  # nothing has left yet
    feed(model, cache, ids[None, :200])
    fork = cache.fork()
    feed(model, cache, token_ids(60, seed=9)[None])
    assert torch.equal(feed(model, fork, ids[None, 200:]), wanted[:, 200:])
    assert frames_of(fork) == frames_of(whole) != frames_of(cache)
    assert fork.stats()["archive_file_bytes"] == whole.stats()["archive_file_bytes"]
    feed(model, early, ids[None, :60])
    assert len(os.listdir(tmp_path)) == (4 if place == "file" else 0)
    for one in (whole, cache, fork, early):
        one.reset()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("chooser", READING)
def test_choosers_that_read_keys_and_queries_agree_with_brute_force(chooser):
    model, ids = build("llama"), repetitive()
    options, recaller = READING[chooser]
    expected, frames = run_recall(Network(model), ids, Rule(**STRICT), recaller, Recalled(8, hold=8, empty_every=8))
    assert sum(bool(tokens) for _, tokens in frames) >= 8
    for sizes in (True, False):
        cache = StreamingCache.for_model(model, **STRICT, recall=chooser, **SMALL, **options, rebase_at=70)
        logits = feed(model, cache, ids[None], cut(cache) if sizes else ())
        assert frames_of(cache) == frames
        assert worst(nll_of(logits, ids[None])[0], expected.nll) < TOLERANCE
        cache.close()
    assert model.config._attn_implementation == "sdpa", "the model is as it was"


class Reader(Lexical):
    """A chooser that reads text: it notes the tokenizer that it is given, and refuses to do without."""

    given: list

    def with_tokenizer(self, tokenizer):
        if tokenizer is None:
            raise ValueError("recall='reader' reads text; give tokenizer=TOKENIZER")
        self.given.append(tokenizer)
        return self


@pytest.mark.parametrize("make", [StreamingCache.for_model, Engine], ids=["cache", "engine"])
def test_a_chooser_that_reads_text_gets_the_tokenizer(make):
    Reader.given, tokenizer = [], FakeTokenizer()
    with pytest.raises(ValueError, match="reads text"):
        make(build("llama"), cap=64, recall=Reader())
    make(build("llama"), cap=64, recall=Reader(), tokenizer=tokenizer)
    assert set(map(id, Reader.given)) == {id(tokenizer)}
