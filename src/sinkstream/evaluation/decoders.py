"""Decoders: a model under a method, one interface for the evaluation and the benchmark.

Every method, the baselines included, is driven by the same loops (`evaluation.run`, `bench.decoding`), so that a
difference between two figures is a difference between two methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from sinkstream.cache import StreamingCache
from sinkstream.compat import attention_implementation, with_cache
from sinkstream.engine import Engine
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.metrics import token_nll
from sinkstream.policies import Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PART = 1_024  # tokens that an engine's decoder reads between two reports: four chunks and more of a cap of 512


def step_weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters without the input embedding, unless it is tied to the head."""
    embedding, head = (part.weight for part in (model.get_input_embeddings(), model.get_output_embeddings()))
    assert isinstance(embedding, torch.Tensor) and isinstance(head, torch.Tensor), "a language model's are matrices"
    held: dict[int, torch.Tensor] = {p.data_ptr(): p for p in model.parameters()}
    if embedding.data_ptr() != head.data_ptr():
        del held[embedding.data_ptr()]
    return sum(p.numel() * p.element_size() for p in held.values())


class Frames:
    """Which evicted tokens were back in the cache, and when: all frames of a run, of which a cache keeps the latest.

    Attributes
    ----------
    tokens : list of int
        Index in the stream of the first token that saw each frame, not decreasing.
    spans : list of tuple of (int, int)
        First token of every span of each frame, and the token after its last.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.spans: list[tuple[tuple[int, int], ...]] = []
        self._latest: Any = None

    def take(self, events: Sequence[Any]) -> None:
        """Add the frames of a cache's `recall_events` that are new."""
        new = []
        for event in reversed(events):
            if event is self._latest:
                break
            new.append(event)
        for event in reversed(new):
            self.tokens.append(event.token)
            self.spans.append(tuple((span.first, span.end) for span in event.spans))
        self._latest = events[-1] if events else None

    def held(self, token: int, wanted: range) -> float:
        """Share of the tokens `wanted` that the frame of that token held."""
        at = bisect_right(self.tokens, token) - 1
        spans = self.spans[at] if at >= 0 else ()
        found = sum(max(0, min(end, wanted.stop) - max(first, wanted.start)) for first, end in spans)
        return found / len(wanted)


class Decoder(ABC):
    """A model that decodes under a method. All ids are int64 on the device of the model.

    `step` appends a token without a device synchronisation; the loops that time tokens call it.
    """

    journal: list[Step] | None = None  # what `step` did to the cache of the first stream, token by token, if kept
    frames: Frames | None = None  # what recall has brought back so far, and when; None without recall

    def __init__(self, model: PreTrainedModel, settings: RunSettings):
        self.model, self.settings = model, settings

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that one step reads."""
        return step_weight_bytes(self.model)

    @abstractmethod
    def prefill(self, ids: torch.Tensor, stream: int = 0) -> torch.Tensor:
        """Feed a prompt (tokens,) of any length to one stream; logits ``(1, vocab)`` after its last token."""

    def choose(self, logits: torch.Tensor) -> torch.Tensor | None:
        """The likeliest token of every stream, (streams,), by the latest logits; None where the step finds it."""
        return logits.argmax(-1)

    @abstractmethod
    def step(self, tokens: torch.Tensor | None) -> torch.Tensor:
        """Append one token to every stream, (streams,), or what `choose` gave.

        Returns logits (streams, vocab), which the next call may overwrite.
        """

    @abstractmethod
    def last_step(self) -> Step:
        """What the latest token did to the cache of the first stream."""

    def take_steps(self) -> list[Step]:
        """What every `step` since the latest call did, `last_step` by `last_step`; the first call begins to keep it.

        The device may be waited for.
        """
        steps, self.journal = self.journal or [], []
        return steps

    @abstractmethod
    def read(self, ids: torch.Tensor) -> Iterator[int]:
        """Feed tokens (tokens,) in as few forwards as may be; gives the tokens of each forward once it is done."""

    def ask(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed a question (tokens,), which ends a turn; logits ``(1, vocab)`` after its last token."""
        return self.prefill(ids)

    def counts(self) -> Mapping[str, int]:
        """What the cache counts of the first stream, its bytes and those of its archive; by default nothing."""
        return {}

    def close(self) -> None:  # noqa: B027  (most decoders put nothing on the model)
        """Leave the model as it was."""


