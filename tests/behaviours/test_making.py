"""What `get_peft_model` makes of a base: what it offers, what is trainable, what it says of itself."""

import json

import peft
import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

import mixora
from mixora.errors import ConfigError
from mixora.mixture import mixtures_of
from tests.behaviours.cases import (
    IDS,
    KINDS,
    base,
    config,
    each_kind,
    each_recipe,
    logits,
    of_adapters,
    of_base,
    plain_logits,
    same,
    warnings_of,
    wrap,
)


def assert_starts_as_the_base(model, recipe, kind="decoder"):
    # adapters that start as small random numbers make a small difference
    atol = 0.02 if recipe == "adamix" else 0
    torch.testing.assert_close(logits(model, kind), plain_logits(kind), rtol=0, atol=atol)


@each_kind
@each_recipe
def test_it_starts_as_the_base_and_only_the_adapter_is_trainable(recipe, kind):
    model = get_peft_model(base(kind), config(recipe, kind))
    assert_starts_as_the_base(model, recipe, kind)
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == of_adapters(model).keys()
    heads = sum(p.numel() for key, p in trainable.items() if "modules_to_save" in key)
    assert bool(heads) == (kind == "encoder")
    counted, everything = model.get_nb_trainable_parameters()
    planned = sum(site["parameters"] for site in model.peft_config["default"].plan)
    assert counted == planned + heads == sum(p.numel() for p in trainable.values())
    assert everything == counted + sum(p.numel() for p in base(kind).parameters())


@each_recipe
def test_it_is_an_ordinary_peft_model(recipe, capsys):
    model = wrap(recipe)
    assert isinstance(model, PeftModel)
    for name in ("save_pretrained", "push_to_hub", "generate", "load_adapter", "merge_and_unload", "get_base_model"):
        assert callable(getattr(model, name))
    assert (model.active_adapters, model.active_adapter) == (["default"], "default")
    assert model.peft_type == "MIXORA"
    assert model.prefix == "mixora_"
    model.print_trainable_parameters()
    assert f"trainable params: {model.get_nb_trainable_parameters()[0]:,}" in capsys.readouterr().out
    # what is not found is looked for in the base
    assert model.lm_head is model.get_base_model().lm_head
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


@each_recipe
def test_it_says_what_it_is(recipe):
    model = wrap(recipe)
    text = repr(model)
    assert "Mixture(" in text
    assert "(base_layer): " in text
    assert "(default): Parameter" in text
    settings = model.peft_config["default"]
    assert recipe in repr(settings)
    assert json.loads(json.dumps(settings.to_dict()))["recipe"] == recipe


@each_recipe
def test_its_status_tells_layers_and_adapters(recipe):
    model = wrap(recipe)
    layers = model.get_layer_status()
    paths = {site["path"] for site in model.peft_config["default"].plan}
    assert {layer.name.removeprefix("model.").replace(".base_layer", "") for layer in layers} == paths
    assert {layer.module_type for layer in layers} == {"Mixture"}
    status = model.get_model_status()
    assert status.num_adapter_layers == len(mixtures_of(model)) == len(paths)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.available_adapters == ["default"]
    assert status.peft_types == {"default": "MIXORA"}
    assert status.devices == {"default": ["cpu"]}
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "MixoraModel")
    with model.disable_adapter():
        assert not model.get_model_status().enabled


@each_recipe
def test_the_seed_decides_what_it_starts_with(recipe):
    made = []
    for seed in (3, 3, 4):
        plain = base()
        torch.manual_seed(seed)
        made.append(of_adapters(get_peft_model(plain, config(recipe))))
    assert all(same(made[1][key], p) for key, p in made[0].items())
    random = [key for key, p in made[0].items() if not same(made[2][key], p)]
    assert any("mixora_A" in key for key in random)


@each_recipe
def test_one_configuration_serves_several_models_and_stays_as_it_was(recipe):
    settings = config(recipe, "encoder")
    before = settings.to_dict()
    first = get_peft_model(base("encoder"), settings)
    second = get_peft_model(base("encoder"), settings)
    assert settings.plan is None
    # for classifiers PEFT itself writes down which heads are saved
    assert {**settings.to_dict(), "modules_to_save": None} == {**before, "modules_to_save": None}
    assert first.peft_config["default"].plan == second.peft_config["default"].plan
    assert first.peft_config["default"] is not second.peft_config["default"]


