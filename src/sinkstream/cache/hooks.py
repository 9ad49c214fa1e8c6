"""The hooks that a streaming cache puts on the one model it was made for.

They look at ``past_key_values`` of each call and act only on their own cache. The cache is held weakly: when it is
closed or collected the hooks are gone and the model is as it was.
"""

import weakref
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from sinkstream.cache.attention import release_attention, switch_attention


def install_hooks(cache, model: PreTrainedModel, *, attention: bool) -> Callable[[], None]:
    """Put the hooks of `cache` on `model`.

    Parameters
    ----------
    attention : bool
        Whether the model's attention must be switched to `cache.attention`.

    Returns
    -------
    callable
        Takes the hooks off; safe to call more than once.

    Raises
    ------
    ValueError
        If logits are needed and this model cannot show them, or the attention to be switched is not sdpa.
    """
    if attention and cache.spec.attention != "sdpa":
        raise ValueError(f"attention scorers need attn_implementation='sdpa'; the model uses {cache.spec.attention!r}")
    decoder = cache.spec.decoder
    if cache.needs_logits and model is decoder:
        raise ValueError(
            f"this policy reads the logits; {type(model).__name__} has none, give the causal language model"
        )
    mine = weakref.ref(cache)
    handles = [
        decoder.register_forward_pre_hook(_before_decoder(mine), with_kwargs=True),
        decoder.register_forward_hook(_after_decoder(mine), with_kwargs=True, always_call=True),
    ]
    if model is not decoder:
        handles += [
            model.register_forward_pre_hook(_before_model(mine), with_kwargs=True),
            model.register_forward_hook(_after_model(mine), with_kwargs=True, always_call=True),
        ]
    if attention:
        switch_attention(decoder)
    close = weakref.finalize(cache, _remove, handles, decoder if attention else None)
    close.atexit = False
    return close


def _remove(handles: list, switched: PreTrainedModel | None) -> None:
    for handle in handles:
        handle.remove()
    if switched is not None:
        release_attention(switched)


def _before_decoder(mine: weakref.ref):
    def hook(module, args, kwargs):
        cache = mine()
        if cache is None or kwargs.get("past_key_values") is not cache:
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        given = ids if ids is not None else kwargs.get("inputs_embeds")
        if given is None:
            return None  # the decoder itself refuses that
        batch, tokens = given.shape[:2]
        _check_mask_and_positions(kwargs, cache.seen_tokens, tokens)
        positions, mask = cache._begin(batch, tokens, ids, given.device)
        return args, kwargs | {"position_ids": positions, "attention_mask": mask}

    return hook


def _after_decoder(mine: weakref.ref):
    def hook(module, args, kwargs, output):
        cache = mine()
        if cache is None or kwargs.get("past_key_values") is not cache:
            return
        if output is None:
            cache._abort()
        elif not cache._in_model:
            cache._commit()

    return hook


def _before_model(mine: weakref.ref):
    def hook(module, args, kwargs):
        cache = mine()
        if cache is None or kwargs.get("past_key_values") is not cache:
            return None
        cache._abort()
        prefilled = _prefill_all_but_last(cache, module, args, kwargs)
        args, kwargs = prefilled or (args, kwargs)
        cache._in_model = True
        if cache.needs_logits:
            return args, kwargs | {"logits_to_keep": 0}
        return prefilled

    return hook


def _prefill_all_but_last(cache, model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Where only the last logits are asked for (as generate() asks of a prompt), feed a long prompt chunk by chunk.

    Returns the call that is left, that of the last token; None if the tokens fit one call as they are.
    """
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None or kwargs.get("logits_to_keep") != 1 or ids.shape[1] <= cache.max_chunk_tokens():
        return None
    _check_mask_and_positions(kwargs, cache.seen_tokens, ids.shape[1])
    cache.prefill(model, ids[:, :-1])
    left = {"attention_mask": None, "position_ids": None} | ({} if args else {"input_ids": ids[:, -1:]})
    return (ids[:, -1:], *args[1:]) if args else (), kwargs | left


def _after_model(mine: weakref.ref):
    def hook(module, args, kwargs, output):
        cache = mine()
        if cache is None or kwargs.get("past_key_values") is not cache:
            return
        if output is None:  # the head raised, or something after it: then the tokens never came
            cache._abort()
        else:
            cache._commit(output.logits if hasattr(output, "logits") else output[0])

    return hook


def _check_mask_and_positions(kwargs: dict, seen: int, tokens: int) -> None:
    """Refuse padding, custom masks and positions of the caller's own: the cache owns both."""
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and mask.ndim != 2:
        raise ValueError(
            f"attention_mask of {mask.ndim} dimensions is not supported; accepted: none, or all ones (2-D)"
        )
    checks = []
    if mask is not None:
        checks.append((mask != 0).all())
    if positions is not None:
        expected = torch.arange(seen, seen + tokens, device=positions.device)
        checks.append((positions == expected).all() if positions.shape[-1] == tokens else torch.tensor(False))
    if not checks or bool(torch.stack([c.to(checks[0].device) for c in checks]).all()):
        return
    if mask is not None and not checks[0]:
        raise ValueError(
            "attention_mask with zeros is not supported: pads would become sinks; give rows of equal length without"
            " padding (without an attention_mask generate() takes every pad_token_id of a prompt for padding)"
        )
    raise ValueError(
        f"position_ids of the caller's own are not supported: the next {tokens} tokens take {seen} to"
        f" {seen + tokens - 1}; give no position_ids, and give generate() the whole conversation: the {seen} tokens"
        " seen and at least one new one"
    )
