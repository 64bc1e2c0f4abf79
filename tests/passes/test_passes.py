"""What a layer must know of its pass: padding, sequence boundaries, both streams of an encoder-decoder, causality."""

import pytest
import torch

import mixora
from mixora.errors import ConfigError
from mixora.passes import tracing
from tests.models import adapt, gradients, tiny_bert, tiny_llama, tiny_t5, token_ids

TIGHT = {"capacity_factor": 0.6, "min_capacity": 1}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def sira(**changes):
    """All linears, few places, no dropout: the routing of a token depends on its sequence, and on nothing else."""
    sizes = {"num_experts": 4, "top_k": 2, "rank": 2, "targets": ["all-linear"], "expert_dropout": 0.0}
    return mixora.recipe("sira", **{**sizes, **TIGHT, "losses.load_balance.coefficient": 0.5, **changes})


def run(model, **inputs):
    """Output, routings by path, and gradients of a loss over the real tokens."""
    with tracing() as trace:
        output = model(**inputs)
    return output, {o.path: o.routing for o in trace.observations}


def pad(rows, side, filler=0):
    """Rows of unequal length as one batch with its mask."""
    longest = max(len(row) for row in rows)
    padded, mask = torch.full((len(rows), longest), filler), torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        padded[index, place], mask[index, place] = row, 1
    return padded, mask


