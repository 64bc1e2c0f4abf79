"""Steps whose numbers go wrong: where that began, that no weight changes, and that leaving a step out is exact."""

import math
import re

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from transformers import TrainerCallback

import mixora
from mixora.errors import NonFiniteError
from mixora.training.bad_place import look_at_sums
from mixora.training.bad_steps import find_rows
from tests.models import tiny_llama
from tests.training.poison import INF, NAN, LeftOut, PoisonedRow, PoisonedWeight, same_weights, trained
from tests.training.setups import RARE_ROW, RARE_TOKEN, make_model, make_trainer

TRAINERS = [mixora.Trainer, mixora.SFTTrainer]
Q = "model.layers.1.self_attn.q_proj"
WEIGHTS = {
    f"{Q}.mixora_router": (NAN, rf"the router's outputs at {Q}: \d+ NaN in .*its mixora_router\.default before"),
    f"{Q}.mixora_A": (NAN, rf"the experts' output at {Q}: .*its mixora_A\.default before"),
    f"{Q}.mixora_B": (INF, rf"the experts' output at {Q}: .*its mixora_B\.default before"),
    f"{Q}.base_layer": (INF, rf"the output of the frozen module {Q}: .*its weight before"),
    "layers.0.mlp.up_proj": (INF, r"the output of the frozen module model\.layers\.0\.mlp\.up_proj: .*its weight"),
    "lm_head": (NAN, r"the logits of the head: .*its weight before"),
}


def train(folder, trainer_class=mixora.Trainer, callbacks=(), skip=0, **changes):
    """A trainer that has trained, and what it raised."""
    settings = {"max_steps": 4, "learning_rate": 0.02, "max_grad_norm": 1.0, **changes}
    trainer = make_trainer(trainer_class, folder, callbacks=callbacks, **settings)
    trainer.skip_bad_steps = skip
    try:
        trainer.train()
    except NonFiniteError as error:
        return trainer, str(error)
    return trainer, ""


@pytest.mark.parametrize(
    ("part", "trainer_class"), [*((part, mixora.Trainer) for part in WEIGHTS), ("lm_head", mixora.SFTTrainer)]
)
def test_a_poisoned_weight_is_named_and_nothing_changes(part, trainer_class, tmp_path):
    value, expected = WEIGHTS[part]
    poison = PoisonedWeight(part, value, step=3)
    trainer, error = train(tmp_path, trainer_class, [poison])
    assert re.match(f"step 3: {expected}", error), error
    assert "no weight was changed. Try: an earlier checkpoint" in error
    assert same_weights(trained(trainer.model), poison.weights)
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("trainer_class", TRAINERS)
def test_a_bad_row_is_named_with_its_micro_batch_and_its_place_in_the_data(trainer_class, tmp_path):
    poison = PoisonedRow(RARE_TOKEN, {1})
    trainer, error = train(tmp_path, trainer_class, [poison], gradient_accumulation_steps=2)
    assert error.startswith("step 1: the output of the frozen module model.embed_tokens: ")
    assert f", micro-batch 2 of 2, row {RARE_ROW} of the training data; no weight" in error
    assert same_weights(trained(trainer.model), poison.weights)


