"""What users of transformers and TRL write, unchanged."""

from types import SimpleNamespace

import pytest
import torch
import transformers
import trl
from peft import PeftModel

import mixora
from mixora.mixture import Mixture, mixtures_of
from tests.models import tiny_llama
from tests.training.setups import collate, dataset, make_model, make_tokenizer, make_trainer, settings


@pytest.mark.works_with("trl.SFTTrainer", "`peft_config`: the trainer makes the adapter, and trains nothing else")
def test_trl_builds_the_adapter_from_the_config(tmp_path):
    adapter = mixora.recipe("sira", num_experts=4, top_k=2, rank=2, task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        model=tiny_llama(),
        peft_config=adapter,
        args=trl.SFTConfig(**settings(tmp_path, learning_rate=0.1), bf16=False),
        train_dataset=dataset().remove_columns("labels"),
        processing_class=make_tokenizer(),
        callbacks=[mixora.AuxiliaryLossCallback()],
    )
    assert isinstance(trainer.model, PeftModel)
    assert sum(isinstance(module, Mixture) for module in trainer.model.modules()) == 8
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert any("router" in name for name in changed)
    assert all("mixora_" in name for name in changed)


def test_saving_resuming_and_evaluating_with_the_plain_trainer(tmp_path):
    first = make_trainer(
        transformers.Trainer,
        tmp_path,
        callbacks=[mixora.AuxiliaryLossCallback()],
        max_steps=2,
        save_steps=1,
        save_strategy="steps",
        learning_rate=0.05,
    )
    first.train()
    second = make_trainer(
        transformers.Trainer, tmp_path, callbacks=[mixora.AuxiliaryLossCallback()], max_steps=2, learning_rate=0.05
    )
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for (name, ours), (_, theirs) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
    metrics = second.evaluate(dataset())
    assert 0 < metrics["eval_loss"] < 10


def test_auxiliary_losses_stay_out_of_evaluation(tmp_path):
    with_losses = make_trainer(mixora.Trainer, tmp_path)
    without = make_trainer(mixora.Trainer, tmp_path, model=make_model(**{"losses.load_balance.coefficient": 0.0}))
    assert with_losses.evaluate(dataset())["eval_loss"] == without.evaluate(dataset())["eval_loss"]


def test_training_loss_of_our_trainer_is_the_task_plus_the_auxiliary_loss(tmp_path):
    trainer = make_trainer(mixora.Trainer, tmp_path)
    trainer.train()
    line = next(line for line in trainer.state.log_history if "loss" in line)
    model, batch = make_model(), collate(list(dataset())[:4])
    model.train()
    task = model(**batch).loss.item()
    assert abs(line["auxiliary_loss"] - 0.5 * line["load_balance"]) < 1e-6
    assert abs(line["loss"] - task - line["auxiliary_loss"]) < 1e-4


def test_the_auxiliary_gradient_is_scaled_as_the_loss_of_fp16():
    model, callback = make_model(), mixora.AuxiliaryLossCallback()
    optimizer = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 1024.0))
    arguments = SimpleNamespace(gradient_accumulation_steps=4)
    for given, scale in ((SimpleNamespace(), 0.25), (optimizer, 256.0)):
        callback.on_step_begin(arguments, None, None, model=model, optimizer=given)
        assert {layer.auxiliary_scale for layer in mixtures_of(model)} == {scale}


def test_the_callback_may_be_called_without_a_trainer():
    callback = mixora.AuxiliaryLossCallback()
    assert callback.on_train_begin(SimpleNamespace(), None, None, model=make_model()) is None
