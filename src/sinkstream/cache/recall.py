"""`Recall`: what left the window of one stream, and what of it stands in the pinned frame now.

A recalled token takes the slot of a window token, so that the cache never holds more than without recall. Before every
token whose index is a multiple of ``every`` the chooser is asked. Below its gate nothing comes back, and once the frame
is empty the slots are the window's again: it grows by the tokens that follow.
"""

import copy
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from sinkstream.archive import (
    Archive,
    BlockFile,
    Evicted,
    KVArchive,
    Query,
    RecallSettings,
    Span,
    TextArchive,
    chosen_tokens,
    runs,
)
from sinkstream.archive.choosers.base import Head
from sinkstream.archive.kv import BLOCK
from sinkstream.archive.text import Reread
from sinkstream.cache.frame import RecallRing
from sinkstream.cache.query_log import QueryLog
from sinkstream.cache.token_log import TokenLog
from sinkstream.policies import PruneSchedule

EVENTS = 1_024  # the latest ones are kept
COUNTS = ("recalls", "until", "asked_until", "chosen_at", "indexed")


@dataclass(frozen=True)
class RecallEvent:
    """The frame was set anew.

    Attributes
    ----------
    token : int
        Index in the stream of the token before which that happened.
    cause : {"gate", "question", "closed"}
        The gate was open, a question was asked, or the frame has been emptied.
    score : float
        Of the best block, in units of the chooser's false-alarm level; below the gate a chooser need not be exact.
    spans : tuple of Span
        What stands in the frame now, oldest first.
    """

    token: int
    cause: str
    score: float
    spans: tuple[Span, ...]


