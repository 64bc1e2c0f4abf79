"""The trace: what it records, once per pass and site, and when it records nothing."""

import pytest
import torch

import mixora
from mixora.passes import tracing
from mixora.routing import Routing, Tokens, Trace
from tests.models import adapt, all_real, tiny_llama, token_ids

SMALL = {"num_experts": 4, "top_k": 2, "rank": 2, "targets": ["q_proj", "o_proj"], "expert_dropout": 0.0}
Q_0 = "model.layers.0.self_attn.q_proj"


def llama(**changes):
    return adapt(tiny_llama(), mixora.recipe("sira", **{**SMALL, **changes}))


def test_every_pass_and_site_is_observed_in_order():
    model = llama()
    with tracing() as trace:
        model(input_ids=token_ids(2, 5))
        with torch.no_grad():
            model(input_ids=token_ids(1, 3))
    leaves = ["0.self_attn.q_proj", "0.self_attn.o_proj", "1.self_attn.q_proj", "1.self_attn.o_proj"]
    assert [o.path.removeprefix("model.layers.") for o in trace.observations] == leaves * 2
    assert [o.pass_index for o in trace.observations] == [0] * 4 + [1] * 4
    assert [o.with_grad for o in trace.observations] == [True] * 4 + [False] * 4
    assert {o.adapter for o in trace.observations} == {"default"}
    assert trace.passes == 2
    assert [len(r.valid_T) for r in trace.of(Q_0)] == [10, 3]


def test_a_disabled_adapter_records_nothing():
    model = llama()
    with tracing() as trace, model.disable_adapter():
        model(input_ids=token_ids(2, 5))
    assert trace.observations == []
    with tracing() as trace:
        model(input_ids=token_ids(2, 5))
    assert len(trace.observations) == 4


def test_nothing_is_recorded_outside_of_a_trace():
    model = llama()
    with tracing() as trace:
        pass
    model(input_ids=token_ids(2, 5))
    assert (trace.observations, trace.passes) == ([], 0)


def test_the_inner_of_two_traces_records():
    model = llama()
    with tracing() as outer:
        with tracing() as inner:
            model(input_ids=token_ids(1, 4))
        model(input_ids=token_ids(1, 5))
    assert [len(trace.of(Q_0)[0].valid_T) for trace in (inner, outer)] == [4, 5]


def test_an_error_inside_closes_the_trace():
    with pytest.raises(KeyError), tracing():
        raise KeyError
    model = llama()
    with tracing() as trace:
        model(input_ids=token_ids(1, 4))
    assert len(trace.observations) == 4


def test_a_trace_shows_what_capacity_would_refuse_at_inference():
    """Without any effect on the weights in use."""
    model = llama(capacity_factor=0.5, min_capacity=1).eval()
    plain = model(input_ids=token_ids(2, 8)).logits
    with tracing() as trace:
        assert torch.equal(model(input_ids=token_ids(2, 8)).logits, plain)
    (routing,) = trace.of(Q_0)
    assert (routing.assigned_TK & ~routing.admitted_TK).any()
    assert torch.equal(routing.weights_TK > 0, routing.assigned_TK)


def test_routings_carry_gradients_to_the_router():
    model = llama()
    with tracing(owns_losses=True) as trace:
        model(input_ids=token_ids(2, 8))
    (routing,) = trace.of(Q_0)
    router = model.get_submodule("base_model.model." + Q_0).mixora_router["default"]
    (gradient_EI,) = torch.autograd.grad(routing.probs_TE[:, 0].sum(), router)
    assert gradient_EI.abs().max() > 0


def test_all_real_tokens_form_one_group():
    tokens = all_real(4, torch.device("cpu"))
    assert tokens.valid_T.tolist() == [True] * 4
    assert tokens.group_T.tolist() == [0] * 4
    assert tokens.group_T.dtype == torch.int64


def test_by_slot_each_choice_is_a_token_of_its_own():
    weights_TK = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.0, 0.0]])
    experts_TK, used_TK = torch.tensor([[2, 0], [1, 2], [0, 1]]), weights_TK > 0
    admitted_TK = torch.tensor([[True, False], [True, True], [False, False]])
    routing = Routing(experts_TK, weights_TK, used_TK, admitted_TK, torch.tensor([True, True, False]), 3)
    slots = routing.by_slot()
    assert slots.experts_TK.tolist() == [[2], [1], [0], [0], [2], [1]]
    torch.testing.assert_close(slots.weights_TK[:, 0], torch.tensor([0.7, 0.6, 0.0, 0.3, 0.4, 0.0]))
    assert slots.assigned_TK[:, 0].tolist() == [True, True, False] * 2
    assert slots.admitted_TK[:, 0].tolist() == [True, True, False, False, True, False]
    assert slots.valid_T.tolist() == [True, True, False] * 2
    torch.testing.assert_close(slots.gates_TE().reshape(2, 3, 3).sum(dim=0), routing.gates_TE())
    assert slots.unweighted().weights_TK[:, 0].tolist() == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_made_from_nothing_stands_on_the_device_asked_for(device):
    tokens = all_real(3, torch.device(device))
    even = Routing.even(tokens.valid_T, (1, 0), 2)
    made = (tokens.valid_T, tokens.group_T, even.experts_TK, even.weights_TK, even.assigned_TK)
    assert {tensor.device.type for tensor in made} == {device}


@pytest.mark.parametrize(("experts", "is_soft"), [((2,), False), ((3, 1), True)])
def test_even_routing_gives_equal_weights_in_fp32(experts, is_soft):
    torch.set_default_dtype(torch.float64)
    try:
        even = Routing.even(torch.tensor([True, False, True]), experts, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert even.weights_TK.dtype == torch.float32
    assert even.weights_TK.tolist() == [[1 / len(experts)] * len(experts)] * 3
    assert even.experts_TK.tolist() == [list(experts)] * 3
    assert even.assigned_TK.tolist() == [[True] * len(experts), [False] * len(experts), [True] * len(experts)]
    assert even.is_soft is is_soft


def test_what_nobody_says_is_off():
    ones_TK = torch.ones(1, 1, dtype=torch.bool)
    assert Tokens(ones_TK[0], ones_TK[0].long()).observed is False
    assert Trace().owns_losses is False
    alone = Routing(ones_TK.long() - 1, ones_TK.float(), ones_TK, ones_TK, ones_TK[0], 2)
    assert alone.is_soft is False
    assert alone.load_E().tolist() == [1, 0]
    assert alone.unweighted().weights_TK.dtype == torch.float32


def test_null_experts_share_their_choices_evenly():
    """In the dtype of the weights: two choices of three null experts."""
    used_TK, weights_TK = torch.tensor([[True], [False]]), torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    probs_TE = torch.full((2, 5), 0.2, dtype=torch.float64)
    routing = Routing(
        used_TK.long(),
        weights_TK,
        used_TK,
        used_TK,
        torch.tensor([True, True]),
        2,
        probs_TE,
        probs_TE,
        null_slots_T=torch.tensor([0, 2]),
    )
    assert routing.counts_of_columns().tolist() == [0, 1, 2 / 3, 2 / 3, 2 / 3]
