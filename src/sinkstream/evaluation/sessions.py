"""Sessions: one stream through one model by one method, behind one interface.

Every method, the baselines included, is driven by the same decode loop (`evaluation.run`), so that a difference between
two figures is a difference between two methods.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from transformers import DynamicCache, PreTrainedModel

from sinkstream.cache import StreamingCache
from sinkstream.compat import with_cache
from sinkstream.engine import STEPS, Engine
from sinkstream.evaluation.settings import BASELINES, RunSettings
from sinkstream.models import LoadedModel
from sinkstream.policies import Step
from sinkstream.registry import Registry

BACKENDS: Registry = Registry("backend")
NLL_ROWS = 128  # tokens whose logits are turned into float32 at once


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, in nats, computed in float32.

    Parameters
    ----------
    logits : Tensor, (tokens, vocab)
    targets : Tensor, (tokens,), int64

    Returns
    -------
    Tensor, (tokens,), float32
    """
    slices = zip(logits.split(NLL_ROWS), targets.split(NLL_ROWS), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in slices])


class Session(ABC):
    """One stream. All ids are ``(tokens,)`` int64 on the device of the model.

    Attributes
    ----------
    top1 : Tensor or None, (tokens,), int64
        The likeliest tokens in place of those that the latest `score` scored, if it knows them.
    """

    top1: torch.Tensor | None = None

    def __init__(self, model: PreTrainedModel, settings: RunSettings):
        self.model, self.settings = model, settings

    @abstractmethod
    def feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        """Forward new tokens; logits ``(tokens, vocab)``, or of the last token only ``(1, vocab)``."""

    @abstractmethod
    def steps(self) -> list[Step]:
        """What happened to the cache at each token of the latest `feed`."""

    def chunk_sizes(self, tokens: int) -> Iterator[int]:
        """Sizes of the forwards that score `tokens` tokens; ask for the next one after scoring the last."""
        size = self.settings.block_tokens
        while tokens > 0:
            yield min(size, tokens)
            tokens -= size

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        """Feed a prompt of any length; logits ``(1, vocab)`` after its last token."""
        fed = 0
        for size in self.chunk_sizes(len(ids)):
            logits = self.feed(ids[fed : fed + size], last_only=True)
            fed += size
        return logits

    def score(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Feed tokens and return the NLL of the tokens that follow each, ``(tokens,)`` float32; NaN = not scored.

        A session may keep only the first of the tokens: then there are fewer figures (and `steps`) than tokens.
        """
        logits = self.feed(ids, last_only=False)
        self.top1 = logits.argmax(-1)
        return token_nll(logits, targets[: len(logits)])

    def close(self) -> None:  # noqa: B027  (most sessions put nothing on the model)
        """Free what the session put on the model."""


class StreamingSession(Session):
    """A `StreamingCache` under the settings' policy."""

    def __init__(self, model: PreTrainedModel, settings: RunSettings, tokenizer):
        super().__init__(model, settings)
        self.cache = StreamingCache.for_model(
            model,
            policy=settings.policy(),
            positions=settings.positions,
            allow_untrained_positions=settings.allow_untrained_positions,
            tokenizer=tokenizer,
            block_tokens=settings.block_tokens if settings.has_blocks else 0,
        )

    def feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        out = self.model(ids[None], **with_cache(self.model, self.cache), logits_to_keep=1 if last_only else 0)
        return out.logits[0, -1:] if last_only else out.logits[0, : len(self.cache.last_steps)]

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        return self.cache.prefill(self.model, ids[None], self.settings.block_tokens)

    def steps(self) -> list[Step]:
        return self.cache.last_steps

    def chunk_sizes(self, tokens: int) -> Iterator[int]:
        self.cache.speculative = True
        return self.cache.chunks(tokens, self.settings.block_tokens)

    def close(self) -> None:
        self.cache.close()


class EngineSession(Session):
    """The engine's decode step, token by token, under the settings' policy; prompts go through its prefill.

    `feed` with ``last_only`` returns a view that the next call overwrites.
    """

    def __init__(self, model: PreTrainedModel, settings: RunSettings, tokenizer, backend: str):
        super().__init__(model, settings)
        self.engine = Engine(model, backend=backend, **engine_options(settings, tokenizer))

    def feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        rows = [self._append(ids[i : i + 1], copy=not last_only) for i in self._begin(ids)]
        return rows[-1] if last_only else torch.cat(rows)

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        return self.engine.prefill(ids)[None]

    def score(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nll, top1 = [], []
        for i in self._begin(ids):
            logits = self._append(ids[i : i + 1])
            nll.append(token_nll(logits, targets[i : i + 1]))
            top1.append(logits.argmax(-1))
        self.top1 = torch.cat(top1)
        return torch.cat(nll)

    def steps(self) -> list[Step]:
        return self._steps

    def close(self) -> None:
        self.engine.close()

    def _begin(self, ids: torch.Tensor) -> range:
        self._steps: list[Step] = []
        return range(len(ids))

    def _append(self, token: torch.Tensor, *, copy: bool = False) -> torch.Tensor:
        self.engine.advance(token, (0,))
        self._steps += self.engine.last_steps
        return self.engine.state.logits.clone() if copy else self.engine.state.logits


def engine_options(settings: RunSettings, tokenizer) -> dict[str, Any]:
    """What the settings mean for an `Engine`, its backend left out."""
    return {
        "policy": settings.policy(),
        "positions": settings.positions,
        "allow_untrained_positions": settings.allow_untrained_positions,
        "tokenizer": tokenizer,
    }


class FullSession(Session):
    """The full cache: transformers' own `DynamicCache`, which grows for ever."""

    def __init__(self, model: PreTrainedModel, settings: RunSettings):
        super().__init__(model, settings)
        self.cache = DynamicCache(config=model.config)

    def feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        seen = self.cache.get_seq_length()
        self._steps = [Step(0, False, seen + i + 1) for i in range(len(ids))]
        return self.model(ids[None], **with_cache(self.model, self.cache), logits_to_keep=1 if last_only else 0).logits[
            0
        ]

    def steps(self) -> list[Step]:
        return self._steps


class RecomputeSession(Session):
    """Sliding-window recompute: the last cap tokens are forwarded anew, at positions 0 to cap − 1, for every token."""

    batch = 32  # windows of one forward where none is timed

    def __init__(self, model: PreTrainedModel, settings: RunSettings):
        super().__init__(model, settings)
        self.history = torch.empty(0, dtype=torch.int64, device=model.device)
        self.fed = self.prefilled = 0

    def feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        assert last_only, "recompute gives the logits of one token at a time"
        self._remember(ids)
        return self._forward(self.history[None])

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        self.prefilled = len(ids)
        return self.feed(ids, last_only=True)

    def steps(self) -> list[Step]:
        return self._steps

    def skip(self, ids: torch.Tensor) -> None:
        """Take in tokens without computing anything."""
        self._remember(ids)

    def score(self, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        stream = torch.cat([self.history, ids])
        first, cap = len(self.history), self.settings.cap
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
        lengths = [min(len(self.history) + i + 1, self.settings.cap) for i in range(len(ids))]
        self._steps = [Step(0, False, n) for n in lengths]
        self.fed += len(ids)
        self.history = torch.cat([self.history, ids])[-self.settings.cap :]


class Backend(ABC):
    """One way of running a model, for one model and one run's settings."""

    def __init__(self, loaded: LoadedModel, settings: RunSettings):
        self.loaded, self.settings = loaded, settings

    @abstractmethod
    def session(self) -> Session:
        """A new session. Raises ValueError if settings and model do not fit together."""

    def check(self) -> None:
        """Raise ValueError as `session` would."""
        self.session().close()


@BACKENDS.register("hf")
class HfBackend(Backend):
    """The transformers module itself, with the soft-ring cache (or no cache, or the full one, for the baselines)."""

    def session(self) -> Session:
        loaded, settings = self.loaded, self.settings
        _check_positions(loaded, settings)
        if settings.method == "full":
            return FullSession(loaded.model, settings)
        if settings.method == "recompute":
            return RecomputeSession(loaded.model, settings)
        return StreamingSession(loaded.model, settings, loaded.tokenizer)


class EngineBackend(Backend):
    """The engine, its decode step done as `step` says; no baselines."""

    step: ClassVar[str]

    def session(self) -> Session:
        self._check_method()
        return EngineSession(self.loaded.model, self.settings, self.loaded.tokenizer, self.step)

    def check(self) -> None:
        self._check_method()
        Engine.check(self.loaded.model, backend=self.step, **engine_options(self.settings, self.loaded.tokenizer))

    def _check_method(self) -> None:
        if self.settings.method in BASELINES:
            raise ValueError(
                f"policy {self.settings.method!r} is a baseline, which --backend {self.step} does not run;"
                " accepted: --backend hf, or an eviction policy"
            )


for _name, _step in STEPS.items():
    BACKENDS.register(_name)(type(_step.__name__, (EngineBackend,), {"step": _name, "__doc__": _step.__doc__}))


def _check_positions(loaded: LoadedModel, settings: RunSettings) -> None:
    trained = loaded.trained_positions
    beyond = settings.method == "recompute" and trained is not None and settings.cap > trained
    if beyond and not settings.allow_untrained_positions:
        raise ValueError(
            f"cap={settings.cap} is above the {trained} positions that {loaded.name} was trained on;"
            f" accepted: at most {trained}, or --allow-untrained-positions"
        )