class RecallMemory:
    """Archive, index and frame of one stream: what comes, what leaves, what stands in the frame.

    Parameters
    ----------
    settings : RecallSettings
    sink : int
        Of the policy: sinks never leave.
    target : int
        Of the policy: entries that a finished prune leaves.
    reread : callable
        Reads a text through the model, for a text archive.
    borders : sequence of bool or None
        Whether a sentence begins behind a token of this id; None: not known.
    decode : callable or None
        Text of ids.

    Attributes
    ----------
    archive : Archive
    frame : list of int
        Indices in the stream of the recalled tokens, ascending.
    events : deque of RecallEvent
    recalls : int
        Frames set so far.
    until : int
        The frame is held for the tokens before this one.
    asked_until : int
        What a question brought back is held for the tokens before this one.
    chosen_at : int
        The token before which the chooser was asked last.
    indexed : int
        A chooser that foresees has taken in the tokens before this one.
    question : (ids, queries by head) or None
        By which the next choice is made.
    """

    def __init__(
        self,
        settings: RecallSettings,
        *,
        sink: int,
        target: int,
        reread: Reread,
        borders: Sequence[bool] | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
    ):
        self.settings, self.sink, self.target = settings, sink, target
        self.reread, self.borders, self.decode = reread, borders, decode
        self.index = settings.chooser.start()
        self.archive: Archive | None = None
        self.log = TokenLog()
        chooser = settings.chooser
        self.queries = QueryLog(chooser.heads, chooser.query_tokens) if chooser.heads else None
        self.frame: list[int] = []
        self.turns: list[int] = []
        self.events: deque[RecallEvent] = deque(maxlen=EVENTS)
        self.recalls = 0
        self.until, self.asked_until, self.chosen_at, self.indexed = 0, 0, -1, 0
        self._room: tuple[int, int] | None = None  # tokens seen, and what `room` said then
        self._coming: tuple[int, list[int]] = (0, [])  # index of the first of the tokens that were announced, and they
        self.question: tuple[list[int], dict[Head, torch.Tensor]] | None = None

    def empty(self) -> Self:
        """Another one like this, for a new stream."""
        return type(self)(
            self.settings,
            sink=self.sink,
            target=self.target,
            reread=self.reread,
            borders=self.borders,
            decode=self.decode,
        )

    def beside(self) -> Self:
        """Another one like this, empty, for a stream that lives beside this one: a file of its own, if there is one."""
        other = self.empty()
        other.settings = self.settings.beside()
        return other

    def fork(self, settings: RecallSettings) -> Self:
        """The same state, to go on independently, with the settings of `beside`. Raises as `Archive.fork`."""
        other = copy.copy(self)
        other.settings = settings
        other.archive = None if self.archive is None else self.archive.fork(settings.file)
        other.index, other.log = self.index.copy(), self.log.fork()
        other.queries = None if self.queries is None else self.queries.fork()
        other.turns, other.events = list(self.turns), self.events.copy()
        return other

    def close(self) -> None:
        """Give back what is not memory."""
        if self.archive is not None:
            self.archive.close()

    def counts(self) -> dict[str, int]:
        """What else a file of the stream must hold."""
        return {name: getattr(self, name) for name in COUNTS}

    def set_counts(self, counts: Mapping[str, int]) -> None:
        """As another memory has them. Raises KeyError if one is missing."""
        for name in COUNTS:
            setattr(self, name, int(counts[name]))

    def stats(self) -> dict[str, int]:
        """Tokens that stand in the frame, frames set so far, and the counts of the archive."""
        archive = self.archive or TextArchive(0, sinks=(), reread=self.reread, budget_bytes=0)  # of nothing
        return {"recalled": len(self.frame), "recalls": self.recalls} | archive.stats()

    def append(self, ids: torch.Tensor) -> None:
        """New tokens ``(tokens,)`` of the stream, whose forward has been shown to `queries`."""
        if self.queries is not None:
            self.queries.commit(len(ids))
        self.log.append(ids)

    def _index_until(self, end: int) -> None:
        """Let a chooser that foresees take in the tokens before this one."""
        if self.settings.chooser.foresees and end > self.indexed:
            self.indexed = max(self.indexed, self.sink)
            self.index.add(Evicted(self.indexed, self.log.read(self.indexed, end)))
            self.indexed = end

    def rewind(self, tokens: int) -> None:
        """Forget the latest tokens, which are in the window. Raises ValueError if the chooser has read them."""
        if self.log.end - tokens < self.indexed:
            raise ValueError(
                f"{tokens} tokens cannot be taken back; accepted: at most {self.log.end - self.indexed}, which the"
                " chooser has not read"
            )
        self.log.rewind(self.log.end - tokens)
        self.chosen_at, self._room = -1, None
        if self.queries is not None:
            self.queries.rewind(tokens)

    def begin_turn(self, index: int) -> None:
        """A turn begins at this token."""
        self.turns.append(index)

    def take(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Tokens from `first` on leave the window; see `cache.ring.Leaving`."""
        if self.archive is None:
            self.open_archive(first, keys.shape, values.dtype)
        archive = self.archive
        assert archive is not None and first == archive.end, "tokens leave in order, each once"
        self._index_until(first + keys.shape[3])
        ids = self.log.read(first, first + keys.shape[3])
        archive.append(ids, keys, values)
        if not self.settings.chooser.foresees:
            heads = {(layer, head): keys[layer, 0, head].float() for layer, head in self.settings.chooser.heads}
            self.index.add(Evicted(first, ids, heads))
        self.index.forget(archive.first)
        self.log.forget(min(archive.end, self.log.end - self.settings.chooser.query_tokens))

    def open_archive(self, first: int, shape: tuple[int, ...], dtype: torch.dtype) -> Archive:
        """Make the archive for keys of a shape ``(layers, 1, kv_heads, any, head_dim)``. Raises as `BlockFile`."""
        settings, file = self.settings, None
        if settings.archive == "text":
            sinks = self.log.read(0, self.sink)
            self.archive = TextArchive(first, sinks=sinks, reread=self.reread, budget_bytes=settings.bytes)
            return self.archive
        if settings.file is not None:
            layers, _, heads, _, dim = shape
            file = BlockFile(settings.file, settings.file_bytes, (2, layers, heads, BLOCK, dim), dtype)
        self.archive = KVArchive(first, budget_bytes=settings.bytes, file=file)
        return self.archive


class Recall(RecallMemory):
    """Chooses what comes back, and sets the frame; parameters and attributes as `RecallMemory`."""

    def ask(self, ids: Sequence[int]) -> None:
        """Choose before the next token by these tokens alone, whatever the gate says.

        Where the chooser reads queries they are the latest ones: those of these tokens, which have been fed.
        """
        self.question, self._room = (list(ids), self._latest_queries(len(ids))), None

    def _latest_queries(self, count: int) -> dict[Head, torch.Tensor]:
        return {} if self.queries is None else self.queries.read(min(count, self.settings.chooser.query_tokens))

    def due(self, now: int) -> bool:
        """Whether there is a choice before token `now`."""
        held = self.asked_until > now  # nothing replaces what a question brought back
        return self.question is not None or (now % self.settings.every == 0 and now != self.chosen_at and not held)

    def announce(self, ids: Sequence[int]) -> None:
        """These tokens come next: a chooser that foresees need not be asked between them if nothing would change."""
        self._coming, self._room = (self.log.end, list(ids)), None

    def check_coming(self, ids: torch.Tensor) -> None:
        """Raise ValueError unless tokens ``(tokens,)`` that cross a choice are those that were announced."""
        every, now = self.settings.every, self.log.end
        if self.archive is None or len(ids) <= every - now % every:
            return
        first, coming = self._coming
        if ids.tolist() != coming[now - first : now - first + len(ids)]:
            raise ValueError("other tokens came than were announced; feed them with cache.prefill(model, input_ids)")

    def room(self, schedule: PruneSchedule) -> int:
        """How many tokens can be appended before the next choice may change the frame."""
        every, now = self.settings.every, schedule.seen
        if self.archive is None:
            surely = now + schedule.sure_steps()  # nothing has left before
            return surely // every * every + every - now
        if self._room is None or self._room[0] != now:
            self._room = now, self._quiet(schedule)
        return self._room[1]

    def _quiet(self, schedule: PruneSchedule) -> int:
        """As `room` once tokens have left: past the next choice, if it and those that follow will change nothing."""
        every, now, foreseen = self.settings.every, schedule.seen, self._foreseen(schedule)
        following = range(now // every * every + every, now + foreseen, every)
        least = every - now % every
        if not following or self.question is not None or (now % every == 0 and self._changes(now, schedule.cached)):
            return least
        dropped = schedule.plan(following[-1] - now).drop.cumsum()
        for t in following:
            if self._changes(t, schedule.cached + t - now - int(dropped[t - now - 1])):
                return t - now
        return following[-1] - now

    def _changes(self, now: int, cached: int) -> bool:
        """Whether a choice before token `now` would set the frame, if so many entries are cached then."""
        if now < self.asked_until:
            return False
        end = now - (cached - self.sink - len(self.frame))
        self._index_until(end)
        return bool(self.frame and now >= self.until) or self._score(now, end) >= self.settings.gate

    def _foreseen(self, schedule: PruneSchedule) -> int:
        """How many of the coming tokens are known, and what leaves before them is in the log already."""
        if not (self.settings.chooser.foresees and schedule.policy.plan_known) or self.archive is None:
            return 0
        first, coming = self._coming
        known = first + len(coming) - schedule.seen if first <= schedule.seen else 0
        window = schedule.cached - self.sink - len(self.frame)
        return min(known, window // 2, self.archive.room())

    def _score(self, now: int, end: int) -> float:
        """Of the best block, at a choice that is to come before token `now`, when the tokens before `end` have left."""
        archive, wanted = self.archive, self.settings.chooser.query_tokens
        assert archive is not None, "something has left"
        first, coming = self._coming
        seen = self.log.end
        ids = [*self.log.read(now - wanted, seen), *coming[max(now - wanted, seen) - first : now - first]]
        least = self.settings.gate
        query = Query(now=now, ids=ids, asked=False, first=archive.first, end=end, least=least)
        return float(self.index.scores(query).max())

    @torch.no_grad()
    def choose(self, ring: RecallRing, schedule: PruneSchedule) -> None:
        """Set the frame anew if it is time; before the drop that the next token brings."""
        now, settings = schedule.seen, self.settings
        due, asked, self.question = self.due(now), self.question, None
        self._room = None
        if self.archive is None or not len(self.archive) or not due:
            return
        self.chosen_at = now
        score, tokens = self._best(now, asked)
        if asked is not None:
            self.until = self.asked_until = now + settings.hold_asked
        elif tokens:
            self.until = max(now + settings.hold, self.until)
        if tokens or (self.frame and (asked is not None or now >= self.until)):
            cause = "question" if asked is not None else "gate" if tokens else "closed"
            self.events.append(RecallEvent(now, cause, score, self._spans(tokens)))
            self._set_frame(ring, schedule, tokens)

    def _best(self, now: int, asked: tuple[list[int], dict[Head, torch.Tensor]] | None) -> tuple[float, list[int]]:
        """Score of the best block, and the tokens to bring back; none while the gate is shut."""
        archive, chooser, settings = self.archive, self.settings.chooser, self.settings
        assert archive is not None, "something has left"
        end = archive.end
        if asked is not None and chooser.foresees:  # what is in the window competes, and comes back to nowhere
            end = now
            self._index_until(end)
        ids: Sequence[int] = self.log.read(now - chooser.query_tokens, now)
        queries = self._latest_queries(chooser.query_tokens)
        if asked is not None:
            ids, queries = asked
        query = Query(
            now=now,
            ids=ids,
            asked=asked is not None,
            first=archive.first,
            end=end,
            queries=queries,
            scaling=1.0 if self.queries is None else self.queries.scaling,
            least=0.0 if asked is not None else settings.gate,
        )
        scores = np.asarray(self.index.scores(query), dtype=np.float64)
        blocks = query.blocks(chooser.block)
        if scores.shape != (len(blocks),):
            raise ValueError(
                f"{type(chooser).__name__} gave scores of shape {scores.shape}; accepted: ({len(blocks)},), one for"
                " each block of the archive"
            )
        best = float(scores.max())
        if not query.asked and not best >= settings.gate:
            return best, []
        tokens = chosen_tokens(
            scores,
            blocks.start,
            chooser.block,
            held=range(archive.first, archive.end),
            budget=settings.slots,
            least=settings.share * best if query.asked else settings.gate,
            border=self._border,
            whole=query.asked,
        )
        return best, tokens

    def _border(self, index: int) -> bool:
        """Whether a turn or a sentence begins at a token of the archive."""
        archive = self.archive
        assert archive is not None, "something has left"
        turn = bisect_left(self.turns, index)
        if self.turns[turn : turn + 1] == [index]:
            return True
        if self.borders is None or not archive.first < index <= archive.end:
            return False
        return self.borders[archive.ids[index - 1 - archive.first]]

    def _set_frame(self, ring: RecallRing, schedule: PruneSchedule, tokens: list[int]) -> None:
        if tokens == self.frame:
            return
        archive, device = self.archive, ring.keys.device
        assert archive is not None, "something has left"
        window = ring.live - ring.pinned
        limit = max(ring.live, self.target)
        drop = max(0, self.sink + len(tokens) + window - limit)
        if tokens:
            keys, values = archive.read(tokens, device)
        else:
            keys, values = (t[..., :0, :] for t in (ring.pinned_keys, ring.pinned_values))
        cached = self.sink + len(tokens) + window - drop
        shift = 0
        if self.settings.distance:
            latest = self.sink + len(tokens) - 1  # position of the nearest recalled token behind the sinks
            shift = max(0, min(cached, self.target) - 1 - self.settings.distance - latest)
        positions = torch.tensor(tokens, dtype=torch.int64).view(1, 1, 1, -1).to(device, non_blocking=True)
        ring.recall(keys, values, positions, drop=drop, shift=shift)
        schedule.hold(ring.live)
        self.frame, self.recalls = tokens, self.recalls + bool(tokens)

    def _spans(self, tokens: list[int]) -> tuple[Span, ...]:
        archive = self.archive
        assert archive is not None, "something has left"
        spans = [Span(first, end) for first, end in runs(tokens)]
        if self.turns:
            spans = [replace(s, turn=int(np.searchsorted(self.turns, s.first, side="right"))) for s in spans]
        if self.decode is not None:
            ids = archive.ids
            spans = [replace(s, text=self.decode(ids[s.first - archive.first : s.end - archive.first])) for s in spans]
        return tuple(spans)


def one_row(batch: int) -> ValueError:
    """What is raised where recall would have to serve a batch."""
    return ValueError(
        f"batch of {batch}: recall serves one row, since rows have different archives; accepted: a batch of 1, or a"
        " cache for each row (cache.fork() of the row that they have in common)"
    )
