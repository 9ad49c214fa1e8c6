"""Recall by brute force: plain lists of tokens, their own positions, naive choosers, attention in float64.

The frame is sinks, recalled tokens, window. Before a token whose index is a multiple of `every`, and before the drop
that it brings, a chooser names the tokens that shall stand behind the sinks; window tokens make room for them. While
no token stands there, also before a multiple of `empty_every`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .forward import Past, Run, Trace, _as_tensor, _step, cache_positions
from .network import Network
from .rules import Rule, Stream

#: (past, t, archived tokens, question or None) -> tokens to recall, None: nothing is wanted
Recaller = Callable[[Past, int, list[int], Sequence[int] | None], list[int] | None]


@dataclass
class Recalled:
    """Options of a recall: tokens between choices, how long a frame is held, distance of the nearest recalled token."""

    every: int
    hold: int = 32
    hold_asked: int = 256
    distance: int | None = None
    empty_every: int = 1
    lag: int = 0  # tokens from a choice without a question to the frame
    alarms: int = 0  # of the gate per 1,000 tokens; each raises it by a tenth until that many tokens are over; 0: none
    step_tokens: int = 1_000_000  # tokens that may come back at once; a larger frame comes later


class RecallStream(Stream):
    """The simulator of prunes, with a frame that holds tokens which have left."""

    def __init__(self, rule: Rule, want_prune: Callable[[int, int], bool] | None = None):
        super().__init__(rule, want_prune=want_prune)
        self.archived: list[int] = []
        self.shift = 0

    @property
    def frame(self) -> list[int]:
        """Recalled tokens, ascending."""
        return self.pinned[None]

    def set_frame(self, tokens: list[int], distance: int | None) -> None:
        """Put tokens behind the sinks, and let window tokens go until no more is visible than before, or than T."""
        before = len(self.sinks) + len(self.frame) + len(self.window)
        self.pinned[None] = list(tokens)
        most = max(before, self.rule.target)
        while len(self.sinks) + len(tokens) + len(self.window) > most:
            self.archived.append(self.window.pop(0))
        n = len(self.sinks) + len(tokens) + len(self.window)
        self.pruning = self.pruning and n > self.rule.target
        last = len(self.sinks) + len(tokens) - 1
        self.shift = 0 if distance is None else max(0, min(n, self.rule.target) - 1 - distance - last)

    def _drop(self, t: int, total: int) -> int:
        window_after = total - 1 - len(self.sinks) - len(self.frame)
        while len(self.window) > window_after:
            self.archived.append(self.window.pop(0))
        return 0


@torch.no_grad()
def run_recall(
    network: Network,
    ids: torch.Tensor,
    rule: Rule,
    recaller: Recaller,
    options: Recalled,
    questions: dict[int, Sequence[int]] | None = None,
    want_prune: Callable[[int, int], bool] | None = None,
) -> tuple[Run, list[tuple[int, list[int]]]]:
    """Feed ids (T,) token by token; `questions`: what is asked before the token of an index.

    `want_prune` says when an adaptive rule prunes, as for `Stream`.

    Returns
    -------
    Run, and the frames: (token before which it was set, its tokens).
    """
    stream, frames, until, kept, coming, calm, sure = RecallStream(rule, want_prune), [], 0, 0, None, 0, False
    past = Past(network, ids[None], cache_positions)

    def positions(visible: torch.Tensor) -> torch.Tensor:
        place = torch.arange(visible.shape[-1])
        first, end = len(stream.sinks), len(stream.sinks) + len(stream.frame)
        place[first:end] += stream.shift
        return place.expand(visible.shape)

    past.positions, traces, logits = positions, [], []
    for t in range(len(ids)):
        question = (questions or {}).get(t)
        between = options.every if stream.frame else options.empty_every
        if question is None and coming is not None:
            if t == coming[0]:
                stream.set_frame(coming[1], options.distance)
                frames.append((t, list(coming[1])))
                coming = None
        elif stream.archived and (question is not None or (t % between == 0 and t >= kept)):
            judge = recaller
            if options.alarms:
                too_soon = max(0, calm - t) / (1_000 / options.alarms)
                judge = replace(recaller, gate=recaller.gate * (1 + 0.1 * too_soon))
            wanted, coming = judge(past, t, list(stream.archived), question), None
            best = 0.0 if not options.alarms else recaller.best(past, t, list(stream.archived))
            lag = max(options.lag, math.ceil(len(wanted or ()) / options.step_tokens) - 1)
            if question is not None:
                until = kept = t + options.hold_asked
            elif wanted:
                until = max(until, t + lag + options.hold)
            if wanted:
                sure = (sure and bool(stream.frame)) or question is not None or best >= 2
            elif question is not None:
                sure = True
            elif stream.frame and t >= until and options.alarms and not sure:
                calm = max(calm, t) + 1_000 // options.alarms
            if wanted and question is None and lag and wanted != stream.frame:
                coming = (t + lag, wanted)
            elif wanted:
                changed = wanted != stream.frame
                if changed:
                    stream.set_frame(wanted, options.distance)
                if changed or question is not None:
                    frames.append((t, list(wanted)))
            elif stream.frame and question is None and t >= until and lag:
                coming = (t + lag, [])
            elif stream.frame and (question is not None or t >= until):
                stream.set_frame([], options.distance)
                frames.append((t, []))
        step = stream.append()
        visible = _as_tensor(step.visible, network)
        out, _ = _step(network, past, t, visible)
        logits.append(out)
        traces.append(Trace(visible, step.event, step.drop_size, None))
    return Run(past._nll[0, 1:], traces, past, torch.stack(logits, 1)[0]), frames


# ---- naive choosers ----


def neighbours(
    scores: dict[int, float],
    archived: list[int],
    block: int,
    budget: int,
    least: float,
    borders: Sequence[int] = (),
    whole: bool = False,
) -> list[int]:
    """Tokens of the best blocks with both neighbours, at most `budget`; `scores` by number of block."""
    have, taken = set(archived), []
    for number in sorted(scores, key=lambda b: (scores[b], b), reverse=True):
        if scores[number] <= 0 or scores[number] < least or len(taken) >= budget:
            break
        first, last = number * block, number * block + block - 1
        low = first - block
        for t in range(first - block, first + 1):
            low = t if t in borders else low
        high = last + block
        if whole:
            ends = [t - 1 for t in borders if last <= t - 1 <= last + block]
            high = max(ends, default=high)
        wanted = [t for t in range(low, high + 1) if t in have and t not in taken]
        inside = [t for t in wanted if first <= t <= last]
        outside = [t for t in wanted if t not in inside]
        outside.sort(key=lambda t: (max(first - t, t - last), t))
        taken += (inside + outside)[: budget - len(taken)] if len(wanted) > budget - len(taken) else wanted
    return sorted(taken)


@dataclass
class Words:
    """Options of the lexical chooser, written again."""

    block: int
    budget: int
    query: int = 32
    rare: float = 0.03
    level: float = 3.6
    row: int = 16
    row_rare: float = 0.1
    row_level: float = 3.4
    run_level: float = 3.0
    gate: float = 1.0
    share: float = 0.6
    every: int = 8  # at other choices without a question runs alone count

    def scores(
        self, ids: Sequence[int], archived: list[int], query: Sequence[int], asked: bool, brief: bool = False
    ) -> dict[int, float]:
        """Score of every block that holds an archived token, counted afresh."""
        held: dict[int, list[int]] = {}
        for t in archived:
            held.setdefault(t // self.block, []).append(int(ids[t]))
        total = len(held)
        df = {term: sum(term in tokens for tokens in held.values()) for term in set(query)}
        idf = {term: math.log(1 + (total - n + 0.5) / (n + 0.5)) for term, n in df.items()}
        once, scores = math.log(1 + (total - 0.5) / 1.5), {}
        for number, tokens in held.items():
            score = 0.0
            for term in set(query):
                count = tokens.count(term)
                if count and df[term] <= max(2, self.rare * total):
                    score += idf[term] ** 2 * count * 2.2 / (count + 1.2)
            scores[number] = 0.0 if brief else score / (self.level * once**2)
        if not asked:
            row = list(query[-self.row :])
            for place in range(archived[0], archived[-1] + 1):  # where the text would go on
                score, run, broken = 0.0, 0.0, False
                for back, term in enumerate(reversed(row), 1):
                    there = place - back
                    if there in range(archived[0], archived[-1] + 1) and int(ids[there]) == term:
                        score += idf[term] * (df[term] <= max(2, self.row_rare * total))
                        run += 0.0 if broken else idf[term]
                    else:
                        broken = True
                score = max(0.0 if brief else score / self.row_level, run / self.run_level) / once
                scores[place // self.block] = max(scores[place // self.block], score)
        return scores

    def best(self, past: Past, t: int, archived: list[int]) -> float:
        """The score of the best block without a question."""
        ids = past.ids[0].tolist()
        return max(self.scores(ids, archived, ids[max(0, t - self.query) : t], False, t % self.every != 0).values())

    def __call__(
        self, past: Past, t: int, archived: list[int], question: Sequence[int] | None, borders: Sequence[int] = ()
    ) -> list[int] | None:
        """As a recaller."""
        ids, asked = past.ids[0].tolist(), question is not None
        query = ids[max(0, t - self.query) : t] if question is None else list(question)
        known = [*archived, *range(archived[-1] + 1, t)] if asked else archived  # the window's own words compete
        scores = self.scores(ids, known, query, asked, not asked and t % self.every != 0)
        if not asked and max(scores.values()) < self.gate:
            return None
        least = self.share * max(scores.values()) if asked else self.gate
        return neighbours(scores, archived, self.block, self.budget, least, borders, asked)


@dataclass
class Attention:
    """Options of the choosers that read keys and queries, written again: token by token, or by mean key."""

    block: int
    budget: int
    heads: Sequence[tuple[int, int]]
    level: float = 1.0
    query: int = 32
    mean: bool = False
    gate: float = 1.0

    def weights(self, past: Past, t: int, archived: list[int], head: tuple[int, int]) -> torch.Tensor:
        """Attention of the latest queries to archived tokens, (query heads, queries, tokens)."""
        network, (layer, kv_head) = past.network, head
        group = network.heads // network.kv_heads
        keys = [past.keys[layer, 0, kv_head, token] for token in archived]
        asking = past.queries[layer, 0, kv_head * group : kv_head * group + group, max(0, t - self.query) : t]
        found = [[[float(q @ k) * network.scale for k in keys] for q in of_one] for of_one in asking]
        return torch.tensor(found, dtype=torch.float64).softmax(-1)

    def scores(self, past: Past, t: int, archived: list[int]) -> dict[int, float]:
        """Score of every block that holds an archived token."""
        if not self.mean:
            return self.rows(past, t, archived)
        network, scores = past.network, dict.fromkeys((token // self.block for token in archived), 1.0)
        group = network.heads // network.kv_heads
        for layer, kv_head in self.heads:
            asking = past.queries[layer, 0, kv_head * group : kv_head * group + group, max(0, t - self.query) : t]
            held = {b: [past.keys[layer, 0, kv_head, i] for i in archived if i // self.block == b] for b in scores}
            means = [sum(keys) / len(keys) for keys in held.values()]
            for q in asking.mean(1):
                share = torch.tensor([float(q @ k) * network.scale for k in means], dtype=torch.float64).softmax(0)
                for number, own in zip(held, share.tolist()):
                    scores[number] += own / group / len(self.heads)
        return scores

    def rows(self, past: Past, t: int, archived: list[int]) -> dict[int, float]:
        """Of every block the best token with which the text would go on, by what the queries before it attend to."""
        n, scores = len(archived), dict.fromkeys((token // self.block for token in archived), 0.0)
        place = {token: i for i, token in enumerate(archived)}
        told = torch.zeros(n, dtype=torch.float64)
        for head in self.heads:
            given = self.weights(past, t, archived, head).mean(0)
            for age in range(given.shape[0]):  # of a query; the latest is 0
                for token in archived:
                    there = place.get(token - age)
                    if there is not None:
                        told[place[token]] += math.log(1 + n * float(given[-1 - age, there])) / math.log(1 + n)
        for token in archived:
            found = float(told[place[token]]) / self.query / len(self.heads) / self.level
            scores[token // self.block] = max(scores[token // self.block], found)
        return scores

    def __call__(self, past: Past, t: int, archived: list[int], question: Sequence[int] | None) -> list[int] | None:
        """As a recaller."""
        scores = self.scores(past, t, archived)
        return chosen(scores, archived, self.block, self.budget, self.gate)


def chosen(scores: dict[int, float], archived: list[int], block: int, budget: int, gate: float) -> list[int] | None:
    """What comes back without a question: nothing below the gate."""
    if max(scores.values()) < gate:
        return None
    return neighbours(scores, archived, block, budget, gate)
