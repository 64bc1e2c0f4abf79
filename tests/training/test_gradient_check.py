"""The self-test must tell right from wrong on a user's own trainer, and leave no trace."""

import pytest
import torch
import transformers
import trl

import mixora
from mixora.errors import TrainingError
from tests.training.setups import make_model, make_trainer


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("trainer_class", "callbacks", "changes", "ratio"),
    [
        (mixora.Trainer, [], {}, 1.0),
        (mixora.Trainer, [], {"gradient_accumulation_steps": 4}, 1.0),
        (mixora.SFTTrainer, [], {"gradient_accumulation_steps": 2}, 1.0),
        (transformers.Trainer, [], {"gradient_accumulation_steps": 4}, 4.0),
        (transformers.Trainer, [mixora.AuxiliaryLossCallback()], {"gradient_accumulation_steps": 4}, 1.0),
        (trl.SFTTrainer, [], {}, 1.0),
        (mixora.Trainer, [], {"activation_checkpointing": True}, 1.0),
        (transformers.Trainer, [mixora.AuxiliaryLossCallback()], {"activation_checkpointing": True}, 1.0),
    ],
)
def test_ratio_is_found_with_dropout_and_learning_on(trainer_class, callbacks, changes, ratio, tmp_path):
    model = make_model(expert_dropout=0.2, dropout=0.1)
    trainer = make_trainer(
        trainer_class, tmp_path, model=model, callbacks=callbacks, **{**changes, "learning_rate": 0.1}
    )
    before, random_state = weights(trainer.model), torch.get_rng_state()
    found = mixora.check_router_gradient(trainer)
    assert found.ratio == pytest.approx(ratio, abs=1e-3)
    assert found.is_right == (ratio == 1.0)
    assert ("intended auxiliary gradient (ratio" in str(found)) == found.is_right
    assert found.is_right or "AuxiliaryLossCallback" in str(found)
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_losses_that_never_arrive_are_found(tmp_path):
    class Forgetful(mixora.Trainer):
        def _is_scaled(self, num_items_in_batch):
            return True

        def compute_loss(self, model, inputs, **kwargs):
            return (
                super().compute_loss(model, inputs, **kwargs).detach()
                + 0 * next(p for name, p in model.named_parameters() if "router" in name).sum()
            )

    found = mixora.check_router_gradient(make_trainer(Forgetful, tmp_path))
    assert abs(found.ratio) < 1e-6
    assert "receive no auxiliary gradient" in str(found)


def test_a_model_without_auxiliary_losses_is_told_so(tmp_path):
    model = make_model(**{"losses.load_balance.coefficient": 0.0})
    with pytest.raises(TrainingError, match="no auxiliary loss is in force"):
        mixora.check_router_gradient(make_trainer(mixora.Trainer, tmp_path, model=model))


def test_the_trainer_can_train_afterwards(tmp_path):
    trainer = make_trainer(mixora.Trainer, tmp_path, learning_rate=0.1, max_steps=2)
    mixora.check_router_gradient(trainer)
    before = weights(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
