"""`StreamRecall`: recall in the one stream of an engine; `cache.recall` says what comes back, and when.

Keys and values are copied out of the ring before a step overwrites them, many at once; no step waits for a copy. At
every choice the host reads the latest token ids as soon as the step that appends the last of them has begun, so choice
and fetch overlap with that step. Recalled entries are written to slots of their own between two steps. The next rows of
the step table say how many of these slots are read.
"""

import torch

from sinkstream.archive import ARCHIVES, RecallSettings
from sinkstream.cache.pinned import SLOT_AXIS, write_rotated
from sinkstream.cache.recall import Recall, RecallEvent
from sinkstream.engine.checked_cache import CheckedCache
from sinkstream.engine.geometry import Counters
from sinkstream.engine.leaving import Leaving
from sinkstream.engine.prompt import PromptForward
from sinkstream.engine.recall_queries import RingQueries
from sinkstream.engine.state import StreamState
from sinkstream.engine.step_ids import StepIds
from sinkstream.policies import EvictionPolicy, PruneSchedule

COPIED = 64  # tokens that are copied out of the ring at once, where the window has so many


class StreamRecall:
    """Moves entries from the ring to the archive and back into the frame. To `Recall` it is a soft ring.

    Parameters
    ----------
    state : StreamState
        Of one stream, with slots for recalled tokens.
    recall : Recall
        Empty.
    prompts : pair of PromptForward
        The forward with an empty frame, and the forward with a filled one.

    Attributes
    ----------
    memory : Recall
        Of the present stream.
    shift : int
        How far in front of their place behind the sinks the recalled tokens stand.
    """

    def __init__(self, state: StreamState, recall: Recall, prompts: tuple[PromptForward, PromptForward]):
        self.state, self.prompts, self.memory = state, prompts, watching(recall.empty(), state)
        keeps = ARCHIVES[recall.settings.archive].keeps_entries or bool(recall.settings.chooser.heads)
        self._leaving = Leaving(state, state.policy.sink, keeps)
        self._ids = StepIds(state)
        self._waiting: tuple[int, int] | None = None  # a choice before this token comes late: what had left by then
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
        if self.memory.settings.lag and self.memory.question is None:  # a question never lags
            self._choose_late()
            self.memory.arrive(self, self.schedule)
            self._waiting = self.counters.seen, self.counters.first_window
        else:
            self._choose()
        self._leaving.renew()
        self._between_choices()
        schedule, target = self.schedule, self.state.policy.target
        if schedule.sure_steps() < 1:
            self._copy(self.counters.first_window + schedule.cached + 1 - target)

    def _between_choices(self) -> None:
        """Do what a choice would need soon, so that no step waits for all of it: archive in one, copy in another."""
        memory, every = self.memory, self.memory.settings.every
        phase = self.counters.seen % every
        if phase == every // 2 and memory.archive is not None and not memory.settings.lag:
            self._archive(min(self.counters.first_window, memory.log.end))
        if phase == every // 4 and self.counters.pruned:
            self._copy(self.counters.first_window + every)

    def _copy(self, end: int) -> None:
        """Copy the window tokens before this one out of the ring, and some more, if they have not been copied."""
        if end > self._leaving.end:
            self._leaving.copy(min(end + COPIED - 1, self.counters.seen))

    def planned(self) -> None:
        """The rows of the plan have no token ids yet."""
        self._ids.planned()

    def keep(self) -> None:
        """Copy the token ids of a plan that will be discarded."""
        self._ids.keep()

    def rewind(self, tokens: int) -> None:
        """Forget the latest tokens. Raises ValueError if they are not in the window, or the chooser has read them."""
        _check_in_window(self.counters, tokens)
        self._learn()
        self.memory.rewind(tokens)
        self._leaving.cut(max(self.counters.seen - tokens, self.state.policy.sink))  # sinks are never copied

    def rebasing(self) -> None:
        """Let no query that recall reads be rounded once more."""
        if isinstance(self.memory.queries, RingQueries):
            self.memory.queries.hold()

    def forget(self) -> None:
        """Begin a new stream with an empty archive."""
        self.memory.close()
        self.memory = watching(self.memory.empty(), self.state)
        self._leaving.restart(self.state.policy.sink)
        self._ids.forget()
        self._waiting = None

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, stream: int) -> None:
        """Append token ids ``(tokens,)``, up to the next choice that changes something in one forward."""
        known, done = ids.tolist(), 0
        self._learn()
        self.memory.announce(known)
        while done < len(known):
            self._choose()
            size = self._forward_size(len(known) - done)
            part = slice(done, done + size)
            prompts = self.prompts[bool(self.counters.recalled)]
            with torch.cuda.device_of(ids):  # Triton launches on the current device
                prompts.append(ids[part], stream, part.stop == len(known))
            self.memory.append(known[part])
            done += size

    def _forward_size(self, rest: int) -> int:
        """How many of the coming tokens to append at once; what leaves on the way has been copied then."""
        counters, schedule = self.counters, self.schedule
        if counters.pruned and self.memory.archive is None:
            self._archive()  # or nothing would seem to have left, and no choice to come until the next prune
        size = min(rest, self.prompts[0].chunk_tokens, self.memory.room(schedule))
        left = schedule.plan(size).drop.cumsum()
        size = max(1, int(left.searchsorted(counters.window, side="right")))  # what leaves lies in the ring now
        self._leaving.copy(counters.first_window + int(left[size - 1]))
        return size

    def catch_up(self) -> Recall:
        """Put all that has left the window into the archive, and give the memory; waits for the device."""
        self._learn()
        self._archive()
        return self.memory

    def go_on(self, memory: Recall) -> None:
        """Take over the memory of a stream that was held elsewhere; the ring and the counters are its own already."""
        self.memory = memory
        self._leaving.restart(self.state.policy.sink if memory.archive is None else memory.archive.end)
        self._ids.forget()
        self._waiting = None
        if isinstance(memory.queries, RingQueries):
            memory.queries.first = self.counters.seen

    # ---- what leaves ----

    def _choose(self) -> None:
        """Set the frame anew if it is time."""
        if not self.memory.due(self.counters.seen):
            return
        if self.counters.pruned and self.memory.chooses:  # before, nothing can come back, and no token need be known
            if not self.memory.brief(self.counters.seen):  # what is known already need not wait for the latest token
                self._archive(min(self.counters.first_window, self.memory.log.end))
                self._learn_until(self.counters.seen - 1)
                self.memory.prepare(self.counters.seen)
            self._learn()
            if self.memory.quiet(self.counters.seen, self.counters.first_window):
                return
            self._archive()
        self.memory.choose(self, self.schedule)

    def _choose_late(self) -> None:
        """Choose before the token of the latest step, which is running: no step waits for a choice whose frame lags."""
        waiting, self._waiting = self._waiting, None
        memory, asked = self.memory, self.memory.question
        if waiting is None:
            return
        now, end = waiting
        memory.question = None  # of a question that comes after that token
        if end > self.state.policy.sink and memory.due(now):
            self._learn_until(now)
            if not memory.quiet(now, end):
                self._archive(end)
                memory.decide(now, self, self.schedule)
        memory.question = asked

    def _learn(self) -> None:
        """Take in the token ids of the steps so far."""
        self._choose_late()
        self._learn_until(self.counters.seen)

    def _learn_until(self, end: int) -> None:
        """Take in the ids of the tokens before this one."""
        count = end - self.memory.log.end
        if count > 0:
            self.memory.append(self._ids.take(count))

    def _archive(self, end: int | None = None) -> None:
        """Put what has left the window into the archive, up to a token."""
        memory, state = self.memory, self.state
        end = self.counters.first_window if end is None else end
        if not self.counters.pruned:
            return
        first = state.policy.sink if memory.archive is None else memory.archive.end
        while first < end:
            keys, values = self._leaving.pop(first, end)
            memory.take(first, keys, values)
            first += keys.shape[SLOT_AXIS]

    @property
    def events(self) -> list[RecallEvent]:
        """When the frame was set, why, and what came back, the oldest first."""
        self._choose_late()
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
        self._leaving.copy(counters.first_window + drop)
        sink, count, g = counters.sink, keys.shape[SLOT_AXIS], state.geometry
        if count and not counters.recalled:
            for part in (state.keys, state.values):
                part[..., :sink, :] = part[..., g.framed : g.framed + sink, :]
        if count:
            slots, phases = slice(sink, sink + count), self._leaving.turned_back(sink + shift, count).conj()
            write_rotated(state.spec.rope, state.keys[..., slots, :], keys, phases)
            state.values[..., slots, :] = values
        counters.geometry = g if count else g.bare
        counters.recalled, self.shift = count, shift
        counters.first_window += drop


