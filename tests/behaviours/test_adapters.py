"""Several adapters on one model: added, named, switched, disabled, deleted; no trace of what is gone."""

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

import mixora
from mixora.errors import ConfigError, MixoraError
from mixora.mixture import mixtures_of
from tests.behaviours.cases import (
    CANNOT_ADD_UP,
    IDS,
    RECIPES,
    TEXT,
    add,
    base,
    config,
    each_kind,
    each_recipe,
    logits,
    of_adapters,
    plain_logits,
    same,
    wrap,
)


@pytest.fixture
def two(recipe):
    """Two adapters of one recipe, the first of them active, and what the base and each adapter compute."""
    model = wrap(recipe, adapter_name="one")
    found = {"one": logits(model), None: plain_logits()}
    add(model, "two", recipe)
    model.set_adapter("two")
    found["two"] = logits(model)
    model.set_adapter("one")
    assert not same(found["one"], found["two"])
    return model, found


def assert_gone(model, name):
    assert name not in model.peft_config
    assert not of_adapters(model, name)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for attribute in (*module.adapter_layer_names, *module.other_param_names):
                assert name not in getattr(module, attribute)


@each_recipe
def test_the_active_adapter_alone_computes_and_is_trainable(recipe, two):
    model, found = two
    for name, other in (("two", "one"), ("one", "two"), ("two", "one")):
        model.set_adapter(name)
        assert model.active_adapters == [name]
        assert same(logits(model), found[name])
        assert all(p.requires_grad for p in of_adapters(model, name).values())
        assert not any(p.requires_grad for p in of_adapters(model, other).values())


@each_recipe
def test_adding_changes_nothing_that_is_there(recipe):
    model = wrap(recipe)
    before, grads = logits(model), {key: p.requires_grad for key, p in model.named_parameters()}
    add(model, "new", recipe)
    assert model.active_adapters == ["default"]
    assert same(logits(model), before)
    assert grads == {key: p.requires_grad for key, p in model.named_parameters() if key in grads}
    assert not any(p.requires_grad for p in of_adapters(model, "new").values())


@each_recipe
def test_an_adapter_is_served_frozen(recipe, two):
    model, found = two
    model.set_adapter("two", inference_mode=True)
    assert same(logits(model), found["two"])
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("two")
    assert {key for key, p in model.named_parameters() if p.requires_grad} == of_adapters(model, "two").keys()


@each_recipe
def test_deleting_an_idle_adapter_changes_nothing(recipe, two):
    model, found = two
    model.delete_adapter("two")
    assert_gone(model, "two")
    assert model.active_adapters == ["one"]
    assert same(logits(model), found["one"])


@pytest.mark.works_with("PEFT", "several adapters: deleting the active one leaves another")
@each_recipe
def test_deleting_the_active_adapter_leaves_the_other_at_work(recipe, two):
    model, found = two
    with pytest.warns(UserWarning, match="adapter 'one' was active; now 'two' is"):
        model.delete_adapter("one")
    assert_gone(model, "one")
    assert model.active_adapters == ["two"]
    assert same(logits(model), found["two"])


@each_recipe
def test_deleting_the_last_adapter_leaves_the_base(recipe):
    model = wrap(recipe)
    model.delete_adapter("default")
    assert_gone(model, "default")
    assert model.active_adapters == []
    # a PEFT model wants an adapter; what it holds computes without
    assert same(logits(model.get_base_model() if model.peft_config else model.base_model.model), plain_logits())
    add(model, "next", recipe)
    model.set_adapter("next")
    assert not same(logits(model), plain_logits())


@each_recipe
def test_names_that_no_adapter_has(recipe):
    model = wrap(recipe)
    before = logits(model)
    with pytest.raises(ValueError, match=r"nobody.*not found"):
        model.set_adapter("nobody")
    for names in ("defualt", ["default", "defualt"]):
        with pytest.raises(ConfigError, match="adapter 'defualt': is not there; did you mean 'default'"):
            model.base_model.set_adapter(names)
    with pytest.raises(ValueError, match="nobody does not exist"):
        model.delete_adapter("nobody")
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", config(recipe))
    assert same(logits(model), before)


@each_recipe
def test_two_active_adapters_add_up_or_are_refused(recipe, two):
    model, found = two
    model.base_model.set_adapter(["one", "two"])
    if recipe in CANNOT_ADD_UP:
        with pytest.raises(MixoraError, match=CANNOT_ADD_UP[recipe]):
            logits(model)
        return
    x = torch.randn(2, 3, 32)
    layer = next(module for module in mixtures_of(model) if "q_proj" in module.path or "mlp" in module.path)
    deltas = []
    for name in ("one", "two"):
        layer.set_adapter(name)
        deltas.append(layer(x) - layer.base_layer(x))
    layer.set_adapter(["one", "two"])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + sum(deltas))
    assert not same(logits(model), found["one"])
    assert all(p.requires_grad for p in of_adapters(model).values())
    model.delete_adapter("two")
    assert model.active_adapters == ["one"]
    assert same(logits(model), found["one"])


