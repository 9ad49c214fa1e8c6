"""`Recall`: what left the window of one stream, and what of it stands in the pinned frame now.

A recalled token takes the slot of a window token, so that the cache never holds more than without recall. Before every
token whose index is a multiple of ``every`` the chooser is asked; while nothing is recalled, also at the multiples of
``empty_every``, for what takes little time. Below its gate nothing comes back, and once the frame is empty the slots
are the window's again: it grows by the tokens that follow.
"""

import copy
import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Self

import torch

from sinkstream.archive import (
    Archive,
    BlockFile,
    Evicted,
    Fetched,
    Index,
    KVArchive,
    Query,
    RecallSettings,
    Span,
    TextArchive,
    chosen_tokens,
    runs,
)
from sinkstream.archive.choosers.base import Head
from sinkstream.archive.kv import block_shape
from sinkstream.archive.text import Reread
from sinkstream.cache.frame import RecallRing
from sinkstream.cache.query_log import QueryLog
from sinkstream.cache.recall_times import Coming, RecallEvent, RecallTimes
from sinkstream.cache.token_log import TokenLog
from sinkstream.policies import PruneSchedule

EVENTS = 1_024  # the latest ones are kept
COUNTS = ("recalls", "until", "asked_until", "chosen_at", "calm_at", "sure", "indexed")


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
    calm_at : int
        The gate is at its lowest again before this token; see `RecallTimes.gate`.
    sure : int
        1 where what stands in the frame is no false alarm.
    indexed : int
        A chooser that foresees has taken in the tokens before this one.
    question : (ids, queries by head) or None
        By which the next choice is made.
    coming : Coming or None
        A frame that has been chosen and is set later.
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
        if not isinstance(self.index, Index):
            name = type(settings.chooser).__name__
            raise ValueError(f"{name}.start() gave {self.index!r}; accepted: an Index, a new one for each stream")
        self.archive: Archive | None = None
        self.log = TokenLog()
        chooser = settings.chooser
        self.queries = QueryLog(chooser.heads, chooser.query_tokens) if chooser.heads else None
        self.frame: list[int] = []
        self.turns: list[int] = []
        self.events: deque[RecallEvent] = deque(maxlen=EVENTS)
        self.recalls = 0
        self.until, self.asked_until, self.chosen_at, self.indexed = 0, 0, -1, 0
        self.calm_at = self.sure = 0
        self._room: tuple[int, int] | None = None  # tokens seen, and what `room` said then
        self._coming: tuple[int, list[int]] = (0, [])  # index of the first of the tokens that were announced, and they
        self.question: tuple[list[int], dict[Head, torch.Tensor]] | None = None
        self.coming: Coming | None = None

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
        counts = {"calm_at": 0, "sure": 0, **counts}  # files did not always have them
        for name in COUNTS:
            setattr(self, name, int(counts[name]))

    def stats(self) -> dict[str, int]:
        """Tokens that stand in the frame, frames set so far, and the counts of the archive."""
        archive = self.archive
        if archive is None:
            archive = TextArchive(0, sinks=(), reread=self.reread, budget_bytes=0)  # of nothing
        return {"recalled": len(self.frame), "recalls": self.recalls} | archive.stats()

    def append(self, ids: torch.Tensor | list[int]) -> None:
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
        self._room = None
        if self.coming is None or self.chosen_at > self.log.end:  # chosen by tokens that are gone
            self.coming, self.chosen_at = None, -1
        if self.queries is not None:
            self.queries.rewind(tokens)

    def begin_turn(self, index: int) -> None:
        """A turn begins at this token. Raises ValueError if a later one is known."""
        latest = self.turns[-1] if self.turns else -1
        if index < latest:
            raise ValueError(f"a turn that begins at token {index} comes after one at token {latest}")
        if index > latest:
            self.turns.append(index)

    def forget_turns(self) -> None:
        """Forget the turns that have not begun: their tokens were taken back."""
        del self.turns[bisect_left(self.turns, self.log.end) :]

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
            file = BlockFile(settings.file, settings.file_bytes, block_shape(layers, heads, dim), dtype)
        self.archive = KVArchive(first, budget_bytes=settings.bytes, file=file)
        return self.archive


