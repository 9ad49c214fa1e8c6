"""`BatchedCache`: what the rows of a batch have seen, a conversation that is passed again, and other rows instead."""

from collections.abc import Mapping
from typing import Any

import torch

from sinkstream import compat
from sinkstream.cache.append_only import AppendOnlyCache
from sinkstream.cache.conversation import check_beginning, unseen
from sinkstream.cache.padding import check_axes, check_ids, check_zeros_and_ones, default_positions
from sinkstream.cache.rows import Rows, selected
from sinkstream.cache.stream import Stream


class BatchedCache(AppendOnlyCache):
    """A cache of a batch of streams.

    Attributes
    ----------
    stream : Stream
    """

    stream: Stream

    @property
    def row_seen(self) -> list[int]:
        """Tokens that each row of the batch has seen, pads left out; empty before the first."""
        return self.stream.row_seen

    def stats(self) -> dict[str, int]:
        """Counts: seen, kept, evicted tokens, prune events, rebases, the bytes held, and those shared with forks.

        Where rows differ, each count is the largest of any row.
        """
        return self.stream.stats()

    def row_stats(self) -> list[dict[str, int]]:
        """The counts of `stats` for every row; bytes are the row's share."""
        if isinstance(self.stream, Rows):
            return self.stream.row_stats()
        stats = self.stream.stats()
        return [stats | {"bytes": stats["bytes"] // self.stream.batch} for _ in range(self.stream.batch)]

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows of the batch, in this order and as often as they are named; the others are forgotten.

        Parameters
        ----------
        indices : Tensor, (any,), int64
            At least one, each from 0 to batch - 1.
        """
        batch, chosen = self.stream.batch, indices.reshape(-1).tolist()
        if not chosen or min(chosen) < 0 or max(chosen) >= batch:
            raise ValueError(f"indices={chosen} are not accepted; accepted: at least one, from 0 to {batch - 1}")
        self.abort_forward()
        self.stream, self.ended = selected(self.stream, indices.reshape(-1)), ()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every row `repeats` times, copies side by side, as generate() repeats its input_ids."""
        if self.stream.batch:
            self.batch_select_indices(torch.arange(self.stream.batch).repeat_interleave(repeats))

    def continuation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """New tokens only, as arguments of generate(), which takes what it is given for the whole conversation.

            model.generate(**cache.continuation(new_ids), cache=cache)

        Parameters
        ----------
        input_ids : Tensor, (batch, tokens), int64
        attention_mask : Tensor or None, (batch, tokens)
            0 where a row has pads, which come before its tokens.

        Returns
        -------
        dict
            ``input_ids`` as given, and an ``attention_mask`` ``(batch, seen + tokens)`` with as many ones in every row
            as the row has seen and new tokens.

        Raises
        ------
        ValueError
            If `input_ids` are no token ids, or the mask has another shape.
        """
        check_ids(input_ids, empty=True)
        batch, tokens = input_ids.shape
        mask = input_ids.new_ones(batch, self.seen_tokens + tokens)
        if attention_mask is not None:
            if attention_mask.shape != input_ids.shape:
                told = tuple(attention_mask.shape)
                raise ValueError(f"attention_mask of shape {told}; accepted: {batch, tokens}, that of the ids")
            check_zeros_and_ones(attention_mask)
            mask[:, self.seen_tokens :] = attention_mask
        for row, seen in enumerate(self.row_seen):
            mask[row, : self.seen_tokens - seen] = 0
        return {"input_ids": input_ids, "attention_mask": mask}

    def check_conversation(self, input_ids: torch.Tensor) -> None:
        """Raise ValueError unless a conversation ``(batch, tokens)`` is what the cache has seen and something new."""
        seen, seen_ids, tokens = self.seen_tokens, self.stream.seen_ids, input_ids.shape[1]
        if seen_ids is None or len(input_ids) != self.stream.batch:
            return  # another batch is refused when the decoder is called
        if tokens <= seen:
            raise ValueError(
                f"the conversation has {tokens} tokens, and the cache has seen {seen}: none is new; accepted: the"
                f" {seen} tokens seen and at least one new one; new tokens only, with"
                " generate(**cache.continuation(new_ids), …); any conversation after cache.reset()"
            )
        if seen_ids.complete:
            check_beginning(input_ids, seen, seen_ids)

    def unseen(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What each row of a padded conversation has that the cache has not seen.

        Parameters
        ----------
        input_ids : Tensor, (batch, tokens), int64
        attention_mask : Tensor, (batch, tokens)
            0 where a row has pads, anywhere.

        Returns
        -------
        input_ids, attention_mask : Tensor, (batch, most new tokens of a row), int64
            New tokens, with pads before them.

        Raises
        ------
        ValueError
            If a row does not begin with what the cache has seen of it, or has nothing new.
        """
        return unseen(input_ids, attention_mask, self.row_seen, self.stream.row_ids)

    def begin_prompt(
        self, input_ids: torch.Tensor, new: int | None, given: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int | None, dict[str, Any]]:
        """What the first call of a generate() is given, of a whole conversation.

        Parameters
        ----------
        input_ids : Tensor, (batch, tokens), int64
        new : int or None
            How many of the last the cache has not seen, if no row has pads; None: `input_ids` are new tokens alone.
        given : mapping
            Other arguments of the call.

        Returns
        -------
        input_ids, new, instead
            As the parameters; where rows have pads or differ, the new tokens of each alone, with their mask.

        Raises
        ------
        ValueError
            If the conversation does not begin with what the cache has seen, or for positions of the caller's own.
        """
        self.ended = ()
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if mask is not None:
            check_axes(mask, len(input_ids))
        if new is None:
            return input_ids, None, {}
        if mask is None or bool((mask == 1).all()):
            if len(set(self.row_seen)) <= 1:
                self.check_conversation(input_ids)
                return input_ids, new, {}
            mask = torch.ones_like(input_ids)
        check_zeros_and_ones(mask)
        ids, new_mask = self.unseen(input_ids, mask)
        if positions is not None and not bool(((positions == default_positions(mask)) | (mask == 0)).all()):
            raise ValueError("position_ids of the caller's own are not supported; give none")
        return ids, ids.shape[1], {"attention_mask": new_mask, "position_ids": None}

    def next_step(self, loop: Mapping[str, Any] | None) -> dict[str, Any]:
        """Mask and positions of a later step: generate() appends ones, also for rows that have ended.

        Parameters
        ----------
        loop : mapping or None
            What `compat.sampling_loop` found; anything but the loop of this cache is left alone.
        """
        if loop is None or not any(value is self for value in loop.get("model_kwargs", {}).values()):
            return {}
        fed, self.ended = self.ended, compat.ended_rows(loop)  # what a row ends with is still the row's own
        mask = None if not any(fed) else torch.tensor([[not ended] for ended in fed]).long()
        return {"attention_mask": mask, "position_ids": None}
