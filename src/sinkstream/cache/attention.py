"""The attention function that a cache can put on its model: transformers' sdpa, watched, and in two frames if need be.

It goes in through transformers' public attention interface, for the life of the caches that ask for it or for one chunk
that crosses prunes. Nothing happens on import, and in a forward of anybody else it is sdpa itself.
"""

import threading
from contextvars import ContextVar
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sinkstream.cache.chunks import TwoFrames
from sinkstream.cache.observe import AttentionObserver
from sinkstream.compat import attention_implementation

SINKSTREAM_SDPA = "sinkstream_sdpa"


@dataclass(frozen=True)
class Forward:
    """What the attention of the forward under way must do besides sdpa.

    Attributes
    ----------
    observer : AttentionObserver or None
        Is shown the queries of every layer.
    frames : TwoFrames or None
        Computes the attention in place of sdpa.
    """

    observer: AttentionObserver | None = None
    frames: TwoFrames | None = None


_PLAIN = Forward()
running: ContextVar[Forward | None] = ContextVar("sinkstream_running_forward", default=None)
_lock = threading.RLock()  # re-entrant: a cache may be collected, and let go of the model, while another one begins
_users: WeakKeyDictionary[PreTrainedModel, set[object]] = WeakKeyDictionary()


def _sinkstream_sdpa(module, query, key, value, attention_mask, **kwargs):
    forward = running.get() or _PLAIN
    if forward.observer is not None:
        forward.observer.see(module.layer_idx, query, key, kwargs["scaling"])
    if forward.frames is not None:
        return forward.frames.attend(query, key, value, kwargs["scaling"]), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def switch_attention(decoder: PreTrainedModel, user: object) -> None:
    """Switch a decoder from sdpa to this module's function, for one user; several caches can ask for it."""
    with _lock:
        users = _users.setdefault(decoder, set())
        users.add(user)
        if not is_switched(decoder):
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
