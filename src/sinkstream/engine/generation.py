"""Generating with an engine: draw, append, stop. Tokens stay on the device unless the host needs their ids.

Each step is launched before the host reads the tokens that the step appends, so that reading overlaps with the step. A
drawn token is appended whatever the host finds. The step itself draws.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NoReturn

import torch
from transformers.generation.streamers import BaseStreamer

from sinkstream.engine.decoder import StreamDecoder
from sinkstream.engine.inputs import Ids, end_tokens
from sinkstream.engine.log_probs import LogProbs, TopLogProbs
from sinkstream.engine.recorder import Recorder
from sinkstream.engine.sampling import Sampler, StreamSampler
from sinkstream.kernels.layout import LIKELIEST, NO_TOKEN
from sinkstream.policies.options import plain

Callback = Callable[[int, int], bool | None]


@dataclass
class Generation:
    """What one stream generated.

    Attributes
    ----------
    tokens : list of int
        The stream holds all of them and can continue.
    reason : {"length", "stop token", "stop string", "callback"}
        Why it ended.
    text : str or None
        Decoded, up to the stop string; None without a tokenizer.
    log_probs : list of float or None
        Of each token, natural logarithm, under the model's own logits: before biases, penalties, temperature and
        thresholds. None unless asked for.
    top_log_probs : list of list of (int, float) or None
        As `log_probs`, of the likeliest tokens at each place, the likeliest first, with their ids.
    """

    tokens: list[int] = field(default_factory=list)
    reason: str = "length"
    text: str | None = None
    log_probs: list[float] | None = None
    top_log_probs: list[TopLogProbs] | None = None


class StopRule:
    """When a stream ends before its length is reached.

    Parameters
    ----------
    tokens : sequence of int
        Token ids that end it.
    strings : sequence of str
        Texts that end it; they need the tokenizer.
    callback : callable or None
        Called with (token, stream) after each token; a true answer ends the stream.
    tokenizer : tokenizer or None
        Its ``decode`` is called with the latest tokens, as many as the longest stop string can take.
    """

    def __init__(self, tokens: Sequence[int], strings: Sequence[str], callback: Callback | None, tokenizer):
        if strings and tokenizer is None:
            raise ValueError("stop strings are compared with text; give the engine tokenizer=TOKENIZER")
        if any(not isinstance(s, str) or not s for s in strings):
            raise ValueError(f"stop={list(strings)!r} is not accepted; accepted: strings that are not empty")
        self.tokens, self.strings, self.callback, self.tokenizer = set(tokens), list(strings), callback, tokenizer
        self._tail = 4 * max(map(len, self.strings), default=0) + 8  # a character takes at most four tokens

    @property
    def looks(self) -> bool:
        """Whether the host needs every token."""
        return bool(self.tokens or self.strings or self.callback)

    def reason(self, tokens: list[int], stream: int) -> str | None:
        """Why a stream ends with the tokens that it has written so far, or None if it continues."""
        answer = self.callback(tokens[-1], stream) if self.callback else None
        if tokens[-1] in self.tokens:
            return "stop token"
        if self.strings:
            tail = self.tokenizer.decode(tokens[-self._tail :])
            if any(s in tail for s in self.strings):
                return "stop string"
        return "callback" if answer else None

    def text(self, tokens: list[int]) -> str | None:
        """Decoded text up to the first stop string."""
        if self.tokenizer is None:
            return None
        text = self.tokenizer.decode([t for t in tokens if t not in self.tokens])
        ends = [text.find(s) for s in self.strings if s in text]
        return text[: min(ends)] if ends else text


class Writer(ABC):
    """Chooses the tokens of a generation and says when a stream ends."""

    @abstractmethod
    def draw(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Next token of every stream, ``(streams,)`` int64, from logits ``(streams, vocab)``, both on the device.

        None: the step itself draws.
        """

    @abstractmethod
    def look(self) -> Callable[[], list] | None:
        """A function that reads on the host, once the step is launched, what `ended` needs; None: nothing is read."""

    @abstractmethod
    def ended(self, shown: list, active: Sequence[int]) -> list[int]:
        """Which of the active streams end with the tokens drawn last; `shown` is what `look` has read."""


@torch.no_grad()
def write(decoder: StreamDecoder, writer: Writer, streams: Sequence[int], max_new_tokens: int) -> None:
    """Step streams together until each has ended; ended streams are idle. Every drawn token is appended."""
    for _ in steps(decoder, writer, streams, max_new_tokens):
        pass


