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
    text : str
        Everything up to the stop string.
    stopped : bool
        Whether a stop string has come.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), end_tokens: Collection[int] = ()):
        self._tokenizer, self._stop, self._ends = tokenizer.backend_tokenizer, list(stop), set(end_tokens)
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._lengths: list[int] = []  # of the text after each token
        self._sent = 0
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Take a token; returns the text that can be sent now, often empty."""
        piece = None if token in self._ends else self._decoder.step(self._tokenizer, token)
        if piece and not self.stopped:
            searched = max(0, len(self.text) - max(map(len, self._stop), default=0))
            self.text += piece
            found = [i for i in (self.text.find(s, searched) for s in self._stop) if i >= 0]
            if found:
                self.text, self.stopped = self.text[: min(found)], True
        self._lengths.append(len(self.text))
        return self._send(0 if self.stopped else self._held_back())

    def finish(self) -> str:
        """The text that was held back because a stop string might have come."""
        return self._send(0)

    def tokens_within(self) -> int:
        """How many tokens, from the first on, wrote nothing past the end of the text."""
        if not self.stopped:
            return len(self._lengths)
        past = (i for i, length in enumerate(self._lengths[:-1]) if length > len(self.text))
        return next(past, len(self._lengths) - 1)  # the last token has ended the stop string

    def _held_back(self) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = min(max(map(len, self._stop), default=0) - 1, len(self.text))
        for length in range(longest, 0, -1):
            if any(s.startswith(self.text[-length:]) for s in self._stop):
                return length
        return 0

    def _send(self, held_back: int) -> str:
        end = max(self._sent, len(self.text) - held_back)
        piece, self._sent = self.text[self._sent : end], end
        return piece
