"""Typical tokens and likeness of experts, against closed forms, dense products, NumPy and SciPy."""

import math

import numpy as np
import pytest
import torch
from peft import get_peft_model
from scipy.stats import power_divergence

import mixora
from mixora.diagnostics.examination import examine
from mixora.diagnostics.record import Similar, Token, Typical
from mixora.diagnostics.similarity import Correlation, choices_of, cosines_of, find_similar
from mixora.diagnostics.typical import TokenCounts, find_strongest, score
from mixora.errors import ModelError
from mixora.routing import Routing
from tests.characters import build_tokenizer
from tests.models import adapt, fill, tiny_gpt2, tiny_llama, tiny_t5, tiny_vit, token_ids


@pytest.mark.parametrize("is_shared", [False, True], ids=["lora", "common A"])
def test_cosines_are_those_of_the_dense_matrices(is_shared):
    torch.manual_seed(0)
    ranks = (2, 2, 2) if is_shared else (1, 3, 2)
    a_RI, b_RO = torch.randn(2 if is_shared else 6, 7), torch.randn(6, 5)
    dense, start = [], 0
    for rank in ranks:
        rows = slice(start, start + rank)
        dense.append((b_RO[rows].double().T @ (a_RI if is_shared else a_RI[rows]).double()).flatten())
        start += rank
    expected = [[float(x @ y / (x.norm() * y.norm())) for y in dense] for x in dense]
    assert cosines_of(a_RI, b_RO, ranks).numpy() == pytest.approx(np.array(expected), abs=1e-5)


def test_experts_that_do_nothing_are_like_none():
    b_RO = torch.cat([torch.zeros(2, 5), torch.ones(2, 5)])
    cosines = cosines_of(torch.randn(4, 3), b_RO, (2, 2))
    assert cosines[0].isnan().all() and cosines[1, 1] == pytest.approx(1)


def test_correlation_over_batches_is_pearsons_and_unknown_for_few_tokens():
    generator = torch.Generator().manual_seed(0)
    choices_TE = (torch.rand(80, 5, generator=generator) < 0.4).double()
    choices_TE[:, 3] = 1.0
    choices_TE[:, 4] = torch.arange(80) < 9
    sums = Correlation()
    for part in choices_TE.split(20):
        sums.add(part)
    values = sums.values()
    assert values[:3, :3].numpy() == pytest.approx(np.corrcoef(choices_TE[:, :3].numpy().T))
    assert values[3:].isnan().all() and values[:, 3:].isnan().all()


def test_choices_are_weights_where_routing_is_soft_and_leave_padding_out():
    valid_T = torch.tensor([True, True, False])
    experts_TK, weights_TK = torch.tensor([[2, 0]] * 3), torch.tensor([[0.75, 0.25]] * 3)
    assigned_TK = torch.tensor([[True, False], [True, True], [False, False]])
    routing = Routing(experts_TK, weights_TK, assigned_TK, assigned_TK, valid_T, 3)
    assert choices_of(routing).tolist() == [[0, 0, 1], [1, 0, 1]]
    soft = Routing(experts_TK, weights_TK, assigned_TK, assigned_TK, valid_T, 3, is_soft=True)
    assert choices_of(soft).tolist() == [[0.25, 0, 0.75]] * 2


def test_kept_are_twins_and_the_most_similar_pairs():
    cosines = torch.tensor([[1.0, 0.2, 0.97], [0.2, 1.0, math.nan], [0.97, math.nan, 1.0]])
    correlations = torch.tensor([[1.0, -0.1, -0.9], [-0.1, 1.0, -0.5], [-0.9, -0.5, 1.0]])
    found = find_similar("q", cosines, correlations)
    assert [(pair.first, pair.second) for pair in found] == [(0, 2), (0, 1)]
    assert found[0].cosine == pytest.approx(0.97) and found[0].correlation == pytest.approx(-0.9)
    assert find_similar("q", torch.full((2, 2), math.nan), None) == []


@pytest.mark.parametrize(("seen", "share", "usual"), [(100, 0.5, 0.125), (10, 1.0, 0.25), (7, 3 / 7, 0.6), (5, 0, 0.3)])
def test_the_score_is_the_signed_root_of_the_likelihood_ratio(seen, share, usual):
    observed, expected = [seen * share, seen * (1 - share)], [seen * usual, seen * (1 - usual)]
    with np.errstate(all="ignore"):
        ratio = power_divergence(observed, expected, lambda_="log-likelihood").statistic
    found = score(*(torch.tensor(value, dtype=torch.float64) for value in (seen, share, usual)))
    assert float(found) == pytest.approx(math.copysign(math.sqrt(ratio), share - usual))


@pytest.mark.parametrize("usual", [0.0, 1.0])
def test_no_token_is_typical_where_all_tokens_go_one_way(usual):
    assert score(torch.tensor(9.0), torch.tensor(usual), torch.tensor(usual)) == 0


def test_typical_are_frequent_tokens_that_reach_an_expert_more_than_others():
    counts = TokenCounts(torch.tensor([3, 5, 8, 9]), 2)
    ids_T = torch.tensor([5] * 40 + [8] * 40 + [9] * 2 + [3] * 40)
    first_T = torch.cat([torch.ones(40), torch.zeros(40), torch.ones(2), torch.tensor([1.0, 0.0]).repeat(20)])
    choices_TE = torch.stack([first_T, 1 - first_T], dim=1).double()
    for rows in torch.arange(122).split(50):
        counts.add(ids_T[rows], choices_TE[rows])
    first, second = counts.find_typical("q", str)
    assert [token.text for token in first.tokens] == ["5"]  # 9 was seen twice only, 3 goes either way
    assert [(token.text, token.count, token.share) for token in second.tokens] == [("8", 40, 1.0)]
    assert first.usual == pytest.approx(62 / 122) and first.usual + second.usual == pytest.approx(1)


