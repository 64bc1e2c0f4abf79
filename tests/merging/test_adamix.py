"""Drawn experts merged: the mean, the mean of products, a greedy choice; read by plain PEFT, with the same logits."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel

import mixora
from mixora.errors import ConfigError, DataError
from mixora.mixture import mixtures_of
from tests.merging.test_export import logits, saved
from tests.models import fill, tiny_bert_classifier, tiny_llama, token_ids

NAMES = ("mixora_A", "mixora_B", "mixora_bias")
SMALL = {"num_experts": 3, "rank": 2}
FORMS = {
    "up": {"share": "up"},
    "down": {"share": "down"},
    "none": {"share": "none"},
    "tied": {"share": "none", "tied": True},
}
MODELS = {
    "llama": (tiny_llama, "AutoModelForCausalLM", "CAUSAL_LM"),
    "bert": (tiny_bert_classifier, "AutoModelForSequenceClassification", "SEQ_CLS"),
}


def make(recipe, folder, base="llama", **changes):
    build, _, task = MODELS[base]
    model = saved(build, folder, mixora.recipe(recipe, task_type=task, **{**SMALL, **changes}))
    return fill(model, seed=2, std=0.1, names=NAMES).eval()


@pytest.mark.slow
@pytest.mark.parametrize(("base", "form"), [("llama", "up"), ("llama", "tied"), ("bert", "none")])
def test_plain_peft_computes_the_same(base, form, by_plain_peft, tmp_path):
    model = make("adamix-lora", tmp_path, base, **FORMS[form])
    expected = logits(model)
    merged = mixora.merge(model, tmp_path / "out")
    assert {(s.method, s.rank, s.error) for s in merged.sites} == {("exact", 6 if form == "tied" else 2, 0.0)}
    found = by_plain_peft(MODELS[base][1], tmp_path / "base", tmp_path / "out")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_other_adapter_servers_ask_for(form, tmp_path):
    """One rank, no rank patterns, names of modules, no modules of its own: what vLLM's reader checks."""
    mixora.merge(make("adamix-lora", tmp_path, **FORMS[form]), tmp_path / "out")
    config = LoraConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.rank_pattern, config.alpha_pattern, config.modules_to_save) == ({}, {}, None)
    assert config.target_modules == {"q_proj", "v_proj"}
    assert config.lora_alpha / config.r == 32 / 2
    assert not [key for key in json.loads((tmp_path / "out/adapter_config.json").read_text()) if "mixora" in key]


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_tied_pairs_can_be_cut_with_a_known_error(rank, tmp_path):
    model = make("adamix-lora", tmp_path, **FORMS["tied"])
    merged = mixora.merge(model, tmp_path / "out", rank=rank)
    for site, layer in zip(merged.sites, mixtures_of(model), strict=True):
        tensors = layer.parameters_of("default")
        whole_OI = sum(tensors[f"B_{e}"].T @ tensors[f"A_{e}"] for e in range(3)).detach().double() / 3
        values = torch.linalg.svdvals(whole_OI)
        expected = (values[rank:].square().sum() / values.square().sum()).sqrt()
        assert site.error == pytest.approx(float(expected), rel=1e-4)
        assert (site.method, site.rank) == ("truncated", rank)


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("share", ["up", "none"])
def test_adapters_behind_modules_become_one_expert(share, base, tmp_path):
    model = make("adamix", tmp_path, base, share=share)
    merged = mixora.merge(model, tmp_path / "out", to="averaged")
    assert (merged.form, {site.method for site in merged.sites}) == ("averaged", {"averaged"})
    one = mixora.from_pretrained(MODELS[base][0](), tmp_path / "out")
    torch.testing.assert_close(logits(one), logits(model), rtol=0, atol=1e-6)
    counted = sum(p.numel() for n, p in one.named_parameters() if "mixora_" in n)
    assert counted == mixora.plan(MODELS[base][0](), mixora.recipe("adamix", **SMALL)).active_parameters
    assert "mixora.from_pretrained" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("tied", [True, False])
