"""One reply: the engine's own generation, one step at a time, turned into text as it comes."""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch

from sinkstream.engine.decoder import StreamDecoder
from sinkstream.engine.generation import SamplingWriter, StopRule, steps
from sinkstream.engine.log_probs import LogProbs
from sinkstream.engine.sampling import Sampler, StreamSampler
from sinkstream.serve.events import Emit, Ended, TextPiece, TokenLogprob
from sinkstream.serve.text import TextStream

REASONS = {"stop token": "stop", "callback": "stop", "length": "length"}


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
    decoder : StreamDecoder
        Its stream 0 has been fed.
    prompt : Tensor, (tokens,), int64
        Tokens that a repetition penalty counts as seen.
    ends : frozenset of int
        The model's end tokens.

    Attributes
    ----------
    text : TextStream
    tokens : int
        Tokens written so far, the end token included.
    """

    def __init__(
        self,
        decoder: StreamDecoder,
        prompt: torch.Tensor,
        options: ReplyOptions,
        index: int,
        tokenizer: Any,
        ends: frozenset[int],
        emit: Emit,
    ):
        self.decoder, self.prompt, self.options, self.index = decoder, prompt, options, index
        self.tokenizer, self.ends, self.emit = tokenizer, frozenset() if options.ignore_end else ends, emit
        self.text = TextStream(tokenizer, options.stop, self.ends)
        self._written: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._log_probs: LogProbs | None = None

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return len(self._written)

    def run(self) -> Generator[None, None, None]:
        """Write it, one token for each `next`. Raises ValueError if there is nothing to draw from."""
        options, state = self.options, self.decoder.state
        rule = StopRule(sorted(self.ends), (), self._take, self.tokenizer)
        sampler = StreamSampler(options.sampler, options.seed + self.index, self.prompt)
        with state.sampling.using({0: sampler}), state.recording(looks=True) as recorder:
            if options.logprobs is not None:
                self._log_probs = LogProbs(state, min(options.logprobs, state.sampling.vocab))
            writer = SamplingWriter([0], recorder, rule, None, self._log_probs)
            for _ in steps(self.decoder, writer, [0], options.max_tokens):
                yield
        self._send(self.text.finish(), rest=True)
        self.emit(Ended(self.index, REASONS[writer.generations[0].reason]))

    def held(self) -> str:
        """Text of the reply as the stream holds it; what came past a stop string is taken back from the stream."""
        kept = self.text.tokens_within()
        past = len(self._written) - kept
        if past:
            try:
                self.decoder.rewind(past)
            except ValueError:  # they have left the window already
                kept += past
        return self.tokenizer.decode(
            self._written[:kept], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _take(self, token: int, stream: int) -> bool:
        self._written.append(token)
        if self._log_probs is not None:
            value, top = self._log_probs.latest(stream, token)
            pairs = tuple((self._piece(one), log_prob) for one, log_prob in top)
            self._logprobs.append(TokenLogprob(self._piece(token), value, pairs))
        self._send(self.text.push(token))
        return self.text.stopped

    def _send(self, piece: str, *, rest: bool = False) -> None:
        if piece or (rest and self._logprobs):
            self.emit(TextPiece(self.index, piece, tuple(self._logprobs)))
            self._logprobs.clear()

    def _piece(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
