"""`StreamDecoder`: the streams of one model, in static memory, under any eviction policy: tokens in, logits out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch

from sinkstream.cache import inner_model
from sinkstream.cache.stream import default_rebase
from sinkstream.engine.checked_cache import CheckedCache
from sinkstream.engine.geometry import Geometry
from sinkstream.engine.inputs import Ids, check_step, encoded, token_ids
from sinkstream.engine.keeping import StreamKeeper
from sinkstream.engine.memory import check_engine
from sinkstream.engine.packing import PackedWeights, check_layers, check_packable, pack
from sinkstream.engine.prompt import CHUNK_TOKENS, PromptForward
from sinkstream.engine.prompt_events import EventPrompts
from sinkstream.engine.recalling import StreamRecall, check_recall, recall_queries, recall_slots, reread_tokens
from sinkstream.engine.refresh import rehearse_refresh
from sinkstream.engine.rereading import PackedReader
from sinkstream.engine.short_chunks import short_chunk_sizes
from sinkstream.engine.state import REBASE_AT, StreamState
from sinkstream.engine.steps import STEPS
from sinkstream.engine.watch import ModelWatch
from sinkstream.measure.metrics import token_nll
from sinkstream.policies import EvictionPolicy
from sinkstream.policies.options import check_whole, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StreamDecoder(StreamKeeper):
    """Decodes one or several independent streams with one set of weights; `Engine` adds generation.

    Parameters
    ----------
    model : PreTrainedModel
        A causal language model of a supported family; its parameters become views of the packed weights.
    policy : EvictionPolicy or None
        Or give its options: ``sink``, ``window`` or ``cap``, ``compress_every`` … (see `EvictionPolicy.build`).
    backend : str
        Name in `STEPS`: how a step is computed.
    streams : int
        How many streams are held; each has its own ring.
    positions : {"cache", "original"}
        As in `StreamingCache.for_model`.
    tokenizer : tokenizer or None
        Needed by ``scorer="structural"``, stop strings and text.
    allow_untrained_positions : bool
        As in `StreamingCache.for_model`.
    rebase_at : int
        Window position past which positions are rebased (at least twice the policy's peak is used).
    chunk_tokens : int
        Most tokens of a prompt that go through the model at once.
    max_sink : int or None
        Most sinks that `join` may give a stream, which then has as much less window; default: the policy's. Goes with
        policies whose prunes are known beforehand.
    recall : str, Chooser or None
        The chooser of evicted tokens that come back, as in `StreamingCache.for_model`, with the same options
        ``recall_slots``, ``recall_every`` … Needs one stream, and a policy whose prunes are known beforehand.

    Raises
    ------
    ValueError
        If the model, the policy, an option or the backend does not fit, or the device's memory does not suffice;
        before anything is allocated.

    Attributes
    ----------
    policy : EvictionPolicy
    spec : ModelSpec
    weights : PackedWeights
    state : StreamState
    recall : StreamRecall or None
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: EvictionPolicy | None = None,
        *,
        backend: str = "ring",
        streams: int = 1,
        positions: str = "cache",
        tokenizer: Any = None,
        allow_untrained_positions: bool = False,
        rebase_at: int = REBASE_AT,
        chunk_tokens: int = CHUNK_TOKENS,
        max_sink: int | None = None,
        **options: Any,
    ):
        model, max_sink = inner_model(model), plain(max_sink)
        streams, chunk_tokens, rebase_at = _whole(streams, chunk_tokens, rebase_at)
        self._cache = checked_cache(
            model,
            policy,
            backend=backend,
            streams=streams,
            positions=positions,
            tokenizer=tokenizer,
            allow_untrained_positions=allow_untrained_positions,
            rebase_at=min(rebase_at, default_rebase(model.dtype)),
            chunk_tokens=chunk_tokens,
            max_sink=max_sink,
            **options,
        )
        self.model, self.tokenizer, self.backend = model, tokenizer, backend
        self.policy, self.spec = self._cache.policy, self._cache.spec
        self.weights: PackedWeights = pack(model)
        self.state = StreamState(
            self.spec,
            self.policy,
            positions=positions,
            streams=streams,
            vocab=self.weights.head.shape[0],
            device=model.device,
            rebase_at=rebase_at,
            structure=self._cache.stream.structure,
            max_sink=max_sink,
            recall_slots=recall_slots(self._cache),
            recall_queries=recall_queries(self._cache),
        )
        self._step = STEPS[backend](self.weights, self.state)
        self._step.prepare()
        rehearse_refresh(self.state)
        self._ready = self._step.ready
        short_sizes = short_chunk_sizes(chunk_tokens) if self._step.captures else ()
        self._append = _prompts(self.weights, self.state, chunk_tokens, short_sizes, self._cache)
        self.recall = self._append if isinstance(self._append, StreamRecall) else None
        self._watch = ModelWatch(model, self.weights)

    # ---- feeding ----

    @torch.no_grad()
    def prefill(self, ids: Ids, *, stream: int = 0, checked: bool = False) -> torch.Tensor:
        """Append a text of any length to a stream, chunk by chunk, evicting on the way.

        An interrupt or an error clears the stream; other streams are unchanged.

        Parameters
        ----------
        ids : Tensor, (tokens,), int64, or sequence of int
            New tokens only; at least one.
        checked : bool
            Whether the ids are a tensor on the device that has been checked: the host does not wait for them then.

        Returns
        -------
        Tensor, (vocab,), float32
            Logits after the last token.
        """
        ids = cast(torch.Tensor, ids) if checked else self._ids(ids, stream)
        self.check_model()
        self.state.settle()
        try:
            self._append(ids, stream)
        except BaseException:
            self.state.clear(stream)
            raise
        self.state.stale_logits.discard(stream)
        return self.state.logits[stream].clone()

    def join(self, ids: Ids, *, stream: int | None = None, sink: int | None = None) -> int:
        """Start a stream between two steps of the others, which are not affected.

        Parameters
        ----------
        ids : Tensor, (tokens,), int64, or sequence of int
            Its prompt, which is fed alone.
        stream : int or None
            Default: the first one that holds no token. Its number is returned.
        sink : int or None
            Its sinks, up to ``max_sink``; default: the policy's.

        Raises
        ------
        ValueError
            If the stream, or every stream, holds tokens (see `leave`), or an argument is not accepted.
        """
        taken = self.active
        if stream is None:
            stream = next((s for s in range(self.state.streams) if s not in taken), None)
            if stream is None:
                raise ValueError(f"all {self.state.streams} streams hold tokens; accepted: leave(stream) of one before")
        checked = self._ids(ids, stream)
        if stream in taken:
            seen = self.state.counters[stream].seen
            raise ValueError(
                f"stream {stream} holds {seen} tokens; accepted: a stream without tokens, or leave({stream})"
            )
        self.reset(stream=stream, sink=sink)
        self.prefill(checked, stream=stream, checked=True)
        return stream

    @torch.no_grad()
    def step(self, tokens: Ids, *, streams: Sequence[int] | None = None) -> torch.Tensor:
        """Append one token to each stream.

        Parameters
        ----------
        tokens : Tensor, (len(streams),), int64, or sequence of int
            Their values are not checked where they lie on a GPU: no step waits for one.
        streams : sequence of int or None
            Which streams take part, each once; default: all of them. The others are unchanged.

        Returns
        -------
        Tensor, (len(streams), vocab), float32
            Logits after these tokens.
        """
        which = _which(streams, self.state.streams)
        for stream in which:
            self._check_stream(stream)
        tokens = self._ids(tokens, which[0], between_steps=True)
        if len(tokens) != len(which):
            raise ValueError(f"{len(tokens)} tokens for {len(which)} streams; accepted: one token a stream")
        if len(which) == self.state.streams and streams is None:
            self.advance(tokens, which)
            return self.state.logits.clone()
        index = torch.tensor(which, device=self.state.device)
        self.advance(self.state.tokens.index_copy(0, index, tokens), sorted(which))
        return self.state.logits[index]

    def advance(self, tokens: torch.Tensor | None, streams: Sequence[int]) -> None:
        """Append ``tokens[s]`` to each stream s of `streams`; the logits are in ``state.logits`` afterwards.

        Parameters
        ----------
        tokens : Tensor or None, (all streams,), int64, on the device
            Token ids, not checked on a GPU. A negative one means the likeliest token of the stream's logits; None means
            that of all streams, and one such step after another launches nothing between two replays of a graph.
        """
        if tokens is not None and tokens.device.type == "cpu":
            check_step(tokens, streams, self.weights.embedding.shape[0])
        self._ready(streams)
        self.state.choose(tokens)
        with self.state.step(streams):
            self._step()

    @torch.no_grad()
    def score(self, ids: Ids, *, stream: int = 0) -> torch.Tensor:
        """Append a text token by token and return the NLL of each token.

        Returns
        -------
        Tensor, (tokens,), float32, nats
            NLL of each token given everything before it; NaN for the first token of a stream, and for the first one
            after `restore` from a file that has no logits.
        """
        ids, state = self._ids(ids, stream), self.state
        self.check_model()
        state.wake([stream])
        begun = state.counters[stream].seen > 0 and stream not in state.stale_logits
        nll = torch.empty(len(ids), dtype=torch.float32, device=state.device)
        logits = state.logits[stream]
        for i, token in enumerate(ids.split(1)):
            nll[i] = token_nll(logits[None], token)[0]
            tokens = token
            if state.streams > 1:
                tokens = state.tokens.clone()
                tokens[stream] = token[0]
            self.advance(tokens, [stream])
        if not begun:
            nll[0] = float("nan")
        return nll

    # ---- checks ----

    def _ids(self, ids: Ids, stream: int, **how: bool) -> torch.Tensor:
        self._check_stream(stream)
        return token_ids(ids, self.weights.embedding.shape[0], self.state.device, **how)

    def prompt_ids(self, prompt: Ids | str, stream: int) -> torch.Tensor:
        """Token ids, ``(tokens,)`` int64 on the device, of a prompt for a stream; text needs the tokenizer.

        Raises ValueError also for an empty prompt of a stream that has not begun.
        """
        ids = self._ids(encoded(prompt, self.tokenizer), stream, empty=True)
        if not len(ids):
            self.state.check_goes_on(stream)
        return ids


