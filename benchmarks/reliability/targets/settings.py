"""Run files, settings as trees and as words, settings of a comparison, and what their methods plan."""

import json
from typing import Any

import yaml

from benchmarks.reliability.targets.drawing import NUMBERS, Draw
from benchmarks.reliability.targets.material import RUN, fresh, make_base
from mixora.commands.terminal import read_tree
from mixora.comparison.settings import read_comparison
from mixora.config import parse, read_yaml
from mixora.files.documents import parse_yaml
from mixora.recipes import recipe_names
from mixora.training.run_config import RunConfig, read_run
from mixora.tuner import plan, recipe

COMPARISON: dict[str, Any] = {
    "model": RUN["model"],
    "data": {"commands": {"source": "rows.jsonl"}},
    "methods": ["sira", {"recipe": "hilo", "name": "half", "rank": 4}, {"recipe": "lora", "vary": "rank"}],
    "seeds": 2,
    "match": {"parameters": "trainable", "tolerance": 0.05, "reference": "sira"},
    "train": {"steps": 3},
    "evaluate": {"limit": 3},
    "metric": "loss",
}
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
ODD_YAML = (
    BOMB,
    "a: &a [*a]",
    "a: {" * 120,
    "[" * 300,
    "- " * 300,
    "title: 2024-13-99",
    "title: !!binary x",
    "title: !!python/object:os.system {}",
    "? [a]\n: b",
    "a: 1\na: 2",
    "<<: {a: 1}\na: 2",
    "title: " + "9" * 5000,
    "title: " + "1:" * 200 + "1",
    "title: .nan",
    "\ufefftitle: x",
    "title: \x00",
    "a: !!set {x, y}",
    "a: !!timestamp x",
    "a: !!int x",
    "a: !!float ''",
    "a: !!bool x",
    "%YAML 9.9\n---\na: 1",
    "a: 1\n---\nb: 2",
)


def read_file(data: bytes) -> None:
    """A run file of any bytes."""
    with fresh("run-file") as folder:
        (folder / "run.yaml").write_bytes(data)
        check_run(read_yaml(folder / "run.yaml"))


def check_run(tree: Any) -> None:
    """A run that is accepted is the same after it was written as a run file, as `mixora train` writes it."""
    config = read_run(tree)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    text.encode()
    assert parse(RunConfig, parse_yaml(text)) == config, "another run after it was written and read"


def read_settings(data: bytes) -> None:
    """The tree of a run with damages."""
    check_run(Draw(data).damage(RUN))


def read_words(data: bytes) -> None:
    """Settings as key=value words."""
    draw, words = Draw(data), []
    for _ in range(1 + draw.below(4)):
        section = draw.pick(sorted(RUN))
        names = [section, *(f"{section}.{name}" for name in RUN[section])] if isinstance(RUN[section], dict) else []
        name = draw.pick([*names, section, "adapter.rules.attention.expert.rank", "a." * 200 + "b", draw.text()])
        value = draw.text() if draw.byte() % 2 else json.dumps(draw.value(), default=str)
        words.append(f"{name}={value}")
    given = ["model.base=base", "data.source=rows.jsonl"] if draw.byte() % 2 else ["a=1"]
    check_run(read_tree([*given, *words]))


def compare(data: bytes) -> None:
    """The settings of a comparison with damages."""
    comparison = read_comparison(Draw(data).damage(COMPARISON))
    assert len(comparison.seed_list) >= 1
    assert parse(type(comparison), comparison.model_dump(mode="json")) == comparison


def plan_method(data: bytes) -> None:
    """A recipe with sizes of any kind, planned on a model."""
    draw = Draw(data)
    names = ("rank", "num_experts", "top_k", "alpha", "scale", "kernel", "targets", "budget", "coefficient", "dropout")
    changes: dict[str, Any] = {}
    for _ in range(1 + draw.below(3)):
        value = draw.pick(NUMBERS) if draw.byte() % 2 else draw.value()
        changes[draw.pick(names) if draw.byte() % 8 else draw.text()] = value
    table = plan(make_base(), recipe(draw.pick(recipe_names()), **changes))
    assert table.parameters == sum(site.parameters for site in table.sites) > 0


def seed_files() -> list[bytes]:
    texts = [yaml.safe_dump(RUN), json.dumps(RUN), *ODD_YAML]
    return [text.encode("utf-8", "surrogatepass") for text in texts]
