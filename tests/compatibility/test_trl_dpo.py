"""TRL's DPO: the reference is the base, or the adapter as it was; the auxiliary gradient arrives."""

import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import get_peft_model
from torch.nn.functional import logsigmoid

import mixora
from tests.compatibility.texts import Catch, make_tokenizer, words
from tests.models import adapt, fill, tiny_llama
from tests.training.setups import ROWS, balance_gradient, settings

BETA = 0.3
# a prompt of three words with two answers
PAIRS = [
    {"prompt": words(row[:3]), "chosen": " " + words(row[3:]), "rejected": " " + words(row[:4:-1])} for row in ROWS[:6]
]
ANSWERS = {"chosen": [[*row[3:], 2] for row in ROWS[:6]], "rejected": [[*row[:4:-1], 2] for row in ROWS[:6]]}


def make_config():
    sizes = {"num_experts": 4, "top_k": 2, "rank": 2, "expert_dropout": 0.0, "targets": ["q_proj", "v_proj"]}
    return mixora.recipe("sira", **sizes, task_type="CAUSAL_LM", **{"losses.load_balance.coefficient": 0.5})


def make_trainer(folder, model, peft_config=None, callbacks=(), **changes):
    """A trainer over all pairs at once; steps change nothing unless a learning rate is given."""
    return trl.DPOTrainer(
        model=model,
        peft_config=peft_config,
        args=trl.DPOConfig(
            **settings(folder, **{"per_device_train_batch_size": len(PAIRS), **changes}), beta=BETA, bf16=False
        ),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
        callbacks=[mixora.AuxiliaryLossCallback(), *callbacks],
    )


def log_likelihoods(model, kind):
    """Sum of the log-probabilities of each answer's tokens, pair by pair: float64 [N]."""
    found = []
    for row, answer in zip(ROWS[:6], ANSWERS[kind], strict=True):
        ids = torch.tensor([[*row[:3], *answer]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        found.append(log_probs.gather(1, ids[0, 1:, None])[2:].sum())
    return torch.stack(found)


def first_line(trainer):
    return next(line for line in trainer.state.log_history if "loss" in line)


@pytest.mark.works_with("trl.DPOTrainer", "`peft_config`: loss and rewards against the base, whose adapter is off")
def test_the_loss_is_that_of_the_paper_against_the_base(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama(), make_config())
    fill(trainer.model)
    trainer.train()
    ratios = {kind: log_likelihoods(trainer.model, kind) - log_likelihoods(tiny_llama(), kind) for kind in ANSWERS}
    assert all(ratio.abs().max() > 0.01 for ratio in ratios.values())
    line = first_line(trainer)
    by_hand = -logsigmoid(BETA * (ratios["chosen"] - ratios["rejected"])).mean()
    assert line["loss"] == pytest.approx(by_hand.item(), rel=1e-5)
    for kind, ratio in ratios.items():
        assert line[f"rewards/{kind}"] == pytest.approx(BETA * ratio.mean().item(), rel=1e-3)


@pytest.mark.works_with("trl.DPOTrainer", "the reference's log-probabilities stay the base's while the adapter learns")
def test_the_reference_stays_the_base(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama(), make_config(), max_steps=3, learning_rate=0.05)
    trainer.train()
    trainer.model.eval()
    assert (log_likelihoods(trainer.model, "chosen") - log_likelihoods(tiny_llama(), "chosen")).abs().max() > 0.1
    batch = trainer.data_collator(list(trainer.train_dataset))
    for kind, found in zip(ANSWERS, trainer.compute_ref_log_probs(trainer.model, batch), strict=True):
        torch.testing.assert_close(found.double(), log_likelihoods(tiny_llama(), kind), rtol=1e-5, atol=1e-5)


@pytest.mark.works_with("trl.DPOTrainer", "a trained adapter: the reference is the adapter as it was")
def test_the_reference_of_a_trained_adapter_is_its_copy(tmp_path):
    trainer = make_trainer(tmp_path, adapt(tiny_llama(), make_config()), max_steps=3, learning_rate=0.05)
    trainer.train()
    # policy and reference are one model at first
    assert first_line(trainer)["loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.model.eval()
    as_it_was = adapt(tiny_llama(), make_config()).eval()
    assert (log_likelihoods(as_it_was, "chosen") - log_likelihoods(tiny_llama(), "chosen")).abs().max() > 0.01
    batch = trainer.data_collator(list(trainer.train_dataset))
    for kind, found in zip(ANSWERS, trainer.compute_ref_log_probs(trainer.model, batch), strict=True):
        torch.testing.assert_close(found.double(), log_likelihoods(as_it_was, kind), rtol=1e-5, atol=1e-5)
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad and ".ref" in name} == set()


def test_another_adapter_of_the_same_config_starts_anew():
    model = adapt(tiny_llama(), make_config())
    model.add_adapter("second", model.peft_config["default"])
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert not layer.parameters_of("second")["B"].any()
    assert layer.parameters_of("default")["B"].all()


@pytest.mark.works_with("trl.DPOTrainer", "auxiliary gradient of the routers as intended")
@pytest.mark.parametrize("is_trained", [False, True], ids=["new adapter", "adapter with a reference copy"])
def test_the_routers_receive_the_auxiliary_gradient(is_trained, tmp_path):
    """B is zero, so that the task gives the routers none."""
    catch, base = Catch(), tiny_llama()
    torch.manual_seed(0)
    given = (
        {"model": get_peft_model(base, make_config())} if is_trained else {"model": base, "peft_config": make_config()}
    )
    trainer = make_trainer(tmp_path, callbacks=[catch], **given)
    trainer.train()
    batch = trainer.data_collator(list(trainer.train_dataset))
    intended = balance_gradient(trainer.model, [batch])
    found = torch.cat([g.flatten() for name, g in catch.gradients.items() if "router" in name])
    assert intended.norm() > 1e-4
    torch.testing.assert_close(found, intended, rtol=1e-4, atol=1e-5 * float(intended.abs().max()))
    assert 0.9 < first_line(trainer)["load_balance"] < 2.0