def steps(
    decoder: StreamDecoder, writer: Writer, streams: Sequence[int], max_new_tokens: int
) -> Iterator[Sequence[int]]:
    """As `write`, one step for each `next`: gives the streams that have not ended."""
    active = list(streams)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            tokens = writer.draw(decoder.state.logits)
            look = writer.look()
            decoder.advance(tokens, active)
            ended = [] if look is None else writer.ended(look(), active)
        active = [s for s in active if s not in ended]
        yield active
        if not active:
            return


class SamplingWriter(Writer):
    """Leaves the draws to the step, see `SamplingState`, and ends by a `StopRule`.

    Parameters
    ----------
    streams : iterable of int
    recorder : Recorder
        Open from the first token on.
    stop : StopRule
    streamer : BaseStreamer or None
        Is given each token of the only stream.
    log_probs : LogProbs or None
        Is told before each step.

    Attributes
    ----------
    generations : dict of Generation
        By stream; `tokens` are complete after `finish`.
    """

    def __init__(
        self,
        streams: Iterable[int],
        recorder: Recorder,
        stop: StopRule,
        streamer: BaseStreamer | None,
        log_probs: LogProbs | None,
    ):
        self.recorder, self.stop, self.streamer, self.log_probs = recorder, stop, streamer, log_probs
        self.generations = {s: Generation() for s in streams}

    def draw(self, logits: torch.Tensor) -> torch.Tensor | None:
        if self.log_probs is not None:
            self.log_probs.before_step()
        return None

    def look(self) -> Callable[[], list] | None:
        return self.recorder.latest if self.stop.looks or self.streamer is not None else None

    def ended(self, shown: list, active: Sequence[int]) -> list[int]:
        ended = []
        for s in active:
            tokens = self.generations[s].tokens
            if shown[s] == NO_TOKEN:
                refuse_logits(f"new token {len(tokens)}", s)
            tokens.append(shown[s])
            if self.streamer is not None:
                self.streamer.put(torch.tensor([shown[s]]))
            reason = self.stop.reason(tokens, s)
            if reason:
                self.generations[s].reason = reason
                ended.append(s)
        return ended

    def finish(self) -> dict[int, Generation]:
        """What every stream wrote."""
        written = self.recorder.tokens().tolist()
        if self.log_probs is not None:
            self.log_probs.after_step()
        for s, generation in self.generations.items():
            generation.tokens = [row[s] for row in written if row[s] != LIKELIEST]
            if NO_TOKEN in generation.tokens:
                refuse_logits(f"new token {generation.tokens.index(NO_TOKEN)}", s)
            generation.text = self.stop.text(generation.tokens)
            if self.log_probs is not None:
                found = self.log_probs.of_stream(s, len(generation.tokens))
                generation.log_probs, generation.top_log_probs = found
        return self.generations


@torch.no_grad()
def generate(
    decoder: StreamDecoder,
    prompts: dict[int, Ids | str],
    max_new_tokens: int,
    *,
    stop: str | Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None,
    callback: Callback | None = None,
    streamer: BaseStreamer | None = None,
    seed: int = 0,
    log_probs: int | None = None,
    recall_ask: int = 0,
    **sampling: Any,
) -> dict[int, Generation]:
    """Feed each stream its prompt, and generate in all of them, stepped together.

    Parameters
    ----------
    decoder : StreamDecoder
    prompts : dict
        By stream: token ids or text; an empty prompt goes on with a stream that has begun.
    **more
        As in `Engine.generate`; a streamer is for one stream.

    Raises
    ------
    ValueError
        If an option or a prompt is not accepted: nothing has been fed then. If there is nothing to draw a token from
        because its logits are not numbers: the streams hold what was written before.
    """
    with ending(streamer):
        return _generate(
            decoder,
            prompts,
            max_new_tokens,
            stop,
            stop_tokens,
            callback,
            streamer,
            seed,
            log_probs,
            recall_ask,
            Sampler.of(sampling),
        )


