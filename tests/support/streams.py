"""Helpers of the cache tests: feed a cache in several ways, and the same policy told to the oracle."""

from collections.abc import Iterable, Iterator
from itertools import chain, repeat

import torch
from oracle.forward import Past, cache_positions, run
from oracle.models import VOCAB, token_ids
from oracle.network import Network
from oracle.rules import Rule
from transformers import DynamicCache, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from sinkstream.cache import SoftRing, StreamingCache
from sinkstream.cache.ahead import KeysAhead
from sinkstream.compat import with_cache
from sinkstream.policies import PRESETS, SCORERS, Candidates, EvictionPolicy, Scorer

# nats per token, float32 against the float64 oracle: 80 epsilons; stock models take 8 (test_oracle.py)
TOLERANCE = 1e-5
CLEAR = 1e-6  # relative; by how much a decision must be clear, some ten times what float32 takes of it
UNCLEAR = "rounding decides here, so machines may differ: give the test another text"
SMALL = {  # preset options, shrunk so that 300 tokens bring many prunes
    "compress_every": 12,
    "refresh": 6,
    "overlap": 5,
    "max_drop": 4,
    "slack": 9,
    "adaptive_min": 3,
    "adaptive_every": 6,
    "adaptive_max": 14,
    "observation": 8,
}
PAD = 96  # not in the prompts: generate() takes it for padding
STRICT = ("strict", "window-only")


def small_policy(name: str, **more) -> dict:
    """Options of a preset at test size."""
    options = {"sink": 4, "window": 20} | PRESETS[name]()
    shrunk = {k: SMALL[k] for k in SMALL if k in options and name not in STRICT}
    if "adaptive" in options:
        shrunk |= {k: v for k, v in SMALL.items() if k.startswith("adaptive_")}
    if options.get("scorer") == "window-attention":
        shrunk["observation"] = SMALL["observation"]
    return options | shrunk | more


# ---- feeding a cache ----


