"""`RecallingCache`: a cache whose evicted tokens can come back; see `cache.recall`."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from sinkstream.archive import PREFIX, Chooser, RecallSettings
from sinkstream.cache.copies import CopiedCache
from sinkstream.cache.families import ModelSpec
from sinkstream.cache.recall import Recall, RecallEvent
from sinkstream.cache.reread import reader
from sinkstream.cache.stream import rewind
from sinkstream.policies import EvictionPolicy, structural_weights
from sinkstream.policies.triggers import Turns

SENTENCE_END = 2.0  # structural weight of a token that ends a sentence or a line, at least


class RecallingCache(CopiedCache):
    """The part of a cache that recall adds."""

    @property
    def recall_events(self) -> list[RecallEvent]:
        """When the frame was set, why, and what came back: the latest 1,024; empty without recall."""
        return [] if self.stream.recall is None else list(self.stream.recall.events)

    def begin_turn(self, ahead: int = 0) -> None:
        """Say that a turn of the conversation begins `ahead` tokens after the next one. Raises ValueError."""
        self.stream.begin_turn(ahead)

    def announce(self, input_ids: torch.Tensor) -> None:
        """Say that the tokens ``(1, tokens)`` come next, so that they can be fed in longer chunks; `prefill` does so.

        It matters with recall only, and for choosers that foresee (``recall="lexical"``).
        """
        if self.stream.recall is not None and len(input_ids) == 1:
            self.stream.recall.announce(input_ids[0].tolist())

    def ask(self, model: PreTrainedModel, question_ids: torch.Tensor, *, replay: bool = True) -> torch.Tensor:
        """Feed a question at the end of a turn; what comes back is chosen by the question alone, without a gate.

        Parameters
        ----------
        question_ids : Tensor, (1, tokens), int64
            New tokens only.
        replay : bool
            Whether the question itself is computed with the tokens that come back. If not, only what follows is. A
            chooser of ids chooses before the question is fed; one that reads queries feeds the question, takes the
            latest of it back (as much as half the window) and feeds that again.

        Returns
        -------
        Tensor, (1, vocab)
            Logits after the question.

        Raises
        ------
        ValueError
            If the cache has no recall; and as `prefill`.
        """
        recall = self.stream.recall
        if recall is None:
            raise ValueError("this cache has no recall; accepted: StreamingCache.for_model(model, recall=CHOOSER, …)")
        ids = question_ids[0].tolist()
        if replay and recall.queries is None:  # the ids are known before the question is fed
            recall.ask(ids)
            return self.prefill(model, question_ids)
        logits = self.prefill(model, question_ids)
        recall.ask(ids)
        if not replay:
            return logits
        ring = self.stream.ring
        assert ring is not None, "the question is in it"
        again = min(len(ids), max(1, (ring.live - ring.pinned) // 2))
        rewind(self.stream, again)
        return self.prefill(model, question_ids[:, len(ids) - again :])

    def prefill(self, model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
        """See `StreamingCache.prefill`."""
        raise NotImplementedError


def recall_of(
    recall: str | Chooser | None,
    options: dict[str, Any],
    model: PreTrainedModel,
    spec: ModelSpec,
    policy: EvictionPolicy,
    positions: str,
    tokenizer: Any,
    compiled: bool,
) -> Recall | None:
    """The recall of a new cache, empty; None without a chooser.

    Parameters
    ----------
    options : dict
        Settings and options of the chooser, with their prefix.

    Raises
    ------
    ValueError
        If an option is not accepted, or the cache cannot have recall.
    """
    if recall is None:
        if options:
            raise ValueError(f"{next(iter(options))} goes with recall=CHOOSER, which is not given")
        return None
    own = {name.removeprefix(PREFIX): value for name, value in options.items()}
    settings = RecallSettings.build(recall, model, policy.peak, **own)
    _check(settings, spec, policy, positions, compiled)
    borders = decode = None
    if tokenizer is not None:
        borders = (structural_weights(tokenizer) >= SENTENCE_END).tolist()
        borders += [False] * max(0, model.config.vocab_size - len(borders))
        decode = partial(_text, tokenizer)
    return Recall(settings, sink=policy.sink, target=policy.target, reread=reader(spec), borders=borders, decode=decode)


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids))


def _check(settings: RecallSettings, spec: ModelSpec, policy: EvictionPolicy, positions: str, compiled: bool) -> None:
    """Raise ValueError, by name, for what recall does not compose with."""
    if spec.sliding is not None:
        raise ValueError(
            f"recall and {spec.family} with sliding layers exclude each other; accepted: models whose layers all stream"
            " under the policy"
        )
    refused = {
        "a policy that pins tokens (refresh)": policy.refresh > 0,
        "evict='turns'": any(isinstance(t, Turns) for t in policy.triggers),
        f"positions={positions!r}": positions != "cache",
        "a compiled model": compiled,
    }
    wrong = next((name for name, given in refused.items() if given), None)
    if wrong is not None:
        raise ValueError(f"recall and {wrong} exclude each other; give one of them")
    most = policy.window + policy.overlap - 1
    if settings.slots > most:
        raise ValueError(
            f"recall_slots={settings.slots} leave no window of {policy.window + policy.overlap} tokens; accepted: 1 to"
            f" {most}"
        )
