"""Token ids of a text, exactly as the whole text would give them, without tokenizing more of it than needed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sinkstream.data.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_CHARACTERS_PER_TOKEN = 6
SPARE_TOKENS = 64
REPEAT_EVERY, PASSAGE = 1_024, 32  # tokens


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Token ids and where they came from."""

    ids: torch.Tensor  # (tokens,), int64, on the CPU
    sha256: str  # hex, over the ids as little-endian int64
    # name, source: those of the text; of random ids: "random" and how they were drawn
    name: str
    source: str
    text_sha256: str | None  # hash of the text; None for random ids

    @classmethod
    def of(cls, ids: list[int] | torch.Tensor, *, name: str, source: str, text_sha256: str | None) -> TokenStream:
        """Hash and keep `ids`."""
        tensor = torch.as_tensor(ids, dtype=torch.int64)
        digest = hashlib.sha256(tensor.numpy().astype("<i8").tobytes()).hexdigest()
        return cls(tensor, digest, name, source, text_sha256)

    def __len__(self) -> int:
        return len(self.ids)

    def record(self) -> dict:
        """JSON-able description for run records."""
        return {
            "name": self.name,
            "source": self.source,
            "tokens": len(self),
            "sha256": self.sha256,
            "text_sha256": self.text_sha256,
        }


class ShortTextError(ValueError):
    """A text has fewer tokens than were asked for.

    Attributes
    ----------
    reason : str
        The message without what is accepted, which a caller with options of its own says itself.
    """

    def __init__(self, reason: str, accepted: str):
        super().__init__(f"{reason}; accepted: {accepted}")
        self.reason = reason


def tokenize(text: Text, tokenizer: PreTrainedTokenizerBase | None, tokens: int | None = None) -> TokenStream:
    """The first token ids of a text, special tokens as the tokenizer itself adds them.

    Without `tokens` there are as many as the text's `default_tokens`; all, if that is None.

    Raises `ShortTextError` if the text has fewer tokens, and ValueError if `tokens` is below 1, or without a tokenizer.
    """
    if tokenizer is None:
        raise ValueError(
            f"text {text.name!r} cannot be tokenized: this model has no tokenizer; accepted: a model with one,"
            " or random tokens"
        )
    wanted = text.default_tokens if tokens is None else tokens
    if wanted is not None and wanted < 1:
        raise ValueError(f"tokens={wanted} is not accepted; accepted: a whole number of at least 1")
    ids = _ids(tokenizer, text.text) if wanted is None else _first_ids(tokenizer, text.text, wanted)
    if not ids or (wanted is not None and len(ids) < wanted):
        raise ShortTextError(
            f"text {text.name!r} is too short: it has {len(ids)} tokens, {wanted or 1} were asked for",
            "a longer text, or fewer tokens",
        )
    return TokenStream.of(ids[:wanted], name=text.name, source=text.source, text_sha256=text.sha256)


def random_tokens(vocab_size: int, tokens: int, seed: int = 0) -> TokenStream:
    """Return uniformly random ids in [0, vocab_size), for models without a tokenizer. Raises ValueError below 1."""
    for option, value in (("vocab_size", vocab_size), ("tokens", tokens)):
        if value < 1:
            raise ValueError(f"{option}={value} is not accepted; accepted: a whole number of at least 1")
    ids = torch.randint(vocab_size, (tokens,), generator=torch.Generator().manual_seed(seed))
    return TokenStream.of(ids, name="random", source=f"uniform below {vocab_size}, seed {seed}", text_sha256=None)


def repeating_tokens(
    vocab_size: int, tokens: int, *, back: int, seed: int = 0, every: int = REPEAT_EVERY, passage: int = PASSAGE
) -> TokenStream:
    """Random ids, in which passages come again: at every multiple of `every` that lies so far, one of long before.

    Parameters
    ----------
    back : int
        A passage comes again `back` to twice `back` tokens later.

    Raises
    ------
    ValueError
        As `random_tokens`, and unless passages fit between two places.
    """
    if not 0 < passage <= min(every, back):
        raise ValueError(f"passage={passage} is not accepted; accepted: 1 to {min(every, back)}")
    ids, draw = random_tokens(vocab_size, tokens, seed).ids.clone(), torch.Generator().manual_seed(seed)
    for place in range(-(-2 * back // every) * every, tokens - passage + 1, every):
        first = place - back - int(torch.randint(back, (), generator=draw))
        ids[place : place + passage] = ids[first : first + passage]
    source = f"uniform below {vocab_size}, every {every} tokens {passage} of {back} to {2 * back} before, seed {seed}"
    return TokenStream.of(ids, name="repeats", source=source, text_sha256=None)


def _first_ids(tokenizer: PreTrainedTokenizerBase, text: str, wanted: int) -> list[int]:
    """Tokenize growing prefixes until one and its double agree on the first `wanted` ids, or the text ends.

    A cut can change the ids near it, and only there; agreement of two cuts that far apart shows that neither reached
    the wanted ids. At least SPARE_TOKENS lie between them and a cut.
    """
    previous: list[int] = []
    length = FIRST_CHARACTERS_PER_TOKEN * (wanted + SPARE_TOKENS)
    while length < len(text):
        ids = _ids(tokenizer, text[:length])
        enough = len(previous) >= wanted + SPARE_TOKENS
        if enough and ids[:wanted] == previous[:wanted]:
            return ids
        previous, length = ids, 2 * length
    return _ids(tokenizer, text)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text of any length; `verbose=False` silences the warning about the model's own maximum."""
    return tokenizer(text, verbose=False, return_attention_mask=False)["input_ids"]
