"""Pinned tokens of every prune inside a chunk, against float64 with every query, key and prune one by one."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from ops_cases import DEVICE, HALF, NEEDS_TRITON, draw, error, on_implementations
from ring_case import rotate
from torch.nn import functional as F

from sinkstream.kernels.attention_prefill import attention_prefill
from sinkstream.kernels.band import ALL_PINNED, SCALARS, Band, Columns, SetColumns
from sinkstream.kernels.config import PrefillConfig
from sinkstream.kernels.pinned_sets import (
    Group,
    Groups,
    GroupSizes,
    Layer,
    group_rows,
    pinned_sets,
    window_splits,
)
from sinkstream.kernels.window_received import store_received, window_received

CASES = [  # kv_heads, group, dim, rotary, sinks, pinned, past entries, latest queries (0: all), drops before tokens
    (2, 2, 32, 32, 3, 5, 30, 4, {3: 4, 9: 6, 10: 3, 17: 8}),
    (2, 1, 48, 16, 4, 70, 90, 0, {2: 9, 40: 70}),
    (1, 3, 16, 16, 2, 9, 20, 0, {5: 3, 6: 3, 20: 11}),
    (1, 4, 80, 20, 1, 33, 80, 40, {1: 30, 30: 70}),  # several tiles of queries
]
TOKENS = {4: 20, 0: 45, 40: 34}
TURN = 7  # positions by which the first group's queries are turned back; each prune turns them further


class Case:
    """One layer in the course of a chunk, drawn before rotation; what float64 says of it is computed on the host."""

    def __init__(self, dtype, kv_heads, group, dim, rotary, sinks, pinned, past, latest, drops):
        self.dtype, self.group, self.pinned, self.drops, self.latest = dtype, group, pinned, drops, latest
        self.tokens, self.past, self.scaling = TOKENS[latest], past, dim**-0.5
        self.inv_freq = 1e3 ** (-torch.arange(rotary // 2, device=DEVICE).double() / (rotary // 2))
        before, entries = (latest, past + self.tokens)
        self.queries = draw(kv_heads * group, before + self.tokens, dim, scale=2.0, dtype=dtype)
        self.sinks, self.window = draw(kv_heads, sinks, dim, dtype=dtype), draw(kv_heads, entries, dim, dtype=dtype)
        self.sources = torch.cat([draw(kv_heads, pinned, dim), draw(kv_heads, entries, dim)], 1)
        self.totals = draw(kv_heads, pinned + entries).abs()
        self.totals[:, pinned + past :] = 0.0
        self.sinks_count, self.first_position = sinks, sinks
        self.oldest, self.turns, oldest, turn = [], [], 0, TURN
        for t in range(self.tokens):
            oldest, turn = oldest + drops.get(t, 0), turn + drops.get(t, 0)
            self.oldest.append(oldest)
            self.turns.append(turn)

    def rotation(self, positions: list[int]) -> torch.Tensor:
        angle = torch.tensor(positions, device=DEVICE).double()[:, None] * self.inv_freq
        return torch.stack([angle.cos(), angle.sin()], 1).float()

    def layer(self, room: int = 0) -> Layer:
        """With `room` entries, sources and queries behind those of the chunk, which are no numbers."""
        totals = None if self.latest else self.totals
        queries = self.queries if self.latest else self.queries[:, : self.tokens]
        sources = self.sources if room else self.sources[:, : self.pinned + self.oldest[-1]]
        parts = [queries, self.window, sources] + ([] if totals is None else [totals[..., None]])
        nan = (F.pad(part, (0, 0, 0, room), value=float("nan")) for part in parts)
        queries, window, sources, *more = (part.contiguous() for part in nan)
        queries = queries.transpose(0, 1).contiguous().transpose(0, 1)  # strided, as a chunk's own are
        totals = more[0][..., 0].contiguous() if more else None
        values = sources.to(self.dtype)  # which no choice reads
        return Layer(window, sources, values, self.sinks, totals, queries=queries)

    def groups(self, turn: int = 0, room: int = 0) -> Groups:
        """With kernels that are launched for `room` groups, queries and entries more than the chunk has."""
        ends, host, start, sums = [*self.drops] + [self.tokens] * (not self.latest), [], 0, 0
        for end in ends:
            oldest = self.oldest[end - 1]
            count = min(self.latest, self.past + end - oldest) if self.latest else end - start
            drop, back = self.drops.get(end, 0), self.turns[end - 1] - turn
            host.append(Group(self.latest + end - count, count, self.past + end - count, oldest, drop, sums, back))
            start, sums = end, sums + count
        found = GroupSizes.of(host)
        sizes = GroupSizes(*(size + room for size in (found.groups, found.queries, found.leaving, found.rows)))
        assert sizes.hold(found) and found.hold(sizes) == (not room)
        table = group_rows(host, not self.latest, sizes.groups).to(DEVICE)
        shift = self.rotation([-group.turn for group in host] + [1] * room)
        frame = self.rotation([self.first_position + i for i in range(self.pinned)])
        return Groups(host, table, shift, frame, sizes, not self.latest)

    def band(self, room: int = 0, **more: int) -> Band:
        first = torch.tensor(self.oldest).numpy() - self.past
        rows = self.tokens + room
        table = torch.zeros(SCALARS + 2 * rows, dtype=torch.int32, device=DEVICE)
        return Band(first, None, self.inv_freq, past=self.past, length=self.past, table=table, **more)

    def pinned_keys(self, head: int, chosen: list[int]) -> torch.Tensor:
        """Rotated to their places and rounded as they are kept."""
        raw, inv_freq = self.drawn.sources[head, chosen], self.inv_freq.cpu()
        keys = [rotate(key, self.first_position + i, inv_freq) for i, key in enumerate(raw)]
        return torch.stack(keys).to(self.dtype).double()

    def weights(self, head: int, chosen: list[int], token: int, at: int) -> dict:
        """What the query of a token gives, before the token `at`: by ("sink", i), ("source", i); mean of the group."""
        oldest, turn, given = self.oldest[at - 1], self.turns[at - 1], {}
        entries = range(oldest, self.past + token + 1)
        names = [("sink", i) for i in range(self.sinks_count)] + [("source", i) for i in chosen]
        names += [("source", self.pinned + i) for i in entries]
        frame, inv_freq = torch.cat([self.drawn.sinks[head], self.pinned_keys(head, chosen)]), self.inv_freq.cpu()
        window = self.drawn.window[head, oldest : self.past + token + 1]
        for g in range(self.group):
            query = self.drawn.queries[head * self.group + g, self.latest + token]
            scores = torch.cat([frame @ rotate(query, -turn, inv_freq), window @ query])
            for name, weight in zip(names, (scores * self.scaling).softmax(0).tolist()):
                given[name] = given.get(name, 0.0) + weight / self.group
        return given

    def expected(self, head: int) -> tuple[list[list[int]], dict[int, float]]:
        """Sources after each prune, and what every source has received in the end, where attention is added up."""
        parts = {"queries": self.queries, "sinks": self.sinks, "window": self.window, "sources": self.sources}
        self.drawn = SimpleNamespace(**{name: part.cpu().double() for name, part in parts.items()})
        chosen, sets = list(range(self.pinned)), [list(range(self.pinned))]
        received = dict(enumerate(self.totals[head].tolist()))
        for t in range(self.tokens):
            if t in self.drops:
                score, oldest = received, self.oldest[t - 1]
                if self.latest:
                    score = {}
                    for token in range(t - min(self.latest, self.past + t - oldest), t):
                        for (_, i), weight in self.weights(head, chosen, token, t).items():
                            score[i] = score.get(i, 0.0) + weight * (_ == "source")
                candidates = chosen + [self.pinned + oldest + i for i in range(self.drops[t])]
                best = sorted(range(len(candidates)), key=lambda i: (score.get(candidates[i], 0.0), i))[-self.pinned :]
                chosen = [candidates[i] for i in sorted(best)]
                sets.append(chosen)
            if not self.latest:
                for (kind, i), weight in self.weights(head, chosen, t, t + 1).items():
                    if kind == "source":
                        received[i] += weight
        return sets, received


@pytest.mark.parametrize("room", [0, 3], ids=["exact", "padded"])
@pytest.mark.parametrize(("sizes", "implementation"), on_implementations(CASES, quick=3))
def test_the_choices_are_those_of_float64(sizes, implementation, room):
    case = Case(torch.float16, *sizes)
    layer, groups, how = case.layer(room), case.groups(room=room), {"implementation": implementation}
    found = pinned_sets(layer, groups, scaling=case.scaling, **how)
    first, end = case.oldest[-1], case.past + case.tokens
    for head in range(len(case.window)):
        sets, received = case.expected(head)
        assert found.chosen[head].tolist() == sets + sets[-1:] * room
        assert any(max(chosen) >= case.pinned for chosen in sets) and any(min(s) < case.pinned for s in sets[1:])
        if not case.latest:
            last = torch.tensor([received[i] for i in sets[-1]])
            assert error(found.totals[head, -1].cpu(), last) < 2e-3
            given = window_received(layer, found.sums, case.band(room), scaling=case.scaling, **how)[head].cpu()
            wanted = [received[case.pinned + i] - case.totals[head, case.pinned + i] for i in range(first, end)]
            assert error(given[first:end], torch.tensor(wanted)) < 2e-3
            assert not given[:first].any() and not given[end:].any() and len(given) == end + room


@pytest.mark.parametrize("room", [0, 3], ids=["exact", "padded"])
@pytest.mark.parametrize(("sizes", "implementation"), on_implementations(CASES[1:3], quick=2))
def test_what_a_token_that_stays_has_received_is_in_its_slot(sizes, implementation, room):
    """Of one of several streams, in a ring that wraps; nothing else is touched."""
    case, how, row, start = Case(torch.float16, *sizes), {"implementation": implementation}, 1, 4
    layer, groups, band = case.layer(room), case.groups(room=room), case.band(room, row=row, start=start)
    found = pinned_sets(layer, groups, scaling=case.scaling, **how)
    given = window_received(layer, found.sums, band, scaling=case.scaling, **how)
    first, end, pinned = case.oldest[-1], case.past + case.tokens, case.pinned
    ring, frame = end - first + 3, slice(case.sinks_count, case.sinks_count + pinned)
    totals = draw(3, len(case.window), 2, frame.stop + ring)[:, :, 1]
    wanted = totals.clone()
    wanted[row, :, frame] = found.totals[:, -1]
    for entry in range(first, end):
        before = case.totals[:, pinned + entry] if entry < case.past else 0.0
        wanted[row, :, frame.stop + (start + entry) % ring] = before + given[:, entry]
    changed = (wanted != totals).any(1).any(0)
    assert not changed[: frame.start].any() and int((~changed).sum()) == frame.start + 3, "control"
    slots = {"pinned_slot": frame.start, "ring_slot": frame.stop}
    store_received(layer, found, band, totals, scaling=case.scaling, **slots, **how)
    assert torch.equal(totals[:, :, ~changed], wanted[:, :, ~changed])
    assert torch.equal(totals[[0, 2]], wanted[[0, 2]]) and error(totals, wanted) < 1e-6


@NEEDS_TRITON
@pytest.mark.parametrize("sizes", [CASES[1], pytest.param(CASES[3], marks=pytest.mark.slow)], ids=str)
def test_the_window_is_split_over_programs_of_which_some_see_nothing(sizes, monkeypatch):
    monkeypatch.setattr("sinkstream.kernels.pinned_sets.multiprocessors", lambda device: 132)
    case, split = Case(torch.float16, *sizes), window_splits(12, sizes[6] + TOKENS[sizes[7]], 132)
    assert split == 4 and window_splits(12, 9, 132) == window_splits(12, 9999, 3) == 1
    assert window_splits(16, 2116, 132) == 16 and window_splits(320, 2116, 132) == 1
    found = pinned_sets(case.layer(), case.groups(), scaling=case.scaling, implementation="triton")
    for head in range(len(case.window)):
        assert found.chosen[head].tolist() == case.expected(head)[0]


@pytest.mark.parametrize(("latest", "implementation"), on_implementations([0, 1], quick=2))
def test_a_chunk_without_a_group_keeps_what_is_pinned(latest, implementation):
    """As a graph is captured."""
    case = Case(torch.float16, *CASES[0 if latest else 1])
    groups, size = case.groups(), len(case.groups().frame)
    idle = Groups([], torch.zeros_like(groups.table), groups.shift, groups.frame, groups.sizes, groups.accumulates)
    found = pinned_sets(case.layer(), idle, scaling=case.scaling, implementation=implementation).chosen
    assert torch.equal(found.cpu(), torch.arange(size, dtype=torch.int32).expand(found.shape)) and found.shape[1] > 1


@pytest.mark.parametrize(("dtype", "implementation"), on_implementations(HALF, quick=2))
def test_queries_that_are_turned_wrongly_choose_otherwise(dtype, implementation):
    case = Case(dtype, *CASES[0])
    right = pinned_sets(case.layer(), case.groups(), scaling=case.scaling, implementation=implementation).chosen
    wrong = pinned_sets(case.layer(), case.groups(turn=3), scaling=case.scaling, implementation=implementation).chosen
    assert right[0].tolist() == case.expected(0)[0] and not torch.equal(right, wrong)


def test_of_equal_scores_the_later_stays():
    case = Case(torch.float32, *CASES[2])
    case.queries.zero_()
    case.totals.fill_(1.0)
    case.totals[:, case.pinned + case.past :] = 0.0
    found = pinned_sets(case.layer(), case.groups(), scaling=case.scaling)
    sets, _ = case.expected(0)
    assert found.chosen[0, 1].tolist() == sets[1] and sets[1][-1] == case.pinned + 2


@pytest.mark.parametrize(("splits", "implementation"), on_implementations([1, 2], quick=2))
def test_every_query_sees_its_own_set(splits, implementation):
    """Against the same attention in pieces, each with one set as its pinned keys."""
    tokens, size, dim = 40, 6, 32
    inv_freq = 1e3 ** (-torch.arange(8, device=DEVICE).double() / 8)
    query, own, values = (draw(1, heads, tokens, dim, dtype=torch.float16) for heads in (4, 2, 2))
    pinned, past = (draw(2, 2, n, dim, dtype=torch.float16) for n in (3, 20))
    sets = draw(2, 2, 3 * size, dim, dtype=torch.float16)
    which = torch.tensor([0] * 11 + [1] * 3 + [2] * 26, dtype=torch.int32, device=DEVICE)
    first = (torch.arange(tokens) - 20).clamp(max=8).numpy()
    turn = (torch.arange(tokens) // 3 + 5).numpy()
    config = PrefillConfig(rows=16, columns=16, warps=4, stages=1, splits=splits)

    def run(frame_keys, frame_values, several=None):
        band = Band(first, turn, inv_freq, past=100, length=20, sinks=ALL_PINNED)
        columns = Columns(frame_keys[None], frame_values[None], past[:1], past[1:], own, values, several)
        return attention_prefill(query, columns, band, scaling=0.2, config=config, implementation=implementation)

    found = run(*pinned, SetColumns(*sets, which, size))
    for i in range(3):
        here = slice(size * i, size * (i + 1))
        alone = run(*(torch.cat([p, s[:, here]], 1) for p, s in zip(pinned, sets)))
        assert error(found[:, which == i], alone[:, which == i]) < 2e-3
        assert error(found[:, which != i], alone[:, which != i]) > 1e-2, "control: another set"


def test_mistakes_are_named():
    case = Case(torch.float16, *CASES[1])
    layer, groups = case.layer(), case.groups()
    with pytest.raises(ValueError, match="totals is None"):
        pinned_sets(replace(layer, totals=None), groups, scaling=1.0)
    for sources in (layer.sources[:, :-1].contiguous(), torch.cat([layer.sources] * 9, 1)):
        with pytest.raises(ValueError, match="sources; accepted: 149 to 205, the pinned"):
            pinned_sets(replace(layer, sources=sources), groups, scaling=1.0)