class ModuleDecoder(Decoder):
    """The transformers module itself, one stream, which also takes many tokens in one forward."""

    top1: torch.Tensor | None = None  # (tokens,) int64: the tokens with the largest logits of the latest `score`

    @abstractmethod
    def feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        """Forward new tokens; logits ``(tokens, vocab)``, or of the last token only ``(1, vocab)``."""

    @abstractmethod
    def steps(self) -> Sequence[Step]:
        """What happened to the cache at each token of the latest `score`."""

    @property
    def taken(self) -> int:
        """How many tokens of the latest `feed` the decoder has kept; feed the others again."""
        return len(self.steps())

    def read(self, ids: torch.Tensor) -> Iterator[int]:
        self.announce(ids)
        done = 0
        for size in self.chunk_sizes(len(ids)):
            self.feed(ids[done : done + size], last_only=True)
            done += self.taken
            yield self.taken

    def prefill(self, ids: torch.Tensor, stream: int = 0) -> torch.Tensor:
        fed = 0
        for size in self.chunk_sizes(len(ids)):
            logits = self.feed(ids[fed : fed + size], last_only=True)
            fed += size
        return logits

    def step(self, tokens: torch.Tensor | None) -> torch.Tensor:
        assert tokens is not None, "`choose` of a module's decoder gives tokens"
        logits = self.feed(tokens, last_only=True)
        if self.journal is not None:
            self.journal.append(self.last_step())
        return logits

    def last_step(self) -> Step:
        return self.steps()[-1]

    def announce(self, ids: torch.Tensor) -> None:
        """These tokens ``(tokens,)`` are scored next."""

    def chunk_sizes(self, tokens: int) -> Iterator[int]:
        """Sizes of the forwards that score `tokens` tokens; ask for the next one after scoring the last."""
        size = self.settings.block_tokens
        while tokens > 0:
            yield min(size, tokens)
            tokens -= size

    def score(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Forward tokens (tokens,) and return the NLL of the token that follows each, (tokens,) float32; NaN: no score.

        A decoder may keep only the first of the tokens: then there are fewer figures (and `steps`) than tokens.
        """
        logits = self.feed(ids, last_only=False)
        self.top1 = logits.argmax(-1)
        return token_nll(logits, targets[: len(logits)])


class StreamingDecoder(ModuleDecoder):
    """A `StreamingCache` under the settings' policy."""

    def __init__(self, model: PreTrainedModel, settings: RunSettings, tokenizer: PreTrainedTokenizerBase | None):
        super().__init__(model, settings)
        self.cache = StreamingCache.for_model(
            model,
            policy=settings.policy(),
            positions=settings.positions,
            allow_untrained_positions=settings.allow_untrained_positions,
            tokenizer=tokenizer,
            block_tokens=settings.block_tokens if settings.has_blocks else 0,
            **settings.recall,
        )
        self.frames = Frames() if settings.recall else None

    def feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        out = self.model(ids[None], **with_cache(self.model, self.cache), logits_to_keep=1 if last_only else 0)
        self._watch()
        return out.logits[0, -1:] if last_only else out.logits[0, : len(self.cache.last_steps)]

    def prefill(self, ids: torch.Tensor, stream: int = 0) -> torch.Tensor:
        logits = self.cache.prefill(self.model, ids[None], self.settings.block_tokens)
        self._watch()
        return logits

    def ask(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.settings.recall:
            return self.prefill(ids)
        logits = self.cache.ask(self.model, ids[None])
        self._watch()
        return logits

    def _watch(self) -> None:
        if self.frames is not None:
            self.frames.take(self.cache.recall_events)

    def steps(self) -> Sequence[Step]:
        return self.cache.last_steps

    def announce(self, ids: torch.Tensor) -> None:
        self.cache.announce(ids[None])

    def chunk_sizes(self, tokens: int) -> Iterator[int]:
        self.cache.stream.speculative = True
        return self.cache.chunks(tokens, self.settings.block_tokens)

    def counts(self) -> Mapping[str, int]:
        return self.cache.stats()

    def close(self) -> None:
        self.cache.close()


class EngineDecoder(Decoder):
    """The engine's decode step under the settings' policy; prompts go through its prefill."""

    def __init__(self, model: PreTrainedModel, settings: RunSettings, **options: Any):
        super().__init__(model, settings)
        self.engine = Engine(model, **options)
        self._streams = range(self.engine.state.streams)
        self.frames = Frames() if settings.recall else None

    @property
    def weight_bytes(self) -> int:
        return self.engine.weights.step_bytes

    def prefill(self, ids: torch.Tensor, stream: int = 0) -> torch.Tensor:
        logits = self.engine.prefill(ids, stream=stream, checked=True)[None]
        self._watch()
        return logits

    def read(self, ids: torch.Tensor) -> Iterator[int]:
        for part in ids.split(PART):
            self.prefill(part)
            yield len(part)

    def ask(self, ids: torch.Tensor) -> torch.Tensor:
        if not self.settings.recall:
            return self.prefill(ids)
        logits = self.engine.ask(ids)[None]
        self._watch()
        return logits

    def choose(self, logits: torch.Tensor) -> None:
        """Nothing: every step finds the likeliest token by itself."""

    def step(self, tokens: torch.Tensor | None) -> torch.Tensor:
        self.engine.advance(tokens, self._streams)
        if self.frames is not None:
            self._watch()
        return self.engine.state.logits

    def _watch(self) -> None:
        if self.frames is not None and self.engine.recall is not None:
            self.frames.take(self.engine.recall.memory.events)

    def counts(self) -> Mapping[str, int]:
        return self.engine.stats()

    def last_step(self) -> Step:
        step = self.engine.last_steps[0]
        assert step is not None, "every step of the decoder advances the first stream"
        return step

    def take_steps(self) -> list[Step]:
        return self.engine.state.take_journal()

    def close(self) -> None:
        self.engine.close()


class FullDecoder(ModuleDecoder):
    """The full cache: transformers' own `DynamicCache`, which grows for ever."""

    def __init__(self, model: PreTrainedModel, settings: RunSettings):
        super().__init__(model, settings)
        self.cache = DynamicCache(config=model.config)

    def feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        seen = self.cache.get_seq_length()
        self._steps = [Step(0, False, seen + i + 1) for i in range(len(ids))]
        out = self.model(ids[None], **with_cache(self.model, self.cache), logits_to_keep=1 if last_only else 0)
        return out.logits[0]

    def steps(self) -> Sequence[Step]:
        return self._steps


class RecomputeDecoder(ModuleDecoder):
    """Sliding-window recompute: the last cap tokens are forwarded anew, at positions 0 to cap − 1, for every token."""

    batch = 32  # windows of one forward where none is timed

    def __init__(self, model: PreTrainedModel, settings: RunSettings, attention: str | None = None):
        super().__init__(model, settings)
        before = attention_implementation(model.config)
        assert before is not None, "transformers chooses an attention when it makes a model"
        self._attention_before = before
        if attention:
            model.set_attn_implementation(attention)
        self.history = torch.empty(0, dtype=torch.int64, device=model.device)
        self.fed = self.prefilled = 0

    def feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        assert last_only, "recompute gives the logits of one token at a time"
        self._remember(ids)
        return self._forward(self.history[None])

    def prefill(self, ids: torch.Tensor, stream: int = 0) -> torch.Tensor:
        self.prefilled = len(ids)
        return self.feed(ids, last_only=True)

    def steps(self) -> Sequence[Step]:
        return self._steps

    def close(self) -> None:
        if attention_implementation(self.model.config) != self._attention_before:
            self.model.set_attn_implementation(self._attention_before)

    def skip(self, ids: torch.Tensor) -> None:
        """Append tokens without a forward."""
        self._remember(ids)

    def score(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        stream = torch.cat([self.history, ids])
        first, cap = len(self.history), self.settings.given_cap
        offset = self.fed - self.prefilled
        wanted = [i for i in range(len(ids)) if (offset + i) % self.settings.sample_every == 0]
        nll = torch.full((len(ids),), float("nan"), device=ids.device)
        full = [i for i in wanted if first + i + 1 >= cap]
        for group in [full[i : i + self.batch] for i in range(0, len(full), self.batch)]:
            windows = torch.stack([stream[first + i + 1 - cap : first + i + 1] for i in group])
            nll[group] = token_nll(self._forward(windows), targets[group])
        for i in sorted(set(wanted) - set(full)):
            nll[i] = token_nll(self._forward(stream[None, : first + i + 1]), targets[i : i + 1])[0]
        self._remember(ids)
        return nll

    def _forward(self, windows: torch.Tensor) -> torch.Tensor:
        return self.model(windows, use_cache=False, logits_to_keep=1).logits[:, -1]

    def _remember(self, ids: torch.Tensor) -> None:
        cap = self.settings.given_cap
        lengths = [min(len(self.history) + i + 1, cap) for i in range(len(ids))]
        self._steps = [Step(0, False, n) for n in lengths]
        self.fed += len(ids)
        self.history = torch.cat([self.history, ids])[-cap:]
