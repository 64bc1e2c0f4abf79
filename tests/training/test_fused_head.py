"""The fused loss in trainers and in loops of one's own: gradients as without it, and reasons for that."""

import copy
import logging

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import mixora
from mixora.errors import DataError
from mixora.losses import fused as fused_loss
from mixora.training.fused_head import why_not_fused
from tests import models
from tests.losses.test_fused import Largest
from tests.models import fill
from tests.training.setups import accumulated_batches, collate, dataset, make_model, make_trainer
from tests.training.test_auxiliary_gradient import SMOOTHING_IS_DEPRECATED
from tests.training.test_consistency import Catch
from tests.training.test_consistency import make_model as make_adamix

CASES = {
    "plain": {},
    "smoothing": {"label_smoothing_factor": 0.1},
    "accumulation": {"gradient_accumulation_steps": 4},
    "accumulation and smoothing": {"gradient_accumulation_steps": 4, "label_smoothing_factor": 0.1},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    "bf16": {"bf16": True},
}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
LITTLE = {"vocab_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64, "use_cache": False, **SMALL}
MARKS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CHANGES_LOGITS = "the model changes its logits behind the head"


def make_sira():
    return fill(make_model(), std=0.1)


def train(folder, fused, make, trainer_class=mixora.Trainer, **changes):
    """All gradients of one step, the log line, and the trainer."""
    catch = Catch()
    trainer = make_trainer(trainer_class, folder, model=make(), callbacks=[catch], **changes)
    trainer.fused_loss = fused
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    return catch.gradients, line, trainer


def assert_same(got, want, rtol=1e-5, atol=1e-7):
    assert got.keys() == want.keys()
    assert any(gradient.abs().max() > 1e-4 for gradient in want.values())
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=rtol, atol=atol, msg=name)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks in each batch."""
    monkeypatch.setattr(fused_loss, "CHUNK", 16)


@pytest.mark.parametrize("make", [make_sira, make_adamix])
@pytest.mark.parametrize("case", CASES)
def test_the_step_is_the_same(case, make, tmp_path):
    fused, fused_line, trainer = train(tmp_path, True, make, **CASES[case])
    assert trainer.fused_loss_reason is None
    plain, plain_line, _ = train(tmp_path, False, make, **CASES[case])
    # products of bf16 are summed in another order, and rounded anew
    tolerances = {"rtol": 2e-2, "atol": 2e-3} if case == "bf16" else {"rtol": 1e-5, "atol": 1e-6}
    assert_same(fused, plain, **tolerances)
    for name in ("loss", "auxiliary_loss"):
        assert fused_line[name] == pytest.approx(plain_line[name], rel=2e-3 if case == "bf16" else 1e-5)


@SMOOTHING_IS_DEPRECATED
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trl_compares_passes_with_it(smoothing, tmp_path):
    changes = {"trainer_class": mixora.SFTTrainer, "label_smoothing_factor": smoothing}
    fused, _, trainer = train(tmp_path, True, make_adamix, **changes)
    assert trainer.fused_loss_reason is None
    plain, _, _ = train(tmp_path, False, make_adamix, **changes)
    assert_same(fused, plain, atol=1e-6)


def test_two_ranks(two_ranks):
    found = dict(two_ranks["fused"])
    assert found.pop("sharded") == "the model's head is sharded or quantised"
    for name, (fused, plain) in found.items():
        assert plain.abs().max() > 1e-4, name
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", [make_sira, make_adamix])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_whole_logits_never_exist(make, smoothing, tmp_path):
    def wide():
        model = make()
        model.get_base_model().resize_token_embeddings(640, mean_resizing=False)
        return model.requires_grad_(False) and thaw(model)

    largest = {}
    for fused in (True, False):
        with Largest() as watch:
            train(tmp_path, fused, wide, label_smoothing_factor=smoothing)
        largest[fused] = watch.numbers
    tokens, weights = collate(list(dataset())[:4])["input_ids"].numel(), 640 * 32
    assert weights < tokens * 640 <= largest[False]
    assert largest[True] == weights


def thaw(model):
    """A resized embedding is trainable anew."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mixora_" in name)
    return model


BASES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "phi", "gpt2")


def losses_and_gradients(model, batch, fused):
    torch.manual_seed(0)
    model.train().zero_grad()
    loss, _ = mixora.compute_loss(model, batch, fused_loss=fused)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_own_loop_is_the_same(model, batch, is_fused=True):
    """With and without, `is_fused` telling what is found out by then."""
    for _ in range(2):
        got, gradients = losses_and_gradients(model, batch, True)
    assert (why_not_fused(model) is None) == is_fused
    want, others = losses_and_gradients(model, batch, False)
    torch.testing.assert_close(got, want)
    assert_same(gradients, others)
    assert "forward" not in vars(model.get_base_model().get_output_embeddings())
    assert "_loss_function" not in vars(model.get_base_model())


def adapt(base, recipe="molora", **settings):
    return fill(get_peft_model(base, mixora.recipe(recipe, num_experts=2, rank=2, task_type="CAUSAL_LM", **settings)))


@pytest.mark.parametrize("name", BASES)
def test_own_loops_on_all_bases(name):
    model = adapt(getattr(models, f"tiny_{name}")(), targets="all-linear")
    assert_own_loop_is_the_same(model, accumulated_batches(1)[0])