def _generate(
    decoder: StreamDecoder,
    prompts: dict[int, Ids | str],
    max_new_tokens: int,
    stop: str | Sequence[str],
    stop_tokens: Sequence[int] | None,
    callback: Callback | None,
    streamer: BaseStreamer | None,
    seed: int,
    log_probs: int | None,
    recall_ask: int,
    sampler: Sampler,
) -> dict[int, Generation]:
    seed, max_new_tokens, log_probs, recall_ask = map(plain, (seed, max_new_tokens, log_probs, recall_ask))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed={seed!r} is not accepted; accepted: a whole number")
    sampler.check_vocab(decoder.state.sampling.vocab)
    LogProbs.check(log_probs, decoder.state.sampling.vocab)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} is not accepted; accepted: a whole number from 1")
    if streamer is not None and len(prompts) > 1:
        raise ValueError(f"streamer= takes the text of one stream, and there are {len(prompts)} prompts")
    if callback is not None and not callable(callback):
        raise ValueError(f"callback={callback!r} is not accepted; accepted: a callable, or None")
    if not isinstance(stop, Iterable):
        raise ValueError(f"stop={stop!r} is not accepted; accepted: a string, or a sequence of strings")
    strings = [stop] if isinstance(stop, str) else list(stop)
    _check_stop_tokens(stop_tokens, decoder.state.sampling.vocab)
    rule = StopRule(
        end_tokens(decoder.model) if stop_tokens is None else stop_tokens, strings, callback, decoder.tokenizer
    )
    fed = {s: decoder.prompt_ids(prompt, s) for s, prompt in prompts.items()}
    for ids in fed.values():
        check_question(decoder, recall_ask, len(ids))
    decoder.check_model()
    for stream, ids in fed.items():
        if streamer is not None:
            streamer.put(ids[None].cpu())
        if len(ids):
            feed(decoder, ids, stream, recall_ask)
    samplers = {s: StreamSampler(sampler, seed + i, ids) for i, (s, ids) in enumerate(fed.items())}
    decoder.state.wake(list(fed))
    looks = rule.looks or streamer is not None
    with decoder.state.sampling.using(samplers), decoder.state.recording(looks=looks) as recorder:
        noted = None if log_probs is None else LogProbs(decoder.state, log_probs)
        writer = SamplingWriter(fed, recorder, rule, streamer, noted)
        write(decoder, writer, list(fed), max_new_tokens)
        return writer.finish()


def _check_stop_tokens(stop_tokens: Any, vocab: int) -> None:
    """Raise ValueError unless these are token ids, or None; anything else would never equal an id."""
    if stop_tokens is None:
        return
    if not isinstance(stop_tokens, Collection) or not all(_is_id(token, vocab) for token in stop_tokens):
        raise ValueError(
            f"stop_tokens={stop_tokens!r} is not accepted; accepted: a sequence of token ids from 0 to {vocab - 1},"
            " () for none, or None for the model's own"
        )


def _is_id(token: Any, vocab: int) -> bool:
    return isinstance(token, Integral) and not isinstance(token, bool) and 0 <= int(token) < vocab


def check_question(decoder: StreamDecoder, recall_ask: int, tokens: int) -> None:
    """Raise ValueError unless the last `recall_ask` tokens of a prompt of so many can be a question; 0: none is."""
    if isinstance(recall_ask, bool) or not isinstance(recall_ask, int) or not 0 <= recall_ask <= tokens:
        raise ValueError(
            f"recall_ask={recall_ask!r} is not accepted; accepted: 0 to {tokens}, the tokens of the prompt"
        )
    if recall_ask and decoder.recall is None:
        raise ValueError("this engine has no recall; accepted: Engine(model, recall=CHOOSER, …)")


@torch.no_grad()
def feed(decoder: StreamDecoder, ids: torch.Tensor, stream: int, recall_ask: int = 0) -> torch.Tensor:
    """As `StreamDecoder.prefill`, of checked ids; by the last `recall_ask` of them alone recall chooses."""
    if not recall_ask or decoder.recall is None:
        return decoder.prefill(ids, stream=stream, checked=True)
    if recall_ask < len(ids):
        decoder.prefill(ids[: len(ids) - recall_ask], stream=stream, checked=True)
    question, memory = ids[len(ids) - recall_ask :], decoder.recall.memory
    if memory.queries is not None:  # the question is fed, and the latest of it taken back
        decoder.prefill(question, stream=stream, checked=True)
    memory.ask(question.tolist())
    if memory.queries is not None:
        counters = decoder.state.counters[stream]
        held = counters.kept - (counters.pinned if counters.pruned else 0)
        again = min(len(question), max(1, held // 2))
        decoder.state.rewind(again, stream)
        question = question[len(question) - again :]
    return decoder.prefill(question, stream=stream, checked=True)


@contextmanager
def ending(streamer: BaseStreamer | None) -> Iterator[None]:
    """End a streamer whatever happens inside, so that its reader never waits for a call that has failed.

    Raises ValueError if it is none.
    """
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise ValueError(f"streamer={streamer!r} is not accepted; accepted: a streamer of transformers, or None")
    try:
        yield
    finally:
        if streamer is not None:
            streamer.end()


def refuse_logits(which: str, stream: int) -> NoReturn:
    """Raise ValueError: a token of a stream cannot be drawn."""
    raise ValueError(
        f"{which} of stream {stream} cannot be drawn: a logit is NaN or infinite (an overflow in half precision, or"
        " weights that are not numbers); reset the stream, and load the model in bfloat16 or float32"
    )