def test_the_strongest_tokens_come_once_each():
    def row(path, *tokens):
        made = [Token(text=text, count=9, share=1.0, score=value) for text, value in tokens]
        return [Typical(path=path, expert=0, usual=0.1, tokens=made)]

    found = find_strongest([row("a", ("x", 4.0)), row("b", ("x", 6.0)), row("c", ("y", 5.0)), row("d")])
    assert [(r.path, r.tokens[0].text) for r in found] == [("b", "x"), ("c", "y")]


def batches_of_words(rows=6, length=12, count=2):
    return [{"input_ids": token_ids(rows, length, seed)} for seed in range(count)]


def test_it_agrees_with_inspect_and_changes_nothing():
    model = adapt(tiny_llama(), mixora.recipe("sira", num_experts=4, top_k=2, rank=2, capacity_factor=0.5))
    batches = batches_of_words()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = examine(model, batches, build_tokenizer())
    assert model.training and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for mine, theirs in zip(found.routing, mixora.inspect(model, batches), strict=True):
        assert mine == {name: theirs[name] for name in mine}
    assert len({row.path for row in found.typical}) == 2 and len(found.typical) == 8
    assert {pair.path for pair in found.similar} == {site["path"] for site in found.routing}


def test_a_token_that_always_goes_its_own_way_is_found():
    model = adapt(tiny_llama(), mixora.recipe("sira", num_experts=4, top_k=1, rank=2, targets=["q_proj"]))
    batch = {"input_ids": torch.full((4, 20), 9).scatter(1, torch.tensor([[3, 7, 15]] * 4), 40)}
    routers = [module for name, module in model.named_modules() if name.endswith("layers.0.self_attn.q_proj")]
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        router = routers[0].mixora_router["default"]
        router.zero_()
        router[2] = embedding[40]
        router[1] = embedding[9]
    tokenizer = build_tokenizer()
    found = {row.expert: row for row in examine(model, [batch], tokenizer).typical if "layers.0" in row.path}
    assert [(t.text, t.count, t.share) for t in found[2].tokens] == [(tokenizer.decode([40]), 12, 1.0)]
    assert [t.text for t in found[1].tokens] == [tokenizer.decode([9])]
    assert found[1].usual == pytest.approx(68 / 80)


def test_copied_experts_are_twins():
    model = adapt(tiny_gpt2(), mixora.recipe("sira", num_experts=4, top_k=2, rank=2))
    module = next(module for name, module in model.named_modules() if name.endswith("h.1.attn.c_attn"))
    with torch.no_grad():
        for bank in (module.mixora_A, module.mixora_B):
            bank["default"][6:8] = bank["default"][2:4]
    found = [pair for pair in examine(model, batches_of_words(), build_tokenizer()).similar if pair.cosine > 0.95]
    assert [(p.path, p.first, p.second) for p in found] == [("transformer.h.1.attn.c_attn", 1, 3)]
    assert isinstance(found[0], Similar) and found[0].cosine == pytest.approx(1, abs=1e-5)


def test_an_encoder_decoder_has_tokens_of_two_streams():
    model = adapt(tiny_t5(), mixora.recipe("sira", num_experts=2, top_k=1, rank=2, task_type="SEQ_2_SEQ_LM"))
    batch = {"input_ids": token_ids(9, 12) % 2 + 10, "labels": token_ids(9, 8, seed=3) % 2 + 20}
    tokenizer = build_tokenizer()
    found = examine(model, [batch], tokenizer)
    read, written = ({tokenizer.decode([n]) for n in numbers} for numbers in ((10, 11), (0, 20, 21)))
    assert len(found.routing) == 2 * 4 + 2 * 8 and {"encoder", "decoder"} <= {row.path[:7] for row in found.strongest}
    for row in found.strongest:
        is_reading = row.path.startswith("encoder") or row.path.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        assert {token.text for token in row.tokens} <= (read if is_reading else written)


@pytest.mark.parametrize("recipe", ["adamix-lora", "lora"])
def test_blind_routers_have_no_tokens_and_no_twins(recipe):
    model = fill(get_peft_model(tiny_llama(), mixora.recipe(recipe)))
    found = examine(model, batches_of_words(), build_tokenizer())
    assert found.typical == found.strongest == found.similar == []
    assert bool(found.routing) is (recipe == "adamix-lora")


def test_pictures_have_no_tokens():
    model = adapt(tiny_vit(), mixora.recipe("sira", num_experts=4, top_k=2, rank=2))
    found = examine(model, [{"pixel_values": torch.randn(3, 3, 8, 8)}], build_tokenizer())
    assert found.routing and found.similar and not found.typical


def test_a_model_without_an_active_adapter_has_no_routing():
    model, batch = adapt(tiny_llama(), mixora.recipe("lora")), {"input_ids": token_ids(1, 4)}
    assert mixora.inspect(model, batch)
    with model.disable_adapter(), pytest.raises(ModelError, match="no active mixture adapter was run"):
        mixora.inspect(model, batch)
    with pytest.raises(ModelError, match="got a model without one, or with its adapters disabled"):
        mixora.inspect(tiny_llama(), batch)
