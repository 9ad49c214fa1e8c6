"""`Stream`: what a streaming cache holds between two forwards, and how much the next forward may bring."""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch

from sinkstream.cache.buffers import RingBuffers
from sinkstream.cache.channels import kept_channels
from sinkstream.cache.chosen_frames import chosen_across
from sinkstream.cache.conversation import SeenTokens
from sinkstream.cache.families import ModelSpec
from sinkstream.cache.observe import AttentionObserver
from sinkstream.cache.pinned import Refreshed, candidate_attention, refresh
from sinkstream.cache.recall import Recall
from sinkstream.cache.ring import SoftRing
from sinkstream.cache.sharing import SharedBuffers
from sinkstream.cache.sliding import SlidingRing
from sinkstream.policies import EvictionPolicy, PruneSchedule, Step

SETTINGS = ("spec", "policy", "positions", "rebase_at", "structure", "block_tokens", "user", "recalling")
REBASE_AT = 1_024  # float32 angles at 2,200 put the NLL of a sharp model off by 1.5e-5, at 16,000 by 3e-5
REBASE_AT_HALF = 8_192  # such an angle is off by less than what a rebase rounds off every key of the window
AHEAD = 16  # prunes at consecutive tokens for which the sinks are rotated at once
MOST_AHEAD = 8  # sinks that are held that many times
SPECULATE = 16  # tokens past the sure ones: a forward of so few costs hardly more than one of a single token


def default_rebase(dtype: torch.dtype) -> int:
    """Position past which a window of keys in `dtype` is rebased by default."""
    return REBASE_AT_HALF if dtype in (torch.float16, torch.bfloat16) else REBASE_AT


