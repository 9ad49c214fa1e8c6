"""Rows of unequal length: each row of a left-padded batch gives what the same row gives alone, under every policy."""

import pytest
import torch
from oracle.models import build
from streams import PAD, TOLERANCE, Follow, feed, make_cache, nll_of, oracle_run, prompt_of, small_policy

from sinkstream.cache.rows import Rows
from sinkstream.cache.stream import Stream
from sinkstream.compat import with_cache
from sinkstream.policies import PRESETS

POLICIES = list(PRESETS)
FEW = ("strict", "refresh-window-attention", "refresh-uncertainty", "adaptive-entropy")
LENGTHS = (23, 150, 61)
EOS = 95
COUNTS = ("seen", "kept", "evicted", "events")


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (batch, longest) of rows (tokens,)."""
    ids = torch.full((len(rows), max(map(len, rows))), PAD)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, ids.shape[1] - len(row) :] = row
        mask[i, ids.shape[1] - len(row) :] = 1
    return ids, mask


def texts(lengths=LENGTHS) -> list[torch.Tensor]:
    """Rows (tokens,) of different texts, without the tokens for padding and for the end."""
    return [prompt_of(n, seed=n + i)[0].clamp(max=EOS - 1) for i, n in enumerate(lengths)]


def sizes_for(cache, tokens: int):
    """Awkward forwards; where the policy must decide, what the cache allows."""
    fed, wanted = 0, iter([1, 40, 7, 64, 13, 2] * 999)
    while fed < tokens:
        size = min(next(wanted), tokens - fed, cache.max_chunk_tokens())
        yield size
        fed += size


@torch.no_grad()
def masked_feed(model, cache, rows: list[torch.Tensor], sizes=None) -> list[torch.Tensor]:
    """Logits (tokens, vocab) of every row, fed left-padded; the mask is now that of the forward, now the whole one."""
    ids, mask = left_padded(rows)
    _, past = left_padded([torch.zeros(n) for n in cache.row_seen or [0] * len(rows)])
    out, fed = [], 0
    for i, size in enumerate(sizes or sizes_for(cache, ids.shape[1])):
        now = slice(fed, fed + size)
        given = torch.cat([past, mask[:, : fed + size]], 1) if i % 2 else mask[:, now]
        out.append(model(ids[:, now], attention_mask=given, **with_cache(model, cache)))
        fed += size
    assert fed == ids.shape[1]
    logits = torch.cat([o.logits for o in out], 1)
    return [row_logits[-len(row) :] for row, row_logits in zip(rows, logits)]


def alone(model, options: dict, row: torch.Tensor, **more) -> tuple[torch.Tensor, dict]:
    """Logits (tokens, vocab) of a row that a cache of its own was fed, and the counts of that cache."""
    cache = make_cache(model, options, **more)
    sizes = cache.chunks(len(row)) if len(row) > 300 else ()  # token by token, unless it takes long
    return feed(model, cache, row[None], sizes)[0], counts(cache.stats())


def counts(stats: dict) -> dict:
    return {name: stats[name] for name in COUNTS}


def assert_rows_are_as_alone(model, options, rows, logits, cache=None, **more):
    """`logits` of each row: of its last tokens, as many as there are."""
    for i, row in enumerate(rows):
        expected, stats = alone(model, options, row, **more)
        torch.testing.assert_close(logits[i], expected[-len(logits[i]) :], rtol=0, atol=TOLERANCE)
        assert cache is None or counts(cache.row_stats()[i]) == stats


# ---- bare forwards ----


@pytest.mark.parametrize(("family", "policy"), [("llama", p) for p in POLICIES] + [("gpt_neox", p) for p in FEW])
def test_bare_forwards_of_a_padded_batch_equal_each_row_alone(policy, family):
    model, options, rows = build(family), small_policy(policy), texts()
    cache = make_cache(model, options)
    assert_rows_are_as_alone(model, options, rows, masked_feed(model, cache, rows), cache)
    assert cache.row_seen == list(LENGTHS) and cache.stats()["events"] > 0


@pytest.mark.parametrize("policy", ["strict", "refresh-window-attention"])
def test_a_padded_batch_agrees_with_the_oracle(policy):
    model, options, rows = build("llama"), small_policy(policy), texts((40, 110))
    logits = masked_feed(model, make_cache(model, options), rows)
    for row, found in zip(rows, logits):
        expected = oracle_run(model, row, options).nll
        torch.testing.assert_close(nll_of(found[None], row[None])[0], expected, rtol=0, atol=TOLERANCE)


def test_pads_that_are_not_masked_are_seen():
    """Control: the tests above would notice it."""
    model, options, rows = build("llama"), small_policy("lazy"), texts()
    found = feed(model, make_cache(model, options), left_padded(rows)[0])
    expected = alone(model, options, rows[0])[0]
    assert (found[0, -len(rows[0]) :] - expected).abs().max() > 0.1


@pytest.mark.parametrize("more", [{"positions": "original"}, {"rebase_at": 40}])
@pytest.mark.parametrize("policy", ["lazy", "refresh-window-attention", "refresh-accumulated-attention"])
def test_wraps_and_rebases_of_a_padded_batch(policy, more):
    model, options, rows = build("llama"), small_policy(policy), texts((300, 640))
    cache = make_cache(model, options, **more)
    logits = masked_feed(model, cache, rows)
    assert_rows_are_as_alone(model, options, rows, logits, cache, **more)
    assert cache.stats()["rebases"] > 0 or "positions" in more


def test_eager_attention_takes_the_masks_as_well():
    model, options, rows = build("llama"), small_policy("max-drop"), texts()
    model.set_attn_implementation("eager")
    cache = make_cache(model, options)
    assert_rows_are_as_alone(model, options, rows, masked_feed(model, cache, rows), cache)


@pytest.mark.parametrize("policy", ["max-drop", "refresh-window-attention"])
def test_a_compiled_model_takes_padded_batches(policy):
    model, options, rows = build("llama"), small_policy(policy), texts((20, 60))
    wrapped = torch.compile(model, backend="eager")
    cache = make_cache(wrapped, options)
    logits = masked_feed(wrapped, cache, rows)
    cache.close()
    assert_rows_are_as_alone(model, options, rows, logits, cache)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["strict", "refresh-uncertainty", "adaptive-entropy", "adaptive-top1"])
def test_rows_of_equal_length_have_their_own_schedules_where_they_observe(policy):
    model, options, rows = build("llama"), small_policy(policy), texts((120, 120, 120))
    cache = make_cache(model, options)
    logits = feed(model, cache, torch.stack(rows))
    assert_rows_are_as_alone(model, options, rows, logits, cache)
    assert isinstance(cache.stream, Rows) == policy.startswith("adaptive")


@torch.no_grad()
@pytest.mark.parametrize("policy", ["strict", "refresh-last-query"])
def test_rows_of_equal_length_take_the_path_without_a_mask(policy):
    model, options, ids = build("llama"), small_policy(policy), torch.stack(texts((120, 120)))
    caches = [make_cache(model, options) for _ in range(2)]
    found = []
    for cache, mask in zip(caches, (None, torch.ones_like(ids))):
        masks: list = []
        begin = cache.begin_forward
        cache.begin_forward = lambda *a, begin=begin, masks=masks: masks.append(begin(*a)) or masks[-1]
        now = [{} if mask is None else {"attention_mask": mask[:, : i + 1]} for i in range(120)]
        out = [model(ids[:, i : i + 1], **now[i], **with_cache(model, cache)).logits for i in range(120)]
        found.append(torch.cat(out, 1))
        assert type(cache.stream) is Stream and all(m is None for _, m in masks) and len(masks) == 120
    assert torch.equal(*found)


# ---- generate() ----


def generate(model, cache, whole: list[torch.Tensor], new: int, **more):
    """generate() that follows texts, each row's prompt being all but its last `new` tokens; what it returns."""
    ids, mask = left_padded([row[:-new] for row in whole])
    follow = torch.cat([ids, torch.stack([row[-new:] for row in whole])], 1)
    return write(model, cache, follow, new, input_ids=ids, attention_mask=mask, **more)


