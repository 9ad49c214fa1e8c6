"""Recall of evicted turns: kept as token ids, chosen by the words of a question, read again right before it."""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sinkstream.archive.choosers import Evicted, Query
from sinkstream.archive.choosers.lexical import Lexical, LexicalIndex
from sinkstream.serve.sessions import ForgottenTurn, Session, Turn

WORD = re.compile(r"\w+")
WORDS = 4096  # of a turn, at the most: the block of a turn in the index
RARE = 0.2  # a word in a larger share of the turns says nothing
LEAST = 0.16  # score of a turn that comes back; 0.28 is one word that no other turn has, 0.165 one of 2 turns in 13
COMMON = 2000  # a word that is one of the first tokens of a byte-pair vocabulary is common in the language
SHARE = 0.4  # of the best score: a turn below it stays where it is
INDEXES = 256  # kept, of the sessions that asked last


class Recall:
    """Chooses turns of sessions. Used by the scheduler's thread only.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    slots : int
        The most tokens that come back for one question.
    """

    def __init__(self, tokenizer: Any, slots: int):
        self.tokenizer, self.slots = tokenizer, slots
        self._chooser = Lexical(block=WORDS, rare=RARE)
        self._indexes: dict[str, tuple[LexicalIndex, int]] = {}  # and the number of the turn that was added last

    def choose(self, session: Session, question: str, leaving: Sequence[Turn] = ()) -> list[ForgottenTurn]:
        """The turns that a question wants back, oldest first, of at most `slots` tokens.

        Parameters
        ----------
        leaving : sequence of Turn
            Turns that are still held, and that the question will push out.
        """
        soon = [ForgottenTurn.of(turn) for turn in leaving if 0 < len(turn.ids) <= self.slots]
        there = {turn.number: turn for turn in [*session.archive, *soon]}
        if not there:
            return []
        held = {number for turn in session.turns if turn not in leaving for number in turn.recalled}
        scores = self._scores(session.id, list(there.values()), question)
        best, chosen, left = max(scores.values()), list[ForgottenTurn](), self.slots
        for number in sorted(scores, key=lambda n: (-scores[n], -n)):
            if scores[number] < max(LEAST, SHARE * best):
                break
            if number not in held and len(there[number]) <= left:
                chosen.append(there[number])
                left -= len(there[number])
        return sorted(chosen, key=lambda turn: turn.number)

    def forget(self, session_id: str) -> None:
        """A session is gone, or has taken turns back."""
        self._indexes.pop(session_id, None)

    def _scores(self, session_id: str, turns: Sequence[ForgottenTurn], question: str) -> dict[int, float]:
        index, latest = self._indexes.pop(session_id, (None, 0))
        index = index or self._chooser.start()
        for turn in turns:
            if turn.number > latest:
                text = self.tokenizer.decode(turn.ids, skip_special_tokens=True)
                index.add(Evicted(turn.number * WORDS, _words(text)[:WORDS]))
        first, end = turns[0].number, turns[-1].number + 1
        self._indexes[session_id] = index, max(latest, end - 1)
        if len(self._indexes) > INDEXES:
            del self._indexes[next(iter(self._indexes))]
        asked = Query(now=end * WORDS, ids=self._rare_words(question), asked=True, first=first * WORDS, end=end * WORDS)
        scores: np.ndarray = index.scores(asked)
        return {turn.number: float(scores[turn.number - first]) for turn in turns}

    def _rare_words(self, question: str) -> list[int]:
        """The words of a question, without the commonest ones of the language: the tokenizer learned those first."""
        words = list(dict.fromkeys(WORD.findall(question.casefold())))
        tokens = self.tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"] if words else []
        return [_number(word) for word, ids in zip(words, tokens) if len(ids) > 1 or ids[0] >= COMMON]


def _words(text: str) -> list[int]:
    return [_number(word) for word in WORD.findall(text.casefold())]


def _number(word: str) -> int:
    """A word as a token id of the index, which does not depend on the tokenizer."""
    return zlib.crc32(word.encode()) & 0x7FFFFFFF