def _check_in_window(counters: Counters, tokens: int) -> None:
    """Raise ValueError unless so many tokens can be taken back; to a schedule recalled ones are of the window."""
    most = counters.window if counters.pruned else counters.seen
    if tokens > most:
        raise ValueError(f"tokens={tokens} cannot be taken back; accepted: 0 to {most}, which are in the window")


def watching(memory: Recall, state: StreamState) -> Recall:
    """The same memory; a chooser that reads queries reads those of the state from now on."""
    chooser = memory.settings.chooser
    if chooser.heads:
        memory.queries = RingQueries(state, chooser.heads, chooser.query_tokens)
    return memory


def recall_slots(cache: CheckedCache) -> int:
    """The most tokens that come back at once into a stream with the settings of a cache; 0 without recall."""
    recall = cache.stream.recalling
    return 0 if recall is None else recall.settings.slots


def recall_queries(cache: CheckedCache) -> int:
    """How many of the latest queries recall reads."""
    recall = cache.stream.recalling
    return 0 if recall is None or not recall.settings.chooser.heads else recall.settings.chooser.query_tokens


def reread_tokens(cache: CheckedCache) -> int:
    """The most tokens that are read again at once, with those in front of what comes back; 0 where entries are kept."""
    recall = cache.stream.recalling
    kept = recall is None or ARCHIVES[recall.settings.archive].keeps_entries
    return 0 if kept or recall is None else recall.sink + recall.settings.behind + recall.settings.slots


def check_recall(cache: CheckedCache, streams: int, max_sink: int | None) -> None:
    """Raise ValueError, by name, for what the engine does not serve beside recall."""
    recall = cache.stream.recalling
    if recall is None:
        return
    check_recall_settings(recall.settings, cache.policy, streams)
    if max_sink is not None:
        raise ValueError(f"recall and max_sink={max_sink} exclude each other; give one of them")


def check_recall_settings(settings: RecallSettings, policy: EvictionPolicy, streams: int) -> None:
    """Raise ValueError, by name, for recall that the engine does not serve, whatever the model."""
    if streams != 1:
        raise ValueError(f"recall with streams={streams} is not served by the engine; accepted: streams=1")
    if settings.lag and settings.chooser.heads:
        raise ValueError(
            f"recall_lag={settings.lag} with {type(settings.chooser).__name__}, a chooser that reads"
            " queries, is not served by the engine; accepted: recall_lag=0"
        )
    if not policy.plan_known:
        raise ValueError(
            "recall with adaptive eviction is not served by the engine; accepted: policies that know every prune"
            " beforehand (strict, lazy, overlap, max_drop, slack), or StreamingCache.for_model(model, recall=CHOOSER,"
            " …), the cache for transformers"
        )
