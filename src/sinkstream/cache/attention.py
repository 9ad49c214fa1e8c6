"""The attention function that a cache can put on its model: transformers' sdpa, watched, and in two frames if need be.

It goes in through transformers' public attention interface, for the life of the caches that ask for it or for one chunk
that crosses prunes. Nothing happens on import, and in a forward of anybody else it is sdpa itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sinkstream.cache.chosen_frames import ChosenFrames
from sinkstream.cache.chunks import TwoFrames
from sinkstream.compat import attention_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINKSTREAM_SDPA = "sinkstream_sdpa"


class Observer(Protocol):
    """What is shown the attention of every layer: an `AttentionObserver`, or one of each row."""

    def see(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """As `AttentionObserver.see`."""


@dataclass(frozen=True)
class Forward:
    """What the attention of the forward under way must do besides sdpa.

    Attributes
    ----------
    observer : Observer or None
        Is shown the queries of every layer.
    frames : TwoFrames, ChosenFrames or None
        Computes the attention in place of sdpa.
    write : callable or None
        ``write(layer, keys, values)`` puts the new entries into the cache and returns everything visible; given where
        this function is handed the new entries alone.
    rows : dict of int
        Rows of the ring, by layer; other layers slide, and sdpa computes their attention.
    mask, sliding_mask : Tensor or None, (batch or 1, 1, tokens, visible), bool
        Which entries a query of a streaming layer, and of a sliding one, sees, where this function writes them; None:
        as a causal mask has it.
    """

    observer: Observer | None = None
    frames: TwoFrames | ChosenFrames | None = None
    write: Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    rows: Mapping[int, int] = field(default_factory=dict)
    mask: torch.Tensor | None = None
    sliding_mask: torch.Tensor | None = None


_PLAIN = Forward()
_WRITING = torch.int8  # dtype of the mask that says so; no other mask has it
running: ContextVar[Forward | None] = ContextVar("sinkstream_running_forward", default=None)
_lock = threading.RLock()  # re-entrant: a cache may be collected, and let go of the model, while another one begins
_users: WeakKeyDictionary[PreTrainedModel, set[object]] = WeakKeyDictionary()


def _write_and_attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scaling: float
) -> torch.Tensor:
    """Put the new entries of one layer into the cache of the forward under way and attend to everything visible.

    Parameters
    ----------
    query : Tensor, (batch, query_heads, tokens, head_dim)
    key, value : Tensor, (batch, kv_heads, tokens, head_dim)

    Returns
    -------
    Tensor, (batch, tokens, query_heads, head_dim), contiguous
    """
    forward = running.get()
    if forward is None or forward.write is None:
        raise ValueError("a compiled forward was run outside of a call of the model that its StreamingCache belongs to")
    key, value = forward.write(layer, key, value)
    row = forward.rows.get(layer)
    if forward.observer is not None and row is not None:
        forward.observer.see(row, query, key, scaling)
    if forward.frames is not None and row is not None:
        return forward.frames.attend(row, query, key, value, scaling).contiguous()
    tokens, visible = query.shape[2], key.shape[2]
    mask = forward.sliding_mask if row is None else forward.mask
    if mask is None and 1 < tokens < visible:
        mask = torch.ones(tokens, visible, dtype=torch.bool, device=query.device).tril(visible - tokens)
    causal = mask is None and 1 < tokens == visible
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous()


_library = torch.library.Library("sinkstream", "FRAGMENT")
_library.define(
    "write_and_attend(Tensor query, Tensor key, Tensor value, int layer, float scaling) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # its launches differ from step to step
)
_library.impl("write_and_attend", _write_and_attend, "CompositeExplicitAutograd")


@torch.library.register_fake("sinkstream::write_and_attend")
def _shape_of_attention(query, key, value, layer, scaling):
    batch, heads, tokens, dim = query.shape
    return query.new_empty((batch, tokens, heads, dim))


def writing_mask(device: torch.device) -> torch.Tensor:
    """What a cache passes for a mask where attention writes the new entries: of four axes, so that it is passed on."""
    return torch.ones((1, 1, 1, 1), dtype=_WRITING, device=device)


def _sinkstream_sdpa(module, query, key, value, attention_mask, **kwargs):
    if attention_mask is not None and attention_mask.dtype == _WRITING:
        # compiled, it is one opaque call: no length of the cache is in the graph
        call = torch.ops.sinkstream.write_and_attend if torch.compiler.is_compiling() else _write_and_attend
        return call(query, key, value, module.layer_idx, kwargs["scaling"]), None
    forward = running.get() or _PLAIN
    row = forward.rows.get(module.layer_idx)
    if forward.observer is not None and row is not None:
        forward.observer.see(row, query, key, kwargs["scaling"])
    if forward.frames is not None and row is not None:
        return forward.frames.attend(row, query, key, value, kwargs["scaling"]), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def switch_attention(decoder: PreTrainedModel, user: object) -> None:
    """Switch a decoder from sdpa to this module's function, for one user; several caches can ask for it."""
    with _lock:
        users = _users.setdefault(decoder, set())
        users.add(user)
        if not is_switched(decoder):
            from transformers import AttentionInterface, AttentionMaskInterface
            from transformers.masking_utils import sdpa_mask

            AttentionInterface.register(SINKSTREAM_SDPA, _sinkstream_sdpa)
            AttentionMaskInterface.register(SINKSTREAM_SDPA, sdpa_mask)
            decoder.set_attn_implementation(SINKSTREAM_SDPA)


def release_attention(decoder: PreTrainedModel, user: object) -> None:
    """Undo `switch_attention` of one user; the last one switches the decoder back to sdpa."""
    with _lock:
        users = _users.get(decoder, set())
        if user in users:
            users.discard(user)
            if not users:
                decoder.set_attn_implementation("sdpa")


def is_switched(decoder: PreTrainedModel) -> bool:
    """Whether this module's function computes the decoder's attention now."""
    return attention_implementation(decoder.config) == SINKSTREAM_SDPA