class Stream(SharedBuffers):
    """Buffers, counts and observations of the rows of one batch, which share a schedule.

    Parameters
    ----------
    spec : ModelSpec
    policy : EvictionPolicy
    positions : {"cache", "original"}
    rebase_at : int or None
        Position past which the window's rotation is rebased; default: `default_rebase`.
    structure : Tensor or None, (vocab,), float32
        Structural weight of every token id, where the scorer needs it.
    block_tokens : int
        Tokens of the largest forward that the buffer must have room for, beside what is cached.
    user : object
        In whose name the model's attention is switched for one chunk; default: a new one.
    recalling : Recall or None
        An empty one, if tokens that left the window may come back.

    Attributes
    ----------
    ring : SoftRing or None
        What is cached; None before the first token.
    sliding : SlidingRing or None
        What the layers with a window of their own hold; None before the first token, and where there are none.
    observer : AttentionObserver or None
        Of the attention, where the scorer reads it.
    recall : Recall or None
        What left the window, and what of it came back.
    schedule : PruneSchedule
        What the policy has counted and observed.
    seen_ids : SeenTokens or None
        Which tokens the stream consists of; None before the first token, and where nobody asks.
    last_steps : sequence of Step
        What the policy did at each token of the latest forward.
    events : int
        Prunes so far.
    log_probs : Tensor or None, (batch, 1, vocab), float32
        Predicted after the latest token, where the policy scores tokens by their uncertainty.
    speculative : bool
        A forward may be a little longer than what is surely free of prunes, where the policy decides by the logits. It
        keeps the tokens before the first prune only: as many as `last_steps` has entries; feed the others again.
    """

    sliding: SlidingRing | None
    last_steps: Sequence[Step]
    log_probs: torch.Tensor | None

    remembers_ids = True  # whether a conversation that is passed again is compared with what the cache has seen

    def __init__(
        self,
        spec: ModelSpec,
        policy: EvictionPolicy,
        *,
        positions: str,
        rebase_at: int | None,
        structure: torch.Tensor | None,
        block_tokens: int,
        user: object = None,
        recalling: Recall | None = None,
    ):
        self.user, self.recalling, self.recall = user or object(), recalling, None
        self.spec, self.policy, self.positions = spec, policy, positions
        self.rebase_at = default_rebase(spec.dtype) if rebase_at is None else rebase_at
        self.structure, self.block_tokens = structure, block_tokens
        self.speculative = False
        self.clear()

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that make another stream like this one, empty."""
        return {name: getattr(self, name) for name in SETTINGS}

    def clear(self) -> None:
        """Forget everything; memory is given back."""
        self._leave()
        if self.recalling is not None:
            if self.recall is not None:
                self.recall.close()
            self.recall = self.recalling.empty()
        self.ring = self.sliding = self.observer = self.seen_ids = self.log_probs = None
        self.last_steps = []
        self.schedule = PruneSchedule(self.policy)
        self.events = 0

    def start_over(self) -> "Stream":
        """Forget everything; returns the stream to go on with."""
        self.clear()
        return self

    @property
    def device(self) -> torch.device | None:
        """Of the buffers; None before they are allocated."""
        return self.ring.keys.device if self.ring is not None else None

    @property
    def batch(self) -> int:
        """Rows held; 0 before the first token."""
        return self.ring.keys.shape[1] if self.ring and self.ring.seen else 0

    @property
    def seen(self) -> int:
        """Tokens appended since the beginning of the stream; of the longest row where rows differ."""
        return self.ring.seen if self.ring else 0

    @property
    def row_seen(self) -> list[int]:
        """Tokens that each row has seen, pads left out."""
        return [self.seen] * self.batch

    def row_ids(self, row: int) -> SeenTokens | None:
        """Which tokens one row has seen; None where they are not known."""
        ids = self.seen_ids
        return ids.take(torch.tensor([row], device=ids.device)) if ids and ids.complete else None

    @property
    def kept(self) -> int:
        """Entries cached now."""
        return self.ring.live if self.ring else 0

    @cached_property
    def needs_logits(self) -> bool:
        """Whether the policy must see the logits of every token."""
        return bool({"risk", "nll", "entropy"} & self.policy.needs)

    @property
    def speculates(self) -> bool:
        """Whether forwards are speculative: accumulated attention cannot be taken back from tokens that are let go."""
        return self.speculative and "accumulated" not in self.policy.needs

    def stats(self) -> dict[str, int]:
        """Counts: seen, kept, evicted tokens, prune events, rebases, the bytes held, and those shared with forks."""
        held = sum(part.bytes for part in (self.ring, self.sliding, self.observer, self.seen_ids) if part)
        recalled = self.recall.stats() if self.recall is not None else {}
        return {
            "seen": self.seen,
            "kept": self.kept,
            "evicted": self.seen - self.kept + recalled.get("recalled", 0),
            "events": self.events,
            "rebases": self.ring.rebases if self.ring else 0,
            "bytes": held,
            "shared_bytes": held if self.shares else 0,
        } | recalled

    def capacity(self) -> int:
        """Slots of the buffer: what is cached and the chunk being fed, and as many again to copy back rarely."""
        return max(2 * max(self.policy.peak, 256), self.policy.peak + self.block_tokens)

    def max_chunk_tokens(self) -> int:
        """The most tokens that the next forward may append."""
        return longest_forward(self)

    def allocate(self, batch: int, device: torch.device) -> SoftRing:
        """Make the buffers of a new stream; returns the empty ring."""
        spec, policy = self.spec, self.policy
        if self.structure is not None:
            self.structure = self.structure.to(device)
        with torch.inference_mode(False):  # so that calls in and out of inference mode can share the buffers
            self.ring = ring = self._new_ring(
                (len(spec.full_layers), batch, spec.kv_heads, self.capacity(), spec.head_dim),
                device,
                rope=spec.rope,
                sink=policy.sink,
                original_positions=self.positions == "original",
                rebase_at=max(0, self.rebase_at - self.block_tokens),  # a block runs that much further
                channels=kept_channels(policy),
                positions=spec.original_length,
                ahead=self._prunes_ahead,
            )
            if spec.sliding:
                self.sliding = SlidingRing(
                    (len(spec.sliding.layers), batch, spec.kv_heads, self.sliding_capacity(), spec.head_dim),
                    spec.dtype,
                    device,
                    rope=spec.sliding.rope,
                    window=spec.sliding.window,
                )
            self.seen_ids = SeenTokens(batch, device) if self.remembers_ids else None
        if self.recall is not None:
            ring.on_leaving = self.recall.take
        queries = policy.scorer.observed_queries if policy.scorer else 0
        if queries or "accumulated" in policy.needs:
            self.observer = AttentionObserver(ring, queries, "accumulated" in policy.needs)
        return ring

    def begin_turn(self, ahead: int = 0) -> None:
        """Say that a turn begins `ahead` tokens after the next one, for ``evict="turns"`` and for recall.

        Raises ValueError if that is before a turn that is known.
        """
        self.schedule.begin_turn(self.schedule.seen + ahead)
        if self.recall is not None:
            self.recall.begin_turn(self.schedule.seen + ahead)

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
        self.clear()
        ring = self.allocate(batch, device)
        self.seen_ids = None  # what was seen elsewhere is not known here
        self.schedule = schedule
        if logits is not None:
            self.log_probs = torch.log_softmax(logits.float(), dim=-1)[:, None]
        return ring

    def buffers_of(self, layer: int) -> tuple[RingBuffers | None, int]:
        """The buffers that hold a layer of the model, None before the first token, and the layer's row in them."""
        row = self.spec.streaming_rows.get(layer)
        return (self.sliding, self.spec.sliding_rows[layer]) if row is None else (self.ring, row)

    def choose(self, leaving: int) -> Refreshed:
        """The tokens that a refresh keeps pinned, when `leaving` tokens leave the window."""
        ring, observer, scorer = self.ring, self.observer, self.policy.scorer
        assert ring is not None and scorer is not None, "a refresh scores the tokens that are cached"
        attention = None
        if observer is not None and "attention" in scorer.needs:
            attention = partial(candidate_attention, queries=observer.latest())
        return refresh(ring.held(), leaving, scorer, self.policy.refresh, attention)

    @property
    def _prunes_ahead(self) -> int:
        """Prunes at consecutive tokens for which the sinks are rotated at once; 0 where prunes are rarer."""
        policy = self.policy
        strict = policy.growth == 0 and not policy.refresh and self.positions == "cache"
        return AHEAD if strict and policy.sink <= MOST_AHEAD else 0

    def sliding_capacity(self) -> int:
        """Slots of the ring of the layers with a window of their own, as `capacity` of the others."""
        assert self.spec.sliding is not None, "asked of hybrid models only"
        window = self.spec.sliding.window
        return max(2 * max(window, 256), window + self.block_tokens)

    def _new_ring(self, shape: tuple[int, ...], device: torch.device, **more: Any) -> SoftRing:
        return SoftRing(shape, self.spec.dtype, device, **more)


