"""Generating with an engine: draw, append, stop. Tokens stay on the device unless somebody must look at them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from sinkstream.engine.sampling import Sampler

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


@torch.no_grad()
def generate(
    engine, prompts: dict[int, torch.Tensor], *, max_new_tokens: int, sampler: Sampler, stop: StopRule, seed: int
) -> dict[int, Generation]:
    """Feed each stream its prompt and let all of them write, stepped together; those that end sit out the rest.

    Parameters
    ----------
    engine : Engine
    prompts : dict of Tensor, (tokens,), int64
        By stream; an empty prompt goes on with a stream that has begun.
    """
    state = engine.state
    for stream, ids in prompts.items():
        if len(ids):
            engine.prefill(ids, stream=stream)
    seen = torch.zeros_like(state.logits, dtype=torch.bool) if sampler.remembers else None
    if seen is not None:
        for stream, ids in prompts.items():
            seen[stream, ids] = True
    generator = torch.Generator(state.device).manual_seed(seed)
    drawn = torch.zeros((max_new_tokens, state.streams), dtype=torch.int64, device=state.device)
    found = {s: Generation() for s in prompts}
    active, lengths = list(prompts), dict.fromkeys(prompts, max_new_tokens)
    for n in range(max_new_tokens):
        drawn[n] = sampler.draw(state.logits, seen, generator)
        if seen is not None:
            seen.scatter_(1, drawn[n][:, None], True)
        ended = []
        if stop.looks:
            row = drawn[n].tolist()
            for s in active:
                found[s].tokens.append(row[s])
                reason = stop.reason(found[s].tokens, s)
                if reason:
                    found[s].reason, lengths[s] = reason, n + 1
                    ended.append(s)
        engine.advance(drawn[n], active)
        active = [s for s in active if s not in ended]
        if not active:
            break
    written = drawn.tolist()
    for s, generation in found.items():
        generation.tokens = [row[s] for row in written[: lengths[s]]]
        generation.text = stop.text(generation.tokens)
    return found
