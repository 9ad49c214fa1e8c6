"""Generating with an engine: draw, append, stop. Tokens stay on the device unless somebody must look at them.

Whoever looks at a token does so while its own step is under way: a drawn token is in the stream in any case. The
likeliest token is drawn by the step itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers.generation.streamers import BaseStreamer

from sinkstream.engine.sampling import Sampler
from sinkstream.kernels.layout import LIKELIEST

Callback = Callable[[int, int], bool | None]


@dataclass
class Generation:
    """What one stream wrote.

    Attributes
    ----------
    tokens : list of int
        All of them are in the stream: it can go on from here.
    reason : {"length", "stop token", "stop string", "callback"}
        Why it ended.
    text : str or None
        Decoded, up to the stop string; None without a tokenizer.
    """

    tokens: list[int] = field(default_factory=list)
    reason: str = "length"
    text: str | None = None


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
        """Whether tokens must be sent to the host one by one."""
        return bool(self.tokens or self.strings or self.callback)

    def reason(self, tokens: list[int], stream: int) -> str | None:
        """Why a stream ends with what it has written so far, or None if it goes on."""
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

        None: the likeliest one, which the step finds by itself.
        """

    @abstractmethod
    def look(self) -> Callable[[], list] | None:
        """How the host sees what it must of the tokens drawn last, once their step is launched; None if it need not."""

    @abstractmethod
    def ended(self, shown: list, active: Sequence[int]) -> list[int]:
        """Which of the active streams end with the tokens drawn last; `shown` is what was seen."""


@torch.no_grad()
def write(engine, writer: Writer, streams: Sequence[int], max_new_tokens: int) -> None:
    """Let streams write, stepped together; those that end sit out the rest. Every token drawn is in its stream."""
    active = list(streams)
    for _ in range(max_new_tokens):
        tokens = writer.draw(engine.state.logits)
        look = writer.look()
        engine.advance(tokens, active)
        ended = [] if look is None else writer.ended(look(), active)
        active = [s for s in active if s not in ended]
        if not active:
            return


class OnItsWay:
    """A small tensor that is copied to the host while the device goes on with what is launched next."""

    def __init__(self, tensor: torch.Tensor):
        self._host, self._arrived = tensor.to("cpu", non_blocking=True), None  # to pinned memory
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list:
        """Wait for the copy, and for nothing that was launched after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()


class SamplingWriter(Writer):
    """Draws with a `Sampler` and ends by a `StopRule`.

    Parameters
    ----------
    state : StreamState
    recorder : Recorder
        Open from the first token on.
    prompts : dict of Tensor, (tokens,), int64
        By stream: tokens that a repetition penalty counts as seen.
    sampler : Sampler
    stop : StopRule
    seed : int
    streamer : BaseStreamer or None
        Is given each token of the only stream.

    Attributes
    ----------
    found : dict of Generation
        By stream; `tokens` are complete after `finish`.
    """

    def __init__(self, state, recorder, prompts, sampler: Sampler, stop: StopRule, seed: int, streamer):
        self.recorder, self.sampler, self.stop, self.streamer = recorder, sampler, stop, streamer
        self.found = {s: Generation() for s in prompts}
        self._generator = torch.Generator(state.device).manual_seed(seed)
        self._drawn: torch.Tensor | None = None
        self._seen = torch.zeros_like(state.logits, dtype=torch.bool) if sampler.remembers else None
        if self._seen is not None:
            for stream, ids in prompts.items():
                self._seen[stream, ids] = True

    def draw(self, logits: torch.Tensor) -> torch.Tensor | None:
        if not self.sampler.bare:
            self._drawn = self.sampler.draw(logits, self._seen, self._generator)
        if self._seen is not None:
            self._seen.scatter_(1, self._drawn[:, None], True)
        return self._drawn

    def look(self) -> Callable[[], list] | None:
        if not self.stop.looks and self.streamer is None:
            return None
        return self.recorder.latest if self._drawn is None else OnItsWay(self._drawn).tolist

    def ended(self, shown: list, active: Sequence[int]) -> list[int]:
        ended = []
        for s in active:
            tokens = self.found[s].tokens
            tokens.append(shown[s])
            if self.streamer is not None:
                self.streamer.put(torch.tensor([shown[s]]))
            reason = self.stop.reason(tokens, s)
            if reason:
                self.found[s].reason = reason
                ended.append(s)
        return ended

    def finish(self) -> dict[int, Generation]:
        """What every stream wrote."""
        written = self.recorder.tokens().tolist()
        for s, generation in self.found.items():
            generation.tokens = [row[s] for row in written if row[s] != LIKELIEST]
            generation.text = self.stop.text(generation.tokens)
        return self.found


@torch.no_grad()
def generate(
    engine,
    prompts: dict[int, torch.Tensor],
    *,
    max_new_tokens: int,
    sampler: Sampler,
    stop: StopRule,
    seed: int,
    streamer: BaseStreamer | None,
) -> dict[int, Generation]:
    """Feed each stream its prompt and let all of them write.

    Parameters
    ----------
    engine : Engine
    prompts : dict of Tensor, (tokens,), int64
        By stream; an empty prompt goes on with a stream that has begun.
    streamer : BaseStreamer or None
        As that of transformers' generate(); for one stream.
    """
    for stream, ids in prompts.items():
        if streamer is not None:
            streamer.put(ids[None].cpu())
        if len(ids):
            engine.prefill(ids, stream=stream)
    with engine.state.recording(looks=stop.looks or streamer is not None) as recorder:
        writer = SamplingWriter(engine.state, recorder, prompts, sampler, stop, seed, streamer)
        try:
            write(engine, writer, list(prompts), max_new_tokens)
        finally:
            if streamer is not None:
                streamer.end()
        return writer.finish()