def test_own_losses_of_the_model_remain():
    config = MixtralConfig(**LITTLE, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    model = adapt(MixtralForCausalLM(config), targets=["q_proj", "v_proj"])
    assert_own_loop_is_the_same(model, accumulated_batches(1)[0])
    (batch,) = accumulated_batches(1)
    loss = mixora.compute_loss(model.train(), batch)[0]
    assert loss > model(**{**batch, "output_router_logits": False}).loss + 0.1


def test_shifted_labels_are_taken_as_they_are():
    (batch,) = accumulated_batches(1)
    shifted = torch.roll(batch["labels"], 3, dims=1)
    assert_own_loop_is_the_same(make_sira(), {**batch, "shift_labels": shifted})


CHANGED = {
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**LITTLE, **MARKS, head_dim=8, final_logit_softcapping=3.0)),
    "scale": lambda: CohereForCausalLM(CohereConfig(**LITTLE, **MARKS, logit_scale=0.3)),
}


@pytest.mark.parametrize("recipe", ["molora", "adamix-lora"])
@pytest.mark.parametrize("name", CHANGED)
def test_changed_logits_are_found_out(name, recipe):
    torch.manual_seed(0)
    model = adapt(CHANGED[name](), recipe, **({"targets": ["q_proj", "v_proj"]} if recipe == "molora" else {}))
    assert why_not_fused(model) is None
    assert_own_loop_is_the_same(model, accumulated_batches(1)[0], is_fused=False)
    assert why_not_fused(model).startswith(CHANGES_LOGITS)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_changed_logits_cost_one_pass(smoothing, tmp_path, caplog):
    def make():
        torch.manual_seed(0)
        return adapt(CHANGED["softcap"](), targets=["q_proj"])

    changes = {"label_smoothing_factor": smoothing, "gradient_accumulation_steps": 2}
    with caplog.at_level(logging.INFO, "mixora"):
        fused, _, trainer = train(tmp_path, True, make, **changes)
    assert trainer.fused_loss_reason.startswith(CHANGES_LOGITS)
    logged = [r for r in caplog.records if r.levelname == "INFO" and CHANGES_LOGITS in r.message]
    assert len(logged) == 1
    assert_same(fused, train(tmp_path, False, make, **changes)[0])


class InPlace(transformers.LlamaForCausalLM):
    """Scales what its head gives in place."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state * 1)
        logits *= 2
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def test_logits_changed_in_place_are_found_out():
    base = InPlace(transformers.LlamaConfig(**LITTLE))
    model = adapt(base, targets=["q_proj"])
    assert_own_loop_is_the_same(model, accumulated_batches(1)[0], is_fused=False)


def test_a_failed_pass_leaves_the_model_as_it_was():
    model, (batch,) = make_sira(), accumulated_batches(1)
    head = model.get_base_model().lm_head
    before, attributes = model.eval()(**batch).logits, set(vars(head))
    model.train()
    with pytest.raises(IndexError):
        mixora.compute_loss(model, {**batch, "input_ids": batch["input_ids"] + 1000})
    with pytest.raises((IndexError, RuntimeError)):
        mixora.compute_loss(model, {**batch, "labels": batch["labels"] + 1000})
    assert set(vars(head)) == attributes
    for again in (model.eval(), copy.deepcopy(model)):
        assert torch.equal(again(**batch).logits, before)


@pytest.mark.parametrize("make", [make_sira, make_adamix])
@pytest.mark.parametrize("fused", [True, False])
def test_a_batch_without_labels_is_an_error(make, fused):
    model, (batch,) = make(), accumulated_batches(1)
    del batch["labels"]
    for given in (model.train(), model.eval(), model.get_base_model().model):
        with pytest.raises(DataError, match=r"gave no loss for a batch of input_ids, attention_mask; valid: one with"):
            mixora.compute_loss(given, batch, fused_loss=fused)


def test_a_batch_without_a_supervised_token_is_worth_nothing():
    model, (batch,) = make_sira().train(), accumulated_batches(1)
    config = {"labels": torch.full_like(batch["labels"], -100)}
    for layer in mixora.mixture.mixtures_of(model):
        layer.parts["default"].losses = []
    loss, _ = mixora.compute_loss(model, {**batch, **config})
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


class OtherLoss(LlamaForCausalLM):
    """Computes the loss by itself, or asks the loss function for one that leaves out another mark."""

    ignored = None

    def forward(self, input_ids, labels=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        logits = output["logits"]
        if self.ignored is None:
            output["loss"] = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            marks = {"vocab_size": 64, "ignore_index": self.ignored}
            output["loss"] = self.loss_function(logits=logits, labels=labels, **marks)
        return output


@pytest.mark.parametrize(
    ("ignored", "reason"),
    [(None, "the loss is not computed by the model"), (7, "the model's loss is not the plain one")],
)
def test_losses_of_another_kind_are_found_out(ignored, reason):
    base = OtherLoss(LlamaConfig(**LITTLE))
    base.ignored = ignored
    model, ids = adapt(base, targets=["q_proj"]), torch.arange(12).view(2, 6)
    assert_own_loop_is_the_same(model, {"input_ids": ids, "labels": ids}, is_fused=False)
    assert why_not_fused(model) == reason
