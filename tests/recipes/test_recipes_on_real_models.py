"""Every recipe on real weights: trained, evaluated, saved, read back bit for bit, asked.

On a causal language model and on a text classifier. `tests/behaviours` does the same on small random models of
three kinds, T5 among them: no encoder-decoder with real weights is at hand.
"""

import copy
import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import mixora
from mixora.bases import TASK_TYPES
from mixora.evaluate import Evaluation, Examples, evaluate
from mixora.short_names import SHORT_NAMES
from mixora.training.material import Material, TrainingSet, make_examples, make_training_set, read_material
from mixora.training.run import make_trainer
from mixora.training.run_config import RunConfig, read_run

ROWS = Path(__file__).parents[2] / "examples" / "quickstart" / "data" / "train.jsonl"
SMOLLM, MINILM = "smollm2-135m-instruct", "minilm-l6"
METRICS = {SMOLLM: ["loss", "perplexity"], MINILM: ["accuracy", "f1"]}
# the preset has 161 million weights on SmolLM2, more than the base, and the optimiser keeps two numbers more for each
SMALLER = {"pesc": {"rules.ffn.expert.rank": 16, "rules.shared.expert.rank": 8}}


@dataclass(frozen=True)
class Case:
    """A base that stays as it was read, and a few rows, as batch and as examples to evaluate."""

    config: RunConfig
    material: Material
    training_set: TrainingSet
    examples: Examples
    batch: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Found:
    """What a model makes of a case."""

    loss: torch.Tensor
    logits: torch.Tensor
    evaluation: Evaluation


@pytest.fixture(scope="module", params=[SMOLLM, MINILM])
def case(request, tmp_path_factory):
    packaged = SHORT_NAMES[request.param]
    if importlib.util.find_spec(packaged.module) is None:
        pytest.skip(f"{packaged.project} is not installed; `make setup` installs it")
    if request.param == SMOLLM:
        request.getfixturevalue("smollm_cache")
    folder = tmp_path_factory.mktemp("case")
    config = make_run(request.param, folder)
    material = read_material(config)
    training_set = make_training_set(material, config)
    batch = material.collator()(list(training_set.dataset))
    (examples,) = make_examples(material, config).values()
    return Case(config, material, training_set, examples, batch)


@pytest.fixture(scope="module")
def plain(case):
    """Found once: what every recipe begins with shows too that the one before has left nothing."""
    return compute(case, case.material.model)


def make_run(name, folder):
    """Three short commands: to be answered, or to be told apart by their domain."""
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[:3]]
    if name == MINILM:
        rows = [{"text": row["prompt"], "label": row["domain"]} for row in rows]
    source = folder / "train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    # a chat template would make the rows three times as long
    form = {"prompt_format": "plain"} if name == SMOLLM else {}
    train = {"steps": 2, "batch_size": 3, "learning_rate": 2e-3, "schedule": "constant"}
    tree = {
        "model": {"base": name},
        "data": {"source": str(source), "max_length": 48, "evaluation_split": "train", **form},
        "train": {**train, "arguments": {"use_cpu": True}},
        "evaluate": {"metrics": METRICS[name]},
        "out": str(folder / "out"),
    }
    return read_run(tree)


def is_classifier(case):
    return case.material.task == "sequence-classification"


def compute(case, model):
    with torch.no_grad():
        return model.eval()(**case.batch)


def measure(case, model):
    found = compute(case, model)
    return Found(found.loss, found.logits, evaluate(model, case.examples, case.config.evaluate))


def train(case, model):
    trainer = make_trainer(model, replace(case.material, model=model), case.training_set, case.config)
    assert isinstance(trainer, mixora.Trainer)
    trainer.train()
    assert trainer.state.global_step == 2


def lend_base(case):
    """The base itself, to be unloaded again. The head of a classifier is trained, so that this one is a copy."""
    return copy.deepcopy(case.material.model) if is_classifier(case) else case.material.model


def fresh_base(case, model):
    """The base as another process reads it: the head of a classifier is a new one."""
    if not is_classifier(case):
        return model.unload()
    base = lend_base(case)
    base.classifier.reset_parameters()
    return base


def write(case, model):
    inputs = {name: case.batch[name][:2, :8] for name in ("input_ids", "attention_mask")}
    return model.eval().generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", mixora.recipe_names())
def test_trains_evaluates_and_comes_back_bit_for_bit(case, plain, recipe, tmp_path):
    torch.manual_seed(0)
    config = mixora.recipe(recipe, task_type=TASK_TYPES[case.material.task], **SMALLER.get(recipe, {}))
    model = get_peft_model(lend_base(case), config)
    before = compute(case, model)
    # adapters that start as small random numbers make a small difference
    assert recipe == "adamix" or torch.equal(before.logits, plain.logits)

    train(case, model)
    after = measure(case, model)
    assert after.loss < before.loss
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    written = None if is_classifier(case) else write(case, model)
    again = mixora.from_pretrained(fresh_base(case, model), tmp_path)
    reread = measure(case, again)
    assert torch.equal(reread.logits, after.logits) and torch.equal(reread.loss, after.loss)
    assert reread.evaluation == after.evaluation
    assert set(after.evaluation.metrics) == set(case.config.evaluate.metrics)
    if not is_classifier(case):
        assert after.evaluation.metrics["loss"] == pytest.approx(after.loss.item(), rel=1e-5)
        assert written.shape == (2, 11) and torch.equal(write(case, again), written)
        # for the next one
        again.unload()
