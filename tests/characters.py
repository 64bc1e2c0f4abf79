"""A tokenizer of one token per character, built on the fly: every test that reads real text takes it from here."""

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

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
