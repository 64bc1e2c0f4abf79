import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

LETTERS = "abcdefghijklmnop"
VOCABULARY = len(LETTERS) + 4


@pytest.fixture
def tokenizer():
    """One token per letter, ids from 4; PAD 0, BOS 1, EOS 2."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *LETTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    inner.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
        attention_dropout=0.3,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        initializer_factor=5.0,
    )
    return T5ForConditionalGeneration(config)


@pytest.fixture
def make_bert():
    def build(outputs):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=outputs,
            initializer_range=0.5,
        )
        return BertForSequenceClassification(config)

    return build


@pytest.fixture
def collate():
    """Right padding with a mask, the plain way."""

    def build(features):
        def pad(name, filler):
            length = max(len(f[name]) for f in features)
            return torch.tensor([[*f[name], *[filler] * (length - len(f[name]))] for f in features])

        ids = pad("input_ids", 0)
        lengths = torch.tensor([len(f["input_ids"]) for f in features])
        labels = features[0]["labels"]
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
            "labels": pad("labels", -100)
            if isinstance(labels, list)
            else torch.tensor([f["labels"] for f in features]),
        }

    return build
