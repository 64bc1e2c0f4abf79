"""A tokenizer of one token per character, built on the fly: every test that reads real text takes it from here."""

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
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

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def build_tokenizer(chat=False, opens=True, special=("<pad>", "<s>", "</s>", "<unk>")):
    """One token per character of printable ASCII and newline; `opens`: it puts BOS before text by itself."""
    letters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    inner.decoder = Fuse()
    if opens:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def save_bases(folder, layers=2):
    """Tiny models of three kinds below `folder`, each with the tokenizer; `layers`: of Llama and BERT."""
    tokenizer = build_tokenizer()
    marks = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    models_by_kind = {
        "llama": LlamaForCausalLM(LlamaConfig(**marks, **width, num_key_value_heads=2)),
        "bert": BertForSequenceClassification(BertConfig(**marks, **width, max_position_embeddings=128)),
        "t5": T5ForConditionalGeneration(T5Config(**marks, **t5)),
    }
    for name, model in models_by_kind.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
