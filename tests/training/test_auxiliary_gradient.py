"""Each way of training must give the router the intended auxiliary gradient: not 0, not 4 times it."""

import pytest
import torch
import transformers
import trl
from transformers import TrainerCallback

import mixora
from mixora.errors import TrainingError
from tests.training.setups import accumulated_batches, balance_gradient, collate, dataset, make_model, make_trainer

# TRL deprecates the argument, and still takes it
SMOOTHING_IS_DEPRECATED = pytest.mark.filterwarnings(
    "ignore:.label_smoothing_factor. is deprecated in .SFTTrainer:FutureWarning"
)
CASES = {
    "plain": {},
    "no task type": {"task_type": None},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "accumulation": {"gradient_accumulation_steps": 4},
    "accumulation and smoothing": {"gradient_accumulation_steps": 4, "label_smoothing_factor": 0.1},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}


class Catch(TrainerCallback):
    def __init__(self):
        self.gradient = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        routers = [p.grad for name, p in model.named_parameters() if "router" in name]
        self.gradient = torch.cat([g.flatten() for g in routers])


AS_INTENDED = "auxiliary gradient of the routers as intended"
TRAINERS = {
    "transformers.Trainer": transformers.Trainer,
    "mixora.Trainer": mixora.Trainer,
    "trl.SFTTrainer": trl.SFTTrainer,
    "mixora.SFTTrainer": mixora.SFTTrainer,
}


@SMOOTHING_IS_DEPRECATED
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=pytest.mark.works_with(name, f"{AS_INTENDED}: {case}"), id=f"{name}-{case}")
        for name in TRAINERS
        for case in CASES
    ],
)
def test_router_receives_the_intended_gradient(name, case, tmp_path):
    catch, changes = Catch(), CASES[case]
    callbacks = [catch] if name.startswith("mixora") else [catch, mixora.AuxiliaryLossCallback()]
    trainer = make_trainer(TRAINERS[name], tmp_path, callbacks=callbacks, **changes)
    trainer.train()
    batches = accumulated_batches(changes.get("gradient_accumulation_steps", 1))
    intended = balance_gradient(make_model(), batches)
    assert intended.norm() > 1e-4
    torch.testing.assert_close(catch.gradient, intended, rtol=1e-4, atol=1e-5 * float(intended.abs().max()))
    logged = next(line for line in trainer.state.log_history if "loss" in line)
    assert 0.9 < logged["load_balance"] < 2.0


@pytest.mark.works_with("transformers.Trainer", f"{AS_INTENDED}: re-entrant checkpointing")
def test_reentrant_checkpointing_is_exact_by_injection(tmp_path):
    catch = Catch()
    trainer = make_trainer(
        transformers.Trainer,
        tmp_path,
        callbacks=[catch, mixora.AuxiliaryLossCallback()],
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    trainer.train()
    intended = balance_gradient(make_model(), accumulated_batches(1))
    torch.testing.assert_close(catch.gradient, intended, rtol=1e-4, atol=1e-5 * float(intended.abs().max()))


@pytest.mark.works_with("mixora.Trainer", "re-entrant activation checkpointing: refused with the reason")
def test_reentrant_checkpointing_is_refused_where_the_loss_would_be_cut_off(tmp_path):
    trainer = make_trainer(
        mixora.Trainer,
        tmp_path,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(TrainingError, match=r"q_proj: re-entrant activation checkpointing .*'use_reentrant': False"):
        trainer.train()


def test_loop_written_by_hand():
    model, (batch,) = make_model(), accumulated_batches(1)
    model.train()
    model(**batch).loss.backward()
    routers = [p.grad.flatten() for name, p in model.named_parameters() if "router" in name]
    intended = balance_gradient(make_model(), [batch])
    torch.testing.assert_close(torch.cat(routers), intended, rtol=1e-4, atol=1e-5 * float(intended.abs().max()))


@pytest.mark.works_with("distribution", "DDP on two ranks (gloo), under both trainers: the intended auxiliary gradient")
def test_two_ranks(two_ranks):
    gradients = two_ranks["auxiliary"]
    intended = balance_gradient(make_model(), [collate(dataset().select(range(8)))])
    for name in ("transformers", "mixora"):
        torch.testing.assert_close(gradients[name], intended, rtol=1e-4, atol=1e-5 * float(intended.abs().max()))
    assert gradients["ratio"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.works_with(
    "distribution", "FSDP2 (`fully_shard`) on two ranks (gloo): gradients equal the mean of both ranks'"
)
def test_two_ranks_of_a_fully_sharded_model(two_ranks):
    """The mean of both ranks' gradients, with weights that are whole in a layer's forward only."""
    found = two_ranks["fsdp2"]
    for kernel in ("joint", "stacked"):
        worst, count, joined = found[kernel].tolist()
        assert worst < 1e-7
        assert (count, joined) == (42, 14)
