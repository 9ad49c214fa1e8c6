"""What callers of an engine give it: streams, token ids and prompts, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sinkstream.cache.vocabulary import check_vocabulary
from sinkstream.kernels.runtime import to_device
from sinkstream.policies.options import plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = torch.Tensor | Sequence[int]
ACCEPTED = "a tensor (tokens,) or a sequence of whole numbers"


def check_stream(stream: int, streams: int) -> None:
    """Refuse what is no index of `streams` streams. Raises ValueError."""
    whole = plain(stream)
    if isinstance(whole, bool) or not isinstance(whole, int) or not 0 <= stream < streams:
        raise ValueError(f"stream={stream!r} is not accepted; accepted: 0 to {streams - 1}")


def token_ids(
    ids: Ids, vocab: int, device: torch.device, *, empty: bool = False, between_steps: bool = False
) -> torch.Tensor:
    """Token ids as ``(tokens,)`` int64 on the device, checked; for ids on a GPU the host waits for their range.

    Parameters
    ----------
    ids : Tensor, (tokens,), whole numbers, or sequence of int
    vocab : int
        Token ids are below it.
    empty : bool
        Whether no token at all is accepted.
    between_steps : bool
        Whether the host must not wait: the values of ids on a GPU are not checked then.

    Raises
    ------
    ValueError
        Naming shape, dtype, or the first token that is not in the vocabulary, and what is accepted.
    """
    if isinstance(ids, (str, bytes, Mapping)) or not hasattr(ids, "__len__"):
        what = "; of what a tokenizer returns, its input_ids" if isinstance(ids, Mapping) else ""
        raise ValueError(f"ids are {type(ids).__name__}; accepted: {ACCEPTED}{what}")
    own = not isinstance(ids, torch.Tensor)  # a tensor of the caller's may change once this has returned
    on_host = not isinstance(ids, torch.Tensor) or ids.device.type == "cpu"
    if not isinstance(ids, torch.Tensor):
        try:
            ids = torch.tensor(ids, dtype=None if len(ids) else torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:  # of texts, of lists of several lengths, of huge numbers
            raise ValueError(f"ids are {type(ids).__name__} of other things; accepted: {ACCEPTED}") from error
    if ids.ndim != 1 or (not len(ids) and not empty) or ids.is_floating_point() or ids.dtype == torch.bool:
        least = "" if empty else ", at least one"
        row = "; of a batch, one row: ids[0]" if ids.ndim == 2 else ""
        raise ValueError(
            f"ids of shape {tuple(ids.shape)} and {ids.dtype}; accepted: (tokens,) whole numbers{least}{row}"
        )
    ids = ids.to(torch.int64)
    if on_host or not between_steps:
        check_vocabulary(ids, vocab, "ids")
    return to_device(ids, device) if own else ids.to(device)


def check_step(tokens: torch.Tensor, streams: Sequence[int], vocab: int) -> None:
    """Raise ValueError if a token ``tokens[s]`` of one of the streams is not in the vocabulary; others may be none."""
    if int(tokens.max()) < vocab:
        return
    for stream in streams:
        token = int(tokens[stream])
        if token >= vocab:
            raise ValueError(
                f"token id {token} for stream {stream} is not in the vocabulary of {vocab} tokens; accepted: 0 to"
                f" {vocab - 1}, or a negative one for the likeliest"
            )


def encoded(prompt: Ids | str, tokenizer: Any) -> Ids:
    """Token ids of a prompt, which may be text if there is a tokenizer. Raises ValueError if there is none."""
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise ValueError("a prompt of text needs a tokenizer; give the engine tokenizer=TOKENIZER, or ids")
    return tokenizer(prompt)["input_ids"]


def end_tokens(model: PreTrainedModel) -> list[int]:
    """Ids of the model's end-of-text tokens."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
