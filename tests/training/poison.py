"""Numbers put out of order at one step of a training: in a weight, in a row, or in the loss alone."""

import torch
from transformers import TrainerCallback

NAN, INF = float("nan"), float("inf")


class PoisonedWeight(TrainerCallback):
    """Puts `value` into the parameter whose name holds `part`, as step `step` begins; keeps the weights as of then."""

    def __init__(self, part, value, step):
        self.part, self.value, self.step = part, value, step
        self.weights = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step != self.step - 1:
            return
        ((_, parameter),) = [(name, p) for name, p in model.named_parameters() if self.part in name]
        with torch.no_grad():
            parameter.view(-1)[3] = self.value
        self.weights = trained(model)


class PoisonedRow(TrainerCallback):
    """During the given steps, rows with the token `token` come out of the module `path` as NaN."""

    def __init__(self, token, steps, path="model.embed_tokens"):
        self.token, self.steps, self.path = token, steps, path
        self.is_on, self.weights, self.ids = False, None, None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        base = model.get_base_model()
        base.register_forward_pre_hook(self._note, with_kwargs=True)
        base.get_submodule(self.path).register_forward_hook(self._spoil)

    def _note(self, module, args, kwargs):
        self.ids = kwargs["input_ids"]

    def _spoil(self, module, args, output):
        if not self.is_on:
            return output
        hit_B = (self.ids == self.token).any(dim=1)
        return torch.where(hit_B.view(-1, *[1] * (output.dim() - 1)), NAN, output)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.is_on = state.global_step + 1 in self.steps
        if self.is_on:
            self.weights = trained(model)

    def on_step_end(self, args, state, control, **kwargs):
        self.is_on = False


class LeftOut(TrainerCallback):
    """Takes away all gradients of some steps: what leaving these out means."""

    def __init__(self, steps):
        self.steps = steps

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 in self.steps:
            model.zero_grad(set_to_none=True)


def trained(model):
    """Copies of all trainable tensors by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same_weights(found, expected):
    """Bit for bit, NaN where it was put."""
    assert found.keys() == expected.keys()
    return all(torch.equal(found[name].nan_to_num(7.0), expected[name].nan_to_num(7.0)) for name in expected)


class PoisonedStep(TrainerCallback):
    """During the given steps, the embeddings come out as NaN."""

    def __init__(self, steps):
        self.steps, self.is_on = steps, False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.handle = model.get_input_embeddings().register_forward_hook(
            lambda module, given, output: output * NAN if self.is_on else output
        )

    def on_step_begin(self, args, state, control, **kwargs):
        self.is_on = state.global_step + 1 in self.steps

    def on_step_end(self, args, state, control, **kwargs):
        self.is_on = False

    def on_train_end(self, args, state, control, **kwargs):
        self.handle.remove()