def rewind(stream: Stream, tokens: int) -> None:
    """Take back the latest tokens of a stream; what left when they came stays away.

    Raises
    ------
    ValueError
        If so many are not in the window, or the policy cannot tell what to take back.
    """
    ring = stream.ring
    window = 0 if ring is None else ring.live - (ring.pinned if ring.first_window else 0)
    if ring is None or not 0 <= tokens <= window:
        raise ValueError(f"tokens={tokens} cannot be taken back; accepted: 0 to {window}, which are in the window")
    before = stream.schedule.fork()
    before.rewind(tokens)  # what is refused has changed nothing
    if stream.recall is not None:
        stream.recall.rewind(tokens)
    stream.own()
    stream.schedule = before
    ring.rewind(tokens)
    if stream.seen_ids is not None:
        stream.seen_ids.rewind(tokens)


def longest_forward(stream: Stream, *, chooses: bool = True) -> int:
    """The most tokens that the next forward may append; `chooses`: whether it may choose pinned tokens on the way."""
    kept = (
        stream.kept if stream.recall is None else max(stream.kept, stream.policy.target)
    )  # tokens may come back before
    room = stream.capacity() - kept
    if stream.spec.original_length is not None:
        room = min(room, stream.spec.original_length - kept)
    if stream.spec.sliding:
        room = min(room, stream.sliding.room if stream.sliding else stream.sliding_capacity())
    if stream.recall is not None:
        room = min(room, stream.recall.room(stream.schedule))
    if stream.policy.plan_known:
        return room
    across = 0
    if chooses and stream.ring is not None and stream.observer is not None and stream.recall is None:
        across = chosen_across(stream.ring, stream.schedule, room)
    ahead = stream.schedule.copy()
    if stream.recall is not None:
        ahead.hold(max(ahead.cached, stream.policy.target))
    ahead.step()
    sure = ahead.sure_steps()
    return max(across, min(room, 1 + (min(ahead.possible_steps(), sure + SPECULATE) if stream.speculates else sure)))
