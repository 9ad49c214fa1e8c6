"""`StreamRecall`: recall in the one stream of an engine; `cache.recall` says what comes back, and when.

Keys and values are copied out of the ring before a step writes over them, many at once; a step waits for no copy.
At every choice the host reads the latest token ids, as soon as the step that appends the last of them has begun: the
choice and the fetch overlap with that step. What comes back is written to slots of its own between two steps, and the
next plan says how many of these are read.
"""

import torch

from sinkstream.archive import ARCHIVES
from sinkstream.cache.pinned import SLOT_AXIS, unrotated, write_rotated
from sinkstream.cache.recall import Recall, RecallEvent
from sinkstream.engine.geometry import Counters
from sinkstream.engine.prefill import PrefillCache
from sinkstream.engine.prompt import PromptForward
from sinkstream.engine.recall_queries import RingQueries
from sinkstream.engine.recorder import EarlyReader
from sinkstream.engine.refresh import window_slots
from sinkstream.engine.state import StreamState
from sinkstream.kernels.layout import NO_TOKEN
from sinkstream.policies import PruneSchedule

COPIED = 256  # tokens that are copied out of the ring at once, where the window has so many


class Leaving:
    """Keys and values that were copied out of the ring and are not in the archive yet.

    Attributes
    ----------
    end : int
        Tokens before this one have been copied, or are in the archive.
    """

    def __init__(self, first: int):
        self.end = first
        self._parts: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # first token, keys and values, oldest first

    def add(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take in the tokens that follow, ``(layers, 1, kv_heads, tokens, head_dim)``, keys not rotated."""
        self._parts.append((self.end, keys, values))
        self.end += keys.shape[SLOT_AXIS]

    def pop(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Give away the oldest tokens, those before `end` at the most and at least one."""
        first, keys, values = self._parts.pop(0)
        count, held = end - first, keys.shape[SLOT_AXIS]
        if count < held:
            rest = (first + count, keys[..., count:, :], values[..., count:, :])
            self._parts.insert(0, rest)
        return keys[..., :count, :], values[..., :count, :]

    def cut(self, end: int) -> None:
        """Let the tokens from `end` on go, which were taken back."""
        self.end = min(self.end, end)
        held = [(first, k[..., : end - first, :], v[..., : end - first, :]) for first, k, v in self._parts]
        self._parts = [part for part in held if part[0] < end]


class StreamRecall:
    """What leaves the ring, and what of it stands in the frame. To `Recall` it is a soft ring.

    Parameters
    ----------
    state : StreamState
        Of one stream, with slots for recalled tokens.
    recall : Recall
        Empty.
    prompts : pair of PromptForward
        While nothing is recalled, and while something is.

    Attributes
    ----------
    memory : Recall
        Of the present stream.
    shift : int
        How far in front of their place behind the sinks the recalled tokens stand.
    """

    def __init__(self, state: StreamState, recall: Recall, prompts: tuple[PromptForward, PromptForward]):
        self.state, self.prompts, self.memory = state, prompts, self.watching(recall.empty(), state)
        self._keeps = ARCHIVES[recall.settings.archive].keeps_entries or bool(recall.settings.chooser.heads)
        self._reader = EarlyReader(state.plan) if state.plan.is_cuda else None
        self._leaving = Leaving(state.policy.sink)
        self._base = 0  # token index of window position 0 when the latest tokens were copied
        self._told = 0  # rows of the present plan whose tokens are known
        self.shift = 0
        state.between_steps.append(self)

    @property
    def counters(self) -> Counters:
        """How far the stream is."""
        return self.state.counters[0]

    @property
    def schedule(self) -> PruneSchedule:
        """When the stream is pruned."""
        return self.state.schedules[0]

    # ---- between two steps ----

    def before_step(self) -> None:
        """Choose if it is time, and copy what the step would write over."""
        self._choose()
        self._renew_copies()
        schedule, target = self.schedule, self.state.policy.target
        if schedule.sure_steps() < 1:
            end = self.counters.first_window + schedule.cached + 1 - target
            if end > self._leaving.end:
                self._copy(min(end + COPIED - 1, self.counters.seen))

    def planned(self) -> None:
        """The rows of the plan have no token ids yet."""
        if self._reader is not None:
            self._reader.due()

    def keep(self) -> None:
        """Read the token ids of a plan that will be discarded."""
        self._learn()
        self._told = 0

    def rewind(self, tokens: int) -> None:
        """Forget the latest tokens. Raises ValueError if the chooser has read them."""
        self.memory.rewind(tokens)
        self._leaving.cut(self.counters.seen - tokens)

    def rebasing(self) -> None:
        """Let no query that recall reads be rounded once more."""
        if isinstance(self.memory.queries, RingQueries):
            self.memory.queries.hold()

    def forget(self) -> None:
        """Begin a new stream with an empty archive."""
        self.memory.close()
        self.memory = self.watching(self.memory.empty(), self.state)
        self._leaving = Leaving(self.state.policy.sink)
        self._told = 0

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, stream: int) -> None:
        """Append token ids ``(tokens,)``, up to the next choice that changes something in one forward."""
        known, done = ids.tolist(), 0
        self.memory.announce(known)
        while done < len(known):
            self._choose()
            size = self._forward_size(len(known) - done)
            part = slice(done, done + size)
            prompts = self.prompts[bool(self.counters.recalled)]
            with torch.cuda.device_of(ids):  # Triton launches on the current device
                prompts.append(ids[part], stream, part.stop == len(known))
            self.memory.append(torch.tensor(known[part]))
            done += size
        self.state.stale_logits.discard(stream)

    def _forward_size(self, rest: int) -> int:
        """How many of the coming tokens to append at once; what leaves on the way has been copied then."""
        counters, schedule = self.counters, self.schedule
        size = min(rest, self.prompts[0].chunk_tokens, self.memory.room(schedule))
        left = schedule.plan(size).drop.cumsum()
        size = max(1, int(left.searchsorted(counters.window, side="right")))  # what leaves lies in the ring now
        self._copy(counters.first_window + int(left[size - 1]))
        return size

    def catch_up(self) -> Recall:
        """Put all that has left the window into the archive, and give the memory; waits for the device."""
        self._learn()
        self._archive()
        return self.memory

    def go_on(self, memory: Recall) -> None:
        """Take over the memory of a stream that was held elsewhere; the ring and the counters are its own already."""
        self.memory, self._base = memory, self.counters.base
        self._leaving = Leaving(self.state.policy.sink if memory.archive is None else memory.archive.end)
        if isinstance(memory.queries, RingQueries):
            memory.queries.first = self.counters.seen

    @staticmethod
    def watching(memory: Recall, state: StreamState) -> Recall:
        """A memory, whose chooser reads the queries that the state keeps, if it reads any."""
        chooser = memory.settings.chooser
        if chooser.heads:
            memory.queries = RingQueries(state, chooser.heads, chooser.query_tokens)
        return memory

    # ---- what leaves ----

    def _choose(self) -> None:
        """Set the frame anew if it is time."""
        if not self.memory.due(self.counters.seen):
            return
        if self.counters.pruned:  # before, nothing can come back, and no token need be known
            self._learn()
            self._archive()
        self.memory.choose(self, self.schedule)

    def _learn(self) -> None:
        """Take in the token ids of the steps so far."""
        state, first, end = self.state, self._told, self.state.steps_done
        if first == end:
            return
        rows = state.plan[first:end]
        ids = self._reader.read(rows, (0,)) if self._reader is not None else state.appended(first).tolist()
        self.memory.append(torch.tensor([0 if row[0] == NO_TOKEN else row[0] for row in ids]))
        self._told = end

    def _copy(self, end: int) -> None:
        """Copy the window tokens before `end` out of the ring, where the archive keeps them."""
        self._renew_copies()
        state, first = self.state, self._leaving.end
        if end <= first:
            return
        if not self._keeps:
            self._leaving.end = end
            return
        slots = window_slots(state, 0, first, end - first)
        keys, values = (part[:, :1].index_select(SLOT_AXIS, slots) for part in (state.keys, state.values))
        self._leaving.add(unrotated(state.spec.rope, keys, first - self.counters.base).to(keys.dtype), values)

    def _renew_copies(self) -> None:
        """After a rebase, let copies of window tokens go: no bit of the archive depends on when it was copied."""
        if self._base != self.counters.base:
            self._leaving.cut(self.counters.first_window)
            self._base = self.counters.base

    def _archive(self) -> None:
        """Put what has left the window into the archive."""
        memory, end, state = self.memory, self.counters.first_window, self.state
        if not self.counters.pruned:
            return
        first = state.policy.sink if memory.archive is None else memory.archive.end
        while first < end:
            if self._keeps:
                keys, values = self._leaving.pop(end)
            else:  # only ids are kept
                keys = values = state.keys[:, :1, :, : end - first]
            memory.take(first, keys, values)
            first += keys.shape[SLOT_AXIS]

    @property
    def events(self) -> list[RecallEvent]:
        """When the frame was set, why, and what came back, the oldest first."""
        return list(self.memory.events)

    # ---- the frame, as `Recall` sees it ----

    @property
    def keys(self) -> torch.Tensor:
        """See `StreamBuffers`; these lie where the frame does."""
        return self.state.keys

    @property
    def pinned_keys(self) -> torch.Tensor:
        """Keys of the sinks, not rotated; where none are recalled, none of them are read."""
        return self.state.pinned_keys

    @property
    def pinned_values(self) -> torch.Tensor:
        """Values; where none are recalled, none of them are read."""
        return self.state.values

    @property
    def live(self) -> int:
        """Entries cached now."""
        return self.counters.kept

    @property
    def pinned(self) -> int:
        """Sinks and recalled tokens."""
        return self.counters.pinned

    def recall(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, *, drop: int = 0, shift: int = 0
    ) -> None:
        """As `cache.frame.FramedRing.recall`."""
        state, counters = self.state, self.counters
        state.settle()  # the plan is that of another frame
        self._copy(counters.first_window + drop)
        sink, count, g = counters.sink, keys.shape[SLOT_AXIS], state.geometry
        if count and not counters.recalled:
            for part in (state.keys, state.values):
                part[..., :sink, :] = part[..., g.framed : g.framed + sink, :]
        if count:
            slots, rope = slice(sink, sink + count), state.spec.rope
            phases = rope.phases(torch.arange(sink + shift, sink + shift + count, device=state.device))
            write_rotated(rope, state.keys[..., slots, :], keys, phases)
            state.values[..., slots, :] = values
        counters.geometry = g if count else g.bare
        counters.recalled, self.shift = count, shift
        counters.first_window += drop