def _which(streams: Sequence[int] | None, count: int) -> list[int]:
    """The streams of a step, of so many; all of them by default. Raises ValueError."""
    if streams is not None and not isinstance(streams, Iterable):
        raise ValueError(f"streams={streams!r} is not accepted; accepted: a sequence of streams, or None for all")
    which = list(range(count) if streams is None else streams)
    if len(set(which)) < len(which) or not which:
        raise ValueError(f"streams={which} is not accepted; accepted: at least one stream, each once")
    return which


def checked_cache(
    model: PreTrainedModel,
    policy: EvictionPolicy | None,
    *,
    backend: str,
    streams: int,
    chunk_tokens: int = CHUNK_TOKENS,
    max_sink: int | None = None,
    **options: Any,
) -> CheckedCache:
    """An empty cache with the engine's settings, after all checks of the engine. Raises ValueError."""
    step, max_sink = STEPS[backend], plain(max_sink)
    streams, chunk_tokens, _ = _whole(streams, chunk_tokens, 0)
    model = inner_model(model)
    check_packable(model)
    cache = cast(CheckedCache, CheckedCache.for_model(model, policy=policy, **options))
    try:
        check_layers(cache.spec)
        check_max_sink(cache.policy, max_sink)
        check_recall(cache, streams, max_sink)
        geometry = Geometry.of(cache.policy, "cache", max_sink, recall_slots(cache))
        step.check(cache.spec, geometry, model.device)
        check_engine(
            model,
            cache.spec,
            cache.policy,
            streams,
            chunk_tokens,
            model.device,
            captures=step.captures,
            max_sink=max_sink,
            recall_slots=recall_slots(cache),
            recall_queries=recall_queries(cache),
            reread_tokens=reread_tokens(cache),
        )
    except ValueError:
        cache.close()
        raise
    return cache


