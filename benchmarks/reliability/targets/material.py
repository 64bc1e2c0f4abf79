"""What the targets need: a folder that goes away, a tiny base, its tokenizer, a valid adapter, run and record."""

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import mixora
from tests.characters import build_tokenizer

RUN: dict[str, Any] = {
    "model": {"base": "base", "dtype": "float32", "task": "auto"},
    "data": {"source": "rows.jsonl", "max_length": 64, "packing": False, "train_rows": 10, "form": "completion"},
    "adapter": {"recipe": "sira", "rank": 2, "rules": {"attention": {"targets": ["q_proj"], "kernel": "auto"}}},
    "train": {"steps": 2, "epochs": 1.0, "batch_size": 2, "learning_rate": 0.01, "arguments": {"weight_decay": 0.1}},
    "evaluate": {"limit": 2, "metrics": ["loss"], "generations": 0},
    "out": "runs/a",
    "title": "A run",
}
ROWS = [
    {"prompt": "lamp hall 1", "completion": "lamp(what=hall)", "domain": "lamp"},
    {"prompt": "song jazz 2", "completion": "song(what=jazz)", "domain": "song", "references": ["a", "b"]},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"text": "a text"},
    {"text": "good", "label": "yes"},
    {"text": "bad", "text_pair": "worse", "label": 1},
    {"question": "q", "choices": ["a", "b"], "answer": 1},
]
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


@cache
def place() -> Path:
    """A folder of this process, in memory where there is such a place; removed at the end."""
    above = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="mixora-fuzz-", dir=above))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextmanager
def fresh(name: str) -> Iterator[Path]:
    """An empty folder that is removed afterwards."""
    folder = place() / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_tokenizer(chat: str | None = None) -> PreTrainedTokenizerFast:
    """One token per printable character of ASCII."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat
    return tokenizer


def base_config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    marks = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(**{**sizes, **marks, "max_position_embeddings": 64, **changes})


@cache
def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(base_config())


@cache
def base_folder() -> Path:
    """The base with its tokenizer on disk."""
    folder = place() / "base"
    make_base().save_pretrained(folder)
    make_tokenizer(CHAT).save_pretrained(folder)
    return folder


@cache
def adapter_files() -> dict[str, bytes]:
    """The files of a valid adapter on that base, by name."""
    torch.manual_seed(0)
    config = mixora.recipe("sira", num_experts=3, top_k=2, rank=2, task_type="CAUSAL_LM")
    model: Any = peft.get_peft_model(LlamaForCausalLM(base_config()), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixora_" in name:
                parameter.normal_()
    with fresh("adapter-made") as folder:
        model.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@cache
def adapter_config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(adapter_files()["adapter_config.json"])
    return found


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
