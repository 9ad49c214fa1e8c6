"""The oracle's prune rules, checked against cases worked out by hand."""

import pytest
from oracle.rules import Rule, Stream, simulate


def shape_of(rule, tokens, **callbacks):
    """(visible length, event, drop size) per token."""
    steps = simulate(rule, tokens, **callbacks)
    return [(len(step.visible[None]), step.event, step.drop_size) for step in steps]


def test_strict_drops_one_token_a_step():
    steps = list(simulate(Rule(sink=2, window=3), 8))
    assert [step.visible[None] for step in steps[4:]] == [
        [0, 1, 2, 3, 4],
        [0, 1, 3, 4, 5],
        [0, 1, 4, 5, 6],
        [0, 1, 5, 6, 7],
    ]
    assert [step.drop_size for step in steps] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert [step.event for step in steps] == [False] * 5 + [True] * 3


def test_lazy_waits_until_r_have_gathered():
    # T = 4, R = 3: n = 7 fires and leaves 4
    lengths = shape_of(Rule(sink=1, window=3, compress_every=3), 13)
    plain, event = (lambda n: (n, False, 0)), (4, True, 3)
    assert lengths == [*map(plain, range(1, 7)), event, plain(5), plain(6), event, plain(5), plain(6), event]


def test_overlap_raises_what_a_prune_leaves():
    # T = 4 + 2, R = 3: n = 9 fires and leaves 6
    assert shape_of(Rule(sink=1, window=3, overlap=2, compress_every=3), 10)[7:] == [
        (8, False, 0),
        (6, True, 3),
        (7, False, 0),
    ]


def test_max_drop_stages_a_prune_and_the_next_interval_starts_when_it_ends():
    # T = 4, R = 4, D = 2: n = 8 fires; 8 -> 6, then 7 -> 5, 6 -> 4 (ends), then 5, 6, 7, and 8 fires again
    steps = shape_of(Rule(sink=1, window=3, compress_every=4, max_drop=2), 15)
    assert steps[6:15] == [
        (7, False, 0),
        (6, True, 2),
        (5, False, 2),
        (4, False, 2),
        (5, False, 0),
        (6, False, 0),
        (7, False, 0),
        (6, True, 2),
        (5, False, 2),
    ]


def test_max_drop_last_stage_is_smaller():
    # T = 4, R = 5, D = 4: 9 -> 5, then 6 -> 4 drops 2 only
    assert shape_of(Rule(sink=1, window=3, compress_every=5, max_drop=4), 11)[8:] == [
        (5, True, 4),
        (4, False, 2),
        (5, False, 0),
    ]


def test_max_drop_does_not_make_events_more_frequent():
    lazy = sum(event for _, event, _ in shape_of(Rule(2, 10, compress_every=8), 400))
    staged = sum(event for _, event, _ in shape_of(Rule(2, 10, compress_every=8, max_drop=3), 400))
    assert 6 <= staged < lazy


def test_slack_prunes_above_and_the_first_of_two_triggers_wins():
    # T = 4, slack 2: n = 7 fires
    only = shape_of(Rule(sink=1, window=3, slack=2), 12)
    assert only == shape_of(Rule(sink=1, window=3, compress_every=3), 12)
    assert only == shape_of(Rule(sink=1, window=3, compress_every=6, slack=2), 12)
    assert only == shape_of(Rule(sink=1, window=3, compress_every=3, slack=9), 12)
    assert shape_of(Rule(sink=1, window=3, slack=0), 12) == shape_of(Rule(sink=1, window=3), 12)


