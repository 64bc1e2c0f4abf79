"""The consistency loss under mixora's trainers: the same step whatever the accumulation, the trainer and the ranks."""

import pytest
import torch
import transformers
import trl
from peft import get_peft_model
from transformers import TrainerCallback

import mixora
from mixora.errors import TrainingError
from mixora.routing.draws import Draw
from mixora.training.second_pass import base_of, compare_passes
from tests.models import fill, tiny_llama
from tests.training.setups import accumulated_batches, make_trainer
from tests.training.test_auxiliary_gradient import SMOOTHING_IS_DEPRECATED

COEFFICIENT = 0.8


def make_model(**changes):
    """A Llama whose routes are all the same in each pass of one kind: two experts, whichever is drawn."""
    torch.manual_seed(0)
    settings = {"num_experts": 2, "rank": 2, "losses.consistency.coefficient": COEFFICIENT, **changes}
    config = mixora.recipe("adamix-lora", task_type="CAUSAL_LM", **settings)
    return fill(get_peft_model(tiny_llama(pad_token_id=0, bos_token_id=1, eos_token_id=2), config), std=0.1)


class Catch(TrainerCallback):
    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def alternating(monkeypatch):
    """First passes are served by expert 0, second ones by expert 1, so that runs of any shape can be compared."""
    seeds = []

    def choose(self, what, count):
        if self.key is None:
            return None
        seed = self.key.partition("/")[0]
        if seed not in seeds:
            seeds.append(seed)
        return seeds.index(seed) % 2

    monkeypatch.setattr(Draw, "choose", choose)


def expected_gradients(batches, smoothing=0.0):
    """From the formulas: all supervised tokens of the step count the same."""
    model = make_model().train()
    total, tokens = 0.0, sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        with mixora.passes.tracing(owns_losses=True):
            first, second = (model(**{k: v for k, v in batch.items() if k != "labels"}).logits for _ in range(2))
        kept = batch["labels"][:, 1:] != -100
        p, q = first[:, :-1][kept].softmax(-1), second[:, :-1][kept].softmax(-1)
        wanted = torch.nn.functional.one_hot(batch["labels"][:, 1:][kept], p.shape[-1]) * (1 - smoothing)
        task = -((wanted + smoothing / p.shape[-1]) * p.log()).sum()
        agreement = (q.detach() * (q.detach() / p).log() + p.detach() * (p.detach() / q).log()).sum() / 2
        total = total + (task + COEFFICIENT * agreement) / tokens
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@SMOOTHING_IS_DEPRECATED
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("fused", [True, False])
def test_the_gradient_is_that_of_the_formula(fused, name, steps, smoothing, tmp_path, alternating):
    catch = Catch()
    changes = {"gradient_accumulation_steps": steps, "label_smoothing_factor": smoothing}
    trainer = make_trainer(getattr(mixora, name), tmp_path, model=make_model(), callbacks=[catch], **changes)
    trainer.fused_loss = fused
    trainer.train()
    assert (trainer.fused_loss_reason is None) == fused
    expected = expected_gradients(accumulated_batches(steps), smoothing)
    assert catch.gradients.keys() == expected.keys()
    for parameter, want in expected.items():
        torch.testing.assert_close(catch.gradients[parameter], want, rtol=1e-4, atol=1e-6)
    logged = next(line for line in trainer.state.log_history if "loss" in line)
    assert logged["auxiliary_loss"] == pytest.approx(COEFFICIENT * logged["consistency"], rel=1e-4)
    assert logged["consistency"] > 1e-3


@pytest.mark.parametrize("trainer_class", [transformers.Trainer, trl.SFTTrainer])
def test_foreign_trainers_are_refused(trainer_class, tmp_path):
    trainer = make_trainer(trainer_class, tmp_path, model=make_model(), callbacks=[mixora.AuxiliaryLossCallback()])
    with pytest.raises(TrainingError, match=r"losses\.consistency: compares two passes over each batch, which only"):
        trainer.train()
    plain = make_model(**{"losses.consistency.coefficient": 0.0})
    make_trainer(trainer_class, tmp_path, model=plain).train()


def test_a_loss_of_trl_without_logits_is_refused(tmp_path):
    trainer = make_trainer(mixora.SFTTrainer, tmp_path, model=make_model(), loss_type="dft")
    with pytest.raises(TrainingError, match=r"needs the model's logits: got loss_type='dft'.*valid: loss_type='nll'"):
        trainer.train()


def test_outputs_that_cannot_be_compared_are_refused():
    model, logits, labels = make_model(), torch.randn(2, 3, 5), torch.tensor([[1, 2, -100], [0, 1, 2]])
    agreed = compare_passes(model, [(logits, logits)], labels)
    assert float(agreed["consistency"][0]) == pytest.approx(0, abs=1e-6)
    for first, given, message in (
        (None, labels, "needs the model's logits, which its output lacks; valid: coefficient 0"),
        (logits, None, "the batch has no labels, which tell the supervised tokens; valid: labels"),
        (logits, labels[0], r"cannot compare outputs of shape \[2, 3, 5\] with labels of shape \[3\]"),
        (logits[0, 0], labels, r"cannot compare outputs of shape \[5\]"),
    ):
        with pytest.raises(TrainingError, match=rf"losses\.consistency: {message}"):
            compare_passes(model, [(first, first)], given)
    base_of(model).config.problem_type = "multi_label_classification"
    with pytest.raises(TrainingError, match="compares distributions over classes, and this model's labels are indep"):
        compare_passes(model, [(logits[0], logits[0])], labels)


def test_two_ranks_take_one_route(two_ranks):
    """Ranks of different random state and batches: the routes, and after the step the weights, are equal."""
    found = two_ranks["adamix"]
    first, second = found["routes"]
    assert torch.equal(first, second)
    assert len(first.unique(dim=0)) > 1
    assert torch.equal(*found["weights"])
    assert torch.equal(*found["idle"])
    assert int(found["idle"][0]) > 0
