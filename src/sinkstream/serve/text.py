"""From token ids to the text that a client is sent: no half characters, nothing past a stop string."""

from collections.abc import Collection, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one reply, as it comes.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        A fast tokenizer.
    stop : sequence of str
        Texts that end the reply; they are not part of it.
    end_tokens : collection of int
        Tokens that end it and have no text.

    Attributes
    ----------
    stopped : bool
        Whether a stop string has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), end_tokens: Collection[int] = ()):
        self._tokenizer, self._stop, self._ends = tokenizer.backend_tokenizer, list(stop), set(end_tokens)
        self._longest = max(map(len, self._stop), default=0)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._lengths: list[int] = []  # of the text after each token
        self._sent: list[str] = []
        self._length = self._sent_length = 0  # of all of the text, and of what was sent
        self._complete = 0  # tokens, from the first on, whose text was sent
        self._tail = ""  # its end, which has not been sent
        self.stopped = False

    @property
    def text(self) -> str:
        """Everything up to the stop string."""
        return "".join(self._sent) + self._tail

    @property
    def length(self) -> int:
        """Characters that have come so far, up to the stop string."""
        return self._length

    def push(self, token: int) -> str:
        """Take a token; returns the text that can be sent now, often empty."""
        piece = None if token in self._ends else self._decoder.step(self._tokenizer, token)
        if piece and not self.stopped:
            self._tail += piece
            self._length += len(piece)
            if self._stop:
                self._look()
        self._lengths.append(self._length)
        return self._send(self._held_back())

    def finish(self) -> str:
        """The text that was held back because a stop string might have come."""
        return self._send(0)

    def tokens_within(self) -> int:
        """How many tokens, from the first on, wrote nothing past the end of the text."""
        if not self.stopped:
            return len(self._lengths)
        past = (i for i, length in enumerate(self._lengths[:-1]) if length > self._length)
        return self._whole(next(past, len(self._lengths) - 1))  # the last token has ended the stop string

    def tokens_sent(self) -> int:
        """How many tokens, from the first on, wrote nothing but what was sent."""
        end = self._complete
        while end < len(self._lengths) and self._lengths[end] <= self._sent_length:
            end += 1
        self._complete = max(self._complete, self._whole(end))
        return self._complete

    def _whole(self, tokens: int) -> int:
        """So many tokens, less the last ones without a text of their own: they begin a character of the next token."""
        while tokens and self._lengths[tokens - 1] == (self._lengths[tokens - 2] if tokens > 1 else 0):
            tokens -= 1
        return tokens

    def _look(self) -> None:
        """Cut the text at the first stop string: none begins in what was sent, since its beginning is held back."""
        found = [i for i in (self._tail.find(s) for s in self._stop) if i >= 0]
        if found:
            self._length -= len(self._tail) - min(found)
            self._tail, self.stopped = self._tail[: min(found)], True

    def _held_back(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        if self.stopped or not self._stop:
            return 0
        for length in range(min(self._longest - 1, len(self._tail)), 0, -1):
            if any(s.startswith(self._tail[-length:]) for s in self._stop):
                return length
        return 0

    def _send(self, held_back: int) -> str:
        end = len(self._tail) - held_back
        piece, self._tail = self._tail[:end], self._tail[end:]
        if piece:
            self._sent.append(piece)
            self._sent_length += len(piece)
        return piece
