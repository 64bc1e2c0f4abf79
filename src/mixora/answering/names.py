"""What a single token is called, and the bytes that it stands for, whatever stands beside it in a text."""

import re

from transformers import PreTrainedTokenizerBase

from mixora.answering.text import REPLACEMENT

# the letters by which byte-level vocabularies write bytes, GPT-2's: bytes that are no printable letter take others
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + n): byte for n, byte in enumerate(_OTHERS)}


class TokenNames:
    """Names and bytes of a tokenizer's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # decoders take a space off the begin of a text, so tokens are read behind a letter
        self._letter: list[int] = tokenizer("a", add_special_tokens=False).input_ids[-1:]
        self._before = len(self._decode(self._letter))

    def name(self, token: int) -> str:
        r"""Its text; `bytes:\xNN` where that is no whole characters, as OpenAI has it."""
        read = self.read_bytes(token)
        try:
            return read.decode()
        except UnicodeDecodeError:
            return f"bytes:{read.decode(errors='backslashreplace')}"

    def read_bytes(self, token: int) -> bytes:
        """What it adds to a text, in UTF-8, of which it may hold a part of a character."""
        text = self._decode([*self._letter, token])[self._before :]
        read = _read_piece(self._tokenizer.convert_ids_to_tokens(token)) if REPLACEMENT in text else None
        return text.encode() if read is None else read

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def _read_piece(piece: str) -> bytes | None:
    """The bytes of a vocabulary's entry for a byte, or of one in byte-level letters; None for any other."""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1])
    return bytes(_BYTES[letter] for letter in piece) if all(letter in _BYTES for letter in piece) else None
