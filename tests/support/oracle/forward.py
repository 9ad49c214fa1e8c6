"""Brute force in float64: every token attends to unrotated keys of its visible set, rotated from scratch.

`run` feeds a sequence token by token under a rule of `rules`; `Past` is what a chooser may look at when a prune asks
which tokens to keep; `Network`, from `network`, does the arithmetic.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .network import F64, Network
from .rules import Rule, Stream


class Past:
    """Everything known before token t is appended; a chooser reads it through the methods below.

    A `group` is None (one shared set), (layer, None) (a set per layer) or (layer, kv_head). Scores are averaged over
    the batch, over the q heads of a kv head, and over whatever layers and kv heads the group covers; each method
    returns a float64 tensor (len(tokens),).
    """

    def __init__(self, network: Network, ids: torch.Tensor, positions):
        shape = (network.layers, ids.shape[0], network.kv_heads, ids.shape[1], network.head_dim)
        self.network, self.ids, self.positions = network, ids, positions
        self.keys, self.values = torch.zeros(shape, dtype=F64), torch.zeros(shape, dtype=F64)
        self.queries = torch.zeros((*shape[:2], network.heads, *shape[3:]), dtype=F64)
        self._received = torch.zeros(network.layers, network.kv_heads, ids.shape[1], dtype=F64)
        self._last = torch.zeros_like(self._received)
        self._nll = torch.zeros(ids.shape, dtype=F64)  # of the token itself; 0 for token 0
        self._entropy = torch.zeros(ids.shape, dtype=F64)  # of the output at t
        self._doubt = torch.zeros(ids.shape, dtype=F64)  # 1 - top-1 probability of the output at t
        self.visible: torch.Tensor | None = None  # (layers, kv_heads, n): what is cached before a drop
        self.window: list[int] = []  # tokens of the window before a drop, those that are about to leave it included

    @staticmethod
    def _pick(scores: torch.Tensor, group, tokens) -> torch.Tensor:
        layer, head = group or (None, None)
        scores = scores if layer is None else scores[layer : layer + 1]
        scores = scores if head is None else scores[:, head : head + 1]
        return scores.mean((0, 1))[torch.as_tensor(tokens)]

    def nll(self, tokens) -> torch.Tensor:
        """Own NLL of each token given its past, in nats; 0 for token 0, which nothing predicted."""
        return self._nll.mean(0)[torch.as_tensor(tokens)]

    def entropy(self, tokens) -> torch.Tensor:
        """Entropy in nats of the distribution each token was drawn from (output of step t - 1); 0 for token 0."""
        tokens = torch.as_tensor(tokens)
        return torch.where(tokens > 0, self.output_entropy((tokens - 1).clamp(min=0)), 0.0)

    def output_entropy(self, steps) -> torch.Tensor:
        """Entropy in nats of the next-token distribution produced at each step."""
        return self._entropy.mean(0)[torch.as_tensor(steps)]

    def output_doubt(self, steps) -> torch.Tensor:
        """1 - the largest probability of the next-token distribution produced at each step."""
        return self._doubt.mean(0)[torch.as_tensor(steps)]

    def key_norm(self, tokens, group=None) -> torch.Tensor:
        """L2 norm of the unrotated key."""
        return self._pick(self.keys.norm(dim=-1).mean(1), group, tokens)

    def cached_key_norm(self, tokens, group=None) -> torch.Tensor:
        """L2 norm of the key as a cache holds it."""
        keys = torch.stack([self.network.as_cached(layer, keys) for layer, keys in enumerate(self.keys)])
        return self._pick(keys.norm(dim=-1).mean(1), group, tokens)

    def accumulated(self, tokens, group=None) -> torch.Tensor:
        """Attention received, summed over all queries so far (the token's own included)."""
        return self._pick(self._received, group, tokens)

    def last_query(self, tokens, group=None) -> torch.Tensor:
        """Attention received from the latest query, as it was when that token was computed."""
        return self._pick(self._last, group, tokens)

    def recent(self, tokens, obs: int, group=None) -> torch.Tensor:
        """Attention received from the latest `obs` queries, re-scored against what is cached now.

        Queries and keys sit at their current positions; queries see window keys causally. A query is asked only while
        its own token is in the window, so there are fewer than `obs` early on and where the window is shorter.
        """
        network, visible = self.network, self.visible
        layers, kv_heads, n = visible.shape
        asking_tokens = [token for token in self.window if token >= int(visible[0, 0, -1]) + 1 - obs]
        obs = len(asking_tokens)
        assert (visible[..., n - obs :] == torch.tensor(asking_tokens)).all(), "the window is what every head sees last"
        place = self.positions(visible)
        scores = torch.zeros_like(self._received)
        for layer in range(layers):
            rows = torch.arange(kv_heads)[:, None]
            k = self.keys[layer][:, rows, visible[layer]]
            q = self.queries[layer].unflatten(1, (kv_heads, -1))  # (batch, kv_heads, group, tokens, dim)
            asking = visible[layer, :, n - obs :]
            q = q.transpose(2, 3)[:, rows, asking].transpose(2, 3)
            allowed = visible[layer][:, None, :] <= asking[:, :, None]
            probabilities = network.attend(q, k, place[layer, :, n - obs :], place[layer], allowed, layer)
            scores[layer].scatter_(1, visible[layer], probabilities.sum(3).mean((0, 2)))
        return self._pick(scores, group, tokens)


@dataclass
class Trace:
    """What happened at one step: indices (layers, kv_heads, n), attention (batch, q_heads, n) a layer, or None."""

    visible: torch.Tensor
    event: bool
    drop_size: int
    attention: list[torch.Tensor] | None


@dataclass
class Run:
    """Result of `run`.

    Attributes
    ----------
    nll : torch.Tensor
        (T - 1,) or (batch, T - 1), float64, nats: entry i is the NLL of token i + 1, produced at step i.
    steps : list of Trace
        One per token.
    past : Past
        State after the last token: keys, values, scores.
    logits : torch.Tensor or None
        (T, vocab) or (batch, T, vocab) if asked for.
    """

    nll: torch.Tensor
    steps: list[Trace]
    past: Past
    logits: torch.Tensor | None


def keep_best(score: Callable) -> Callable:
    """A chooser for `run` that keeps the highest `score(past, tokens, group)`; of equals, the more recent token."""

    def choose(past: Past, candidates: list[int], keep: int, t: int, group) -> list[int]:
        scored = zip(score(past, candidates, group).tolist(), candidates)
        return [token for _, token in sorted(scored)[-keep:]]

    return choose


def cache_positions(visible: torch.Tensor) -> torch.Tensor:
    """0 .. n - 1 in visible order, for visible (layers, kv_heads, n)."""
    return torch.arange(visible.shape[-1]).expand(visible.shape)


def original_positions(visible: torch.Tensor) -> torch.Tensor:
    """Every token keeps its absolute index."""
    return visible


POSITIONS = {"cache": cache_positions, "original": original_positions}


@torch.inference_mode()
def run(
    network: Network,
    ids: torch.Tensor,
    rule: Rule | None = None,
    positions: str | Callable[[torch.Tensor], torch.Tensor] = "cache",
    choose: Callable | None = None,
    want_prune: Callable | None = None,
    per: str = "shared",
    keep_attention: bool = False,
    keep_logits: bool = False,
) -> Run:
    """Feed a whole sequence token by token.

    Parameters
    ----------
    network : Network
    ids : torch.Tensor
        (T,) or (batch, T) token ids. A batch shares its visible sets.
    rule : Rule, optional
        Default: nothing is ever evicted.
    positions : "cache", "original" or callable
        A callable maps visible indices (layers, kv_heads, n) to positions of the same shape, the query's last.
    choose : callable (past, candidates, keep, t, group) -> list of int, optional
        Which tokens stay pinned; see `rules.Stream` and `Past`.
    want_prune : callable (past, t, gathered) -> bool, optional
        Fires adaptive events.
    per : "shared", "layer" or "head"
        Who chooses: everyone together (group None), each layer (layer, None), or each (layer, kv_head).
    keep_attention, keep_logits : bool
        Keep attention probabilities in each `Trace`, logits in the `Run`.
    """
    ids_2d = ids if ids.dim() == 2 else ids[None]
    rule = rule or Rule(sink=0, window=ids_2d.shape[1])
    place = POSITIONS[positions] if isinstance(positions, str) else positions
    past = Past(network, ids_2d, place)
    groups = {
        "shared": [None],
        "layer": [(layer, None) for layer in range(network.layers)],
        "head": [(layer, head) for layer in range(network.layers) for head in range(network.kv_heads)],
    }[per]
    stream = Stream(
        rule,
        choose and (lambda *arguments: choose(past, *arguments)),
        want_prune and (lambda *arguments: want_prune(past, *arguments)),
        groups,
    )
    traces, logits = [], []
    for t in range(ids_2d.shape[1]):
        step = stream.append()
        visible = _as_tensor(step.visible, network)
        out, attention = _step(network, past, t, visible)
        logits.append(out if keep_logits else None)
        past.visible, past.window = visible, list(stream.window)
        traces.append(Trace(visible, step.event, step.drop_size, attention if keep_attention else None))
    nll = past._nll[:, 1:]
    shown = torch.stack(logits, 1) if keep_logits else None
    if ids.dim() == 1:
        nll, shown = nll[0], shown[0] if keep_logits else None
    return Run(nll, traces, past, shown)


def _as_tensor(visible: dict, network: Network) -> torch.Tensor:
    """Visible sets of all groups as (layers, kv_heads, n)."""
    rows = torch.tensor(list(visible.values()))
    if len(rows) == 1 and None in visible:
        return rows.expand(network.layers, network.kv_heads, -1)
    return rows.unflatten(0, (network.layers, -1)).expand(-1, network.kv_heads, -1)


def _step(network: Network, past: Past, t: int, visible: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One token through all layers; returns logits (batch, vocab) and every layer's attention (batch, q_heads, n)."""
    place = past.positions(visible)
    hidden, attention = network.embed(past.ids[:, t]), []
    past._last.zero_()
    rows = torch.arange(network.kv_heads)[:, None]
    for layer in range(network.layers):
        q, k, v = network.project(layer, hidden)
        past.queries[layer, :, :, t], past.keys[layer, :, :, t], past.values[layer, :, :, t] = q, k, v
        seen, where = visible[layer], place[layer]
        if network.windows[layer] is not None:  # a layer that slides: the latest tokens, at their own indices
            seen = where = torch.arange(max(0, t + 1 - network.windows[layer]), t + 1).expand(network.kv_heads, -1)
        grouped = q.unflatten(1, (network.kv_heads, -1))[:, :, :, None]  # (batch, kv_heads, group, 1, dim)
        probabilities = network.attend(
            grouped, past.keys[layer][:, rows, seen], where[:, -1:], where, layer=layer
        ).squeeze(3)
        context = probabilities @ past.values[layer][:, rows, seen]
        past._last[layer].scatter_(1, seen, probabilities.mean((0, 2)))
        attention.append(probabilities.flatten(1, 2))
        hidden = network.finish(layer, hidden, context.flatten(1, 2))
    past._received += past._last
    logits, log_p = network.log_probabilities(hidden)
    past._entropy[:, t] = -(log_p.exp() * log_p).sum(-1)
    past._doubt[:, t] = 1 - log_p.amax(-1).exp()
    if t + 1 < past.ids.shape[1]:
        past._nll[:, t + 1] = -log_p.gather(1, past.ids[:, t + 1 : t + 2])[:, 0]
    return logits, attention