def _whole(streams: int, chunk_tokens: int, rebase_at: int) -> tuple[int, int, int]:
    """The three as plain numbers. Raises ValueError as `check_whole`."""
    given = (("streams", streams, 1), ("chunk_tokens", chunk_tokens, 1), ("rebase_at", rebase_at, 0))
    return tuple(check_whole(*one) for one in given)  # type: ignore[return-value]


def check_max_sink(policy: EvictionPolicy, max_sink: int | None) -> None:
    """Refuse streams of more sinks than the policy's where the policy has no place for them. Raises ValueError."""
    if max_sink is None:
        return
    if isinstance(max_sink, bool) or not isinstance(max_sink, int) or max_sink < policy.sink:
        raise ValueError(f"max_sink={max_sink!r} is not accepted; accepted: a whole number from sink={policy.sink}")
    if max_sink == policy.sink:
        return
    if not policy.plan_known:
        raise ValueError(
            f"max_sink={max_sink} with refresh or adaptive eviction; accepted: policies that know every prune"
            " beforehand (strict, lazy, overlap, max_drop, slack, evict='turns')"
        )
    policy.with_sink(max_sink)


def _prompts(
    weights: PackedWeights,
    state: StreamState,
    chunk_tokens: int,
    short_sizes: tuple[int, ...],
    cache: CheckedCache,
) -> Callable[[torch.Tensor, int], None]:
    """What appends token ids to a stream: chunks that cross prunes, known or foreseen, or that end there."""
    recall = cache.stream.recalling
    if recall is not None:
        bare, framed = (PromptForward(weights, state, chunk_tokens, short_sizes, framed=f) for f in (False, True))
        tokens = reread_tokens(cache)
        if tokens:
            recall.reread = PackedReader(weights, state.spec, tokens, short_sizes)
        return StreamRecall(state, recall, (bare, framed))
    forward = PromptForward(weights, state, chunk_tokens, short_sizes)
    return forward if state.policy.plan_known else EventPrompts(forward)
