"""`HeldStreams`: what streams hold between two steps, and views and copies of parts of it."""

from collections.abc import Sequence
from typing import Any

import torch

from sinkstream.engine.counts import StreamCounts
from sinkstream.engine.span import Block, StreamSpan, block_of
from sinkstream.policies import EvictionPolicy
from sinkstream.policies.options import plain


class HeldStreams(StreamCounts):
    """The buffers of several streams with the counts of each. Parameters are those of `StreamCounts`.

    Attributes
    ----------
    stale_logits : set of int
        Streams whose logits are not those of their last token.
    """

    def __init__(self, *args: Any, **more: Any):
        super().__init__(*args, **more)
        self.stale_logits: set[int] = set()
        self._idle: list[tuple[torch.Tensor, torch.Tensor]] = []  # what idle streams hold, and copies of it
        self._spans: dict[Block, StreamSpan] = {}

    def policy_of(self, sink: int | None) -> EvictionPolicy:
        """The policy of a stream with `sink` sinks; None: as many as the state's policy has. Raises ValueError."""
        least, most = self.policy.sink, self.geometry.sink
        sink = plain(sink)
        if sink is None:
            return self.policy
        if isinstance(sink, bool) or not isinstance(sink, int) or not least <= sink <= most:
            raise ValueError(
                f"sink={sink!r} is not accepted for a stream of this engine; accepted: {least} to {most} (its policy's"
                " sink, and max_sink)"
            )
        return self.policy if sink == least else self.policy.with_sink(sink)

    def check_goes_on(self, stream: int) -> None:
        """Raise ValueError unless a stream can go on without a token: it has begun, and its logits are known."""
        if not self.counters[stream].seen:
            raise ValueError(f"stream {stream} has not begun and the prompt is empty; give at least one token")
        if stream in self.stale_logits:
            raise ValueError(
                f"stream {stream} was rewound, or restored from a cache's file, which has no logits, and the prompt is"
                " empty; give at least one token"
            )

    def block_of(self, active: Sequence[int]) -> Block:
        """The streams that a step of `active` computes: a block of them, or all where a kernel's tables need all."""
        whole = self.decisions is not None or self.scores is not None
        block = Block(0, self.streams) if whole else block_of(active, self.streams)
        return block._replace(framed=any(self.counters_so_far[s].recalled for s in active))

    def span(self, block: Block | None = None) -> StreamSpan:
        """A block of streams; default: all of them."""
        block = Block(0, self.streams) if block is None else block
        if block not in self._spans:
            self._spans[block] = StreamSpan(self, *block)
        return self._spans[block]

    def put_aside(self, block: Block, active: Sequence[int]) -> None:
        """Copy what steps of a block change in streams that hold tokens and sit these steps out."""
        span = self.span(block)
        idle = [s for s in range(block.first, block.first + block.streams) if s not in active and self.counters[s].seen]
        self._idle = [(part, part.clone()) for s in idle for part in span.touched(s - span.first)]

    def wake_idle(self) -> None:
        """Put back what `put_aside` has copied."""
        for part, copy in self._idle:
            part.copy_(copy)
        self._idle = []