def write(model, cache, follow: torch.Tensor, new: int, **more):
    given = {"max_new_tokens": new, "do_sample": False, "pad_token_id": PAD, "logits_processor": [Follow(follow)]}
    return model.generate(**with_cache(model, cache), **given | more, return_dict_in_generate=True, output_logits=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_generate_with_a_padded_prompt_equals_each_row_alone(policy):
    model, options, rows = build("llama"), small_policy(policy), texts((63, 190, 101))
    cache = make_cache(model, options)
    logits = torch.stack(generate(model, cache, rows, 40).logits, 1)
    assert_rows_are_as_alone(model, options, [row[:-1] for row in rows], logits, cache)


@pytest.mark.parametrize("policy", ["strict", "max-drop", "refresh-window-attention", "adaptive-top1"])
def test_long_padded_prompts_come_in_chunks(policy):
    model, options, rows = build("llama"), small_policy(policy), texts((830, 410))
    cache = make_cache(model, options)
    logits = torch.stack(generate(model, cache, rows, 10).logits, 1)
    assert_rows_are_as_alone(model, options, [row[:-1] for row in rows], logits, cache)


def test_greedy_text_without_an_attention_mask():
    """generate() works out the mask from the token for padding; pads may be anywhere then."""
    model, options, rows = build("llama"), small_policy("lazy"), texts((20, 70))
    ids, _ = left_padded(rows)
    given = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": 60}
    found = model.generate(ids, **with_cache(model, make_cache(model, options)), **given)
    right = model.generate(ids.roll(-50, 1), **with_cache(model, make_cache(model, options)), **given)
    pieces = model.generate(
        ids, **with_cache(model, make_cache(model, options)), **given, prefill_chunk_size=30, attention_mask=ids != PAD
    )
    assert torch.equal(pieces, found)
    for i, row in enumerate(rows):
        single = model.generate(row[None], **with_cache(model, make_cache(model, options)), **given)
        assert found[i, 70:].tolist() == single[0, len(row) :].tolist()
        assert i or right[i, 70:].tolist() == single[0, len(row) :].tolist()


# ---- turns ----


def first_turn(model, cache, ends=(5, 30, 12)) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Rows of unequal length end one by one, the middle one last.

    Returns what generate() wrote (batch, tokens), its mask, and each row's own tokens, those for padding left out.
    """
    prompts, answers = texts((23, 50, 31)), texts(ends)
    ids, mask = left_padded(prompts)
    own = [torch.cat([p, a, torch.tensor([EOS])]) for p, a in zip(prompts, answers)]
    rest = [torch.cat([a, torch.tensor([EOS]), torch.full((40,), PAD)])[:40] for a in answers]
    follow = torch.cat([ids, torch.stack(rest)], 1)
    out = write(model, cache, follow, 40, input_ids=ids, attention_mask=mask, eos_token_id=EOS).sequences
    assert out.shape[1] == 50 + max(ends) + 1 and out[0, -1] == PAD and out[1, -1] == EOS
    return out, torch.cat([mask, torch.ones_like(out[:, 50:])], 1), own


def anew(out, mask, own, new):
    """The conversation of every row, left-padded once more."""
    ids, again = left_padded([torch.cat(pair) for pair in zip(own, new)])
    return {"input_ids": ids, "attention_mask": again}


def behind_pads(out, mask, own, new):
    """What generate() returned and new tokens behind it; zeros in the mask where rows were filled up."""
    ids, more = left_padded(new)
    zeros = torch.where(out[:, 50:] == PAD, 0, 1)
    return {"input_ids": torch.cat([out, ids], 1), "attention_mask": torch.cat([mask[:, :50], zeros, more], 1)}


def new_alone(out, mask, own, new, cache=None):
    """New tokens only, behind the tokens for the end that were not fed."""
    rest = [torch.cat(pair)[seen:] for *pair, seen in zip(own, new, cache.row_seen)]
    ids, more = left_padded(rest)
    return cache.continuation(ids, more)


@pytest.mark.parametrize(
    ("policy", "turn"), [(p, anew) for p in POLICIES] + [(p, t) for p in FEW for t in (behind_pads, new_alone)]
)
def test_a_conversation_goes_on_after_rows_have_ended(policy, turn):
    model, options = build("llama"), small_policy(policy)
    cache = make_cache(model, options)
    out, mask, own = first_turn(model, cache)
    assert cache.row_seen == [len(own[0]), len(own[1]) - 1, len(own[2])], "what came after the end is not seen"
    new = texts((9, 14, 60))
    given = turn(out, mask, own, new, **({"cache": cache} if turn is new_alone else {}))
    answers = torch.stack(texts((25,) * 3))
    follow = torch.cat([given["input_ids"], answers], 1)
    logits = torch.stack(write(model, cache, follow, 25, **given).logits, 1)
    whole = [torch.cat([*parts[:2], parts[2][:-1]]) for parts in zip(own, new, answers)]
    assert_rows_are_as_alone(model, options, whole, logits, cache)


def test_tokens_for_padding_that_are_not_masked_are_tokens():
    """Who gives no zeros for them says that they are part of the conversation; so they are fed."""
    model, options = build("llama"), small_policy("lazy")
    cache = make_cache(model, options)
    out, mask, _ = first_turn(model, cache)
    new = torch.stack(texts((20, 20, 20)))
    ids, more = torch.cat([out, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    out = write(model, cache, torch.cat([ids, new], 1), 20, input_ids=ids, attention_mask=more)
    whole = [torch.cat([ids[i][more[i] != 0], new[i, :-1]]) for i in range(3)]
    assert_rows_are_as_alone(model, options, whole, torch.stack(out.logits, 1), cache)


def test_equal_rows_part_when_one_has_ended():
    model, options = build("llama"), small_policy("strict")
    cache = make_cache(model, options)
    rows = texts((40, 40))
    follow = torch.stack(rows)
    follow[0, 25] = EOS
    write(model, cache, follow, 15, input_ids=follow[:, :25], eos_token_id=EOS, attention_mask=follow[:, :25] * 0 + 1)
    assert isinstance(cache.stream, Rows) and cache.row_seen == [26, 39]
    logits = masked_feed(model, cache, [texts((9,))[0], texts((5,))[0]])
    whole = [torch.cat([rows[0][:25], torch.tensor([EOS]), texts((9,))[0]]), torch.cat([rows[1][:39], texts((5,))[0]])]
    assert_rows_are_as_alone(model, options, whole, logits, cache)


def test_a_row_of_another_conversation_is_refused_and_nothing_is_lost():
    model, options = build("llama"), small_policy("lazy")
    cache = make_cache(model, options)
    out, mask, own = first_turn(model, cache)
    before, new = cache.row_stats(), texts((9, 14, 60))
    other = [row.clone() for row in own]
    other[2][17] += 1
    with pytest.raises(ValueError, match=r"row 2 of the conversation differs .* at token 17 of 44; .*cache.reset\(\)"):
        write(model, cache, out, 5, **anew(out, mask, other, new))
    with pytest.raises(ValueError, match=r"row 0 of the conversation has 29 tokens.*batch_select_indices"):
        write(model, cache, out, 5, **anew(out, mask, own, [new[0][:0], *new[1:]]))
    with pytest.raises(ValueError, match="position_ids"):
        given = anew(out, mask, own, new)
        write(model, cache, out, 5, **given, position_ids=torch.arange(given["input_ids"].shape[1])[None] + 3)
    assert cache.row_stats() == before
    given, answers = anew(out, mask, own, new), torch.stack(texts((4, 4, 4)))
    logits = torch.stack(write(model, cache, torch.cat([given["input_ids"], answers], 1), 4, **given).logits, 1)
    whole = [torch.cat([*parts[:2], parts[2][:-1]]) for parts in zip(own, new, answers)]
    assert_rows_are_as_alone(model, options, whole, logits, cache)


# ---- other rows ----


@pytest.mark.parametrize(("policy", "lengths"), [(p, LENGTHS) for p in POLICIES] + [(p, (80, 80, 80)) for p in FEW])
def test_rows_are_dropped_and_repeated(policy, lengths):
    model, options, rows = build("llama"), small_policy(policy), texts(lengths)
    for indices in ([2, 0, 0], [1]):
        cache = make_cache(model, options)
        masked_feed(model, cache, rows)
        cache.batch_select_indices(torch.tensor(indices))
        new = texts((70, 41, 9))[: len(indices)]
        logits = masked_feed(model, cache, new)
        whole = [torch.cat([rows[i], n]) for i, n in zip(indices, new)]
        assert_rows_are_as_alone(model, options, whole, logits, cache)
        assert cache.row_seen == [len(row) for row in whole]


def test_one_row_left_needs_no_mask():
    model, rows = build("llama"), texts()
    cache = make_cache(model, small_policy("lazy"))
    masked_feed(model, cache, rows)
    cache.batch_select_indices(torch.tensor([2]))
    assert type(cache.stream) is Stream and cache.row_seen == [61]


def test_a_prompt_is_shared_by_several_sequences():
    model, options, prompt = build("llama"), small_policy("lazy"), texts((60, 40))
    cache = make_cache(model, options)
    cache.batch_repeat_interleave(2)
    assert cache.row_seen == [], "nothing to repeat yet"
    masked_feed(model, cache, prompt)
    cache.batch_repeat_interleave(2)
    assert cache.row_seen == [60, 60, 40, 40]
    new = texts((30,) * 4)
    logits = masked_feed(model, cache, new)
    whole = [torch.cat([prompt[i // 2], n]) for i, n in enumerate(new)]
    assert_rows_are_as_alone(model, options, whole, logits, cache)
    for wrong in ([], [4], [-1]):
        with pytest.raises(ValueError, match="from 0 to 3"):
            cache.batch_select_indices(torch.tensor(wrong, dtype=torch.int64))


def test_reset_forgets_that_rows_differ():
    model, options, rows = build("llama"), small_policy("lazy"), texts()
    cache = make_cache(model, options)
    masked_feed(model, cache, rows)
    cache.reset()
    assert cache.row_seen == [] and cache.stats()["seen"] == 0
    logits = feed(model, cache, rows[0][None])
    assert_rows_are_as_alone(model, options, rows[:1], logits, cache)
    assert type(cache.stream) is Stream


# ---- what goes wrong ----


class Stop(Exception):
    """Raised half-way."""


@torch.no_grad()
@pytest.mark.parametrize("policy", ["strict", "lazy", "refresh-accumulated-attention", "adaptive-entropy"])
def test_a_forward_that_fails_half_way_loses_nothing(policy):
    model, options, rows = build("llama"), small_policy(policy), texts()
    cache = make_cache(model, options)
    masked_feed(model, cache, rows)
    new = texts((1, 1, 1))

    def fail(*_):
        raise Stop

    for mask in ([1, 1, 1], [0, 1, 1], [1, 0, 0]):
        hook = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            model(torch.stack(new), attention_mask=torch.tensor(mask)[:, None], **with_cache(model, cache))
        hook.remove()
    assert cache.row_seen == list(LENGTHS)
    later = texts((3, 1, 2)) if cache.policy.plan_known else texts((1, 1, 1))
    logits = masked_feed(model, cache, later)
    assert_rows_are_as_alone(model, options, [torch.cat(pair) for pair in zip(rows, later)], logits, cache)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ([[1, 1, 0], [1, 1, 1]], "row 0 has zeros behind or between its tokens.*padding_side='left'"),
        ([[1, 1, 1], [1, 0, 1]], "row 1 has zeros behind or between its tokens"),
        ([[0, 0, 0], [0, 0, 0]], "nothing but zeros"),
        ([[1, 0], [1, 1]], "2 columns for 3 tokens"),
        (
            [[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]],
            "counts 2 tokens of row 0 before the new ones, and the cache has seen 30",
        ),
    ],
)
def test_masks_that_are_no_padding_are_refused(mask, words):
    model, options, rows = build("llama"), small_policy("lazy"), texts((30, 44))
    cache = make_cache(model, options)
    masked_feed(model, cache, rows)
    before = cache.row_stats()
    with pytest.raises(ValueError, match=words):
        model(torch.stack(rows[:1] * 2)[:, :3], attention_mask=torch.tensor(mask), **with_cache(model, cache))
    with pytest.raises(ValueError, match="position_ids of the caller's own"):
        given = {"position_ids": torch.tensor([[30, 31, 32]]), "attention_mask": torch.ones(2, 3)}
        model(torch.stack(rows[:1] * 2)[:, :3], **given, **with_cache(model, cache))
    with pytest.raises(ValueError, match=r"batch of 1, .* 2 streams; .*batch_select_indices"):
        model(rows[0][None, :3], **with_cache(model, cache))
    assert cache.row_stats() == before
    logits = masked_feed(model, cache, rows)
    assert_rows_are_as_alone(model, options, [torch.cat([row, row]) for row in rows], logits, cache)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_a_mask_of_another_batch_is_refused(rows):
    model, ids = build("llama"), torch.stack(texts((30, 30)))
    cache = make_cache(model, small_policy("strict"))
    calls = [
        lambda mask: cache.prefill(model, ids, attention_mask=mask),
        lambda mask: model(ids, attention_mask=mask, **with_cache(model, cache)),
        lambda mask: model.generate(ids, attention_mask=mask, max_new_tokens=2, **with_cache(model, cache)),
    ]
    left_padded = torch.ones(rows, 30)
    left_padded[0, :9] = 0
    for mask in (torch.ones(rows, 30), left_padded):
        for call in calls[: 2 if mask.all() else 3]:  # generate() itself takes a mask of ones away
            with pytest.raises(ValueError, match=f"attention_mask of {rows} rows for a batch of 2"):
                call(mask)
        with pytest.raises(ValueError, match=rf"attention_mask of shape \({rows}, 30\); accepted: \(2, 30\)"):
            cache.continuation(ids, mask)
    with pytest.raises(ValueError, match="position_ids of the caller's own"):
        calls[2](torch.ones(3, 30))
    assert cache.seen_tokens == 0
    assert calls[0](torch.ones(2, 30)).shape == (2, 97), "control"