class BadLoss(TrainerCallback):
    """From step 2 on the label of a batch is impossible: Inf, of which the gradient is finite."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            model.get_base_model().loss_function = lambda logits, labels, **_: logits.float().sum() * 0 + INF


def test_a_loss_whose_gradients_are_finite_is_seen_too(tmp_path):
    trainer, error = train(tmp_path, callbacks=[BadLoss()], max_grad_norm=0)
    assert error.startswith("step 2: the loss (the task's own): 1 Inf in 1 number, rows 4, 5, 6, 7"), error
    assert [line["loss"] > 0 for line in trainer.state.log_history if "loss" in line] == [True]


def test_an_auxiliary_loss_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("mixora.losses.load_balance.LoadBalance.conclude", lambda self, *sums: sums[1].sum() * NAN)
    _, error = train(tmp_path)
    assert error.startswith("step 1: the loss (losses.load_balance): 1 NaN")


def test_a_batch_without_a_label_is_told(tmp_path):
    model = make_model()
    trainer = make_trainer(mixora.Trainer, tmp_path, model=model, max_steps=1)
    collate = trainer.data_collator
    trainer.data_collator = lambda rows: {**(batch := collate(rows)), "labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(NonFiniteError, match=r"the loss \(the task's own\).*no token has a label"):
        trainer.train()


class Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * INF


def test_a_gradient_is_named_by_parameter_and_where_it_began(tmp_path):
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixora_B" in name:
                parameter.normal_()
    layer = model.get_base_model().model.layers[1].self_attn.o_proj
    layer.register_forward_hook(lambda module, args, output: Overflow.apply(output))
    _, error = train(tmp_path, model=model)
    assert re.match(r"step 1: the gradient of model\.layers\.1\.self_attn\.[qv]_proj\.mixora_", error), error
    assert "first seen behind the output of model.layers.1.self_attn." in error


def test_exploding_weights_end_in_an_error_and_are_not_saved(tmp_path):
    _, error = train(tmp_path, learning_rate=1e25)
    assert re.match(r"step 2: the (router|experts|logits|output|gradient)", error), error
    _, error = train(tmp_path, learning_rate=1e39, save_strategy="steps", save_steps=1)
    assert re.match(r"step 1: its update made .*mixora_\w+\.default .*(NaN|Inf).* which is not saved", error), error


def make_noisy(recipe):
    """A model whose steps draw: dropout everywhere, and routes where the recipe draws them."""
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(), mixora.recipe(recipe, dropout=0.1, task_type="CAUSAL_LM"))


@pytest.mark.parametrize(("recipe", "trainer_class"), [("sira", mixora.Trainer), ("adamix-lora", mixora.SFTTrainer)])
def test_a_step_that_is_left_out_is_as_if_its_update_had_not_been(recipe, trainer_class, tmp_path):
    """Weights, moments of the optimiser, schedule and the losses of all later steps, bit for bit."""
    # with two micro-batches of four a step, the row comes in steps 1 and 3
    changes = {"gradient_accumulation_steps": 2, "max_steps": 4}
    runs = [
        train(tmp_path, trainer_class, [callback], skip=skip, model=make_noisy(recipe), **changes)[0]
        for skip, callback in ((0, LeftOut({3})), (1, PoisonedRow(RARE_TOKEN, {3})))
    ]
    expected, found = runs
    assert [(bad.step, bad.micro_batch, bad.rows) for bad in found.bad_steps] == [(3, 2, [RARE_ROW])]
    assert same_weights(trained(found.model), trained(expected.model))
    for one, other in zip(*(run.optimizer.state_dict()["state"].values() for run in runs), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in other)
    lines = [[line for line in run.state.log_history if "loss" in line] for run in runs]
    for there, here in zip(*lines, strict=True):
        assert here["learning_rate"] == there["learning_rate"] and here["step"] == there["step"]
        assert math.isnan(here["loss"]) if here["step"] == 3 else here["loss"] == there["loss"]
    assert found.state.num_input_tokens_seen <= expected.state.num_input_tokens_seen


def test_one_more_than_allowed_stops(tmp_path):
    poison = PoisonedRow(RARE_TOKEN, {1, 3, 5})
    trainer, error = train(tmp_path, callbacks=[poison], skip=2, gradient_accumulation_steps=2, max_steps=6)
    assert error.startswith("step 5: ")
    assert [bad.step for bad in trainer.bad_steps] == [1, 3]
    assert [line["skipped_steps"] for line in trainer.state.log_history if "skipped_steps" in line] == [1, 2]
    assert same_weights(trained(trainer.model), poison.weights)


def test_no_number_of_a_step_that_is_left_out_reaches_the_log(tmp_path):
    """transformers puts the mean of earlier losses in the place of NaN, or 0 where there are none."""
    good, _ = train(tmp_path, callbacks=[LeftOut({2})], logging_steps=1)
    each = [line["loss"] for line in good.state.log_history if "loss" in line]
    for filters in (True, False):
        logging = {"logging_steps": 2, "logging_nan_inf_filter": filters}
        bad, _ = train(tmp_path, callbacks=[PoisonedRow(RARE_TOKEN, {2})], skip=1, **logging)
        losses = [line["loss"] for line in bad.state.log_history if "loss" in line]
        assert losses == pytest.approx([each[0], (each[2] + each[3]) / 2], rel=1e-6)
        final = bad.state.log_history[-1]["train_loss"]
        assert final == pytest.approx((each[0] + each[2] + each[3]) / 3, rel=1e-6)
        terms = [value for line in bad.state.log_history for name, value in line.items() if name != "grad_norm"]
        assert all(math.isfinite(value) for value in terms if isinstance(value, float))


class Scaled(TrainerCallback):
    """Trains with a loss scale as under fp16, which accelerate gives on a GPU only."""

    def __init__(self, scale):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        self.scales = []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        from accelerate.optimizer import patch_optimizer_step

        optimizer.scaler = self.scaler
        optimizer._accelerate_step_called = False
        optimizer._optimizer_original_step_method = optimizer.optimizer.step
        optimizer._optimizer_patched_step_method = patch_optimizer_step(optimizer, optimizer.optimizer.step)

    def on_step_end(self, args, state, control, **kwargs):
        self.scales.append(self.scaler.get_scale())


def train_scaled(folder, scale, callbacks=(), skip=0, **changes):
    scaled = Scaled(scale)
    trainer = make_trainer(
        mixora.Trainer, folder, callbacks=[scaled, *callbacks], max_steps=6, learning_rate=0.01, **changes
    )
    trainer.skip_bad_steps = skip
    trainer.accelerator.scaler = scaled.scaler
    trainer.accelerator.unscale_gradients = lambda optimizer=None: scaled.scaler.unscale_(trainer.optimizer.optimizer)
    return trainer, scaled


def test_gradients_that_overflow_under_a_loss_scale_are_the_scalers_business(tmp_path):
    trainer, scaled = train_scaled(tmp_path, 3e38, max_grad_norm=1.0)
    trainer.train()
    assert scaled.scales == pytest.approx([3e38 / 2**n for n in (1, 2, 3, 4, 4, 4)])
    assert trainer.bad_steps == []


class Huge(TrainerCallback):
    """All gradients of layer 1 overflow, whatever the scale."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        layer = model.get_base_model().model.layers[1].self_attn.o_proj
        layer.register_forward_hook(lambda module, args, output: Overflow.apply(output))


