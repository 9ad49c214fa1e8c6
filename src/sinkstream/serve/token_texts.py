"""What one token writes: a text, or a part of a character, of which only the bytes are known."""

import re
from dataclasses import dataclass
from typing import Any

BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of one byte, in tokenizers with byte fallback
PRINTED = (
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
)  # bytes that a byte-level tokenizer writes as themselves
OTHERS = [byte for byte in range(256) if byte not in PRINTED]  # it writes them as characters from 256 on
BYTE_LEVEL = {chr(byte): byte for byte in PRINTED} | {chr(256 + i): byte for i, byte in enumerate(OTHERS)}


@dataclass(frozen=True)
class TokenText:
    """What a token writes.

    Attributes
    ----------
    text : str
        With U+FFFD for a part of a character.
    data : bytes
        Those of all tokens in a row are the UTF-8 bytes of the whole text.
    """

    text: str
    data: bytes

    @property
    def name(self) -> str:
        """The text; for a part of a character its bytes, as OpenAI's completions write them: ``bytes:\\xf0\\x9f``."""
        if self.text.encode() == self.data:
            return self.text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.data)


class TokenTexts:
    """The texts of the tokens of one tokenizer, each as it is behind other tokens.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, TokenText] = {}

    def __getitem__(self, token: int) -> TokenText:
        if token not in self._known:
            self._known[token] = self._read(token)
        return self._known[token]

    def _read(self, token: int) -> TokenText:
        alone, twice = self._decoded([token]), self._decoded([token, token])
        if "\ufffd" not in alone:  # some decoders leave out a space at the beginning of a text
            text = twice[len(alone) :] if twice.startswith(alone) else alone
            return TokenText(text, text.encode())
        written = self._tokenizer.convert_ids_to_tokens(token)
        byte = BYTE.fullmatch(written)
        if byte is not None:
            return TokenText(alone, bytes.fromhex(byte[1]))
        if all(character in BYTE_LEVEL for character in written):
            return TokenText(alone, bytes(BYTE_LEVEL[character] for character in written))
        return TokenText(alone, alone.encode())

    def _decoded(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
