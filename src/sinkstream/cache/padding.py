"""What an attention mask says of pads, and position ids of rows that have some."""

from typing import Any

import torch


def check_ids(ids: Any, name: str = "input_ids", *, empty: bool = False) -> None:
    """Raise ValueError unless these are token ids, ``(batch, tokens)``, whole numbers; `empty`: or no token at all."""
    if not isinstance(ids, torch.Tensor):
        raise ValueError(f"{name} is {type(ids).__name__}; accepted: a tensor (batch, tokens) of whole numbers")
    if ids.ndim != 2 or not (ids.shape[1] or empty):
        raise ValueError(f"{name} of shape {tuple(ids.shape)}; accepted: (batch, tokens) with tokens > 0")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} of {ids.dtype}; accepted: whole numbers, int64 or int32")


def check_embedded(embeddings: torch.Tensor, seen: int) -> None:
    """Raise ValueError unless the embeddings ``(batch, tokens, hidden)`` given to generate() go past what was seen."""
    if embeddings.shape[1] <= seen:
        raise ValueError(
            f"inputs_embeds of {embeddings.shape[1]} tokens, and the cache has seen {seen}: none is new; accepted by"
            f" generate(): those of the whole conversation, the {seen} tokens seen and at least one new one. New tokens"
            " alone are fed with model(inputs_embeds=…) and the cache"
        )


def own_tokens(mask: torch.Tensor, tokens: int, seen: list[int]) -> list[int]:
    """How many of a forward's columns are tokens of each row; the columns before them are pads.

    Parameters
    ----------
    mask : Tensor, (batch, at least tokens), 0 for a pad
        Its last columns are those of the forward. Columns before them must be ones, or as many ones in each row as the
        row has seen: what a cache has seen cannot be hidden any more.
    seen : list of int
        Tokens that each row has seen; empty before the first.

    Raises
    ------
    ValueError
        If the mask has another shape or says something else.
    """
    check_axes(mask)
    if mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask of {mask.shape[1]} columns for {tokens} tokens; accepted: at least one a token"
        )
    given = mask != 0
    new, past = given[:, mask.shape[1] - tokens :], given[:, : mask.shape[1] - tokens]
    count = new.sum(1)
    left = new == (torch.arange(tokens, device=mask.device) >= tokens - count[:, None])
    other = (given & (mask != 1)).any(1)
    others, *told = torch.stack([other.long(), left.all(1).long(), count, past.sum(1)]).tolist()  # one wait in all
    if any(others):
        check_zeros_and_ones(mask)
    for row, (is_left, _, before) in enumerate(zip(*told)):
        if not is_left:
            raise ValueError(
                f"attention_mask of row {row} has zeros behind or between its tokens; a forward accepts pads before the"
                " tokens of a row only (padding_side='left'); generate() accepts them anywhere in a conversation"
            )
        if before not in (past.shape[1], seen[row] if row < len(seen) else 0):
            raise ValueError(
                f"attention_mask counts {before} tokens of row {row} before the new ones, and the cache has seen"
                f" {seen[row] if row < len(seen) else 0} of it, which cannot be hidden any more; give a mask of the new"
                " tokens alone, or call reset() and pass all of them again"
            )
    if not any(told[1]):
        raise ValueError("attention_mask with nothing but zeros: no token in this call; accepted: at least 1")
    return told[1]


def check_axes(mask: torch.Tensor, batch: int | None = None) -> None:
    """Raise ValueError unless a mask is a tensor of two axes, and has as many rows as the batch."""
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"attention_mask is {type(mask).__name__}; accepted: none, or a tensor (batch, tokens)")
    if mask.ndim != 2:
        raise ValueError(
            f"attention_mask of {mask.ndim} dimensions is not supported; accepted: none, or (batch, tokens) with 0 for"
            " the pads before the tokens of a row"
        )
    if batch not in (None, len(mask)):
        raise ValueError(f"attention_mask of {len(mask)} rows for a batch of {batch}; accepted: a row for each")


def check_zeros_and_ones(mask: torch.Tensor) -> None:
    """Raise ValueError for a mask of other numbers, of which nobody knows what they mean: -inf hides, and is not 0."""
    other = (mask != 0) & (mask != 1)
    if bool(other.any()):
        raise ValueError(
            f"attention_mask holds {mask[other][0].item()}; accepted: 0 for a pad and 1 for a token. A mask that is"
            " added to attention scores (0 and -inf) becomes one with (mask == 0).long()"
        )


def are_positions(positions: torch.Tensor, seen: list[int], own: list[int], tokens: int) -> bool:
    """Whether position ids ``(batch or 1, tokens)`` are the indices of each row's tokens, whatever they are for pads.

    Parameters
    ----------
    seen, own : list of int
        Tokens that each row has seen, and those that come now, behind ``tokens - own`` pads.
    """
    if positions.shape[-1] != tokens or (positions.ndim == 2 and len(positions) not in (1, len(own))):
        return False
    first = torch.tensor([s - tokens + n for s, n in zip(seen, own)], device=positions.device)[:, None]
    column = torch.arange(tokens, device=positions.device)
    pads = torch.tensor([tokens - n for n in own], device=positions.device)[:, None]
    return bool(((positions == first + column) | (column < pads)).all())


def default_positions(mask: torch.Tensor) -> torch.Tensor:
    """The position ids that generate() makes of a mask ``(batch, tokens)``; 0 for pads."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def call_tokens(named: dict[str, Any], seen: list[int], batch: int, tokens: int) -> list[int] | None:
    """How many of the coming columns are tokens of each row; None: all of them.

    Refuses masks that are no padding, and positions of the caller's own: the cache owns both.

    Parameters
    ----------
    seen : list of int
        Tokens that each row has seen.
    """
    mask, positions, own = named.get("attention_mask"), named.get("position_ids"), None
    if mask is not None:
        check_axes(mask, batch)
        if not bool((mask == 1).all()):
            own = own_tokens(mask, tokens, seen)
    if positions is not None and not are_positions(positions, seen, own or [tokens] * batch, tokens):
        first = seen[0]
        raise ValueError(
            f"position_ids of the caller's own are not supported: the next {tokens} tokens take {first} to"
            f" {first + tokens - 1}; give no position_ids. generate() makes them of attention_mask, which needs as many"
            " columns as the conversation has tokens"
        )
    return None if own == [tokens] * batch else own
