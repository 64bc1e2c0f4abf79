import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
from pathlib import Path

import pytest
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


@pytest.fixture
def plain_tokenizer():
    return build_tokenizer()


@pytest.fixture
def chat_tokenizer():
    return build_tokenizer(chat=True)


@pytest.fixture
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def write(tmp_path):
    """Writes rows (dicts) or raw bytes under a name and gives the path."""

    def put(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return put


@pytest.fixture
def shared_data():
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("MIXORA_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no folder of real data sets at {folder}; MIXORA_SHARED_DATA can name it")
    return folder
