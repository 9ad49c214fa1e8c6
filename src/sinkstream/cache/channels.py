"""Channels: what is kept of every cached token besides its key and value, because a scorer reads it."""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from sinkstream.policies import SIGNALS, EvictionPolicy

UNCERTAINTY = frozenset({"nll", "entropy"})  # read from the distribution that a token was drawn from
KEPT = UNCERTAINTY | {"structure", "accumulated"}


@dataclass(frozen=True)
class Channel:
    """A float32 quantity of every cached token.

    Attributes
    ----------
    name : str
        A field of `Candidates`.
    per_head : bool
        Shape ``(layers, batch, kv_heads, slots)`` if true, ``(1, batch, 1, slots)`` otherwise.
    """

    name: str
    per_head: bool


def kept_channels(policy: EvictionPolicy) -> list[Channel]:
    """The channels that a policy's scorer reads; each head has its own where heads pin different tokens."""
    if policy.scorer is None:
        return []
    return [Channel(n, policy.scorer.per_head or n == "accumulated") for n in sorted(KEPT & policy.needs)]


def token_channels(
    names: Collection[str], ids: torch.Tensor | None, log_probs: torch.Tensor | None, structure: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What is known of new tokens as soon as they come; nothing asks the host.

    Parameters
    ----------
    names : collection of str
        Channels that are kept; those that other code fills are passed over.
    ids : Tensor or None, (batch, tokens), int64
        The new tokens; where structure or NLL is kept.
    log_probs : Tensor or None, (batch, tokens, vocab), float32
        Log-softmax that each token was drawn from, 0 throughout for the first token of a stream; where NLL or entropy
        is kept.
    structure : Tensor or None, (vocab,), float32
        Structural weight of every token id; where it is kept.

    Returns
    -------
    dict of Tensor, (batch, tokens), float32
        By name; NLL and entropy in nats, 0 for the first token of a stream and where they are not a number: a token of
        which nothing is known is not pinned for it.
    """
    found = {}
    if "structure" in names:
        assert structure is not None and ids is not None, "structure is looked up by token id"
        found["structure"] = structure[ids]
    if "nll" in names:
        assert log_probs is not None and ids is not None, "NLL is read from the distribution, by token id"
        found["nll"] = -log_probs.gather(-1, ids[..., None])[..., 0]
    if "entropy" in names:
        assert log_probs is not None, "entropy is read from the distribution"
        found["entropy"] = SIGNALS["entropy"](log_probs)
    for name in UNCERTAINTY & found.keys():
        found[name] = torch.where(found[name].isnan(), 0.0, found[name])
    return found
