"""One adapter for both plug-ins, and what training it must give."""

import torch
import transformers
from transformers import TrainerCallback

from tests.models import token_ids
from tests.training.setups import accumulated_batches, balance_gradient, make_model, make_trainer

SETTINGS = {
    "num_experts": 4,
    "top_k": 2,
    "rank": 2,
    "expert_dropout": 0.0,
    "targets": ["q_proj", "v_proj"],
    "losses.load_balance.coefficient": 0.5,
}


class Catch(TrainerCallback):
    """The routers' gradient of the last step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "router" in name])


def make_base():
    return make_model().unload()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=token_ids(2, 8)).logits


def assert_auxiliary_gradient(model, callbacks, folder):
    """Over four accumulated batches under transformers' trainer, which both tools' trainers are made from."""
    catch = Catch()
    changes = {"gradient_accumulation_steps": 4, "model": model}
    trainer = make_trainer(transformers.Trainer, folder, callbacks=[*callbacks, catch], **changes)
    trainer.train()
    torch.testing.assert_close(catch.gradient, balance_gradient(model, accumulated_batches(4)), rtol=1e-3, atol=1e-6)
    assert "load_balance" in trainer.state.log_history[0]
