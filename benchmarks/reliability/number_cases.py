"""What is put out of order, in which model, under which trainer, and what has to be said of it."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments
from trl import SFTConfig

import mixora
import mixora.errors
from mixora.training import run as running
from mixora.training.progress import Progress
from mixora.training.run import fit
from mixora.training.run_config import read_run
from tests.characters import build_tokenizer

NAN, INF = float("nan"), float("inf")
STEP, STEPS = 2, 3
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
RARE = "~"
"""A letter that stands in one row alone: the third of the batch of step 2."""


def layers_of(recipe: str) -> int:
    """Some recipes have values for four groups of layers."""
    return 4 if recipe in ("hilo", "mola") else 2


def make_base(tokenizer: Any, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, **SIZES, **marks))


def make_rows(count: int) -> list[dict[str, str]]:
    rows = [{"prompt": f"say {n % 7} and {n % 5}", "completion": f"{n % 7}{n % 5} = {n}"} for n in range(count)]
    rows[4 * (STEP - 1) + 2]["completion"] += RARE
    return rows


def write_material(folder: Path) -> None:
    """Bases, and rows to train and to evaluate on."""
    tokenizer = build_tokenizer()
    for layers in (2, 4):
        make_base(tokenizer, layers).save_pretrained(folder / f"base-{layers}")
        tokenizer.save_pretrained(folder / f"base-{layers}")
    (folder / "rows").mkdir()
    for split, rows in {"train": make_rows(4 * STEPS), "validation": make_rows(4 * STEPS)[-4:]}.items():
        (folder / "rows" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings_of(material: Path, recipe: str, out: Path, **changes: Any) -> dict[str, Any]:
    """A run with everything random that the recipe knows."""
    return {
        "model": {"base": str(material / f"base-{layers_of(recipe)}")},
        "data": {"source": str(material / "rows")},
        "adapter": {"recipe": recipe, "dropout": 0.1},
        "train": {"steps": STEPS, "batch_size": 4, "learning_rate": 0.01, **changes},
        "evaluate": {"limit": 4, "metrics": ["loss"], "generations": 0},
        "out": str(out),
    }


class Case(NamedTuple):
    """`said`: what the message must match. `is_late`: the update of step 1 is what spoils the numbers."""

    said: str
    is_late: bool = False


CASES = {
    "loss, by one bad row": Case(r"step 2: the output of the frozen module model\.embed_tokens: "),
    "logits, NaN in the head": Case(r"step 2: the logits of the head: "),
    "router, NaN": Case(r"step 2: the router's outputs at model\.layers\.1\."),
    "router, Inf": Case(r"step 2: the router's outputs at model\.layers\.1\."),
    "expert, NaN": Case(r"step 2: the experts' output at model\.layers\.1\."),
    "frozen weight, Inf": Case(r"step 2: the output of the frozen module model\.layers\.1\.mlp\.up_proj: "),
    "activations beyond fp16": Case(r"step 2: (the output of the frozen module|what reaches) model\.layers\.1\.mlp"),
    "learning rate of 1e39": Case(r"step 2: ", is_late=True),
}


class Poison(TrainerCallback):
    """Puts numbers out of order as step 2 begins; keeps the weights as they were when the last step began."""

    def __init__(self, case: str, rare: int) -> None:
        self.case, self.rare, self.is_on, self.handles = case, rare, False, []
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.handles.append(model.get_input_embeddings().register_forward_hook(self._spoil))

    def _spoil(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        hit_B11 = (args[0] == self.rare).any(dim=1)[:, None, None]
        return torch.where(hit_B11, NAN, output) if self.is_on else output

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == STEP - 1:
            self.is_on = self.case == "loss, by one bad row"
            with torch.no_grad():
                spoil(model, self.case)
        self.weights = trained(model)


def spoil(model: Any, case: str) -> None:
    """Change the weights as the case says: of the second layer, or the head."""
    base = model.get_base_model()
    layer = base.model.layers[1]
    if case.startswith(("router", "expert")):
        # a pass that draws its route may leave one tensor out: all of the layer
        for name, parameter in layer.named_parameters():
            if ".mixora_" in name and (".mixora_router" in name) == case.startswith("router"):
                parameter.fill_(INF if "Inf" in case else NAN)
    elif case.startswith("logits"):
        base.lm_head.weight[5] = NAN
    elif case.startswith("frozen"):
        ((_, weight),) = [(n, p) for n, p in layer.mlp.named_parameters() if "up_proj" in n and n.endswith("weight")]
        weight[7] = INF
    elif case.startswith("activations"):
        for name, parameter in layer.mlp.named_parameters():
            if "mixora_" not in name and ("up_proj" in name or "gate_proj" in name):
                parameter.mul_(3e4)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def has_router(recipe: str) -> bool:
    tokenizer = build_tokenizer()
    model = get_peft_model(make_base(tokenizer, layers_of(recipe)), mixora.recipe(recipe))
    return any(".mixora_router" in name for name, _ in model.named_parameters())


def run_trainer(trainer_class: Any, recipe: str, case: str, folder: Path) -> tuple[str, Any, Poison]:
    """The message, the model and the poison of a trainer in Python."""
    tokenizer = build_tokenizer()
    base = make_base(tokenizer, layers_of(recipe))
    if case.startswith("activations"):
        base = base.half()
    torch.manual_seed(0)
    model = get_peft_model(base, mixora.recipe(recipe, dropout=0.1, task_type="CAUSAL_LM"))
    texts = [f"{row['prompt']} {row['completion']}" for row in make_rows(4 * STEPS)]
    encoded = [tokenizer(text)["input_ids"][:24] for text in texts]
    rows = [{"input_ids": ids, "labels": ids} for ids in encoded]
    common = {"output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4, "report_to": []}
    common |= {"learning_rate": 1e39 if CASES[case].is_late else 0.01, "save_strategy": "no", "disable_tqdm": True}
    common |= {"use_cpu": True, "dataloader_pin_memory": False, "train_sampling_strategy": "sequential"}
    poison = Poison(case, tokenizer.convert_tokens_to_ids(RARE))
    settings = {"model": model, "train_dataset": Dataset.from_list(rows), "callbacks": [poison]}
    if trainer_class is mixora.SFTTrainer:
        arguments = SFTConfig(**common, bf16=False, dataset_kwargs={"skip_prepare_dataset": True})
        settings |= {"processing_class": tokenizer}
    else:
        arguments = TrainingArguments(**common)
    trainer = trainer_class(args=arguments, data_collator=collate, **settings)
    return message_of(trainer.train), model, poison


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    filled = [(row["input_ids"], width - len(row["input_ids"])) for row in rows]
    found = {
        name: [ids + [value] * rest for ids, rest in filled] for name, value in (("input_ids", 0), ("labels", -100))
    }
    found["attention_mask"] = [[1] * len(ids) + [0] * rest for ids, rest in filled]
    return {name: torch.tensor(values) for name, values in found.items()}


def run_command(recipe: str, case: str, material: Path, out: Path) -> tuple[str, Any, Poison]:
    """The same of what `mixora train` runs."""
    poison = Poison(case, build_tokenizer().convert_tokens_to_ids(RARE))
    arguments = {"train_sampling_strategy": "sequential"}
    tree = settings_of(material, recipe, out, arguments=arguments)
    if case.startswith("activations"):
        tree["model"]["dtype"] = "float16"
    make, found = running.make_trainer, []

    def make_trainer(*given: Any) -> Any:
        found.append(make(*given))
        found[0].add_callback(poison)
        return found[0]

    running.make_trainer = make_trainer
    try:
        said = message_of(lambda: fit(read_run(tree), Progress(Console(quiet=True))))
    finally:
        running.make_trainer = make
    return said, found[0].model, poison


def message_of(train: Any) -> str:
    """Of the error that it raises; a fault of ours is told by its class."""
    try:
        train()
    except mixora.errors.NonFiniteError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def judge(case: str, said: str, model: Any, poison: Poison) -> dict[str, Any]:
    """Whether the place was named rightly, with its row, and whether the weights are those of before the step."""
    weights = trained(model)
    is_named = re.match(CASES[case].said, said) is not None
    if case == "loss, by one bad row":
        is_named &= "row 6 of the training data" in said
    same = all(torch.equal(weights[name].nan_to_num(7.0), p.nan_to_num(7.0)) for name, p in poison.weights.items())
    return {"case": case, "is_named": is_named, "is_unchanged": same, "said": said.split(";")[0]}
