"""Where the loss is not fused with the model's head, and what is said about it."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import mixora
from mixora.contracts import PassLoss
from mixora.training.fused_head import why_not_fused
from mixora.training.material import make_training_set, read_material
from mixora.training.run import make_trainer as make_run_trainer
from mixora.training.run_config import read_run
from tests import models
from tests.training.setups import accumulated_batches, dataset, make_model, make_trainer
from tests.training.test_consistency import make_model as make_adamix
from tests.training.test_run import settings


class Other(PassLoss):
    def of_items(self, first_NC, second_NC, is_regression):
        return (first_NC - second_NC).float().square().mean(-1)


def with_other_loss():
    model = make_adamix()
    for layer in mixora.mixture.mixtures_of(model):
        layer.parts["default"].pass_losses = [("other", Other(None), 1.0)]
    return model


def with_hook():
    model = make_model()
    model.get_base_model().lm_head.register_forward_hook(lambda *_: None)
    return model


def with_loss(function):
    model = make_model()
    model.get_base_model().loss_function = function
    return model


def with_trained_head():
    model = make_model()
    model.get_base_model().lm_head.requires_grad_(True)
    return model


def with_quantised_head():
    model = make_model()
    # as bitsandbytes lays 4-bit weights out
    model.get_base_model().lm_head.weight = nn.Parameter(torch.zeros(9, 1, dtype=torch.uint8), requires_grad=False)
    return model


def on(base, task_type="CAUSAL_LM", **settings):
    return get_peft_model(base, mixora.recipe("molora", num_experts=2, rank=2, task_type=task_type, **settings))


REASONS = {
    "trained": (with_trained_head, "the model's head is trained"),
    "hooked": (with_hook, "the model's head has hooks"),
    "quantised": (with_quantised_head, "the model's head is sharded or quantised"),
    "other loss": (lambda: with_loss(lambda *_, **__: 0), "the model's loss is not transformers' causal one"),
    "pass loss": (with_other_loss, "losses.other compares logits"),
    "replicated": (lambda: nn.DataParallel(make_model()), "nn.DataParallel copies the model"),
    "compiled": (lambda: torch.compile(make_model(), backend="eager"), "the model is compiled"),
    "saved": (
        lambda: get_peft_model(models.tiny_llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])),
        "the model's head is no plain linear: ModulesToSaveWrapper",
    ),
    "adapted": (
        lambda: on(models.tiny_llama(), targets=["lm_head", "q_proj"]),
        "the model's head is no plain linear: ",
    ),
    "encoder-decoder": (lambda: on(models.tiny_t5(), "SEQ_2_SEQ_LM"), "the model is an encoder-decoder"),
    "classifier": (lambda: on(models.tiny_bert_classifier(), "SEQ_CLS"), "the model has no language-model head"),
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons_of_the_model(name):
    make, reason = REASONS[name]
    assert why_not_fused(make()).startswith(reason)


def test_reasons_of_the_trainer(tmp_path):
    class Own(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    class OwnFirst(mixora.training.trainers.AuxiliaryLossMixin, Own):
        pass

    def reason(trainer_class=mixora.Trainer, **changes):
        trainer = make_trainer(trainer_class, tmp_path, model=make_model())
        for name, value in changes.items():
            setattr(trainer, name, value)
        return trainer.fused_loss_reason

    assert reason() is None
    assert reason(fused_loss=False) == "fused_loss is False"
    assert reason(compute_loss_func=lambda *_, **__: 0) == "compute_loss_func may need the logits"
    assert reason(OwnFirst) == "the trainer's own compute_loss may need the logits"
    assert reason(mixora.SFTTrainer) == "TRL computes its losses without the whole logits itself"


def test_the_constructor_switches_it_off(tmp_path):
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[])
    assert mixora.Trainer(make_model(), arguments, fused_loss=False).fused_loss_reason == "fused_loss is False"


@pytest.mark.parametrize("fused", [True, False])
def test_the_command_line_switches_it_off(fused, bases, data, tmp_path):
    config = read_run(settings(bases / "llama", data / "commands", tmp_path / "out", train__fused_loss=fused))
    material = read_material(config)
    training_set = make_training_set(material, config)
    model = get_peft_model(material.model, config.adapter.build(task_type="CAUSAL_LM"))
    assert make_run_trainer(model, material, training_set, config).fused_loss is fused


def test_who_asks_for_outputs_gets_logits(tmp_path):
    trainer = make_trainer(mixora.Trainer, tmp_path, model=make_model())
    (batch,) = accumulated_batches(1)
    _, outputs = trainer.compute_loss(trainer.model.train(), dict(batch), return_outputs=True)
    assert outputs["logits"].shape[-1] == 64
    assert trainer.predict(dataset()).predictions.shape[-1] == 64
