"""Where texts come from, and how they become token ids."""

from .load import load_text
from .text import TEXTS, Text
from .tokens import TokenStream, random_tokens, tokenize

__all__ = ["TEXTS", "Text", "TokenStream", "load_text", "random_tokens", "tokenize"]