def test_an_overflow_that_no_scale_helps_is_an_error_in_the_end(tmp_path):
    trainer, scaled = train_scaled(tmp_path, 4.0, [Huge()], max_grad_norm=1.0)
    with pytest.raises(NonFiniteError, match=r"^step 3: the gradient of "):
        trainer.train()
    assert scaled.scales == [2.0, 1.0]


@pytest.mark.parametrize("skip", [0, 1])
def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale(skip, tmp_path):
    trainer, _ = train_scaled(tmp_path, 1024.0, [PoisonedRow(RARE_TOKEN, {2})], skip=skip, max_grad_norm=1.0)
    if skip:
        trainer.train()
        assert [bad.step for bad in trainer.bad_steps] == [2]
    else:
        with pytest.raises(NonFiniteError, match=f"^step 2: .*row {RARE_ROW} of"):
            trainer.train()


@pytest.mark.works_with(
    "distribution", "DDP on two ranks (gloo): NaN on one of them stops both, or leaves the step out"
)
def test_two_ranks_decide_alike(two_ranks):
    found = two_ranks["bad step"]
    stopped, skipped, left_out = (found[name] for name in ("stopped", "skipped", "left out"))
    # rank 1 holds the row in its half of step 1
    assert stopped["errors"][0] == stopped["errors"][1]
    assert re.match(rf"step 1: the output of the frozen .*, process 1, row {RARE_ROW} of", stopped["errors"][0])
    assert skipped["errors"] == ["", ""] and skipped["steps"] == [[1], [1]]
    for found in (skipped, left_out):
        assert same_weights(found["weights"][0], found["weights"][1])
    assert same_weights(skipped["weights"][0], left_out["weights"][0])


def test_healthy_steps_are_not_run_again_and_give_the_trainers_own_numbers(tmp_path):
    calls = []

    class Count(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.get_base_model().register_forward_hook(lambda *_: calls.append(1))

    trainer, error = train(tmp_path, callbacks=[Count()], gradient_accumulation_steps=2)
    assert (error, len(calls)) == ("", 8)
    logits, labels = torch.randn(5, 7, requires_grad=True), torch.arange(5)
    loss = F.cross_entropy(logits, labels)
    (own,) = torch.autograd.grad(loss, logits, retain_graph=True)
    guarded = trainer._guard(loss, loss, {}, labels)
    assert torch.equal(guarded, loss) and torch.equal(torch.autograd.grad(guarded, logits)[0], own)


def test_sums_of_gradients_that_overflow_are_named():
    """Each micro-batch may be finite, or each number, and what is summed over them not."""
    model = make_model()
    assert look_at_sums(model) is None
    routers = [name for name, p in model.get_base_model().named_parameters() if "mixora_router" in name]
    parameters = dict(model.get_base_model().named_parameters())
    for name in routers:
        parameters[name].grad = torch.ones_like(parameters[name])
    assert look_at_sums(model) is None
    parameters[routers[1]].grad *= 1e30
    place = str(look_at_sums(model))
    assert routers[1] in place and "which is beyond what its dtype holds" in place
    parameters[routers[0]].grad[0, 0] = INF
    place = str(look_at_sums(model))
    assert routers[0] in place and "1 Inf" in place and "summed over micro-batches and processes" in place


def test_rows_that_cannot_be_told_are_not_named():
    ids, whole = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.ones(2, 3)
    rows = [{"input_ids": [9]}, {"input_ids": [1, 2, 3]}, {"text": "other"}]
    batch = {"input_ids": ids, "attention_mask": whole}
    assert find_rows(rows, batch, (0,)) == [1]
    assert find_rows(rows, batch, ()) == [1]
    assert find_rows(iter(rows), batch, (0,)) == find_rows(rows, {"input_ids": ids}, (0,)) == []