def test_refresh_is_filled_by_the_first_drop_and_keeps_original_order():
    asked = []

    def choose(candidates, keep, t, group):
        asked.append((t, candidates))
        return sorted(candidates, key=lambda token: -(token % 4))[:keep]  # best first, not in original order

    # C = 1 + 2 + 3 = 6, R = 3: n = 9 at t = 8 leaves sink, 2 pinned, 3 window
    steps = list(simulate(Rule(sink=1, window=3, refresh=2, compress_every=3), 12, choose))
    assert asked == [(8, [1, 2, 3, 4, 5]), (11, [2, 3, 6, 7, 8])]
    assert steps[8].visible[None] == [0, 2, 3, 6, 7, 8] and steps[8].drop_size == 3
    assert steps[9].visible[None] == [0, 2, 3, 6, 7, 8, 9]
    assert steps[11].before[None] == [0, 2, 3, 6, 7, 8, 9, 10]
    assert steps[11].visible[None] == [0, 3, 7, 9, 10, 11]


def test_refresh_with_max_drop_is_filled_by_the_first_stage():
    # T = 6, R = 4, D = 2: n = 10 at t = 9 leaves 8 = sink + 2 pinned + 5 window; 4 tokens leave the window
    asked = []

    def choose(candidates, keep, t, group):
        asked.append((t, candidates))
        return candidates[:keep]

    steps = list(simulate(Rule(sink=1, window=3, refresh=2, compress_every=4, max_drop=2), 12, choose))
    assert asked == [(9, [1, 2, 3, 4]), (10, [1, 2, 5, 6]), (11, [1, 2, 7, 8])]
    assert steps[9].visible[None] == [0, 1, 2, 5, 6, 7, 8, 9]
    assert steps[11].visible[None] == [0, 1, 2, 9, 10, 11]
    assert [step.event for step in steps[9:]] == [True, False, False]


def test_groups_choose_for_themselves_and_bad_choices_are_refused():
    rule = Rule(sink=1, window=3, refresh=2)
    pick = {"old": lambda candidates: candidates[:2], "new": lambda candidates: candidates[-2:]}
    steps = list(simulate(rule, 12, lambda c, keep, t, group: pick[group](c), groups=("old", "new")))
    assert steps[-1].visible == {"old": [0, 1, 2, 9, 10, 11], "new": [0, 7, 8, 9, 10, 11]}
    for bad in ([1], [1, 1], [0, 1]):
        with pytest.raises(ValueError, match="distinct"):
            list(simulate(rule, 12, lambda c, keep, t, group, bad=bad: bad))


def test_want_prune_fires_events_within_the_longest_wait():
    asked = []

    def want(t, gathered):
        asked.append((t, gathered))
        return t == 5

    # T = 4: asked from n = 5 on; fires at t = 5 (n = 6), then never; compress_every = 4 fires by itself at n = 8
    steps = shape_of(Rule(sink=1, window=3, compress_every=4, adaptive=True), 10, want_prune=want)
    assert steps[5] == (4, True, 2) and steps[9] == (4, True, 4)
    assert asked == [(4, 1), (5, 2), (6, 1), (7, 2), (8, 3), (9, 4)]
    with pytest.raises(ValueError, match="adaptive"):
        Stream(Rule(1, 3, adaptive=True))


RULES = [
    Rule(4, 12),
    Rule(4, 12, compress_every=7),
    Rule(4, 12, refresh=5, overlap=3, compress_every=7, max_drop=2),
    Rule(0, 9, refresh=3, slack=5),
    Rule(1, 1, overlap=4, compress_every=16, slack=6, max_drop=5),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_visible_set_is_sinks_then_pinned_then_a_run_up_to_t_and_never_exceeds_cap(rule):
    longest = 0
    for step in simulate(rule, 300, lambda candidates, keep, t, group: sorted(candidates, key=lambda i: i % 7)[:keep]):
        visible, t = step.visible[None], step.token
        longest = max(longest, len(visible))
        assert visible == sorted(set(visible)) and visible[: rule.sink] == list(range(min(t + 1, rule.sink)))
        tail = visible[rule.sink + rule.refresh :] if step.token >= rule.cap else []
        assert tail == list(range(t - len(tail) + 1, t + 1))
        assert len(visible) == len(step.before[None]) + 1 - step.drop_size
        assert rule.max_drop is None or step.drop_size <= rule.max_drop
    assert longest == rule.cap
