"""Which heads of a model find a place again: planted passages that come again, and planted facts that are asked.

One stream of ordinary text. Its first part has passages and statements in it, its last part the passages again and
questions about the statements; between them lies ordinary text alone, longer than the cap. Each head then says, at
every moment of interest, which block of the archive it attends to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from sinkstream.archive import Chooser, Evicted, Index, Query
from sinkstream.archive.choosers.heads import HeadKeys, Heads, attention, in_a_row, of_blocks, shape_of, signature
from sinkstream.cache import StreamingCache
from sinkstream.models import LoadedModel

CAP, EVERY, BLOCK = 512, 8, 16
PASSAGES, PASSAGE_TOKENS, SEEN_TOKENS, FACTS = 16, 64, 24, 16
GAP, QUIET = 32, 4_096  # tokens of text between two planted ones; ordinary text, by which the level is chosen
FALSE_ALARMS = 0.01
BETTER = 0.02  # by how much a second head must find more
STATEMENT, QUESTION = " The code word of the {} is {}.", " Question: what is the code word of the {}? Answer: the {}"
COLOURS = ("grey", "golden", "silent", "narrow", "broken", "distant", "crimson", "hollow")
PLACES = ("garden", "harbour", "tower", "bridge", "market", "forest", "mill", "chapel")
WORDS = ("apple", "lantern", "violin", "copper", "thunder", "saddle", "feather", "anchor", "pepper", "marble")


@dataclass(frozen=True)
class Moment:
    """A choice before token `now` that ought to find one of the tokens `first` to `end` - 1."""

    now: int
    kind: str  # {"passage", "fact"}
    first: int
    end: int


@dataclass
class ProbeStream:
    """Token ids, what ought to be found when, and the moments of ordinary text."""

    ids: list[int]
    moments: list[Moment]
    quiet: list[int]


def probe_stream(text: Sequence[int], encode: Callable[[str], list[int]], seed: int = 0) -> ProbeStream:
    """Plant passages and facts in a text. Raises ValueError if the text is too short."""
    rng, source = np.random.default_rng(seed), iter(text)
    names = [f"{colour} {place}" for colour in COLOURS for place in PLACES]
    facts = [(names[i], WORDS[int(rng.integers(len(WORDS)))]) for i in rng.permutation(len(names))[:FACTS]]
    ids: list[int] = []

    def plain(tokens: int) -> list[int]:
        taken = [token for _, token in zip(range(tokens), source)]
        if len(taken) < tokens:
            raise ValueError("the text is too short for the probe; accepted: a text of at least 12,000 tokens")
        return taken

    passages = [plain(PASSAGE_TOKENS) for _ in range(PASSAGES)]
    planted: list[tuple[str, int]] = [("passage", i) for i in range(PASSAGES)] + [("fact", i) for i in range(FACTS)]
    places: dict[tuple[str, int], tuple[int, int]] = {}
    ids += plain(2 * GAP)
    for which in [planted[i] for i in rng.permutation(len(planted))]:
        own = passages[which[1]] if which[0] == "passage" else encode(STATEMENT.format(*facts[which[1]]))
        places[which] = len(ids), len(ids) + len(own)
        ids += own + plain(GAP)
    ids += plain(CAP)
    start = -(-len(ids) // EVERY) * EVERY
    ids += plain(QUIET)
    quiet, moments = list(range(start, len(ids), EVERY)), list[Moment]()
    for kind, i in [planted[i] for i in rng.permutation(len(planted))]:
        own = passages[i] if kind == "passage" else encode(QUESTION.format(facts[i][0], facts[i][0]))
        read = SEEN_TOKENS if kind == "passage" else len(own)
        ids += plain(GAP)
        ids += plain(-(len(ids) + read) % EVERY)
        first, end = places[kind, i]
        found = (first + read - BLOCK, min(end, first + read + BLOCK)) if kind == "passage" else (first, end)
        moments.append(Moment(len(ids) + read, kind, *found))
        ids += own
    return ProbeStream(ids + plain(EVERY), moments, quiet)


class Noted(NamedTuple):
    """What all heads score at one moment: ``(heads, blocks)``, by what they attend to and by rows of it."""

    first: int
    masses: torch.Tensor
    rows: torch.Tensor


class ProbeIndex(Index):
    """Keys of all heads; what each scores is noted at the moments asked for, and nothing comes back."""

    def __init__(self, chooser: "Probe"):
        self.chooser = chooser
        self.keys = {head: HeadKeys() for head in chooser.heads}

    def add(self, evicted: Evicted) -> None:
        """Keep the keys."""
        for head, keys in self.keys.items():
            keys.add(evicted.first, evicted.keys[head])

    def scores(self, query: Query) -> np.ndarray:
        """0 for every block."""
        blocks = query.blocks(BLOCK)
        if query.now in self.chooser.moments:
            given = [attention(query, head, keys.read(query.first)) for head, keys in self.keys.items()]
            masses = torch.stack([of_blocks(one.mean(0), query, BLOCK).sum(1) for one in given])
            rows = [of_blocks(in_a_row(one, Heads.query_tokens), query, BLOCK).amax(1) for one in given]
            self.chooser.noted[query.now] = Noted(blocks.start, masses.half().cpu(), torch.stack(rows).half().cpu())
        return np.zeros(len(blocks))


@dataclass(frozen=True)
class Probe(Chooser):
    """Chooses nothing and notes what all heads attend to."""

    heads: tuple[tuple[int, int], ...] = ()  # type: ignore[misc]  # of the model, all
    moments: frozenset[int] = frozenset()
    noted: dict[int, Noted] = field(default_factory=dict)

    def start(self) -> ProbeIndex:
        """No keys."""
        return ProbeIndex(self)


@torch.inference_mode()
def probe_heads(
    loaded: LoadedModel, text: Sequence[int], seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """The one or two heads of a model that find most, and their levels.

    Parameters
    ----------
    text : sequence of int
        At least 12,000 token ids of ordinary text.
    progress : callable or None
        Called with the tokens fed and their total.

    Returns
    -------
    dict
        What the file for ``recall_heads`` holds: model_type, shape (layers, kv heads), signature, heads, level,
        row_level, the share of passages for which they open the gate at the right block, and that of facts among
        their best two blocks.

    Raises
    ------
    ValueError
        If the model has no tokenizer, the text is too short, or the model cannot have recall.
    """
    if loaded.tokenizer is None:
        raise ValueError("facts are planted as text, and this model has no tokenizer")
    tokenizer, model = loaded.tokenizer, loaded.model
    stream = probe_stream(text, lambda words: tokenizer.encode(words, add_special_tokens=False), seed)
    layers, kv_heads = shape_of(model)
    heads = tuple((layer, head) for layer in range(layers) for head in range(kv_heads))
    noted: dict[int, Noted] = {}
    moments = frozenset([*stream.quiet, *(m.now for m in stream.moments)])
    chooser = Probe(block=BLOCK, query_tokens=Heads.query_tokens, heads=heads, moments=moments, noted=noted)
    cache = StreamingCache.for_model(model, cap=CAP, recall=chooser, recall_every=EVERY)
    try:
        ids = torch.tensor([stream.ids], device=model.device)
        for first in range(0, ids.shape[1], 256):
            cache.prefill(model, ids[:, first : first + 256])
            if progress:
                progress(min(first + 256, ids.shape[1]), ids.shape[1])
    finally:
        cache.close()
    return _best_heads(stream, heads, noted) | {
        "model": loaded.name,
        "model_type": model.config.model_type,
        "shape": [layers, kv_heads],
        "signature": signature(model),
    }


def _best_heads(stream: ProbeStream, heads: Sequence[tuple[int, int]], noted: dict[int, Noted]) -> dict[str, Any]:
    def level(chosen: list[int], scores: str) -> float:
        """What 1 % of the moments of ordinary text reach."""
        best = [float(getattr(noted[now], scores)[chosen].float().mean(0).max()) for now in stream.quiet]
        return float(np.quantile(best, 1 - FALSE_ALARMS))

    def found(chosen: list[int], kind: str) -> float:
        """Share of the passages that open the gate at the right block; of the facts that are in the best two blocks."""
        hits, gate = [], level(chosen, "rows") if kind == "passage" else 0.0
        for moment in (m for m in stream.moments if m.kind == kind):
            one = noted[moment.now]
            scores = (one.rows if kind == "passage" else one.masses)[chosen].float().mean(0)
            best, blocks = scores.topk(1 if kind == "passage" else 2)
            right = [moment.first // BLOCK <= b + one.first <= (moment.end - 1) // BLOCK for b in blocks.tolist()]
            hits.append(any(right) and float(best[0]) >= gate)
        return float(np.mean(hits))

    def both(chosen: list[int]) -> float:
        return (found(chosen, "passage") + found(chosen, "fact")) / 2

    chosen = [max(range(len(heads)), key=lambda i: both([i]))]
    second = max((i for i in range(len(heads)) if i not in chosen), key=lambda i: both([*chosen, i]))
    if both([*chosen, second]) >= both(chosen) + BETTER:
        chosen.append(second)
    return {
        "heads": [list(heads[i]) for i in chosen],
        "level": round(level(chosen, "masses"), 4),
        "row_level": round(level(chosen, "rows"), 4),
        "passages_found": found(chosen, "passage"),
        "facts_found": found(chosen, "fact"),
        "tokens": len(stream.ids),
    }
