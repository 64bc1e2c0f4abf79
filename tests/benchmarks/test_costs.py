"""What a training step costs whatever the machine, and may not grow: operator calls and peak memory.

Two layers of the benchmark's model, forward and backward. A ceiling is what was counted when it was set (2026-11-22)
and about 5 % more, for other versions of the libraries. Who lowers a figure lowers its ceiling.
"""

from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, mm_flop

import mixora
from benchmarks import training_step
from benchmarks.measuring import peak_mebibytes
from mixora.mixture import mixtures_of

CALLS = {"mola": 2500, "sira": 1750, "adamix-lora": 1300, "mixlora": 3080, "pesc": 1990}
# times the peak of PEFT's LoRA of rank 16
MEMORY = {"mola": 0.90, "sira": 0.76, "adamix-lora": 1.33, "mixlora": 1.95, "pesc": 3.78}


class OperatorCalls(TorchDispatchMode):
    """Counts calls of torch's operators, those of backward among them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        return operator(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"ROWS": 2, "LENGTH": 64, "VOCABULARY": 2048}.items():
            patch.setattr(training_step, name, size)
        yield


@pytest.fixture(scope="module")
def lora():
    return warm(training_step.make_step(training_step.make_lora(make_base()), torch.float32))


def make_base():
    return training_step.make_base(2, torch.float32)


def warm(step):
    """What a first step makes for good does not count."""
    step()
    return step


def make_step(recipe):
    # two layers are not the four groups of MoLA
    changes = {"num_experts": 8} if recipe == "mola" else {}
    config = mixora.recipe(recipe, task_type="CAUSAL_LM", **changes)
    model = training_step.fill(get_peft_model(make_base(), config))
    return warm(training_step.make_step(model, torch.float32, compute_loss=training_step.compute_mixture_loss))


def count_calls(step):
    with OperatorCalls() as calls:
        step()
    return calls.count


@pytest.mark.parametrize("recipe", CALLS)
def test_a_step_costs_no_more_than_it_did(recipe, lora):
    step = make_step(recipe)
    assert count_calls(step) <= CALLS[recipe]
    assert peak_mebibytes(step) <= MEMORY[recipe] * peak_mebibytes(lora)


def count_operations(step):
    """Floating-point operations of all matrix products but those of attention."""

    def in_place(sum_shape, left, right, *, out_shape=None, **kwargs):
        return mm_flop(left, right)

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        step()
    return counter.get_total_flops()


def test_the_products_of_a_step_are_those_that_the_experts_of_its_linears_need():
    """Two for each of the rows of A, of B and of the routers in forward, and four in backward, as LoRA has them too.

    The input of the first block needs no gradient. The gates are spread over the ranks in forward and again in
    backward, and their gradients are gathered.
    """
    model, lora = training_step.make_mixture(make_base()), training_step.make_lora(make_base())
    compute_loss = partial(training_step.compute_mixture_loss, fused=False)
    ours = count_operations(warm(training_step.make_step(model, torch.float32, compute_loss=compute_loss)))
    theirs = count_operations(warm(training_step.make_step(lora, torch.float32)))
    experts, columns, columns_of_lora = 8, 8 * 8, 16
    more, expected = columns - columns_of_lora, 0
    for linear in mixtures_of(model):
        is_first = linear.path.startswith("model.layers.0.") and linear.path.endswith(("q_proj", "k_proj", "v_proj"))
        inputs, outputs = linear.base_layer.in_features, linear.base_layer.out_features
        expected += (2 if is_first else 3) * inputs * (more + experts) + 3 * outputs * more + 3 * experts * columns
    assert ours - theirs == 2 * training_step.ROWS * training_step.LENGTH * expected