def recall_slots(cache: PrefillCache) -> int:
    """The most tokens that come back at once into a stream with the settings of a cache; 0 without recall."""
    recall = cache.stream.recalling
    return 0 if recall is None else recall.settings.slots


def recall_queries(cache: PrefillCache) -> int:
    """How many of the latest queries recall reads."""
    recall = cache.stream.recalling
    return 0 if recall is None or not recall.settings.chooser.heads else recall.settings.chooser.query_tokens


def reread_tokens(cache: PrefillCache) -> int:
    """The most tokens that are read again at once, sinks included; 0 where keys and values are kept."""
    recall = cache.stream.recalling
    kept = recall is None or ARCHIVES[recall.settings.archive].keeps_entries
    return 0 if kept or recall is None else recall.sink + recall.settings.slots


def check_recall(cache: PrefillCache, streams: int, max_sink: int | None) -> None:
    """Raise ValueError, by name, for what the engine does not serve beside recall."""
    recall = cache.stream.recalling
    if recall is None:
        return
    if streams != 1:
        raise ValueError(f"recall with streams={streams} is not served by the engine; accepted: streams=1")
    if max_sink is not None:
        raise ValueError(f"recall and max_sink={max_sink} exclude each other; give one of them")
    if not cache.policy.plan_known:
        raise ValueError(
            "recall with adaptive eviction is not served by the engine; accepted: policies that know every prune"
            " beforehand (strict, lazy, overlap, max_drop, slack), or StreamingCache.for_model(model, recall=CHOOSER,"
            " …), the cache for transformers"
        )
