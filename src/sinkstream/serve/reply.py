"""One reply: the tokens that a lane writes, one at a time, turned into text as they come."""

from dataclasses import dataclass, field
from typing import Any

import torch

from sinkstream.engine.sampling import Sampler, StreamSampler
from sinkstream.serve.events import Emit, Ended, TextPiece, TokenLogprob
from sinkstream.serve.lanes import Lane
from sinkstream.serve.scheduler import STEP, Work
from sinkstream.serve.text import TextStream
from sinkstream.serve.token_texts import TokenTexts


@dataclass(frozen=True)
class ReplyOptions:
    """How a reply is written.

    Attributes
    ----------
    stop : tuple of str
        Texts that end it.
    seed : int
        Choice i draws with seed + i.
    logprobs : int or None
        How many of the likeliest tokens are told beside each token; None: nothing is told.
    ignore_end : bool
        Whether the model's end tokens are tokens like others.
    """

    sampler: Sampler = field(default_factory=Sampler)
    max_tokens: int = 1024
    stop: tuple[str, ...] = ()
    seed: int = 0
    choices: int = 1
    logprobs: int | None = None
    ignore_end: bool = False


class Reply:
    """A reply that is being written.

    Parameters
    ----------
    lane : Lane
        Its stream has been fed.
    prompt : Tensor, (tokens,), int64
        Tokens that a repetition penalty counts as seen.
    texts : TokenTexts
        Of the tokenizer, for log-probabilities; shared by all replies.
    ends : frozenset of int
        The model's end tokens.

    Attributes
    ----------
    text : TextStream
    tokens : int
        Tokens written so far, the end token included.
    kept : list of int
        Those that the stream holds, once `held` was called.
    """

    def __init__(
        self,
        lane: Lane,
        prompt: torch.Tensor,
        options: ReplyOptions,
        index: int,
        tokenizer: Any,
        texts: TokenTexts,
        ends: frozenset[int],
        emit: Emit,
    ):
        self.lane, self.prompt, self.options, self.index = lane, prompt, options, index
        self.tokenizer, self._texts = tokenizer, texts
        self.ends, self.emit = frozenset() if options.ignore_end else ends, emit
        self.text = TextStream(tokenizer, options.stop, self.ends)
        self.kept: list[int] = []
        self._written: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._told = 0  # of them

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return len(self._written)

    def run(self) -> Work:
        """Write it, one token for each step of all lanes. Raises ValueError if there is nothing to draw from."""
        options, reason = self.options, "length"
        sampler = StreamSampler(options.sampler, options.seed + self.index, self.prompt)
        self.lane.begin(sampler, None if options.logprobs is None else min(options.logprobs, self.lane.vocab))
        try:
            for _ in range(options.max_tokens):
                self.lane.ask()
                yield STEP
                token = self.lane.answer(len(self._written))
                self._take(token)
                if self.text.stopped or token in self.ends:
                    reason = "stop"
                    break
        finally:
            self.lane.end()
        self._send(self.text.finish(), rest=True)
        self.emit(Ended(self.index, reason))

    def held(self) -> str:
        """Text of the reply as the stream holds it; what came past a stop string is taken back from the stream."""
        kept = self.text.tokens_within()
        past = len(self._written) - kept
        if past:
            try:
                self.lane.rewind(past)
            except ValueError:  # they have left the window already
                kept += past
        self.kept = self._written[:kept]
        return self.tokenizer.decode(self.kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _take(self, token: int) -> None:
        self._written.append(token)
        if self.options.logprobs is not None:
            value, top = self.lane.log_probs(token)
            pairs = tuple((self._texts[one], log_prob) for one, log_prob in top)
            self._logprobs.append(TokenLogprob(self._texts[token], value, pairs, self.text.length))
        self._send(self.text.push(token))

    def _send(self, piece: str, *, rest: bool = False) -> None:
        logprobs = self._untold(rest) if self._logprobs else ()
        if piece or (rest and logprobs):
            self._told += len(logprobs)
            self.emit(TextPiece(self.index, piece, logprobs))

    def _untold(self, rest: bool) -> tuple[TokenLogprob, ...]:
        """Those of the tokens whose text is a part of what was sent; at the end, of all that have written the text."""
        end = self.text.tokens_sent()
        if rest:
            end = self.text.tokens_within() - (self._written[-1] in self.ends)
        return tuple(self._logprobs[self._told : end])
