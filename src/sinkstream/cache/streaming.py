"""`StreamingCache`: a transformers cache that never grows past its cap.

    cache = StreamingCache.for_model(model, sink=4, window=2044)
    model.generate(**inputs, cache=cache, max_new_tokens=100_000)  # past_key_values=cache before transformers 5.24

The cache is a subclass of transformers' public `Cache`. Two module hooks on the model it was made for tell it which
tokens are coming and put positions and masks right; they act on calls with this very cache only, and go with it.
`Stream` is what the cache holds between two forwards, `PendingForward` is one forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.nn.functional import pad

from sinkstream.archive import PREFIX, Chooser
from sinkstream.cache.attention import release_attention, running
from sinkstream.cache.families import check_policy, describe
from sinkstream.cache.forward import PendingForward, check_forward
from sinkstream.cache.padding import check_axes, check_ids, own_tokens
from sinkstream.cache.recalling import RecallingCache, recall_of
from sinkstream.cache.row_forward import RowsForward, begun, parted
from sinkstream.cache.rows import CHUNK as ROWS_CHUNK
from sinkstream.cache.rows import Rows
from sinkstream.cache.stream import Stream
from sinkstream.cache.vocabulary import check_vocabulary, vocabulary_size
from sinkstream.cache.wrappers import inner_model, is_compiled
from sinkstream.compat import with_cache
from sinkstream.policies import EvictionPolicy, Step, structural_weights
from sinkstream.policies.options import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = ("cache", "original")
CHUNK = 2_048  # tokens of one forward of a prompt


class StreamingCache(RecallingCache):
    """Attention sinks, pinned tokens and a window of KV entries, under an eviction policy.

    Made by `for_model`. Works with ``generate()`` (greedy, sampling, streamers) and with bare calls, with prompts in
    chunks of any size, and with left-padded batches; each token sees exactly what it would see token by token, and
    each row of a batch what it would see alone. Pads are neither seen nor kept. A row that has ended while generate()
    goes on with others keeps what it held: the tokens that fill it up are pads.

    Attributes
    ----------
    policy : EvictionPolicy
    spec : ModelSpec
    stream : Stream
        What is held between two forwards; `Rows` as soon as the rows of the batch differ.
    ended : tuple of bool
        Which rows of the generate() under way have ended, so that pads are fed to them; empty: none.
    """

    ended: tuple[bool, ...] = ()
    stream_class: ClassVar[type[Stream]] = Stream
    _pending: PendingForward | RowsForward | None = None  # a forward that has begun
    _in_model = False  # whether the causal model, not its decoder alone, is being called

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        *,
        policy: EvictionPolicy | None = None,
        positions: str = "cache",
        tokenizer: Any = None,
        allow_untrained_positions: bool = False,
        rebase_at: int | None = None,
        block_tokens: int = 0,
        recall: str | Chooser | None = None,
        **options: Any,
    ) -> StreamingCache:
        """Make a cache for one model.

        Parameters
        ----------
        model : PreTrainedModel, or a wrapper of one
            Of a supported family: `sinkstream.cache.FAMILIES`. The cache belongs to the model inside PEFT's and
            torch.compile's wrappers and works for calls of either. Give a model that is compiled already: the cache
            then keeps out of the compiled graphs.
        policy : EvictionPolicy or None
            Or give its options: ``sink``, ``window`` or ``cap``, ``compress_every``, ``max_drop``, ``refresh`` …
            (see `EvictionPolicy.build`).
        positions : {"cache", "original"}
            Positions inside the cache (StreamingLLM), or every token keeps its index in the stream.
        tokenizer : tokenizer or None
            Needed by ``scorer="structural"``; recall takes sentence borders, and the text of its events, from it.
        allow_untrained_positions : bool
            Accept a cache that grows past the positions the model was trained on.
        rebase_at : int or None
            Position past which the window's rotation is rebased, so that float32 angles stay exact; default: 1,024, and
            8,192 in half precision, where a rebase rounds every key of the window once more.
        block_tokens : int
            Prepare for scoring in blocks of that many tokens: the buffer has room for one, and until the cache is
            closed the model's sdpa is switched to a function whose cost does not grow with the prunes in a block.
        recall : str, Chooser or None
            Who says which tokens that left the window come back: a name of `sinkstream.archive.CHOOSERS`, or a chooser
            of your own. None: what has left is gone.
        **options
            Of the policy; with ``recall`` also those of `RecallSettings` and of the chooser, behind ``recall_``:
            ``recall_slots``, ``recall_every``, ``recall_gate`` …

        Raises
        ------
        ValueError
            If the model, an option or their combination is not supported.
        """
        compiled, model = is_compiled(model), inner_model(model)
        spec = describe(model)
        recall_options = {name: options.pop(name) for name in [*options] if name.startswith(PREFIX)}
        policy = _policy_of(policy, options)
        rebase_at, block_tokens = _checked(positions, rebase_at, block_tokens)
        check_policy(spec, policy, positions, compiled=compiled)
        check_trained(policy, spec.trained_positions, allow_untrained_positions)
        stream = cls.stream_class(
            spec,
            policy,
            positions=positions,
            rebase_at=rebase_at,
            structure=_structure(tokenizer, model) if "structure" in policy.needs else None,
            block_tokens=block_tokens,
            recalling=recall_of(recall, recall_options, model, spec, policy, positions, tokenizer, compiled),
        )
        cache = cls(stream)
        cache.compiled = compiled
        cache.attach_to(model)
        return cache

    @property
    def seen_tokens(self) -> int:
        """Tokens appended since the beginning of the stream."""
        return self.stream.seen

    @property
    def kept_tokens(self) -> int:
        """Entries cached now."""
        return self.stream.kept

    @property
    def needs_logits(self) -> bool:
        """Whether the policy must see the logits of every token."""
        return self.stream.needs_logits

    @property
    def last_steps(self) -> Sequence[Step]:
        """What the policy did at each token of the latest forward."""
        return self.stream.last_steps

    def reset(self) -> None:
        """Forget the stream; memory is given back and the cache can be used for another one."""
        self.abort_forward()
        self.stream, self.ended = self.stream.start_over(), ()

    def chunks(self, tokens: int, chunk_tokens: int = CHUNK) -> Iterator[int]:
        """Sizes of the forwards that feed `tokens` tokens: at most `chunk_tokens`, cut where the policy must decide.

        The next size is worked out when it is asked for, so feed each chunk before asking again.
        """
        end = self.seen_tokens + tokens
        while self.seen_tokens < end:
            yield min(end - self.seen_tokens, chunk_tokens, self.max_chunk_tokens())

    def max_chunk_tokens(self) -> int:
        """The most tokens that the next forward may append."""
        return self.stream.max_chunk_tokens()

    @torch.no_grad()
    def prefill(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        chunk_tokens: int = CHUNK,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Feed a prompt of any length in bounded memory, evicting on the way.

        Parameters
        ----------
        model : PreTrainedModel
            The model that the cache was made for, or its wrapper.
        input_ids : Tensor, (batch, tokens), int64
            New tokens only.
        chunk_tokens : int
            Most tokens of one forward; it bounds the memory.
        attention_mask : Tensor or None, (batch, tokens)
            0 where a row has pads, which come before its tokens.

        Returns
        -------
        Tensor, (batch, vocab)
            Logits after the last token, in the dtype of the model; without meaning for a row that has none.

        Raises ValueError if ids, mask or chunk size are not accepted, a token is not in the vocabulary, or the batch is
        not that of the stream; nothing has been fed then.
        """
        _check_prompt(model, input_ids)
        chunk_tokens = check_whole("chunk_tokens", chunk_tokens, 1)
        mask, pads = attention_mask, 0
        if mask is not None:
            check_axes(mask, len(input_ids))
            pads = input_ids.shape[1] - max(own_tokens(mask, input_ids.shape[1], self.row_seen))  # of every row
            input_ids, mask = input_ids[:, pads:], mask[:, pads:]
        if mask is not None or isinstance(self.stream, Rows):
            chunk_tokens = min(chunk_tokens, ROWS_CHUNK)
        check_vocabulary(input_ids, vocabulary_size(self.spec.decoder), first=pads)
        self.announce(input_ids)
        fed, taken = 0, 0
        with _speculating(self.stream if mask is None and len(input_ids) == 1 else None):
            while fed < input_ids.shape[1]:
                now = slice(fed, fed + min(input_ids.shape[1] - fed, chunk_tokens, self.max_chunk_tokens()))
                masked = {} if mask is None else {"attention_mask": mask[:, now]}
                out = model(input_ids[:, now], **masked, **with_cache(model, self), logits_to_keep=1)
                taken = now.stop - now.start if masked else len(self.last_steps)
                fed += taken
        return out.logits[:, :taken][:, -1]

    @torch.no_grad()
    def prefill_all_but_last_chunk(
        self, model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Feed a prompt as `prefill` does, but for its last chunk, ``(batch, at least 1)``, which is returned."""
        size = vocabulary_size(self.spec.decoder)
        if attention_mask is not None or isinstance(self.stream, Rows) or not self.policy.plan_known:
            check_vocabulary(input_ids[:, -1:], size, first=input_ids.shape[1] - 1)
            mask = None if attention_mask is None else attention_mask[:, :-1]
            self.prefill(model, input_ids[:, :-1], attention_mask=mask)
            return input_ids[:, -1:]
        check_vocabulary(input_ids, size)
        self.announce(input_ids)
        for tokens in self.chunks(input_ids.shape[1]):
            if tokens == input_ids.shape[1]:
                break
            model(input_ids[:, :tokens], **with_cache(model, self), logits_to_keep=1)
            input_ids = input_ids[:, tokens:]
        return input_ids

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Write new entries ``(batch, kv_heads, new, head_dim)`` of one layer; returns what its queries may see."""
        if self.compiled:
            return key_states, value_states  # attention writes them
        if self._pending is None:
            raise ValueError(
                "this cache is not attached to the model that is using it;"
                " make one with StreamingCache.for_model(model, …)"
            )
        return self._pending.write(layer_idx, key_states, value_states)

    # ---- the life of one forward, driven by the hooks ----

    def begin_forward(
        self, batch: int, tokens: int, input_ids: torch.Tensor | None, device: torch.device, own: list[int] | None
    ):
        """Prune if it is time, make room, and return (position_ids, mask or None) for the coming tokens."""
        if self._pending is not None:  # left by an interrupted call of the causal model; this one is of the decoder
            self.abort_forward()
        check_forward(self.stream, batch, tokens, input_ids, has_logits=self._in_model)
        stream = parted(self.stream, batch, own, device)
        if stream is not self.stream:
            self.stream = stream
            check_forward(stream, batch, tokens, input_ids, has_logits=self._in_model)
        pending = self._pending = begun(self.stream, batch, tokens, input_ids, device, own)
        return pending.positions, pending.write_in_attention() if self.compiled else pending.mask

    def enter_model(self) -> None:
        """The causal language model, not its decoder alone, is being called: `commit_forward` comes after its head."""
        self._in_model = True

    def end_decoder(self) -> None:
        """The decoder has returned; if it was called alone, the forward ends here."""
        if not self._in_model:
            self.commit_forward()

    def commit_forward(self, logits: torch.Tensor | None = None) -> None:
        """The called model has returned: its tokens count from now on."""
        pending = self._pending
        self.abort_forward()
        if pending is not None:
            pending.commit(logits)

    def abort_forward(self) -> None:
        """No forward is under way; if one was and is not committed, its tokens never came."""
        self._pending, self._in_model = None, False
        running.set(None)
        release_attention(self.spec.decoder, self.chunk_user)


@contextmanager
def _speculating(stream: Stream | None) -> Iterator[None]:
    """The forwards of a stream are speculative inside the context: who feeds it looks how many tokens were kept."""
    if stream is None:
        yield
        return
    before, stream.speculative = stream.speculative, True
    try:
        yield
    finally:
        stream.speculative = before


def _check_prompt(model: Any, input_ids: Any) -> None:
    """Raise ValueError, also for a model and ids that were swapped."""
    check_ids(input_ids)
    if not isinstance(model, torch.nn.Module):
        raise ValueError(
            f"model={type(model).__name__} is not accepted; accepted: the model that the cache was made for, or its"
            " wrapper"
        )


def _structure(tokenizer: Any, model: PreTrainedModel) -> torch.Tensor:
    """The structural weight of every token id, (vocab,). Raises ValueError without a tokenizer."""
    if tokenizer is None:
        raise ValueError("scorer='structural' reads the text of tokens; give tokenizer=TOKENIZER")
    weights = structural_weights(tokenizer)  # models pad their vocabulary past the tokenizer's
    return pad(weights, (0, max(0, model.config.vocab_size - len(weights))))


def _policy_of(policy: EvictionPolicy | None, options: dict[str, Any]) -> EvictionPolicy:
    if policy is None:
        return EvictionPolicy.build(**options)
    if options:
        raise ValueError(f"policy and {next(iter(options))} exclude each other; give one of them")
    if not isinstance(policy, EvictionPolicy):
        raise ValueError(f"policy={policy!r} is not accepted; accepted: an EvictionPolicy")
    return policy


def _checked(positions: str, rebase_at: int | None, block_tokens: int) -> tuple[int | None, int]:
    if positions not in POSITIONS:
        raise ValueError(f"positions={positions!r} is not accepted; accepted: {', '.join(POSITIONS)}")
    rebase_at = None if rebase_at is None else check_whole("rebase_at", rebase_at, 0)
    return rebase_at, check_whole("block_tokens", block_tokens, 0)


def check_trained(policy: EvictionPolicy, trained: int, allowed: bool) -> None:
    """Raise ValueError if a policy caches more tokens than the positions that a model was trained on."""
    if policy.peak > trained and not allowed:
        raise ValueError(
            f"the cache would hold up to {policy.peak} entries (growth {policy.growth} included), but the model was"
            f" trained on {trained} positions, past which quality collapses; accepted: a cap of at most"
            f" {trained} (window of at most {policy.window - policy.peak + trained}),"
            " or allow_untrained_positions=True"
        )