@pytest.mark.skipif(not hasattr(peft, "get_base_model_state_dict"), reason="PEFT gives it since 0.19")
@each_recipe
def test_the_base_keeps_its_tensors_and_their_names(recipe):
    plain = base().state_dict()
    model = wrap(recipe)
    found = peft.get_base_model_state_dict(model)
    assert found.keys() == plain.keys() == of_base(model).keys()
    assert all(same(found[key], tensor) for key, tensor in plain.items())


@each_recipe
def test_it_is_made_without_memory(recipe):
    model = get_peft_model(base(), config(recipe), low_cpu_mem_usage=True)
    assert {p.device.type for p in of_adapters(model).values()} == {"meta"}
    assert {p.device.type for key, p in model.named_parameters() if "mixora_" not in key} == {"cpu"}


@each_recipe
def test_it_is_put_into_a_model_without_a_peft_model_around(recipe):
    plain = base()
    model = inject_adapter_in_model(config(recipe), plain)
    assert model is plain
    assert {key for key, p in model.named_parameters() if p.requires_grad} == of_adapters(model).keys()
    assert_starts_as_the_base(model, recipe)
    state = get_peft_model_state_dict(wrap(recipe))
    set_peft_model_state_dict(model, state)
    assert same(logits(model), logits(wrap(recipe)))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@each_recipe
def test_making_it_twice_warns_and_making_it_after_unloading_does_not(recipe):
    model = wrap(recipe)
    with pytest.warns(UserWarning, match="modify a model with PEFT for a second time"):
        again = get_peft_model(model.get_base_model(), config(recipe))
    assert list(again.peft_config) == ["default"]
    assert again.get_model_status().num_adapter_layers == len(mixtures_of(again))
    unloaded = again.unload()
    assert same(logits(unloaded), plain_logits())
    made = []
    texts = warnings_of(lambda: made.append(get_peft_model(unloaded, config(recipe))))
    assert not [text for text in texts if "second time" in text or "multiple adapters" in text]
    assert_starts_as_the_base(made[0], recipe)


FOREIGN = {
    "target_modules": ["q_proj"],
    "exclude_modules": ["q_proj"],
    "layers_to_transform": [0],
    "layers_pattern": "layers",
    "rank_pattern": {},
    "target_parameters": ["weight"],
    "trainable_token_indices": [1],
    "ensure_weight_tying": True,
    "init_weights": False,
    "bias": "all",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_settings_of_other_tuners_are_refused(name):
    """PEFT would drop them with a warning."""
    with pytest.raises(ConfigError, match=f"{name}: unknown key"):
        mixora.MixoraConfig(rules=config("sira").rules, **{name: FOREIGN[name]})
    with pytest.raises(ConfigError, match=f"{name}: reaches no part of this recipe"):
        mixora.recipe("sira", **{name: FOREIGN[name]})


Q_AND_V = {f"model.layers.{n}.self_attn.{name}_proj" for n in (0, 1) for name in "qv"}


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (["q_proj", "v_proj"], Q_AND_V),
        (r".*\.(q|v)_proj", Q_AND_V),
        # all but some
        (r"(?!.*[ko]_proj).*self_attn.*", Q_AND_V),
        # only some layers
        (r"model\.layers\.1\..*[qv]_proj", {path for path in Q_AND_V if ".1." in path}),
    ],
)
def test_what_others_spell_by_many_settings_is_a_list_or_an_expression(targets, paths):
    model = get_peft_model(base(), config("sira", targets=targets))
    assert {module.path for module in mixtures_of(model)} == paths


def test_all_linears_leave_the_heads_alone():
    for kind, count in (("decoder", 14), ("encoder", 12), ("encoder-decoder", 32)):
        model = get_peft_model(base(kind), config("sira", kind, targets=["all-linear"]))
        paths = [module.path for module in mixtures_of(model)]
        assert len(paths) == count
        assert not [path for path in paths if "lm_head" in path or "classifier" in path]


def test_other_entries_than_the_peft_model_work_too():
    """The bare base model and its backbone run the adapters, with the mask that they were given."""
    model = wrap("sira")
    mask = torch.tensor([[1] * 6] * 3 + [[1] * 3 + [0] * 3])
    for entry in (model, model.get_base_model(), model.get_base_model().model):
        with mixora.passes.tracing() as trace:
            entry(IDS, mask)
        assert {int(o.routing.valid_T.sum()) for o in trace.observations} == {21}


def test_each_kind_has_a_class_of_peft():
    found = [type(get_peft_model(base(kind), config("lora", kind))).__name__ for kind in KINDS]
    assert found == ["PeftModelForCausalLM", "PeftModelForSequenceClassification", "PeftModelForSeq2SeqLM"]
