"""AdaMix on whole models: what is drawn when, what an optimiser touches, and what serves in evaluation."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

import mixora
from mixora.errors import ConfigError, ModelError, TrainingError
from mixora.mixture import mixtures_of
from mixora.passes import tracing
from tests.models import adapt, fill, gradients, tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_t5, token_ids

IDS = token_ids(3, 7)
TEXT = {"input_ids": IDS, "labels": IDS}
FILLED = ("mixora_A", "mixora_B", "mixora_bias")


def make(recipe="adamix-lora", base=tiny_llama, **changes):
    config = mixora.recipe(recipe, **{"num_experts": 3, "rank": 2, **changes})
    return fill(get_peft_model(base(), config), names=FILLED).train()


def route(trace, pass_index=0):
    return [int(o.routing.experts_TK[0, 0]) for o in trace.observations if o.pass_index == pass_index]


def test_a_pass_has_one_route_and_each_pass_its_own():
    model = make(num_experts=8)
    with tracing(owns_losses=True) as trace:
        for _ in range(6):
            model(**TEXT)
    routes = [route(trace, n) for n in range(6)]
    assert all(len(r) == 4 for r in routes)
    assert len({tuple(r) for r in routes}) == 6
    for seen in trace.observations:
        assert seen.routing.experts_TK.unique().numel() == 1


def test_the_seed_decides_the_routes():
    model, found = make(num_experts=8), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        with tracing(owns_losses=True) as trace:
            model(**TEXT)
        found.append(route(trace))
    assert found[0] == found[1] != found[2]


def test_both_halves_of_an_encoder_decoder_belong_to_one_pass():
    model = make(base=tiny_t5)
    torch.manual_seed(0)
    with tracing(owns_losses=True) as trace:
        model(**TEXT)
    assert trace.passes == 1
    assert len(trace.observations) == 12


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_layers_take_the_same_route(use_reentrant):
    found = []
    for recomputes in (False, True):
        model = make("adamix", num_experts=8, share="none")
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        mixora.compute_loss(model, TEXT)[0].backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


@pytest.mark.parametrize("recipe", ["adamix", "adamix-lora"])
def test_an_optimiser_leaves_experts_alone_that_were_not_drawn(recipe):
    """AdamW with decay and momentum: a step without a draw changes neither weight nor state."""
    model = make(recipe, num_experts=8, share="none")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.5)
    idle = 0
    for seed in range(6):
        torch.manual_seed(seed)
        before = {name: p.detach().clone() for name, p in trained.items()}
        states = {name: copy.deepcopy(dict(optimiser.state[p])) for name, p in trained.items() if p in optimiser.state}
        optimiser.zero_grad()
        mixora.compute_loss(model, TEXT)[0].backward()
        drawn = {name for name, p in trained.items() if p.grad is not None}
        optimiser.step()
        assert drawn
        for name in trained.keys() - drawn:
            idle += 1
            assert torch.equal(trained[name], before[name])
            for key, value in states.get(name, {}).items():
                assert torch.equal(optimiser.state[trained[name]][key], value)
        assert all(not torch.equal(trained[name], before[name]) for name in drawn)
    assert idle > 50


@pytest.mark.parametrize("recipe", ["adamix", "adamix-lora"])
def test_evaluation_is_by_the_mean_also_in_the_middle_of_training(recipe):
    """Evaluating changes nothing that is trained, and sees every update."""
    runs = []
    for evaluates in (False, True):
        model = make(recipe, share="none")
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        seen = []
        for seed in range(4):
            if evaluates:
                seen.append(model.eval()(IDS).logits)
                torch.testing.assert_close(seen[-1], merged_by_hand(model, recipe)(IDS).logits)
            torch.manual_seed(seed)
            mixora.compute_loss(model.train(), TEXT)[0].backward()
            optimiser.step()
            optimiser.zero_grad()
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(seen[0], seen[-1])


def merged_by_hand(model, recipe):
    """The same recipe with one expert, the mean of all."""
    one = get_peft_model(tiny_llama(), mixora.recipe(recipe, num_experts=1, rank=2, share="none"))
    for single, many in zip(mixtures_of(one), mixtures_of(model), strict=True):
        tensors = many.parameters_of("default")
        for name, tensor in single.parameters_of("default").items():
            kind = name.removesuffix("_0")
            tensor.data.copy_(sum(tensors[f"{kind}_{e}"] for e in range(3)) / 3)
    return one.eval()


def test_what_serves_can_be_chosen():
    model = make(share="none").eval()
    merged = model(IDS).logits
    with mixora.served_by(model, "fixed", expert=1):
        fixed = model(IDS).logits
    with mixora.served_by(model, "random"):
        torch.manual_seed(0)
        random = [model(IDS).logits for _ in range(3)]
        torch.manual_seed(0)
        again = [model(IDS).logits for _ in range(3)]
    with mixora.served_by(model, "ensemble", draws=3):
        torch.manual_seed(0)
        averaged = model(**TEXT)
    assert torch.equal(model(IDS).logits, merged)
    assert all(torch.equal(*pair) for pair in zip(random, again, strict=True))
    assert not torch.equal(random[0], random[1])
    torch.testing.assert_close(averaged.logits, sum(random) / 3)
    assert averaged.loss is None

    for layer in mixtures_of(model):
        tensors = layer.parameters_of("default")
        for kind in "AB":
            for e in (0, 2):
                tensors[f"{kind}_{e}"].data.copy_(tensors[f"{kind}_1"])
    torch.testing.assert_close(model(IDS).logits, fixed)


def test_an_ensemble_generates_without_a_cache():
    model = make(base=lambda: tiny_llama(use_cache=True), task_type="CAUSAL_LM").eval()
    with mixora.served_by(model, "ensemble", draws=2):
        written = model.generate(input_ids=IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
        with pytest.raises(ModelError, match=r"cannot use a cache.*valid: use_cache=False"):
            model.generate(input_ids=IDS, max_new_tokens=3, use_cache=True, pad_token_id=0)
    assert written.shape == (3, 10)
    assert model.generation_config.use_cache is True


def test_impossible_servings_are_refused():
    model, plain = make().eval(), adapt(tiny_llama(), mixora.recipe("lora")).eval()
    with (
        pytest.raises(ConfigError, match="served by 'median'; valid: merged, random, fixed, ensemble"),
        mixora.served_by(model, "median"),
    ):
        pass
    with pytest.raises(ConfigError, match="expert: got 3; valid: 0 to 2"), mixora.served_by(model, "fixed", expert=3):
        pass
    with pytest.raises(ConfigError, match="draws no routes; valid: 'merged'"), mixora.served_by(plain, "random"):
        pass
    with pytest.raises(ConfigError, match="draws: got 0"), mixora.served_by(model, "ensemble", draws=0):
        pass
    with mixora.served_by(plain, "merged"):
        plain(IDS)


def test_a_pass_by_itself_in_training_is_refused():
    with pytest.raises(TrainingError, match=r"losses\.consistency: compares two passes .* mixora.Trainer, mixora.SFT"):
        make()(**TEXT)
    with torch.no_grad():
        make()(**TEXT)
    make(**{"losses.consistency.coefficient": 0.0})(**TEXT).loss.backward()


def test_a_consistency_loss_without_draws_is_refused():
    with pytest.raises(ConfigError, match=r"losses\.consistency: has no effect without a router that draws"):
        mixora.plan(tiny_llama(), mixora.recipe("lora", **{"losses.consistency.coefficient": 1.0}))
    with pytest.raises(ConfigError, match=r"losses\.load_balance: has no effect without a router that decides"):
        mixora.plan(tiny_llama(), mixora.recipe("adamix", **{"losses.load_balance.coefficient": 1.0}))


def test_tied_adapters_are_refused():
    config = mixora.recipe("adamix", share="none", tied=True)
    with pytest.raises(ConfigError, match=r"rules\.ffn\.router\.tied: got true .*valid: false, or LoRA experts"):
        mixora.plan(tiny_llama(), config)


def test_queries_and_values_must_be_linears_of_their_own():
    with pytest.raises(ConfigError, match="'query-value' matches no module of this model"):
        mixora.plan(tiny_gpt2(), mixora.recipe("adamix-lora"))
    assert len(mixora.plan(tiny_gpt2(), mixora.recipe("adamix-lora", targets=["c_attn"])).sites) == 2


def test_an_allocation_of_unequal_ranks_is_refused():
    path = mixora.plan(tiny_llama(), mixora.recipe("adamix-lora")).sites[0].path
    config = mixora.MixoraConfig(**{**plain_data(mixora.recipe("adamix-lora")), "allocation": {path: [2, 3]}})
    with pytest.raises(ConfigError, match=r"router 'uniform' have one rank, but .* the ranks \[2, 3\]"):
        mixora.plan(tiny_llama(), config)


def plain_data(config):
    return {"rules": config.rules, "losses": config.losses}


@pytest.mark.parametrize("changes", [{"share": "up"}, {"share": "none"}, {"share": "none", "tied": True}], ids=str)
@pytest.mark.parametrize("base", [tiny_llama, tiny_bert_classifier, tiny_t5])
def test_the_merged_dense_model_computes_the_same(base, changes):
    model = make(base=base, **changes).double().eval()
    batch = {"input_ids": IDS, **({"decoder_input_ids": IDS} if base is tiny_t5 else {})}
    with torch.no_grad():
        expected = model(**batch).logits
        dense = model.merge_and_unload()
        torch.testing.assert_close(dense(**batch).logits, expected)
    assert not mixtures_of(dense)


def test_an_adapter_behind_a_module_is_not_folded_into_weights():
    with pytest.raises(mixora.errors.MixoraError, match="cannot be merged: its experts stand behind the module"):
        make("adamix").merge_and_unload()


@pytest.mark.parametrize("recipe", ["adamix", "adamix-lora"])
def test_files_hold_every_expert_once(recipe, tmp_path):
    model = make(recipe, share="up")
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="other", is_trainable=True)
    for old, new in zip(mixtures_of(model), mixtures_of(again), strict=True):
        assert old.parameters_of("default").keys() == new.parameters_of("other").keys()
        for name, tensor in old.parameters_of("default").items():
            assert torch.equal(tensor, new.parameters_of("other")[name])
    twin = copy.deepcopy(again).eval()
    assert torch.equal(twin(IDS).logits, again.eval()(IDS).logits)


# encoders of 24 and 12 layers, and GPT-2 medium's sizes with queries and values of their own
SHAPES = {
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16},
    "base": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
}
COUNTS = [
    ("large", "adamix", {"rank": 16, "num_experts": 4}, 811_392, 1_992_192),
    ("base", "adamix", {"rank": 48, "num_experts": 4}, 894_528, 2_223_360),
    ("large", "adamix-lora", {"rank": 4, "num_experts": 8}, 393_216, 1_769_472),
    ("large", "adamix", {"rank": 8, "num_experts": 8}, 417_984, 1_795_584),
]


@pytest.mark.parametrize(("shape", "recipe", "changes", "served", "trained"), COUNTS)
def test_counts_of_the_paper(shape, recipe, changes, served, trained):
    with torch.device("meta"):
        base = tiny_bert_classifier(layers=24 if shape == "large" else 12, **SHAPES[shape])
    plan = mixora.plan(base, mixora.recipe(recipe, **changes))
    assert (plan.active_parameters, plan.parameters) == (served, trained)


def test_an_ensemble_does_not_touch_passes_in_training():
    model, plain = make(**{"losses.consistency.coefficient": 0.0}).train(), {"input_ids": IDS}
    model.get_base_model().generation_config = None
    torch.manual_seed(0)
    expected = model(**plain).logits
    with mixora.served_by(model, "ensemble", draws=3):
        torch.manual_seed(0)
        assert torch.equal(model(**plain).logits, expected)
        # without labels there is no loss to take away
        assert model.eval()(**plain).loss is None
    assert model.get_base_model().generation_config is None
