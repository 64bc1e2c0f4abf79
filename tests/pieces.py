"""Tokenizers whose tokens are words behind a space, or single bytes: what they decode depends on its neighbours."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast


def byte_tokenizer():
    """One token per byte, written as GPT-2 does, so that a character may have four."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def word_tokenizer(words=("my", "name", "is")):
    """transformers' own for Llama-2, as SentencePiece writes it: `words` behind a space, letters, else bytes."""
    letters = [chr(n) for n in range(33, 127)]
    merged = {"\u2581" + word[:end] for word in words for end in range(1, len(word) + 1)}
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = ["<unk>", "<s>", "</s>", *bytes_, "\u2581", *letters, *sorted(merged, key=len)]
    merges = [(piece[:-1], piece[-1]) for piece in sorted(merged, key=len)]
    return LlamaTokenizer(vocab={piece: n for n, piece in enumerate(vocabulary)}, merges=merges)