class Recall(RecallMemory, RecallTimes):
    """Chooses what comes back, and sets the frame; parameters and attributes as `RecallMemory`."""

    def ask(self, ids: Sequence[int]) -> None:
        """Choose before the next token by these tokens alone, whatever the gate says.

        Where the chooser reads queries they are the latest ones: those of these tokens, which have been fed.
        """
        self.question, self._room = (list(ids), self._latest_queries(len(ids))), None

    def _latest_queries(self, count: int) -> dict[Head, torch.Tensor]:
        return {} if self.queries is None else self.queries.read(min(count, self.settings.chooser.query_tokens))

    @torch.no_grad()
    def choose(self, ring: RecallRing, schedule: PruneSchedule) -> None:
        """Do what is due before the next token, and before the drop that it brings."""
        if not self.arrive(ring, schedule):
            self.decide(schedule.seen, ring, schedule)

    @torch.no_grad()
    def arrive(self, ring: RecallRing, schedule: PruneSchedule) -> bool:
        """Set the frame that an earlier choice has left for now; returns whether there was one."""
        coming = self.coming
        if coming is None or self.question is not None or schedule.seen < coming.at:
            return False
        self.chosen_at, self.coming, self._room = schedule.seen, None, None
        self.events.append(coming.event)
        self._set_frame(ring, schedule, coming.tokens, coming.fetched)
        return True

    @torch.no_grad()
    def decide(self, now: int, ring: RecallRing, schedule: PruneSchedule) -> None:
        """Choose before token `now` if it is time, which is the next one unless frames lag; set the frame, or leave it.

        Log and archive hold what there was before that token.
        """
        settings, archive, device = self.settings, self.archive, ring.keys.device
        due, asked, self.question = self.due(now), self.question, None
        self._room = None
        if archive is None or not len(archive) or not due:
            return
        self.chosen_at, self.coming = now, None
        score, tokens = self._best(now, asked)
        late = max(settings.lag, -(-archive.fetch_bytes(len(tokens)) // settings.step_bytes) - 1)
        lag = late if asked is None and tokens != self.frame else 0
        if asked is not None:
            self.until = self.asked_until = now + settings.hold_asked
        elif tokens:
            self.until = max(now + late + settings.hold, self.until)
        empties = not tokens and bool(self.frame) and (asked is not None or now >= self.until)
        if tokens or empties:
            self._judge(now, score, filled=bool(tokens), asked=asked is not None)
        if not (tokens or empties) or (asked is None and tokens == self.frame):
            return
        cause = "question" if asked is not None else "gate" if tokens else "closed"
        behind = self._behind(now) if tokens else []
        if lag:
            event = RecallEvent(now + lag, cause, score, self._spans(tokens))
            self.coming = Coming.of(archive, tokens, behind, event, device)
        else:  # what the device needs comes first: the texts of the spans are decoded while it works
            self._set_frame(ring, schedule, tokens, partial(archive.read, tokens, device, behind))
            self.events.append(RecallEvent(now, cause, score, self._spans(tokens)))

    def prepare(self, now: int) -> None:
        """Do what a choice before token `now` needs, but for the latest token, which is not known yet.

        Only while something stands in the frame: then an engine's host waits several steps for that token.
        """
        archive, chooser = self.archive, self.settings.chooser
        if self.frame and chooser.foresees and archive is not None and len(archive) and self.log.end == now - 1:
            ids = self.log.read(now - 1 - chooser.query_tokens, now - 1)
            first, end, least = archive.first, archive.end, self.gate(now)
            self.index.prepare(Query(now=now - 1, ids=ids, asked=False, first=first, end=end, least=least))

    def _behind(self, now: int) -> list[int]:
        """Ids of the latest tokens of the window before token `now`, behind which a text archive reads."""
        archive, count = self.archive, self.settings.behind
        assert archive is not None, "something has left"
        return list(self.log.read(max(self.sink, archive.end, now - count), now)) if count else []

    def _best(self, now: int, asked: tuple[list[int], dict[Head, torch.Tensor]] | None) -> tuple[float, list[int]]:
        """Score of the best block, and the tokens to bring back; none while the gate is shut."""
        archive, chooser, settings = self.archive, self.settings.chooser, self.settings
        assert archive is not None, "something has left"
        end, gate = archive.end, self.gate(now)
        if asked is not None and chooser.foresees and chooser.window_competes:  # its tokens come back to nowhere
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
            least=0.0 if asked is not None else gate,
            brief=asked is None and self.brief(now),
        )
        hits = self.index.hits(query, query.blocks(chooser.block))
        best = hits.best
        if math.isnan(best):  # which no gate would let through: nothing would ever come back, in silence
            raise ValueError(f"{type(self.index).__name__} gave a score that is NaN; accepted: numbers, 0 for no hit")
        if not query.asked and not best >= gate:
            return best, []
        tokens = chosen_tokens(
            hits,
            chooser.block,
            held=range(archive.first, archive.end),
            budget=settings.slots,
            least=settings.share * best if query.asked else gate,
            border=self._border,
            whole=query.asked,
        )
        return best, tokens

    def _border(self, index: int) -> bool:
        """Whether a turn or a sentence begins at a token of the archive."""
        archive = self.archive
        assert archive is not None, "something has left"
        if self.turns:
            turn = bisect_left(self.turns, index)
            if self.turns[turn : turn + 1] == [index]:
                return True
        if self.borders is None or not archive.first < index <= archive.end:
            return False
        return self.borders[archive.ids[index - 1 - archive.first]]

    def _set_frame(self, ring: RecallRing, schedule: PruneSchedule, tokens: list[int], fetched: Fetched) -> None:
        if tokens == self.frame:
            return
        window = ring.live - ring.pinned
        limit = max(ring.live, self.target)
        drop = max(0, self.sink + len(tokens) + window - limit)
        if tokens:
            keys, values = fetched()
        else:
            keys, values = (t[..., :0, :] for t in (ring.pinned_keys, ring.pinned_values))
        cached = self.sink + len(tokens) + window - drop
        shift = 0
        if self.settings.distance:
            latest = self.sink + len(tokens) - 1  # position of the nearest recalled token behind the sinks
            shift = max(0, min(cached, self.target) - 1 - self.settings.distance - latest)
        positions = torch.tensor(tokens, dtype=torch.int64).view(1, 1, 1, -1)
        ring.recall(keys, values, positions, drop=drop, shift=shift)
        schedule.hold(ring.live)
        self.frame, self.recalls = tokens, self.recalls + bool(tokens)

    def _spans(self, tokens: list[int]) -> tuple[Span, ...]:
        archive = self.archive
        assert archive is not None, "something has left"
        spans = [Span(first, end) for first, end in runs(tokens)]
        if self.turns:
            spans = [replace(s, turn=bisect_right(self.turns, s.first)) for s in spans]
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
