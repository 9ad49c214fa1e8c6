"""`RecallingCache`: a cache whose evicted tokens can come back; see `cache.recall`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sinkstream import compat
from sinkstream.archive import PREFIX, BlockFile, Chooser, RecallSettings
from sinkstream.archive.kv import block_shape
from sinkstream.archive.settings import excluded
from sinkstream.cache.copies import CopiedCache
from sinkstream.cache.families import ModelSpec
from sinkstream.cache.padding import check_ids
from sinkstream.cache.recall import Recall, RecallEvent, one_row
from sinkstream.cache.reread import reader
from sinkstream.cache.stream import rewind
from sinkstream.cache.vocabulary import check_vocabulary, vocabulary_size
from sinkstream.policies import EvictionPolicy, structural_weights
from sinkstream.policies.options import check_whole, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SENTENCE_END = 2.0  # structural weight of a token that ends a sentence or a line, at least


class RecallingCache(CopiedCache):
    """The part of a cache that recall adds."""

    _asked = 0

    @property
    def recall_ask(self) -> int:
        """How many tokens at the end of the next prompt of ``generate()`` are a question, as `ask` takes one; 0: none.

        Set it before ``model.generate(…)``: the prompt is fed up to the question, and what comes back is chosen by the
        question alone. Then it is 0 again.

        Raises
        ------
        ValueError
            When it is set: if the cache has no recall, or the number is not accepted. In ``generate()``, before
            anything is computed: if the prompt has fewer new tokens, or is fed in pieces (``prefill_chunk_size``).
        """
        return self._asked

    @recall_ask.setter
    def recall_ask(self, tokens: int) -> None:
        tokens = plain(tokens)
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 0:
            raise ValueError(f"recall_ask={tokens!r} is not accepted; accepted: a number of tokens, 0 for no question")
        if tokens:
            self._recall()
        self._asked = tokens

    @property
    def recall_events(self) -> list[RecallEvent]:
        """When the frame was set, why, and what came back: the latest 1,024; empty without recall."""
        return [] if self.stream.recall is None else list(self.stream.recall.events)

    def begin_turn(self, ahead: int = 0) -> None:
        """Say that a turn of the conversation begins `ahead` tokens after the next one. Raises ValueError."""
        self.stream.begin_turn(check_whole("ahead", ahead, 0))

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
            If the cache has no recall, or, with `replay`, the chooser reads queries and the policy is adaptive; and as
            `prefill`.
        """
        recall = self._recall()
        check_ids(question_ids, "question_ids")
        check_vocabulary(question_ids, vocabulary_size(self.spec.decoder), "question_ids")
        if replay:
            check_replay(recall.settings, self.policy)
            left = self._choose_by(model, question_ids)
            return self.prefill(model, question_ids[:, question_ids.shape[1] - left :])
        logits = self.prefill(model, question_ids)
        recall.ask(question_ids[0].tolist())
        return logits

    def begin_prompt(
        self, input_ids: torch.Tensor, new: int | None, given: Mapping[str, Any]
    ) -> tuple[torch.Tensor, int | None, dict[str, Any]]:
        """As `BatchedCache.begin_prompt`; feeds a prompt up to the question of `recall_ask`, and chooses by that."""
        asked, pieces = self._asked, compat.prefill_pieces(sys._getframe(1)) if self._asked else None
        if pieces is not None:
            raise _in_pieces(asked)
        input_ids, new, more = super().begin_prompt(input_ids, new, given)
        if not asked:
            return input_ids, new, more
        batch, tokens = input_ids.shape
        first = tokens if new is None else new
        if batch != 1:
            raise one_row(batch)
        if asked > first:
            has = f"{first} new tokens; accepted: at most {first}" if first > 0 else "no new tokens"
            raise ValueError(f"recall_ask={asked}, and the prompt has {has}")
        check_replay(self._recall().settings, self.policy)
        model = self._attached_model("asked")
        if asked < first:
            self.prefill(model, input_ids[:, tokens - first : tokens - asked])
        left = self._choose_by(model, input_ids[:, tokens - asked :])
        self._asked = 0
        return input_ids, left, more

    def next_step(self, loop: Mapping[str, Any] | None) -> dict[str, Any]:
        """As `BatchedCache.next_step`; before 5.23 transformers feeds the pieces of a prompt so."""
        if self._asked and loop is None:
            raise _in_pieces(self._asked)
        return super().next_step(loop)

    def _recall(self) -> Recall:
        recall = self.stream.recall
        if recall is None:
            raise ValueError("this cache has no recall; accepted: StreamingCache.for_model(model, recall=CHOOSER, …)")
        return recall

    def _choose_by(self, model: PreTrainedModel, question_ids: torch.Tensor) -> int:
        """Have the next choice made by a question ``(1, tokens)``; returns how many of its last tokens must be fed.

        Where the chooser reads queries, the question is fed, and the latest of it is taken back.
        """
        recall, ids = self._recall(), question_ids[0].tolist()
        if recall.queries is None:  # the ids are known before the question is fed
            recall.ask(ids)
            return len(ids)
        self.prefill(model, question_ids)
        recall.ask(ids)
        ring = self.stream.ring
        assert ring is not None, "the question is in it"
        again = min(len(ids), max(1, (ring.live - ring.pinned) // 2))
        rewind(self.stream, again)
        return again

    def prefill(self, model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
        """See `StreamingCache.prefill`."""
        raise NotImplementedError


def check_replay(settings: RecallSettings, policy: EvictionPolicy) -> None:
    """Raise ValueError unless a question whose queries are read can be taken back, to be fed again."""
    if settings.chooser.heads and not policy.plan_known:
        raise ValueError(
            f"a question cannot be fed again under adaptive eviction, and {type(settings.chooser).__name__} reads its"
            " queries first; accepted: ask(…, replay=False), recall='lexical', or a policy that knows every prune"
            " beforehand"
        )


def _in_pieces(asked: int) -> ValueError:
    return ValueError(
        f"recall_ask={asked} and prefill_chunk_size exclude each other; accepted: generate() without"
        " prefill_chunk_size, which feeds a long prompt in chunks by itself"
    )


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
    WriteError
        If the file of the archive could not be made.
    """
    if recall is None:
        if options:
            raise ValueError(f"{next(iter(options))} goes with recall=CHOOSER, which is not given")
        return None
    own = {name.removeprefix(PREFIX): value for name, value in options.items()}
    settings = RecallSettings.build(recall, model, policy.peak, tokenizer, **own)
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
    settings.check_policy(policy)
    refused = {f"positions={positions!r}": positions != "cache", "a compiled model": compiled}
    wrong = next((name for name, given in refused.items() if given), None)
    if wrong is not None:
        raise excluded(wrong)
    if settings.file is not None:  # what shows now need not wait until something leaves the window
        shape = block_shape(len(spec.full_layers), spec.kv_heads, spec.head_dim)
        BlockFile.check(settings.file, settings.file_bytes, shape, spec.dtype)
