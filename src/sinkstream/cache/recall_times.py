"""`RecallTimes`: before which tokens recall chooses, and how many tokens can go by until then."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sinkstream.archive import Archive, Fetched, Index, Query, RecallSettings, Span
from sinkstream.archive.choosers.base import LATEST, Head
from sinkstream.cache.token_log import TokenLog
from sinkstream.policies import PruneSchedule

RISE = 0.1  # of the gate, for every false alarm that came too soon
SURE = 2.0  # a score of so many times the gate is no false alarm


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


@dataclass(frozen=True)
class Coming:
    """A frame that has been chosen and is not set yet: before which token it will be, which tokens, and what is told.

    Attributes
    ----------
    at : int
    tokens, behind : list of int
        Which tokens, and the ids of the text behind which a text archive reads them.
    event : RecallEvent
    fetched : callable
        Waits for their keys and values.
    """

    at: int
    tokens: list[int]
    behind: list[int]
    event: RecallEvent
    fetched: Fetched

    @classmethod
    def of(
        cls, archive: Archive, tokens: list[int], behind: list[int], event: RecallEvent, device: torch.device
    ) -> "Coming":
        """A frame whose keys and values begin to be read."""
        read = archive.fetch(tokens, device, behind) if tokens else partial(archive.read, tokens, device)
        return cls(event.token, tokens, behind, event, read)


class RecallTimes:
    """The part of `Recall` that counts; attributes as `RecallMemory` has them."""

    settings: RecallSettings
    archive: Archive | None
    index: Index
    log: TokenLog
    frame: list[int]
    sink: int
    until: int
    asked_until: int
    chosen_at: int
    calm_at: int
    sure: int
    question: tuple[list[int], dict[Head, torch.Tensor]] | None
    coming: Coming | None
    _room: tuple[int, int] | None
    _coming: tuple[int, list[int]]

    def due(self, now: int) -> bool:
        """Whether there is a choice before token `now`, or the frame that an earlier one chose is set."""
        if self.question is not None:
            return True
        if self.coming is not None:
            return now >= self.coming.at
        held = self.asked_until > now  # nothing replaces what a question brought back
        return now % self._every == 0 and now != self.chosen_at and not held

    @property
    def chooses(self) -> bool:
        """Whether what is due is a choice, and not the frame of an earlier one."""
        return self.coming is None or self.question is not None

    def gate(self, now: int) -> float:
        """The score that opens the gate before token `now`.

        Every false alarm raises it by a tenth of the user's gate, which ``1,000 / alarms`` tokens take back: a constant
        false-alarm rate (CFAR, as in radar), whatever the text.
        """
        too_soon = max(0, self.calm_at - now) * self.settings.alarms / 1_000
        return self.settings.gate * (1 + RISE * too_soon)

    def _judge(self, now: int, score: float, *, filled: bool, asked: bool) -> None:
        """Count a false alarm when the frame of the gate is emptied, unless its score was ever sure.

        Parameters
        ----------
        now : int
            The token before which the choice is made.
        filled : bool
            Whether the choice fills the frame.
        asked : bool
            Whether a question was asked.
        """
        alarms = self.settings.alarms
        if filled or asked:
            self.sure = int(asked or score >= SURE * self.settings.gate or (self.sure and bool(self.frame)))
        elif alarms and not self.sure:
            self.calm_at = max(self.calm_at, now) + 1_000 // alarms

    def quiet(self, now: int, end: int) -> bool:
        """Whether a choice before token `now` is a brief one that changes nothing.

        Parameters
        ----------
        end : int
            The tokens before this one have left the window; the archive may lag behind.
        """
        if self.archive is None or not self.settings.chooser.foresees or not self.brief(now):
            return False
        self._index_until(end)
        return not self._opens(now, end)

    @property
    def _every(self) -> int:
        """Tokens between two choices, as long as the frame is what it is."""
        return self.settings.every if self.frame else self.settings.empty_every

    def _next(self, after: int) -> int:
        """The first token behind this one that there is a choice before, if that before this one empties no frame."""
        return after // self._every * self._every + self._every

    def _surely(self, now: int) -> int:
        """How many tokens from `now` on come before what is done next, whatever is done before `now`."""
        due, coming = self.due(now), self.coming
        if coming is not None and not due:
            return coming.at - now
        filled = bool(self.frame if coming is None else coming.tokens)
        empties = due and (self.question is not None or (coming is None and now >= self.until))
        every = self.settings.every if filled and not empties else self.settings.empty_every
        surely = every - now % every
        lag = self._least_lag() if due and coming is None else 0
        return min(surely, lag) if lag else surely

    def _least_lag(self) -> int:
        """Tokens from a choice to the frame that it sets, at least, if not at once; 0: surely at once."""
        settings, archive = self.settings, self.archive
        large = archive is not None and archive.fetch_bytes(settings.slots) > settings.step_bytes
        return settings.lag or int(large)

    def brief(self, now: int) -> bool:
        """Whether a choice before token `now`, without a question, is one of the many while nothing is recalled."""
        return self.question is None and now % self.settings.every != 0

    def announce(self, ids: Sequence[int]) -> None:
        """These tokens come next: a chooser that foresees need not be asked between them if nothing would change."""
        self._coming, self._room = (self.log.end, list(ids)), None

    def check_coming(self, ids: torch.Tensor) -> None:
        """Raise ValueError unless tokens ``(tokens,)`` that cross a choice are those that were announced."""
        now = self.log.end
        if self.archive is None or len(ids) <= self._surely(now):
            return
        first, coming = self._coming
        if ids.tolist() != coming[now - first : now - first + len(ids)]:
            raise ValueError("other tokens came than were announced; feed them with cache.prefill(model, input_ids)")

    def room(self, schedule: PruneSchedule) -> int:
        """How many tokens can be appended before the next choice may change the frame."""
        now = schedule.seen
        if self.archive is None:
            return self._next(now + schedule.sure_steps()) - now  # nothing has left before
        if self._room is None or self._room[0] != now:
            self._room = now, self._quiet(schedule)
        return self._room[1]

    def _quiet(self, schedule: PruneSchedule) -> int:
        """As `room` once tokens have left: past the next choice, if it and those that follow will change nothing."""
        every, now, foreseen = self._every, schedule.seen, self._foreseen(schedule)
        following = range(self._next(now), now + foreseen, every)
        least = self._surely(now)
        settled = following and self.question is None and self.coming is None
        if not settled or (self.due(now) and self._changes(now, schedule.cached)):
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
        return bool(self.frame and now >= self.until) or self._opens(now, end)

    def _foreseen(self, schedule: PruneSchedule) -> int:
        """How many of the coming tokens are known, and what leaves before them is in the log already."""
        if not (self.settings.chooser.foresees and schedule.policy.plan_known) or self.archive is None:
            return 0
        first, coming = self._coming
        known = first + len(coming) - schedule.seen if first <= schedule.seen else 0
        window = schedule.cached - self.sink - len(self.frame)
        return min(known, window // 2)

    def _opens(self, now: int, end: int) -> bool:
        """Whether a choice that is to come before token `now`, when those before `end` have left, opens the gate."""
        archive, wanted = self.archive, self.settings.chooser.query_tokens
        assert archive is not None, "something has left"
        least, brief = self.gate(now), self.brief(now)
        if brief and not self.index.may_hit(self._before(now, min(wanted, LATEST)), least):
            return least <= 0
        held_from = archive.first_after(max(0, end - archive.end))
        if held_from >= end:
            return least <= 0
        ids = self._before(now, wanted)
        query = Query(now=now, ids=ids, asked=False, first=held_from, end=end, least=least, brief=brief)
        return self.index.hits(query, query.blocks(self.settings.chooser.block)).best >= least

    def _before(self, now: int, count: int) -> list[int]:
        """Ids of the latest tokens before token `now`, of the stream and of those that were announced."""
        first, coming = self._coming
        seen = self.log.end
        return [*self.log.read(now - count, seen), *coming[max(now - count, seen) - first : now - first]]

    def _index_until(self, end: int) -> None:
        """See `RecallMemory`."""
        raise NotImplementedError
