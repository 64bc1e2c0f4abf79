"""Python as a reader would run it: the blocks of a page one after the other, over tiny models instead of real ones."""

import ast
import json
import warnings
from pathlib import Path
from unittest.mock import create_autospec

import datasets
import lm_eval
import peft
import torch
import transformers

import mixora
from mixora.bases import base as bases
from mixora.data import Collator
from mixora.recipes import recipe_names
from tests.training.conftest import command_rows


class Names(dict):
    """What a reader has who comes to a block: made when a name is asked for, over the tiny base in `folder`.

    `method`: the recipe of `model`.
    """

    def __init__(self, folder, method):
        super().__init__()
        self.folder, self.method = folder, method

    def __missing__(self, name):
        make = getattr(self, f"make_{name}", None)
        if make is None:
            raise KeyError(name)
        self[name] = made = make()
        return made

    def make_mixora(self):
        return mixora

    def make_torch(self):
        return torch

    def make_get_peft_model(self):
        return peft.get_peft_model

    def make_name(self):
        return str(self.folder)

    def make_tokenizer(self):
        return bases.read_tokenizer(self.folder)

    def make_base(self):
        return bases.load_base(self.folder)[0]

    make_base_model = make_base

    def make_model(self):
        return adapt(self.make_base(), self.method)

    def make_batch(self):
        batch = self["tokenizer"](["lamp hall 1", "song folk"], return_tensors="pt", padding=True)
        return {**batch, "labels": batch["input_ids"]}

    def make_batches(self):
        return [self.make_batch()]

    def make_rows(self):
        tokens = self["tokenizer"]([row["prompt"] for row in command_rows(8)])["input_ids"]
        return datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})

    def make_collator(self):
        return Collator(self["tokenizer"], "decoder")

    def make_args(self):
        return transformers.TrainingArguments("runs/stand-in", max_steps=1, report_to=[], disable_tqdm=True)

    def make_trainer(self):
        data = {"train_dataset": self["rows"], "eval_dataset": self["rows"], "data_collator": self["collator"]}
        return mixora.Trainer(self["model"], self["args"], **data)


def adapt(base, method):
    return peft.get_peft_model(base, mixora.recipe(method, task_type="CAUSAL_LM"))


def lay_out(folder, blocks):
    """The files that a page's Python names, or that it calls its blocks; `examples/` is that of the repository."""
    rows = "".join(json.dumps(row) + "\n" for row in command_rows(24))
    for block in blocks:
        for node in ast.walk(ast.parse(block.text)) if block.language == "python" else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".jsonl"):
                path = folder / node.value
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(rows)


def stand_in(folder, monkeypatch):
    """Bases that are not there are the tiny one in `folder`; adapters that are not there are made on it."""
    resolve, adapter_of = bases.resolve_base, mixora.from_pretrained
    load = transformers.AutoModelForCausalLM.from_pretrained

    def resolve_base(name):
        return resolve(name if Path(name).exists() else folder)

    def from_hub(name, **settings):
        return load(name if Path(name).exists() else folder, **settings)

    def from_pretrained(base, adapter, *arguments, **options):
        if not Path(adapter).exists():
            adapt(bases.load_base(folder)[0], "sira").save_pretrained(adapter)
        return adapter_of(base, adapter, *arguments, **options)

    monkeypatch.setattr(bases, "resolve_base", resolve_base)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_hub)
    monkeypatch.setattr(mixora, "from_pretrained", from_pretrained)
    # the harness loads its tasks from the hub; a run of it is in tests/compatibility/test_lm_eval.py
    monkeypatch.setattr(lm_eval, "simple_evaluate", create_autospec(lm_eval.simple_evaluate))


def method_of(page):
    """The recipe that a page is about."""
    return stem if (stem := Path(page).stem) in recipe_names() else "sira"


def run(block, kept, folder):
    """Run a block after others of its page, which left the names `kept`; adds its own to them."""
    names = Names(folder, method_of(block.page))
    names.update(kept)
    # so that a traceback tells the line of the page
    code = compile("\n" * block.line + block.text, block.page, "exec")
    before = dict(names)
    with warnings.catch_warnings():
        # those of other libraries are no matter of the page
        warnings.simplefilter("ignore")
        exec(code, names)
    kept.update({name: value for name, value in names.items() if before.get(name) is not value})