def assert_same_gradients(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_routers_learn(found):
    routers = [gradient for name, gradient in found.items() if "router" in name]
    assert routers
    assert all(gradient.abs().max() > 1e-6 for gradient in routers)


@pytest.mark.parametrize("share_router", [False, True])
def test_the_last_token_never_changes_earlier_ones(share_router):
    model = adapt(tiny_llama(), sira(share_router=share_router))
    ids = token_ids(3, 12)
    edited = ids.clone()
    edited[:, -1] = (ids[:, -1] + 7) % 60 + 3
    (before, routings), (after, _) = run(model, input_ids=ids), run(model, input_ids=edited)
    assert torch.equal(before.logits[:, :-1], after.logits[:, :-1])
    assert not torch.equal(before.logits[:, -1], after.logits[:, -1])
    assert any((r.assigned_TK & ~r.admitted_TK).any() for r in routings.values())


@pytest.mark.parametrize("order", ["choice", "priority"])
def test_orders_that_are_not_causal_are_for_encoders_only(order):
    with pytest.raises(ConfigError, match=rf"attention\.router\.admission: got '{order}'"):
        mixora.plan(tiny_llama(), sira(admission=order))
    assert len(mixora.plan(tiny_bert(), sira(admission=order)).sites) == 12
    routed = adapt(tiny_bert(), sira(admission=order))
    assert torch.isfinite(routed(input_ids=token_ids(2, 6)).last_hidden_state).all()


def test_an_encoder_decoder_takes_other_orders_in_its_encoder_only():
    inside = {"targets": r"encoder\..*\.(q|k|v|o|wi|wo)", "admission": "choice"}
    assert len(mixora.plan(tiny_t5(), sira(**inside)).sites) == 12
    with pytest.raises(ConfigError, match="valid for a causal model: 'token'"):
        mixora.plan(tiny_t5(), sira(targets=r"decoder\..*\.(q|k|v|o|wi|wo)", admission="choice"))


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_of_a_decoder_equal_unpadded_ones(side):
    model, ids = adapt(tiny_llama(), sira()), token_ids(2, 9)
    padded, mask = torch.nn.functional.pad(ids, (4, 0) if side == "left" else (0, 4), value=1), torch.ones(2, 13)
    mask[:, :4] = 0 if side == "left" else 1
    mask[:, -4:] = 1 if side == "left" else 0
    real = mask.bool()
    plain, routings = run(model, input_ids=ids)
    plain.logits[:, :-1].square().mean().backward()
    expected = gradients(model)
    with_padding, padded_routings = run(model, input_ids=padded, attention_mask=mask.long())
    torch.testing.assert_close(
        with_padding.logits[real].reshape(plain.logits.shape), plain.logits, rtol=1e-4, atol=1e-5
    )
    with_padding.logits[real].reshape(plain.logits.shape)[:, :-1].square().mean().backward()
    found = gradients(model)
    assert_same_gradients(found, expected)
    assert_routers_learn(found)
    for path, routing in routings.items():
        flat = real.flatten()
        assert torch.equal(padded_routings[path].valid_T, flat)
        assert torch.equal(padded_routings[path].admitted_TK[flat], routing.admitted_TK)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_of_unequal_length_equal_each_alone(side):
    model = adapt(tiny_llama(), sira())
    rows = [token_ids(1, n, seed=n)[0] for n in (3, 11, 6)]
    padded, mask = pad(rows, side)
    logits = run(model, input_ids=padded, attention_mask=mask)[0].logits
    for index, row in enumerate(rows):
        alone = run(model, input_ids=row[None])[0].logits[0]
        torch.testing.assert_close(logits[index][mask[index].bool()], alone, rtol=1e-4, atol=1e-5)


def test_padded_rows_of_an_encoder_equal_unpadded_ones():
    model, ids = adapt(tiny_bert(), sira(admission="priority")), token_ids(2, 9)
    plain, routings = run(model, input_ids=ids)
    plain.last_hidden_state[..., 0].square().mean().backward()
    expected = gradients(model)
    padded, mask = pad([*ids, token_ids(1, 12)[0]], "right")
    with_padding, padded_routings = run(model, input_ids=padded[:2], attention_mask=mask[:2])
    hidden = with_padding.last_hidden_state[:, :9]
    torch.testing.assert_close(hidden, plain.last_hidden_state, rtol=1e-4, atol=1e-5)
    hidden[..., 0].square().mean().backward()
    assert_same_gradients(gradients(model), expected)
    assert any((r.assigned_TK & ~r.admitted_TK).any() for r in routings.values())
    assert all(not r.assigned_TK[~mask[:2].flatten().bool()].any() for r in padded_routings.values())


def packed(rows):
    """Rows behind each other in one row; positions restart with each."""
    return torch.cat(rows)[None], torch.cat([torch.arange(len(row)) for row in rows])[None]


def test_packed_sequences_have_places_of_their_own():
    model = adapt(tiny_llama(), sira())
    rows = [token_ids(1, n, seed=n)[0] for n in (5, 4, 8)]
    ids, positions = packed(rows)
    output, routings = run(model, input_ids=ids, position_ids=positions)
    padded, mask = pad(rows, "right")
    apart, padded_routings = run(model, input_ids=padded, attention_mask=mask)
    real = mask.flatten().bool()
    torch.testing.assert_close(output.logits[0], apart.logits.flatten(0, 1)[real], rtol=1e-4, atol=1e-5)
    for path, routing in routings.items():
        expected = padded_routings[path]
        assert torch.equal(routing.experts_TK, expected.experts_TK[real])
        assert torch.equal(routing.admitted_TK, expected.admitted_TK[real])
    # one long sequence of 17 would have admitted others
    as_one = run(model, input_ids=ids)[1][Q_PROJ]
    assert not torch.equal(as_one.admitted_TK, routings[Q_PROJ].admitted_TK)


def test_padding_between_packed_sequences_keeps_them_apart():
    model = adapt(tiny_llama(), sira(targets=["q_proj"]))
    ids, positions = packed([token_ids(1, n, seed=n)[0] for n in (6, 6)])
    gap_ids, gap_positions = (torch.cat([t[:, :6], t[:, :2], t[:, 6:]], dim=1) for t in (ids, positions))
    gap_positions[:, 6:8] = 0
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[:, 6:8] = 0
    # the first layer alone: what attention does with the gap is not the question
    expected = run(model, input_ids=ids, position_ids=positions)[1][Q_PROJ]
    found = run(model, input_ids=gap_ids, position_ids=gap_positions, attention_mask=mask)[1][Q_PROJ]
    assert torch.equal(found.admitted_TK[mask[0].bool()], expected.admitted_TK)


@pytest.mark.parametrize(("training", "real"), [(True, 5), (False, 8)])
def test_what_fills_a_packed_row_up_is_no_token_in_training(training, real):
    model = adapt(tiny_llama(), sira()).train(training)
    _, routings = run(model, input_ids=token_ids(1, 8), position_ids=torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0]]))
    expected = torch.arange(8) < real
    assert all(torch.equal(routing.valid_T, expected) for routing in routings.values())


def test_a_row_that_has_no_other_positions_is_real():
    positions = torch.zeros(2, 1, dtype=torch.long)
    _, routings = run(adapt(tiny_llama(), sira()), input_ids=token_ids(2, 1), position_ids=positions)
    assert all(routing.valid_T.all() for routing in routings.values())


def test_packed_gradients_equal_those_of_the_rows():
    model = adapt(tiny_llama(), sira())
    rows = [token_ids(1, n, seed=n)[0] for n in (5, 4, 8)]
    ids, positions = packed(rows)
    run(model, input_ids=ids, position_ids=positions)[0].logits.square().sum().backward()
    found = gradients(model)
    padded, mask = pad(rows, "left")
    run(model, input_ids=padded, attention_mask=mask)[0].logits[mask.bool()].square().sum().backward()
    assert_same_gradients(found, gradients(model), tolerance=1e-3)


