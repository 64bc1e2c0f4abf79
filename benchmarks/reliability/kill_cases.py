"""Small runs that have whatever could keep a resumed run from ending as an uninterrupted one: every recipe once."""

import json
from pathlib import Path
from typing import Any

from tests.characters import save_bases

WORDS = ("kitchen", "hall", "attic", "jazz", "folk", "soul")
WORKERS = {"arguments": {"dataloader_num_workers": 2}}
SMALL = {"num_experts": 4, "rank": 2}

# recipe: (base, rows, changes by section); several tasks where rows are "tasks"
CASES: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "lora": ("llama", "commands", {"adapter": {"rank": 2, "dropout": 0.1}, "data": {"packing": True}}),
    "sira": (
        "llama",
        "commands",
        {"adapter": {**SMALL, "dropout": 0.1, "expert_dropout": 0.3}, "train": {"gradient_accumulation": 2}},
    ),
    "hilo": ("llama", "commands", {"train": WORKERS}),
    "mola": ("llama", "tasks", {"data": {"mixing": {"temperature": 2.0}}}),
    "pesc": (
        "llama",
        "commands",
        {"adapter": {"num_experts": 4, "rank": 4}, "data": {"packing": True}, "train": WORKERS},
    ),
    "adamix": ("llama", "commands", {"adapter": {"rank": 4}, "train": {"gradient_accumulation": 2}}),
    "adamix-lora": ("t5", "tasks", {"adapter": {"rank": 2}, "train": WORKERS}),
    "molora": ("llama", "commands", {"adapter": {**SMALL, "dropout": 0.1}, "train": WORKERS}),
    "hydralora": ("llama", "tasks", {"adapter": {"rank": 4}, "train": {"gradient_accumulation": 3}}),
    "adamole": ("llama", "commands", {"adapter": {**SMALL, "dropout": 0.1}, "data": {"packing": True}}),
    "adamoe": ("bert", "classes", {"adapter": {"rank": 2, "dropout": 0.1}, "train": WORKERS}),
    "mixlora": (
        "llama",
        "commands",
        {"adapter": SMALL, "data": {"packing": True}, "train": {"gradient_accumulation": 2, **WORKERS}},
    ),
}


def make_settings(recipe: str, folder: Path, out: Path, steps: int, save_every: int) -> dict[str, Any]:
    """A run file; checkpoints fall between log lines."""
    base, rows, changes = CASES[recipe]
    tasks = {"first": {"source": str(folder / "commands")}, "second": {"source": str(folder / "others")}}
    tree: dict[str, dict[str, Any]] = {
        "model": {"base": str(folder / base)},
        "data": {"tasks": tasks} if rows == "tasks" else {"source": str(folder / rows)},
        "adapter": {"recipe": recipe},
        "train": {"steps": steps, "batch_size": 2, "learning_rate": 0.01, "schedule": "cosine", "log_every": 2},
        "evaluate": {"limit": 2, "max_new_tokens": 2},
    }
    tree["train"]["save_every"] = save_every
    for section, settings in changes.items():
        tree[section] |= settings
    return {**tree, "out": str(out)}


def write_material(folder: Path) -> None:
    """Bases of three kinds with a tokenizer of characters, and the rows of the cases."""
    save_bases(folder, layers=4)
    _write_rows(folder / "commands", [{"prompt": f"go {w} {n}", "completion": f"go({w}; {n})"} for n, w in _words(40)])
    _write_rows(folder / "others", [{"prompt": f"{w}?", "completion": w[::-1]} for _, w in _words(24)])
    _write_rows(folder / "classes", [{"text": f"{w} {n}", "label": "odd" if n % 2 else "even"} for n, w in _words(36)])


def _words(count: int) -> list[tuple[int, str]]:
    return [(n, WORDS[n % len(WORDS)]) for n in range(count)]


def _write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir()
    for split, part in (("train", rows[:-4]), ("validation", rows[-4:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
