"""Where texts come from, and how they become token ids."""

from sinkstream.data.load import load_text
from sinkstream.data.text import TEXTS, Text
from sinkstream.data.tokens import ShortTextError, TokenStream, random_tokens, repeating_tokens, tokenize

__all__ = [
    "TEXTS",
    "ShortTextError",
    "Text",
    "TokenStream",
    "load_text",
    "random_tokens",
    "repeating_tokens",
    "tokenize",
]
