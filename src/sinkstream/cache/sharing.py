"""`SharedBuffers`: a stream and its forks read the same buffers until one of them is about to write."""

import copy
import weakref
from abc import abstractmethod
from typing import Self

from sinkstream.cache.conversation import SeenTokens
from sinkstream.cache.observe import AttentionObserver
from sinkstream.cache.recall import Recall
from sinkstream.cache.ring import SoftRing
from sinkstream.cache.sliding import SlidingRing
from sinkstream.policies import EvictionPolicy, PruneSchedule


class SharedBuffers:
    """The part of `Stream` that forks it."""

    ring: SoftRing | None
    sliding: SlidingRing | None
    observer: AttentionObserver | None
    schedule: PruneSchedule
    recall: Recall | None
    recalling: Recall | None
    seen_ids: SeenTokens | None
    policy: EvictionPolicy
    _sharers: "weakref.WeakSet[SharedBuffers] | None" = None  # all that read the same buffers, this stream among them

    @abstractmethod
    def clear(self) -> None:
        """Forget everything; memory is given back."""

    def fork(self, *, share: bool = True) -> Self:
        """The same stream so far, to go on independently.

        Parameters
        ----------
        share : bool
            Whether the buffers are shared until one of the two is about to write (`own`); else they are copied at once.
        """
        other = copy.copy(self)  # what is replaced and never written to may be shared
        other._sharers, other.recall = None, None
        if self.recalling is not None:
            other.recalling = self.recalling.beside()
        ring, observer = self.ring, self.observer
        if ring is None or not ring.seen:
            other.clear()
            return other
        other.schedule = copy.deepcopy(self.schedule, {id(self.policy): self.policy})
        other.ring = ring.twin()
        other.sliding = None if self.sliding is None else self.sliding.twin()
        if self.recall is not None and other.recalling is not None:
            other.recall = self.recall.fork(other.recalling.settings)
            other.ring.on_leaving = other.recall.take
        if observer is not None:
            other.observer = AttentionObserver(other.ring, observer.keep, accumulate=False)
            other.observer.accumulate, other.observer.scaling = observer.accumulate, observer.scaling
            other.observer.queries = dict(observer.queries)
        if self._sharers is None:
            self._sharers = weakref.WeakSet([self])
        self._sharers.add(other)
        other._sharers = self._sharers
        if not share:
            other.own()
        return other

    def own(self) -> None:
        """Make sure that nobody else reads the buffers: comes before every write."""
        if self.shares:
            assert self.ring is not None, "what is shared is there"
            self.ring.copy_buffers()
            if self.sliding is not None:
                self.sliding.copy_buffers()
            self.seen_ids = self.seen_ids.copy() if self.seen_ids is not None else None
        self._leave()

    @property
    def shares(self) -> bool:
        """Whether another stream reads the same buffers."""
        return self._sharers is not None and len(self._sharers) > 1

    def _leave(self) -> None:
        sharers, self._sharers = self._sharers, None
        if sharers is not None:
            sharers.discard(self)