def seq2seq():
    """Sources of 5 and 7 tokens, targets of 4 and 6."""
    sources, mask = pad([token_ids(1, n, seed=n)[0] for n in (5, 7)], "right")
    labels, _ = pad([token_ids(1, n, seed=n)[0] for n in (4, 6)], "right", filler=-100)
    return {"input_ids": sources, "attention_mask": mask, "labels": labels}


def is_cross_source(path):
    return path.split(".")[-2] == "EncDecAttention" and path[-1] in "kv"


def test_the_encoder_and_cross_attention_know_the_padding_of_the_source():
    batch = seq2seq()
    _, routings = run(adapt(tiny_t5(), sira()), **batch)
    of_source = {path: r for path, r in routings.items() if path.startswith("encoder") or is_cross_source(path)}
    assert len(of_source) == 12 + 4
    for path, routing in of_source.items():
        assert torch.equal(routing.valid_T, batch["attention_mask"].flatten().bool()), path
        assert not routing.assigned_TK[~routing.valid_T].any()


def test_padding_of_the_target_is_not_routed():
    labels = token_ids(2, 8)
    labels[0, 3:] = -100
    _, routings = run(adapt(tiny_t5(), sira()), input_ids=token_ids(2, 5), labels=labels)
    routing = routings["decoder.block.0.layer.0.SelfAttention.q"]
    assert routing.assigned_TK[:3].all()
    assert not routing.assigned_TK[4:8].any()
    assert routing.assigned_TK[8:].all()


def test_a_target_has_as_many_real_tokens_as_labels():
    """Unpadded, n labels make n decoder positions."""
    batch = seq2seq()
    _, routings = run(adapt(tiny_t5(), sira()), **batch)
    of_target = {p: r for p, r in routings.items() if p.startswith("decoder") and not is_cross_source(p)}
    assert len(of_target) == 16
    for path, routing in of_target.items():
        assert torch.equal(routing.valid_T, (batch["labels"] != -100).flatten()), path


def test_padding_the_target_changes_no_gradient():
    model = adapt(tiny_t5(), sira())
    sources, labels = token_ids(2, 5), token_ids(2, 4, seed=1)
    run(model, input_ids=sources, labels=labels)[0].loss.backward()
    expected = gradients(model)
    padded = torch.nn.functional.pad(labels, (0, 3), value=-100)
    run(model, input_ids=sources, labels=padded)[0].loss.backward()
    assert_same_gradients(gradients(model), expected)


def test_a_given_decoder_mask_wins_over_the_labels():
    batch = seq2seq()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 3:] = 0
    _, routings = run(adapt(tiny_t5(), sira()), **batch, decoder_attention_mask=mask)
    assert torch.equal(routings["decoder.block.1.layer.0.SelfAttention.q"].valid_T, mask.flatten().bool())


def test_a_decoder_called_on_its_own_knows_both_masks():
    batch, model = seq2seq(), adapt(tiny_t5(), sira())
    mask = (batch["labels"] != -100).long()
    hidden = torch.randn(2, 7, 32)
    settings = {"encoder_hidden_states": hidden, "encoder_attention_mask": batch["attention_mask"]}
    with tracing() as trace:
        model.get_base_model().get_decoder()(input_ids=token_ids(2, 6), attention_mask=mask, **settings)
    for observation in trace.observations:
        real = batch["attention_mask"] if is_cross_source(observation.path) else mask
        assert torch.equal(observation.routing.valid_T, real.flatten().bool()), observation.path


def test_padded_pairs_of_an_encoder_decoder_equal_each_alone():
    batch, model = seq2seq(), adapt(tiny_t5(), sira())
    logits = run(model, **batch)[0].logits
    for row, (source, target) in enumerate([(5, 4), (7, 6)]):
        alone = run(
            model, input_ids=batch["input_ids"][row : row + 1, :source], labels=batch["labels"][row : row + 1, :target]
        )
        torch.testing.assert_close(logits[row, :target], alone[0].logits[0], rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_equals_generation_without():
    model = adapt(tiny_llama(use_cache=True), sira()).eval()
    ids, mask = pad([token_ids(1, n, seed=n)[0] for n in (3, 7)], "left")
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = [model.generate(input_ids=ids, attention_mask=mask, use_cache=c, **settings) for c in (True, False)]
    assert found[0].shape == (2, 12)
    assert torch.equal(*found)


def test_outside_of_a_model_all_tokens_are_real():
    layer = adapt(tiny_llama(), sira()).get_submodule("base_model.model." + Q_PROJ)
    x_BSI = torch.randn(2, 5, 32)
    separate = torch.cat([layer(x_BSI[:1]), layer(x_BSI[1:])])
    torch.testing.assert_close(layer(x_BSI), separate)


def test_a_failed_forward_leaves_no_pass_open():
    model = adapt(tiny_llama(), sira())
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 10**6))
    assert mixora.passes.current() is None
    assert run(model, input_ids=token_ids(1, 4))[1]
