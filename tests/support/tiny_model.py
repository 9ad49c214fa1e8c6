"""A tiny random model with a tokenizer of one token a character, in memory or as a directory on disk."""

import string
from pathlib import Path

import torch
from oracle.models import VOCAB, build
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sinkstream.models import LoadedModel

CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
POISON = "~"  # the character whose embedding is not a number in a poisoned model
SENTENCE = "The quick brown fox, 12 years old, jumps over the lazy dog.\n"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, as many as the tiny models have."""
    vocab = {character: i for i, character in enumerate(["<unk>", *CHARACTERS])}
    assert len(vocab) == VOCAB
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")


def tiny_model(family: str = "gpt_neox", *, poisoned: bool = False):
    """A model of the tests; if poisoned, its predictions are NaN from the first POISON token on."""
    model = build(family)
    if poisoned:
        with torch.no_grad():
            model.get_input_embeddings().weight[tokenizer().convert_tokens_to_ids(POISON)] = float("nan")
    return model


def loaded(family: str = "gpt_neox", *, poisoned: bool = False) -> LoadedModel:
    """The same, as `load_model` gives it."""
    model = tiny_model(family, poisoned=poisoned)
    return LoadedModel.of(model, tokenizer(), name=f"tiny-{family}", source="directory", hash="hash of tiny")


def save_model(folder: Path, family: str = "gpt_neox", *, poisoned: bool = False) -> Path:
    """The same, as a directory for ``--model``."""
    tiny_model(family, poisoned=poisoned).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_text(path: Path, tokens: int, poison_at: int | None = None) -> Path:
    """A text of that many tokens, with POISON as the token of that index."""
    text = (SENTENCE * (tokens // len(SENTENCE) + 1))[:tokens]
    if poison_at is not None:
        text = text[:poison_at] + POISON + text[poison_at + 1 :]
    path.write_text(text)
    return path