@each_kind
@each_recipe
def test_disabled_it_is_the_base_and_comes_back(recipe, kind):
    model = wrap(recipe, kind)
    plain, expected = plain_logits(kind), logits(model, kind)
    assert not same(plain, expected)
    grads = {key: p.requires_grad for key, p in model.named_parameters()}
    with model.disable_adapter():
        assert same(logits(model, kind), plain)
        with model.disable_adapter():
            pass
        assert same(logits(model, kind), plain)
        assert not any(p.requires_grad for p in of_adapters(model).values())
    assert same(logits(model, kind), expected)
    with pytest.raises(KeyError, match="of the body"), model.disable_adapter():
        raise KeyError("of the body")
    assert grads == {key: p.requires_grad for key, p in model.named_parameters()}
    assert same(logits(model, kind), expected)


@each_recipe
def test_switching_while_disabled_takes_effect_afterwards(recipe, two):
    model, found = two
    with model.disable_adapter():
        model.set_adapter("two")
        assert same(logits(model), found[None])
    assert same(logits(model), found["two"])


@each_kind
@each_recipe
def test_unloading_gives_the_untouched_base(recipe, kind):
    plain, model = base(kind), wrap(recipe, kind)
    inner = model.get_base_model()
    assert inner._forward_pre_hooks
    unloaded = model.unload()
    assert unloaded is inner
    assert not hasattr(unloaded, "peft_config")
    assert not any(isinstance(module, BaseTunerLayer) for module in unloaded.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unloaded.modules())
    if kind == "encoder":
        # PEFT leaves the trained head in its place
        unloaded.classifier.load_state_dict(plain.classifier.state_dict())
    assert [name for name, _ in unloaded.named_modules()] == [name for name, _ in plain.named_modules()]
    assert unloaded.state_dict().keys() == plain.state_dict().keys()
    assert same(logits(unloaded, kind), plain_logits(kind))


@each_recipe
def test_a_failed_adapter_leaves_no_trace(recipe):
    model = wrap(recipe)
    before, keys = logits(model), model.state_dict().keys()
    rules = [f"rules.{rule}.targets" for rule in config(recipe).rules]
    with pytest.raises(ConfigError, match="'nothing' matches no"):
        model.add_adapter("two", config(recipe, **{key: ["nothing"] for key in rules}))
    assert list(model.peft_config) == ["default"]
    assert model.state_dict().keys() == keys
    assert same(logits(model), before)
    plain = base()
    with pytest.raises(ConfigError, match="'nothing' matches no"):
        get_peft_model(plain, config(recipe, **{key: ["nothing"] for key in rules}))
    assert plain.state_dict().keys() == base().state_dict().keys()
    assert all(p.requires_grad for p in plain.parameters())


@pytest.mark.works_with("PEFT", "several adapters of different recipes: switched, disabled, deleted")
def test_adapters_of_all_recipes_on_one_base(saved):
    """To the bit but where experts stand inside of a part that another adapter wraps: `joint` cannot serve there."""
    model = PeftModel.from_pretrained(base(), saved(RECIPES[0])[0], adapter_name=RECIPES[0])
    for recipe in RECIPES[1:]:
        model.load_adapter(saved(recipe)[0], adapter_name=recipe)
    for recipe in (*RECIPES, *reversed(RECIPES)):
        model.set_adapter(recipe)
        assert same(logits(model), saved(recipe)[1])
    with model.disable_adapter():
        assert same(logits(model), plain_logits())
    for recipe in RECIPES[1::2]:
        model.delete_adapter(recipe)
        assert_gone(model, recipe)
    for recipe in RECIPES[::2]:
        model.set_adapter(recipe)
        assert same(logits(model), saved(recipe)[1])
    assert same(logits(model.unload()), plain_logits())


@each_recipe
def test_rows_with_adapters_of_their_own_are_refused(recipe, two):
    """PEFT drops the argument for tuners that cannot do it, and computes all rows with the active adapter."""
    model, _ = two
    names = ["one", "two", "one", "two"]
    with pytest.raises(MixoraError, match="rows of one batch cannot have adapters of their own; valid: a batch for"):
        model(**TEXT, adapter_names=names)
    with pytest.raises(MixoraError, match="rows of one batch"):
        model.generate(input_ids=IDS, adapter_names=names, max_new_tokens=1)


@each_recipe
def test_a_weighted_sum_of_adapters_is_refused(recipe, two):
    model, found = two
    with pytest.raises(MixoraError, match=r"add_weighted_adapter: .* valid: several active adapters"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum")
    assert same(logits(model), found["one"])


PLAIN = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")


@each_recipe
def test_adapters_of_another_type_are_refused(recipe, tmp_path):
    model = wrap(recipe)
    get_peft_model(base(), PLAIN).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(tmp_path, adapter_name="plain")
    plain = PeftModel.from_pretrained(base(), tmp_path)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        plain.add_adapter("mine", config(recipe))
    with pytest.raises(ValueError, match="'MIXORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(base(), config(recipe), mixed=True)


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_a_mixed_model_refuses_the_type():
    plain = get_peft_model(base(), PLAIN, mixed=True)
    assert isinstance(plain, PeftMixedModel)
    with pytest.raises(ValueError, match="'MIXORA' is not compatible with the `PeftMixedModel`"):
        plain.add_adapter("sira", config("sira"))


def test_adapters_with_sites_of_their_own_switch_off_where_they_have_none():
    model = wrap("sira", adapter_name="one")
    model.add_adapter("two", mixora.recipe("sira", num_experts=3, top_k=2, rank=5, targets=["q_proj", "down_proj"]))
    model.set_adapter("two")
    assert same(logits(model), plain_logits())
    for module in mixtures_of(model):
        assert ("two" in module.parts) == module.path.endswith(("q_proj", "down_proj"))
