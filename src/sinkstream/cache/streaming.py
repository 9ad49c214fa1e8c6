"""`StreamingCache`: a transformers cache that never grows past its cap.

    cache = StreamingCache.for_model(model, sink=4, window=2044)
    model.generate(**inputs, cache=cache, max_new_tokens=100_000)  # past_key_values=cache before transformers 5.24

The cache is a subclass of transformers' public `Cache`. Two module hooks on the model it was made for tell it which
tokens are coming and put positions and masks right; they act on calls with this very cache only, and go with it.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from sinkstream.cache.attention import Forward, is_switched, running
from sinkstream.cache.channels import UNCERTAINTY, kept_channels, token_channels
from sinkstream.cache.chunks import PinnedCopies, Segments, TwoFrames
from sinkstream.cache.conversation import SeenTokens
from sinkstream.cache.families import ModelSpec, describe
from sinkstream.cache.hooks import HookedCache, attach
from sinkstream.cache.observe import AttentionObserver
from sinkstream.cache.pinned import Refreshed, refresh
from sinkstream.cache.ring import SoftRing
from sinkstream.compat import with_cache
from sinkstream.policies import SIGNALS, EvictionPolicy, PruneSchedule, Step, structural_weights

POSITIONS = ("cache", "original")
SPECULATE = 16  # tokens past the sure ones: a forward of so few costs hardly more than one of a single token
REBASE_AT = 1_024  # float32 angles at 2,200 put the NLL of a sharp model off by 1.5e-5, at 16,000 by 3e-5


class StreamingLayer(CacheLayerMixin):
    """One layer's window onto the cache: transformers writes through it, the cache keeps the books."""

    is_croppable = False
    supports_early_init = False

    def __init__(self, cache: "StreamingCache", index: int):
        super().__init__()
        self._cache, self._index = weakref.proxy(cache), index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the cache allocates all layers at once."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write new entries ``(batch, kv_heads, new, head_dim)``; returns everything the queries may see."""
        return self._cache._write(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical length with the new entries, and the stream index that its first column stands for."""
        return self._cache.kept_tokens + query_length, self._cache.seen_tokens - self._cache.kept_tokens

    def get_seq_length(self) -> int:
        """Tokens seen since the beginning of the stream, evicted ones included."""
        return self._cache.seen_tokens

    def get_max_length(self) -> int:
        """No limit: the stream may be endless."""
        return -1


@dataclass
class _Pending:
    """A forward that has begun: committed when the called model returns, forgotten if it raises."""

    ring: SoftRing
    tokens: int
    steps: list[Step]
    schedule: PruneSchedule
    input_ids: torch.Tensor | None
    crossing: PinnedCopies | TwoFrames | None
    layers_written: int = 0


class StreamingCache(HookedCache):
    """Attention sinks, pinned tokens and a window of KV entries, under an eviction policy.

    Made by `for_model`. Works with ``generate()`` (greedy, sampling, streamers) and with bare calls, batch rows of
    equal length, and prompts in chunks of any size; each token sees exactly what it would see token by token.

    Attributes
    ----------
    policy : EvictionPolicy
    spec : ModelSpec
    last_steps : list of Step
        What the policy did at each token of the latest forward.
    ring : SoftRing or None
        What is cached; None before the first token.
    observer : AttentionObserver or None
    schedule : PruneSchedule
        What the policy has counted and observed.
    seen_ids : SeenTokens or None
        Which tokens the cache has seen; None before the first token.
    structure : Tensor or None, (vocab,), float32
        Structural weight of every token id, where the scorer needs it.
    speculative : bool
        A forward may be a little longer than what is surely free of prunes, where the policy decides by the logits. It
        keeps the tokens before the first prune only: as many as `last_steps` has entries; feed the others again.
    """

    ring: SoftRing | None
    observer: AttentionObserver | None
    schedule: PruneSchedule
    seen_ids: SeenTokens | None
    last_steps: list[Step]
    _pending: _Pending | None
    _log_probs: torch.Tensor | None  # of the latest token, (batch, 1, vocab), where tokens are scored by uncertainty

    remembers_ids = True  # whether a conversation that is passed again is compared with what the cache has seen

    def __init__(
        self, spec: ModelSpec, policy: EvictionPolicy, *, positions: str, rebase_at: int, structure, block_tokens: int
    ):
        super().__init__(layers=[StreamingLayer(self, i) for i in range(spec.layers)])
        self.spec, self.policy, self.positions = spec, policy, positions
        self._rebase_at, self.structure, self._block_tokens = rebase_at, structure, block_tokens
        self.speculative = False
        self._close: Callable[[], None] = lambda: None
        self._clear()

    @classmethod
    def for_model(
        cls,
        model: PreTrainedModel,
        *,
        policy: EvictionPolicy | None = None,
        positions: str = "cache",
        tokenizer: Any = None,
        allow_untrained_positions: bool = False,
        rebase_at: int = REBASE_AT,
        block_tokens: int = 0,
        **options: Any,
    ) -> "StreamingCache":
        """Make a cache for one model.

        Parameters
        ----------
        model : PreTrainedModel
            A supported family: gpt_neox, llama, mistral, qwen2, qwen3.
        policy : EvictionPolicy or None
            Or give its options: ``sink``, ``window`` or ``cap``, ``compress_every``, ``max_drop``, ``refresh`` …
            (see `EvictionPolicy.build`).
        positions : {"cache", "original"}
            Positions inside the cache (StreamingLLM), or every token keeps its index in the stream.
        tokenizer : tokenizer or None
            Needed by ``scorer="structural"`` only.
        allow_untrained_positions : bool
            Accept a cache that grows past the positions the model was trained on.
        rebase_at : int
            Position past which the window's rotation is rebased, so that float32 angles stay exact.
        block_tokens : int
            Prepare for scoring in blocks of that many tokens: the buffer has room for one, and until the cache is
            closed the model's sdpa is switched to a function whose cost does not grow with the prunes in a block.

        Raises
        ------
        ValueError
            If the model, an option or their combination is not supported.
        """
        spec = describe(model)
        policy = _policy_of(policy, options)
        if positions not in POSITIONS:
            raise ValueError(f"positions={positions!r} is not accepted; accepted: {', '.join(POSITIONS)}")
        _check_trained(spec, policy, allow_untrained_positions)
        structure = None
        if "structure" in policy.needs:
            if tokenizer is None:
                raise ValueError("scorer='structural' reads the text of tokens; give tokenizer=TOKENIZER")
            weights = structural_weights(tokenizer)  # models pad their vocabulary past the tokenizer's
            structure = pad(weights, (0, max(0, model.config.vocab_size - len(weights))))
        cache = cls(
            spec, policy, positions=positions, rebase_at=rebase_at, structure=structure, block_tokens=block_tokens
        )
        observed = bool({"attention", "accumulated"} & policy.needs)
        in_blocks = block_tokens > 0 and spec.attention == "sdpa"
        cache._close = attach(cache, model, attention=observed or in_blocks)
        return cache

    @property
    def seen_tokens(self) -> int:
        """Tokens appended since the beginning of the stream."""
        return self.ring.seen if self.ring else 0

    @property
    def kept_tokens(self) -> int:
        """Entries cached now."""
        return self.ring.live if self.ring else 0

    @property
    def needs_logits(self) -> bool:
        """Whether the policy must see the logits of every token."""
        return bool({"risk", "nll", "entropy"} & self.policy.needs)

    def stats(self) -> dict[str, int]:
        """Counts of this stream: seen, kept, evicted tokens, prune events, rebases, and the bytes held."""
        return {
            "seen": self.seen_tokens,
            "kept": self.kept_tokens,
            "evicted": self.seen_tokens - self.kept_tokens,
            "events": self._events,
            "rebases": self.ring.rebases if self.ring else 0,
            "bytes": sum(part.bytes for part in (self.ring, self.observer, self.seen_ids) if part),
        }

    def reset(self) -> None:
        """Forget the stream; memory is given back and the cache can be used for another one."""
        self._clear()

    def close(self) -> None:
        """Take the hooks off the model. Happens by itself when the cache is collected."""
        self._close()
        self.model = None

    def chunks(self, tokens: int, chunk_tokens: int = 256) -> Iterator[int]:
        """Sizes of the forwards that feed `tokens` tokens: at most `chunk_tokens`, cut where the policy must decide.

        The next size is worked out when it is asked for, so feed each chunk before asking again.
        """
        end = self.seen_tokens + tokens
        while self.seen_tokens < end:
            yield min(end - self.seen_tokens, chunk_tokens, self.max_chunk_tokens())

    def capacity(self) -> int:
        """Slots of the buffer: what is cached and the chunk being fed, and as many again to copy back rarely."""
        return max(2 * max(self.policy.peak, 256), self.policy.peak + self._block_tokens)

    def resume(
        self, schedule: PruneSchedule, device: torch.device, *, batch: int = 1, logits: torch.Tensor | None = None
    ) -> SoftRing:
        """Start over with a stream that was held elsewhere: allocates, and returns the empty ring for `SoftRing.load`.

        Parameters
        ----------
        schedule : PruneSchedule
            What the policy has counted and observed so far; taken over, not copied.
        logits : Tensor or None, (batch, vocab)
            After the stream's last token, where the policy scores tokens by their uncertainty.
        """
        self.reset()
        ring = self._allocate(batch, device)
        self.seen_ids = None  # what was seen elsewhere is not known here
        self.schedule = schedule
        if logits is not None:
            self._log_probs = torch.log_softmax(logits.float(), dim=-1)[:, None]
        return ring

    def max_chunk_tokens(self) -> int:
        """The most tokens that the next forward may append."""
        room = self.capacity() - self.kept_tokens
        if self.policy.plan_known:
            return room
        ahead = self.schedule.copy()
        ahead.step()
        sure = ahead.sure_steps()
        return min(room, 1 + (min(ahead.possible_steps(), sure + SPECULATE) if self._speculates else sure))

    @property
    def _speculates(self) -> bool:
        """Accumulated attention cannot be taken back from tokens that are let go."""
        return self.speculative and "accumulated" not in self.policy.needs

    @torch.no_grad()
    def prefill(self, model: PreTrainedModel, input_ids: torch.Tensor, chunk_tokens: int = 256) -> torch.Tensor:
        """Feed a prompt of any length in bounded memory, evicting on the way.

        Parameters
        ----------
        input_ids : Tensor, (batch, tokens), int64
            New tokens only.

        Returns
        -------
        Tensor, (batch, vocab)
            Logits after the last token.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids of shape {tuple(input_ids.shape)}; accepted: (batch, tokens) with tokens > 0")
        fed = 0
        for size in self.chunks(input_ids.shape[1], chunk_tokens):
            out = model(input_ids[:, fed : fed + size], **with_cache(model, self), logits_to_keep=1)
            fed += len(self.last_steps)
        return out.logits[:, : len(self.last_steps)][:, -1]

    def continuation(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """New tokens only, as arguments of generate(), which takes what it is given for the whole conversation.

            model.generate(**cache.continuation(new_ids), cache=cache)

        Parameters
        ----------
        input_ids : Tensor, (batch, tokens), int64

        Returns
        -------
        dict
            ``input_ids`` as given, and an ``attention_mask`` ``(batch, seen + tokens)`` of ones.
        """
        batch, tokens = input_ids.shape
        return {"input_ids": input_ids, "attention_mask": input_ids.new_ones(batch, self.seen_tokens + tokens)}

    def check_conversation(self, input_ids: torch.Tensor) -> None:
        """Raise ValueError unless a conversation ``(batch, tokens)`` begins with the tokens that the cache has seen."""
        seen = self.seen_tokens
        if not (self.seen_ids and self.seen_ids.complete) or input_ids.shape[1] <= seen:
            return
        if self.ring is None or len(input_ids) != self.ring.keys.shape[1]:
            return  # refused when the decoder is called
        index = self.seen_ids.first_difference(input_ids)
        if index is not None:
            raise ValueError(
                f"the conversation differs from what the cache has seen at token {index} of {seen}; the cache cannot"
                " go back, so nothing was computed. Ways out: cache.reset() and pass the conversation again"
                " (also after a chat template has rendered an earlier turn in another way); pass new tokens only, with"
                " generate(**cache.continuation(new_ids), …) or cache.prefill(model, new_ids)"
            )

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any):
        """Write new entries ``(batch, kv_heads, new, head_dim)`` of one layer; returns what its queries may see."""
        return self._write(layer_idx, key_states, value_states)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refused: rows of a streaming cache share one schedule."""
        raise ValueError(
            "beam search is not supported by StreamingCache; accepted: greedy decoding and sampling."
            " The prompt is in the cache, once for every beam: call reset() before using it again"
        )

    def activate_past_recording(self) -> None:
        """Refused, as `crop`: generate() asks for it before an assisted decoding."""
        self.crop()

    def crop(self, *args: Any) -> None:
        """Refused: evicted entries cannot come back."""
        raise ValueError("StreamingCache cannot be rolled back; assisted decoding and crop() are not supported")

    def __deepcopy__(self, memo: dict) -> None:
        """Refused: a copy would have no hooks on the model."""
        raise ValueError("StreamingCache cannot be copied; make another one with StreamingCache.for_model(model, …)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused, as `reorder_cache`."""
        raise ValueError("StreamingCache cannot change its batch; accepted: the batch size of the first call")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused, as `reorder_cache`."""
        raise ValueError("StreamingCache cannot change its batch; accepted: the batch size of the first call")

    # ---- the life of one forward, driven by the hooks ----

    def _clear(self) -> None:
        self.ring = self.observer = self.seen_ids = self._pending = self._log_probs = None
        self.last_steps = []
        self.schedule = PruneSchedule(self.policy)
        self._events = 0
        self._in_model = False  # whether the causal model, not its decoder alone, is being called

    def begin_forward(self, batch: int, tokens: int, input_ids: torch.Tensor | None, device: torch.device):
        """Prune if it is time, make room, and return (position_ids, mask or None) for the coming tokens."""
        if self._pending is not None:  # left by an interrupted call of the causal model; this one is of the decoder
            self.abort_forward()
        self._check_call(batch, tokens, input_ids)
        ring = self.ring
        if ring is None or ring.seen == 0:
            ring = self._allocate(batch, device)
        ahead = self.schedule.copy()
        steps = [ahead.step() for _ in range(tokens)]
        drop = steps[0].drop - (self.schedule.cached - ring.live)  # a failed forward may have dropped already
        if drop > 0:
            ring.prune(drop, self.policy.refresh, self._choose)
        delta = ring.make_room(tokens)
        if self.observer:
            self.observer.begin(tokens, spare=tokens - 1 if self._speculates else 0)
            if delta is not None:
                self.observer.rebase(delta)
        crossing = self._crossing(ring, steps)
        ring.open(tokens)
        self._pending = _Pending(ring, tokens, steps, ahead, input_ids, crossing)
        running.set(Forward(self.observer, crossing if isinstance(crossing, TwoFrames) else None))
        first = ring.seen - ring.base
        positions = torch.arange(first, first + tokens, device=device).expand(batch, -1)
        return positions, None if crossing is None else self._attention_mask(crossing.mask())

    def _crossing(self, ring: SoftRing, steps: list[Step]) -> PinnedCopies | TwoFrames | None:
        """How a chunk crosses the prunes that fall inside it; None if none does."""
        segments = Segments.of(steps) if self.policy.plan_known else None
        if segments is None:
            return None
        return (TwoFrames if is_switched(self.spec.decoder) else PinnedCopies)(ring, segments)

    def _write(self, layer: int, keys: torch.Tensor, values: torch.Tensor):
        pending = self._pending
        if pending is None:
            raise ValueError(
                "this cache is not attached to the model that is using it;"
                " make one with StreamingCache.for_model(model, …)"
            )
        if keys.dtype != self.spec.dtype and not torch.is_autocast_enabled(keys.device.type):
            raise ValueError(
                f"the model's dtype was changed from {self.spec.dtype} to {keys.dtype} after the cache was made;"
                " change it back, or make the cache again"
            )
        pending.layers_written += 1
        visible = pending.ring.write(layer, keys, values)
        crossing = pending.crossing
        return crossing.extend(layer, *visible) if isinstance(crossing, PinnedCopies) else visible

    def commit_forward(self, logits: torch.Tensor | None = None) -> None:
        """The called model has returned: count the tokens, do the prunes inside the chunk, observe the logits."""
        pending = self._pending
        self.abort_forward()
        if pending is None:
            return
        if pending.layers_written != self.spec.layers:
            raise ValueError(
                f"{pending.layers_written} of {self.spec.layers} layers wrote their keys and values into the cache, so"
                " its tokens are not counted: layers with gradient checkpointing pass no cache on in training mode;"
                " call model.eval(), or model.gradient_checkpointing_disable()"
            )
        begun, log_probs = pending.tokens, None
        if self.needs_logits:
            assert logits is not None, "a policy that reads the logits is refused when the decoder is called alone"
            log_probs = torch.log_softmax(logits.detach().float(), dim=-1)
            self._observe(pending, log_probs)
        if self.observer:
            self.observer.commit(let_go=begun - pending.tokens)
        self._fill_channels(pending, log_probs)
        if self.seen_ids:
            ids = pending.input_ids
            self.seen_ids.append(None if ids is None else ids[:, : pending.tokens])
        pending.ring.advance(pending.tokens, sum(s.drop for s in pending.steps[1:]))
        self.schedule = pending.schedule
        self._events += sum(s.event for s in pending.steps)
        self.last_steps = pending.steps

    def enter_model(self) -> None:
        """The causal language model, not its decoder alone, is being called: `commit_forward` comes after its head."""
        self._in_model = True

    def end_decoder(self) -> None:
        """The decoder has returned; if it was called alone, the forward ends here."""
        if not self._in_model:
            self.commit_forward()

    def abort_forward(self) -> None:
        """No forward is under way; if one was and is not committed, its tokens never came."""
        self._pending, self._in_model = None, False
        running.set(None)

    def _observe(self, pending: _Pending, log_probs: torch.Tensor) -> None:
        """Step and observe token by token, where triggers look at the logits; the first prune on the way ends it.

        Parameters
        ----------
        log_probs : Tensor, (batch, tokens, vocab)
            Predicted by the forward.
        """
        risks = {signal: SIGNALS[signal](log_probs).mean(0).tolist() for signal in self.schedule.signals()}
        if not risks:
            return
        schedule, pending.steps = self.schedule, []
        for i in range(pending.tokens):
            ahead = schedule.copy()
            step = ahead.step()
            if step.drop and pending.steps:
                break
            schedule = ahead
            pending.steps.append(step)
            for signal, values in risks.items():
                schedule.observe(signal, values[i])
        pending.schedule, pending.tokens = schedule, len(pending.steps)

    def _fill_channels(self, pending: _Pending, log_probs: torch.Tensor | None) -> None:
        """What is kept of every new token besides key and value; before the ring counts them."""
        ring, tokens = pending.ring, pending.tokens
        drawn_from = None if log_probs is None else self._drawn_from(ring, log_probs[:, :tokens])
        ids = None if pending.input_ids is None else pending.input_ids[:, :tokens]
        for name, known in token_channels(ring.channels, ids, drawn_from, self.structure).items():
            ring.channels[name][..., ring.tail : ring.tail + tokens] = known[:, None]

    def _drawn_from(self, ring: SoftRing, log_probs: torch.Tensor) -> torch.Tensor | None:
        """The distributions that tokens were drawn from, given those that were predicted after them."""
        if not UNCERTAINTY & ring.channels.keys():
            return None
        before, self._log_probs = self._log_probs, log_probs[:, -1:].clone()
        before = torch.zeros_like(self._log_probs) if before is None else before
        return torch.cat([before, log_probs[:, :-1]], 1)

    def _choose(self, leaving: int) -> Refreshed:
        ring, observer, scorer = self.ring, self.observer, self.policy.scorer
        assert ring is not None and scorer is not None, "a refresh scores the tokens that are cached"
        queries = observer.latest() if observer is not None and "attention" in scorer.needs else None
        return refresh(ring.held(), leaving, scorer, self.policy.refresh, queries)

    def _allocate(self, batch: int, device: torch.device) -> SoftRing:
        spec, policy = self.spec, self.policy
        if self.structure is not None:
            self.structure = self.structure.to(device)
        with torch.inference_mode(False):  # so that calls in and out of inference mode can share the buffers
            self.ring = ring = self._new_ring(
                (spec.layers, batch, spec.kv_heads, self.capacity(), spec.head_dim),
                device,
                rope=spec.rope,
                sink=policy.sink,
                original_positions=self.positions == "original",
                rebase_at=max(0, self._rebase_at - self._block_tokens),  # a block runs that much further
                channels=kept_channels(policy),
            )
            self.seen_ids = SeenTokens(batch, device) if self.remembers_ids else None
        queries = policy.scorer.observed_queries if policy.scorer else 0
        if queries or "accumulated" in policy.needs:
            self.observer = AttentionObserver(ring, queries, "accumulated" in policy.needs)
        return ring

    def _new_ring(self, shape: tuple[int, ...], device: torch.device, **more: Any) -> SoftRing:
        return SoftRing(shape, self.spec.dtype, device, **more)

    def _attention_mask(self, visible: torch.Tensor) -> torch.Tensor:
        if self.spec.attention == "sdpa":
            return visible
        lowest = torch.finfo(self.spec.dtype).min
        return torch.zeros_like(visible, dtype=self.spec.dtype).masked_fill_(~visible, lowest)

    def _check_call(self, batch: int, tokens: int, input_ids: torch.Tensor | None) -> None:
        if tokens < 1:
            raise ValueError("0 tokens in one call; accepted: at least 1")
        ring = self.ring
        if ring is not None and ring.seen and batch != ring.keys.shape[1]:
            raise ValueError(
                f"batch of {batch}, but this cache holds {ring.keys.shape[1]} streams; use reset() or another cache"
            )
        if input_ids is None and {"structure", "nll"} & self.policy.needs:
            raise ValueError("this policy reads token ids; inputs_embeds are not supported, give input_ids")
        if self.needs_logits and not self._in_model:
            raise ValueError("this policy reads the logits; call the causal language model, not its decoder alone")
        if tokens > self.max_chunk_tokens():
            raise ValueError(
                f"{tokens} tokens in one call, but this cache takes at most {self.max_chunk_tokens()} now;"
                " feed them with cache.prefill(model, input_ids), or ask for the last logits only (logits_to_keep=1)"
            )


def _policy_of(policy: EvictionPolicy | None, options: dict[str, Any]) -> EvictionPolicy:
    if policy is None:
        return EvictionPolicy.build(**options)
    if options:
        raise ValueError(f"policy and {next(iter(options))} exclude each other; give one of them")
    if not isinstance(policy, EvictionPolicy):
        raise ValueError(f"policy={policy!r} is not accepted; accepted: an EvictionPolicy")
    return policy


def _check_trained(spec: ModelSpec, policy: EvictionPolicy, allowed: bool) -> None:
    if policy.peak > spec.trained_positions and not allowed:
        raise ValueError(
            f"the cache would hold up to {policy.peak} entries (growth {policy.growth} included), but the model was"
            f" trained on {spec.trained_positions} positions, past which quality collapses; accepted: a cap of at most"
            f" {spec.trained_positions} (window of at most {policy.window - policy.peak + spec.trained_positions}),"
            " or allow_untrained_positions=True"
        )