def test_linear_experts_beside_adapters_keep_their_scale(tied, tmp_path):
    """Tied experts lie below each other, of rank 6 where the rule's alpha was said of rank 2."""
    uniform = {"kind": "uniform", "num_experts": 3, "share": "none"}
    rules = {
        "ffn": {"targets": ["mlp"], "expert": {"kind": "bottleneck", "rank": 2}, "router": uniform},
        "attention": {
            "targets": ["q_proj"],
            "expert": {"kind": "lora", "rank": 2, "alpha": 8},
            "router": {**uniform, "tied": tied},
        },
    }
    model = fill(saved(tiny_llama, tmp_path, mixora.MixoraConfig(rules=rules)), seed=2, names=NAMES)
    merged = mixora.merge(model, tmp_path / "out", to="averaged")
    assert {site.path.split(".")[-1]: site.rank for site in merged.sites} == {"mlp": 2, "q_proj": 6 if tied else 2}
    one = mixora.from_pretrained(tiny_llama(), tmp_path / "out")
    for name, module in one.named_modules():
        if name.endswith("q_proj"):
            tensors = model.get_submodule(name).parameters_of("default")
            products = [tensors[f"B_{up}"].T @ tensors[f"A_{down}"] for up in range(3) for down in range(3)]
            change = sum(products[::4]) / 3 if tied else sum(products) / 9
            torch.testing.assert_close(module.get_delta_weight("default"), 8 / 2 * change)
    torch.testing.assert_close(logits(one), logits(model), rtol=0, atol=1e-6)


def spoil(model, expert):
    """Make one expert useless everywhere."""
    with torch.no_grad():
        for layer in mixtures_of(model):
            for name, tensor in layer.parameters_of("default").items():
                if name.endswith(f"_{expert}"):
                    tensor.copy_(5 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(expert)))


@pytest.mark.parametrize("recipe", ["adamix", "adamix-lora"])
def test_a_greedy_soup_takes_only_what_lowers_the_loss(recipe, tmp_path):
    model = make(recipe, tmp_path, "bert", share="none", num_experts=4)
    fill(model, seed=3, std=5.0, names=("modules_to_save.default",))
    ids = token_ids(12, 7, seed=4)
    with torch.no_grad():
        batch = {"input_ids": ids, "labels": model(ids).logits.argmax(dim=-1)}
    spoil(model, 2)
    to = "averaged" if recipe == "adamix" else "peft-lora"
    merged = mixora.merge(model, tmp_path / "out", to=to, soup=[batch])
    soup = merged.soup

    def loss(members):
        with mixora.routing.draws.serving(members=tuple(members)), torch.no_grad():
            return model(**batch).loss.item()

    alone = [loss([e]) for e in range(4)]
    order = sorted(range(4), key=alone.__getitem__)
    chosen = [order[0]]
    for expert in order[1:]:
        if loss([*chosen, expert]) < loss(chosen):
            chosen.append(expert)
    assert soup.members == tuple(sorted(chosen))
    assert soup.losses == pytest.approx(alone, rel=1e-4)
    assert soup.loss == pytest.approx(loss(chosen), rel=1e-4)
    assert soup.loss <= min(soup.losses)
    assert soup.loss_of_all == pytest.approx(loss(range(4)), rel=1e-4)
    assert 2 not in soup.members
    read = mixora.from_pretrained if recipe == "adamix" else PeftModel.from_pretrained
    one = read(tiny_bert_classifier(), tmp_path / "out").eval()
    assert one(**batch).loss.item() == pytest.approx(soup.loss, rel=1e-4)
    assert f"experts {', '.join(map(str, soup.members))} of 4" in (tmp_path / "out/README.md").read_text()


def test_options_without_effect_are_refused(tmp_path):
    adapters, loras = make("adamix", tmp_path), make("adamix-lora", tmp_path)
    for options, name in (
        ({"to": "averaged", "rank": 1}, "rank"),
        ({"to": "averaged", "uniform_rank": True}, "uniform_rank"),
        ({"to": "dense"}, "dense"),
        ({}, "peft-lora"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}: model.layers.0.mlp has an adapter behind it"):
            mixora.merge(adapters, tmp_path / "out", **options)
    plain = saved(tiny_llama, tmp_path, mixora.recipe("lora"))
    with pytest.raises(ConfigError, match="soup: the sites of this adapter draw from no experts"):
        mixora.merge(plain, tmp_path / "out", soup=[{"input_ids": token_ids(1, 4)}])
    with pytest.raises(DataError, match="no token is supervised"):
        mixora.merge(loras, tmp_path / "out", soup=[{"input_ids": token_ids(1, 4), "labels": torch.full((1, 4), -100)}])
    assert not (tmp_path / "out").exists()
