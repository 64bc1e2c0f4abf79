"""`transformers.Trainer` and ours: resuming, callbacks, metrics, the best checkpoint, hyper-parameter search."""

import itertools

import numpy
import optuna
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

import mixora
from tests.compatibility.texts import each
from tests.models import tiny_llama
from tests.training.setups import collate, dataset, make_model, settings

TRAINERS = {"transformers.Trainer": transformers.Trainer, "mixora.Trainer": mixora.Trainer}


def make_trainer(trainer_class, folder, callbacks=(), model=None, model_init=None, compute_metrics=None, **changes):
    """A trainer over shuffled rows."""
    if trainer_class is transformers.Trainer:
        callbacks = [mixora.AuxiliaryLossCallback(), *callbacks]
    return trainer_class(
        model=model or (None if model_init else make_model()),
        model_init=model_init,
        args=TrainingArguments(**settings(folder, **{"learning_rate": 0.05, **changes})),
        train_dataset=dataset(),
        eval_dataset=dataset().select(range(8)),
        data_collator=collate,
        compute_metrics=compute_metrics,
        callbacks=list(callbacks),
    )


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "mixora_" in name}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def make_adamix():
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), mixora.recipe("adamix", rank=4, task_type="CAUSAL_LM"))


def assert_resumes(trainer_class, make, folder):
    changes = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps"}
    whole = make_trainer(trainer_class, folder, model=make(), **changes)
    whole.train()
    second = make_trainer(trainer_class, folder, model=make(), **changes)
    second.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert_equal(weights(second.model), weights(whole.model))
    steps = [[line for line in trainer.state.log_history if "loss" in line] for trainer in (whole, second)]
    assert steps[0] == steps[1]


@each(TRAINERS, "resuming from a checkpoint: weights equal bit for bit to the uninterrupted run's")
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(trainer_class, tmp_path):
    """Random routes, shuffled rows and a schedule of learning rates go on where they were."""
    assert_resumes(trainer_class, lambda: make_model(expert_dropout=0.4), tmp_path)


@pytest.mark.works_with("mixora.Trainer", "resuming an AdaMix run: the same routes are drawn")
def test_drawn_routes_go_on_where_they_were(tmp_path):
    assert_resumes(mixora.Trainer, make_adamix, tmp_path)


class Witness(TrainerCallback):
    """The adapter's weights after each step, and what each log line held."""

    def __init__(self):
        self.steps, self.lines = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(weights(model))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))


@each(TRAINERS, "callbacks: `EarlyStoppingCallback` with `load_best_model_at_end`, and one's own")
def test_the_best_checkpoint_comes_back_after_stopping_early(trainer_class, tmp_path):
    """The loss only falls; asked for the greatest one, the first evaluation stays the best."""
    witness = Witness()
    trainer = make_trainer(
        trainer_class,
        tmp_path,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2), witness],
        max_steps=10,
        learning_rate=0.01,
        per_device_train_batch_size=16,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
    )
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert losses == sorted(losses, reverse=True)
    assert trainer.state.global_step == len(witness.steps) == len(losses) == 3
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert_equal(weights(trainer.model), witness.steps[0])
    stored = PeftModel.from_pretrained(make_model().unload(), tmp_path / "checkpoint-1")
    assert_equal(weights(stored), witness.steps[0])
    assert trainer.evaluate()["eval_loss"] == losses[0]
    assert all("load_balance" in line for line in witness.lines if "loss" in line)


def measure(predictions):
    """Token accuracy and cross entropy of logits at all next tokens."""
    logits, labels = predictions.predictions[:, :-1], predictions.label_ids[:, 1:]
    kept = labels != -100
    logits = logits[kept].astype(numpy.float64)
    log_probs = logits - numpy.log(numpy.exp(logits).sum(-1, keepdims=True))
    return {
        "accuracy": float((logits.argmax(-1) == labels[kept]).mean()),
        "entropy": float(-numpy.take_along_axis(log_probs, labels[kept][:, None], axis=1).mean()),
    }


@each(TRAINERS, "`compute_metrics`: accuracy and loss from the logits it gets")
def test_metrics_are_computed_from_the_adapted_logits(trainer_class, tmp_path):
    trainer = make_trainer(trainer_class, tmp_path, max_steps=3, compute_metrics=measure, per_device_eval_batch_size=8)
    trainer.train()
    found = trainer.evaluate()
    with torch.no_grad():
        batch = collate(list(dataset())[:8])
        output = trainer.model.eval()(**batch)
    by_hand = measure(transformers.EvalPrediction(output.logits.numpy(), batch["labels"].numpy()))
    assert found["eval_accuracy"] == by_hand["accuracy"]
    assert found["eval_entropy"] == pytest.approx(by_hand["entropy"], rel=1e-6)
    assert found["eval_loss"] == pytest.approx(by_hand["entropy"], rel=1e-5)


GRID = {"learning_rate": [0.01, 0.05], "rank": [1, 4]}


def space(trial):
    return {"learning_rate": trial.suggest_categorical("learning_rate", GRID["learning_rate"])}


def init_model(trial=None):
    return make_model(rank=2 if trial is None else trial.suggest_categorical("rank", GRID["rank"]))


def loss_by_hand(trainer_class, folder, rate, rank):
    run = make_trainer(trainer_class, folder, model_init=lambda: make_model(rank=rank), max_steps=2, learning_rate=rate)
    run.train()
    return run.evaluate()["eval_loss"]


@each(TRAINERS, "`hyperparameter_search` (optuna) over the learning rate and the adapter's rank")
def test_each_trial_is_the_run_with_its_settings(trainer_class, tmp_path):
    trainer = make_trainer(trainer_class, tmp_path, model_init=init_model, max_steps=2, eval_strategy="no")
    seen = {}

    def objective(metrics):
        sites = trainer.model.peft_config["default"].plan
        seen[trainer.args.learning_rate, sites[0]["ranks"][0]] = metrics["eval_loss"]
        return metrics["eval_loss"]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    best = trainer.hyperparameter_search(
        space, objective, n_trials=4, direction="minimize", backend="optuna", sampler=optuna.samplers.GridSampler(GRID)
    )
    expected = {
        (rate, rank): loss_by_hand(trainer_class, tmp_path, rate, rank)
        for rate, rank in itertools.product(*GRID.values())
    }
    assert seen == expected
    assert best.objective == min(expected.values())
    assert (best.hyperparameters["learning_rate"], best.hyperparameters["rank"]) == min(expected, key=expected.get)
