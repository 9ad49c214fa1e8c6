"""Structural refresh: keep the tokens that end lines, sentences and quotations."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkstream.policies.scorers.base import SCORERS, Candidates, Scorer, collected

_SENTENCE_ENDS = (".", "!", "?", "。", "！", "？")
_QUOTES = ('"', "'", "“", "”", "‘", "’", "«", "»")


def structural_weights(tokenizer) -> torch.Tensor:
    """Weight of every vocabulary entry: 3 newline, 2 sentence end, 1 quotation mark, 0 otherwise.

    Parameters
    ----------
    tokenizer : transformers tokenizer
        Each id is decoded by itself.

    Returns
    -------
    Tensor, (vocab,), float32
    """
    if not (hasattr(tokenizer, "batch_decode") and hasattr(tokenizer, "__len__")):
        raise ValueError(f"tokenizer={tokenizer!r} is not accepted; accepted: a tokenizer of transformers, or None")
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return torch.tensor([_weight(piece) for piece in pieces], dtype=torch.float32)


def _weight(piece: str) -> float:
    text = piece.strip(" ")
    if "\n" in text:
        return 3.0
    if text.rstrip("".join(_QUOTES)).endswith(_SENTENCE_ENDS):
        return 2.0
    return 1.0 if any(mark in text for mark in _QUOTES) else 0.0


@SCORERS.register("structural")
@dataclass(frozen=True)
class Structural(Scorer):
    """Keep tokens that end a line, a sentence or a quotation, the most recent first.

    Needs the tokenizer: ``StreamingCache.for_model(..., tokenizer=tokenizer)``. Source: structure tokens of the
    project's plan.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"structure"})

    def score(self, candidates: Candidates) -> torch.Tensor:
        return collected(candidates.structure)