def nll_of(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """NLL of tokens 1 .. T - 1, (batch, T - 1) float64, from logits (batch, T, vocab)."""
    return -logits.double().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


@torch.no_grad()
def feed(model, cache: StreamingCache, ids: torch.Tensor, sizes: Iterable[int] = (), seen=None) -> torch.Tensor:
    """Logits (batch, T, vocab) of ids (batch, T), fed in forwards of the given sizes, then one token at a time.

    `seen`, if given, is called with the cache after each forward.
    """
    logits, fed = [], 0
    for size in chain(sizes, repeat(1)):
        logits.append(model(ids[:, fed : fed + size], **with_cache(model, cache)).logits)
        fed += logits[-1].shape[1]
        if seen:
            seen(cache)
        if fed >= ids.shape[1]:
            return torch.cat(logits, 1)


# ---- what half precision may cost ----


def rounding_bound(model) -> float:
    """Nats by which the NLL of one token may be off: eight roundings a layer, each of half an epsilon to one side."""
    return 8 * model.config.num_hidden_layers * torch.finfo(model.dtype).eps / 2


@torch.no_grad()
def full_cache_error(model, ids: torch.Tensor) -> torch.Tensor:
    """Error of the NLL, (T - 1,), of the plain module that is fed ids (T,) token by token and evicts nothing."""
    cache = DynamicCache(config=model.config)
    logits = torch.cat([model(token.view(1, 1), **with_cache(model, cache)).logits for token in ids], 1)
    return nll_of(logits, ids[None])[0] - run(Network(model), ids).nll


def root_mean_square(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


def one_too_far(visible: torch.Tensor) -> torch.Tensor:
    """For `oracle_run`: positions in the cache, but the first four tokens sit one too far: a wrong rotation."""
    positions = cache_positions(visible).clone()
    positions[..., :4] += 1
    return positions


def odd_sizes() -> Iterator[int]:
    """Forwards of awkward sizes that cross prunes anywhere."""
    while True:
        yield from (1, 7, 64, 33, 2, 50, 13)


def chunk_sizes(cache: StreamingCache, tokens: int) -> Iterable[int]:
    """Odd sizes where every prune is known in advance, what the cache allows otherwise."""
    return odd_sizes() if cache.policy.plan_known else cache.chunks(tokens, 29)


class Follow(LogitsProcessor):
    """Makes generate() write a given text."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, float("-inf"))
        return forced.scatter_(1, self.ids[:, input_ids.shape[1], None], 0.0)


def generate_text(model, cache: StreamingCache, ids: torch.Tensor, prompt: int = 1) -> torch.Tensor:
    """Logits (batch, T - prompt, vocab) of tokens prompt - 1 .. T - 2, through generate() that follows the text."""
    out = model.generate(
        ids[:, :prompt],
        **with_cache(model, cache),
        attention_mask=torch.ones_like(ids[:, :prompt]),  # else generate() takes the tokens of id 0 for pads
        max_new_tokens=ids.shape[1] - prompt,
        do_sample=False,
        logits_processor=[Follow(ids)],
        return_dict_in_generate=True,
        output_logits=True,
        pad_token_id=0,
    )
    assert torch.equal(out.sequences, ids)
    return torch.stack(out.logits, 1)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Likeliest tokens (...,) of logits (..., vocab), on a text where no other may be likeliest on another machine."""
    first, second = logits.topk(2).values.unbind(-1)
    assert (first - second).min() > 2 * TOLERANCE, UNCLEAR
    return logits.argmax(-1)


# ---- the same policy for the oracle ----


class FakeTokenizer:
    """Decodes every id to a piece of text whose structural weight is known."""

    pieces = ("word", " and", "\n", "the.", ' said"', "x", "ing")

    def __len__(self) -> int:
        return VOCAB

    def batch_decode(self, rows: list[list[int]]) -> list[str]:
        """One piece a row of one id."""
        return [self.pieces[token % len(self.pieces)] for (token,) in rows]

    def decode(self, ids: list[int]) -> str:
        """All pieces in a row."""
        return "".join(self.batch_decode([[token] for token in ids]))

    @staticmethod
    def weight(token: int) -> int:
        """3 newline, 2 sentence end, 1 quotation mark, 0 otherwise."""
        return (0, 0, 3, 2, 1, 0, 0)[token % 7]


def _structure(past: Past, tokens, group):
    return torch.tensor([FakeTokenizer.weight(int(past.ids[0, token])) for token in tokens])


def _bit_reversal(past: Past, tokens, group):
    return torch.tensor([-int(f"{token:040b}"[::-1], 2) for token in tokens])


def _key_norm(past: Past, tokens, group):
    return -(1000 * past.cached_key_norm(tokens, group).log())


# What the oracle knows by itself; any other scorer is asked (`AskedScorer`).
# scorer name -> (options -> score(past, tokens, group), who chooses)
CHOOSERS = {
    "uniform": (lambda o: _bit_reversal, "shared"),
    "structural": (lambda o: _structure, "shared"),
    "uncertainty": (lambda o: lambda p, t, g: getattr(p, o.get("uncertainty", "nll"))(t), "shared"),
    "window-attention": (lambda o: lambda p, t, g: p.recent(t, o["observation"], g), "head"),
    "accumulated-attention": (lambda o: lambda p, t, g: p.accumulated(t, g), "head"),
    "last-query": (lambda o: lambda p, t, g: p.last_query(t, g), "head"),
    "key-norm": (lambda o: _key_norm, "head"),
}
WHOLE = ("uniform", "structural")  # scores that no rounding touches
ROUNDED = ("key-norm",)  # scores of which only whole numbers count


def keep_clearly(score, scorer: str):
    """`keep_best` by a scorer's score, where what is kept is clear: the same whatever way float32 rounds."""

    def choose(past: Past, candidates: list[int], keep: int, t: int, group) -> list[int]:
        scores = score(past, candidates, group).double()
        blur = 0.0 if scorer in WHOLE else CLEAR * scores.abs()
        known = [scores, scores - blur, scores + blur]
        exact, least, most = ((s.round() if scorer in ROUNDED else s).tolist() for s in known)
        least, most = dict(zip(candidates, least)), dict(zip(candidates, most))
        ranked = [token for _, token in sorted(zip(exact, candidates))]
        dropped, kept = ranked[:-keep], ranked[-keep:]
        surely = min((least[token], token) for token in kept)
        assert all((most[token], token) < surely for token in dropped), UNCLEAR
        return kept

    return choose


class Risk:
    """The adaptive trigger, written again from its description, for the oracle to ask."""

    def __init__(self, signal: str, low: int, every: int, quantile: float = 0.75, smoothing: float = 0.8):
        self.signal, self.low, self.every, self.smoothing = signal, low, every, smoothing
        self.quantiles, self.estimates, self.scales = (1 - quantile, quantile), [None, None], [0.0, 0.0]
        self.risk, self.steps = None, 0

    def __call__(self, past: Past, t: int, gathered: int) -> bool:
        read = past.output_entropy if self.signal == "entropy" else past.output_doubt
        for value in read(list(range(self.steps, t))).tolist():
            self._learn(value)
        self.steps = t
        lower, upper = self.estimates
        if t < 64:
            return gathered >= self.every
        if gathered < self.low:
            return False
        bound = upper if gathered < self.every else min(lower, upper)
        assert abs(self.risk - bound) > CLEAR * abs(bound), UNCLEAR
        return self.risk > bound

    def _learn(self, value: float) -> None:
        self.risk = value if self.risk is None else self.smoothing * self.risk + (1 - self.smoothing) * value
        for i, q in enumerate(self.quantiles):
            if self.estimates[i] is None:
                self.estimates[i] = self.risk
            self.scales[i] = 0.95 * self.scales[i] + 0.05 * abs(self.risk - self.estimates[i])
            below = 1.0 if self.risk <= self.estimates[i] else 0.0
            self.estimates[i] += 4 * 0.05 * self.scales[i] * (q - below)


class AskedScorer:
    """Lets a registered scorer choose, by its own `score`, on candidates that the oracle works out in float64.

    What is known of the candidates and which of them the highest scores keep is thus independent of the cache, for any
    scorer; what a score ought to be is for a test of that scorer.
    """

    def __init__(self, scorer: Scorer):
        self.scorer, self._asked = scorer, (None, None)

    def __call__(self, past: Past, candidates: list[int], keep: int, t: int, group) -> list[int]:
        layer, head = group or (0, 0)
        row = past.visible[layer, head].tolist()
        first = row.index(candidates[0])
        assert row[first : first + len(candidates)] == candidates, "candidates stand in a row behind the sinks"
        if self._asked[0] != t:  # all heads at once: a scorer may look at the others
            positions = past.visible[..., first : first + len(candidates)]
            self._asked = t, self.scorer.score(self._known(past, positions))[:, 0]
        layers, heads, _ = self._asked[1].shape
        scores = self._asked[1][min(layer, layers - 1), min(head, heads - 1)].tolist()
        return [token for _, token in sorted(zip(scores, candidates))[-keep:]]

    def _known(self, past: Past, positions: torch.Tensor) -> Candidates:
        """All fields that the scorer needs, (layers or 1, 1, kv_heads or 1, candidates), float64."""
        read = {
            "structure": lambda tokens, group: _structure(past, tokens, group).double(),
            "nll": lambda tokens, group: past.nll(tokens),
            "entropy": lambda tokens, group: past.entropy(tokens),
            "attention": lambda tokens, group: past.recent(tokens, self.scorer.observed_queries, group),
            "accumulated": past.accumulated,
            "key_norm": past.cached_key_norm,
        }
        layers, heads, _ = positions.shape
        fields = {
            name: torch.stack(
                [torch.stack([read[name](positions[i, j], (i, j)) for j in range(heads)]) for i in range(layers)]
            )[:, None]
            for name in self.scorer.needs
        }
        if not self.scorer.per_head:
            positions = positions[:1, :1]
            fields |= {n: fields[n][:1, :, :1] for n in ("structure", "nll", "entropy") if n in fields}
        return Candidates(position=positions[:, None], **fields)


def oracle_run(model, ids: torch.Tensor, options: dict, positions: str = "cache", *, ask: bool = False):
    """The oracle's run of the same policy over ids (T,).

    `ask`: let the registered scorer choose even if the oracle has a chooser of its own; for other scorers it does.
    """
    rule = {k: v for k, v in options.items() if k in Rule.__dataclass_fields__ and k != "adaptive"}
    more = {}
    if "adaptive" in options:
        more["want_prune"] = Risk(options["adaptive"], options["adaptive_min"], options["adaptive_every"])
        rule |= {"adaptive": True, "compress_every": options["adaptive_max"]}
    scorer = options.get("scorer")
    if scorer in CHOOSERS and not ask:
        make, per = CHOOSERS[scorer]
        more |= {"choose": keep_clearly(make(options), scorer), "per": per}
    elif scorer:
        registered = EvictionPolicy.build(**options).scorer
        more |= {"choose": AskedScorer(registered), "per": "head" if registered.per_head else "shared"}
    return run(Network(model), ids, Rule(**rule), positions=positions, **more)


def make_cache(model, options: dict, **more) -> StreamingCache:
    """A cache under the options; with the fake tokenizer where structure is asked for."""
    needs = SCORERS[options["scorer"]].needs if "scorer" in options else ()
    tokenizer = {"tokenizer": FakeTokenizer()} if "structure" in needs else {}
    return StreamingCache.for_model(model, **options, **tokenizer, **more)


def prompt_of(tokens: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    """Prompt (batch, tokens) without the padding token."""
    return token_ids(tokens, seed=seed, batch=batch).clamp(max=PAD - 1)


class Collect(BaseStreamer):
    """Takes what generate() streams."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then token by token."""
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        """Nothing more comes."""
        self.ended = True


def shift_pinned_frame(monkeypatch) -> None:
    """A control: pinned keys lie one position beside their place, also those that are rotated ahead."""
    phases, at = SoftRing.pinned_phases, KeysAhead.at

    def off_by_one(ring):
        ring.first_window += 1
        try:
            return phases(ring)
        finally:
            ring.first_window -= 1

    monkeypatch.setattr(SoftRing, "pinned_phases", off_by_one)
    monkeypatch.setattr(
        KeysAhead, "at", lambda ahead, first, *more: at(ahead, None if first is None else first + 1, *more)
    )
