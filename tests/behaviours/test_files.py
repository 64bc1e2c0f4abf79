"""Adapters on disk: what is written, and that it comes back to the bit by every way PEFT has."""

import json

import pytest
import torch
import yaml
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

import mixora
from mixora.errors import CheckpointError
from tests.behaviours.cases import (
    add,
    base,
    config,
    each_kind,
    each_recipe,
    load,
    logits,
    of_adapters,
    same,
    train,
    wrap,
)
from tests.models import adapt, fill


@each_kind
@each_recipe
def test_an_adapter_comes_back_to_the_bit_under_another_name(recipe, kind, saved):
    folder, expected = saved(recipe, kind)
    again = load(folder, kind, adapter_name="elsewhere")
    assert same(logits(again, kind), expected)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    # tensors are the adapter's, named as if no adapter had a name
    on_disk = load_file(folder / "adapter_model.safetensors")
    here = {key.replace(".elsewhere", ""): p for key, p in of_adapters(again).items()}
    heads = {key: p for key, p in here.items() if "modules_to_save" in key}
    here = {key.replace(".modules_to_save", ""): p for key, p in here.items()}
    assert here.keys() == on_disk.keys()
    assert all(same(on_disk[key], p) for key, p in here.items())
    assert bool(heads) == (kind == "encoder")


@each_recipe
def test_three_files_are_written_and_none_of_them_is_a_pickle(recipe, saved):
    folder, _ = saved(recipe)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    card = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert card["library_name"] == "peft"
    assert "base_model:adapter" in " ".join(card["tags"])


@each_recipe
def test_the_configuration_comes_back_as_it_was(recipe, saved):
    folder, _ = saved(recipe)
    again = PeftConfig.from_pretrained(folder)
    assert isinstance(again, mixora.MixoraConfig)
    written = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert (written["peft_type"], written["recipe"], written["task_type"]) == ("MIXORA", recipe, "CAUSAL_LM")
    mine = wrap(recipe).peft_config["default"]
    assert again.method == mine.method
    assert (again.recipe, again.plan) == (mine.recipe, mine.plan)
    # a saved adapter is for inference until someone trains on
    assert again.inference_mode


@each_recipe
def test_without_memory_for_two_and_added_to_others_it_is_the_same(recipe, saved):
    folder, expected = saved(recipe)
    model = load(folder, low_cpu_mem_usage=True)
    assert same(logits(model), expected)
    for name, is_meta in (("second", False), ("third", True)):
        result = model.load_adapter(folder, adapter_name=name, low_cpu_mem_usage=is_meta)
        assert result.missing_keys == []
        assert {p.device.type for p in model.parameters()} == {"cpu"}
        model.set_adapter(name)
        assert same(logits(model), expected)


@each_recipe
def test_a_loaded_adapter_can_be_trained_on(recipe, saved):
    folder, expected = saved(recipe)
    model = load(folder, is_trainable=True)
    assert {key for key, p in model.named_parameters() if p.requires_grad} == of_adapters(model).keys()
    before = train(model)
    assert not same(logits(model), expected)
    assert before[0] > 0


@pytest.mark.works_with("PEFT", "several adapters: saving those that are selected")
@each_recipe
def test_several_adapters_are_saved_each_in_a_folder(recipe, tmp_path):
    model = add(wrap(recipe), "second", recipe)
    first = logits(model)
    model.set_adapter("second")
    second = logits(model)
    model.save_pretrained(tmp_path / "all")
    again = load(tmp_path / "all")
    again.load_adapter(tmp_path / "all" / "second", adapter_name="second")
    assert same(logits(again), first)
    again.set_adapter("second")
    assert same(logits(again), second)
    # both orders, and only those selected
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert [path.name for path in (tmp_path / "one").iterdir() if path.is_dir()] == ["second"]
    assert not list((tmp_path / "one").glob("*.safetensors"))
    assert same(logits(load(tmp_path / "one" / "second", adapter_name="default")), second)


def test_names_inside_of_other_names_are_kept_apart(tmp_path):
    """Each is a part of another's name, or of a tensor's."""
    names = ["default", "default2", "other_default", "efaul", "A", "router", "lora"]
    model = wrap("sira")
    count = len(get_peft_model_state_dict(model))
    expected = {"default": logits(model)}
    for seed, name in enumerate(names[1:]):
        add(model, name, "sira", seed=seed)
        model.set_adapter(name)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    for name in names:
        folder = tmp_path if name == "default" else tmp_path / name
        assert len(load_file(folder / "adapter_model.safetensors")) == count
        assert same(logits(load(folder, adapter_name=name)), expected[name])


@each_recipe
def test_states_are_read_and_set_without_files(recipe):
    model = wrap(recipe)
    state = get_peft_model_state_dict(model)
    again = wrap(recipe, seed=5, adapter_name="other")
    assert not same(logits(again), logits(model))
    result = set_peft_model_state_dict(again, state, adapter_name="other")
    assert result.unexpected_keys == []
    assert same(logits(again), logits(model))
    assert get_peft_model_state_dict(again, adapter_name="other").keys() == state.keys()


def test_keys_may_be_mapped_on_the_way_in(tmp_path):
    """A file of a base whose blocks had another name."""
    model = wrap("lora")
    model.save_pretrained(tmp_path)
    again = get_peft_model(base(), config("lora"))
    mapping = {r"^model\.layers\.": "model.layers."}
    again.load_adapter(tmp_path, adapter_name="default", key_mapping=mapping)
    assert same(logits(again), logits(model))


@each_recipe
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_is_loaded_onto_a_base_of_another_dtype(recipe, dtype, saved):
    folder, expected = saved(recipe)
    for is_fp32 in (True, False):
        model = PeftModel.from_pretrained(base().to(dtype), folder, autocast_adapter_dtype=is_fp32)
        experts = {p.dtype for key, p in of_adapters(model).items() if "router" not in key}
        assert experts == {torch.float32 if is_fp32 else dtype}
        found = logits(model)
        assert found.dtype == dtype
        # a token whose experts are nearly as probable may get others
        error = (found.float() - expected).norm(dim=-1).median()
        assert error < 0.03 * expected.norm(dim=-1).median()


@each_recipe
def test_swapping_weights_under_a_compiled_model_is_for_lora(recipe, saved):
    folder, expected = saved(recipe)
    model = load(folder)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but MIXORA was passed"):
        hotswap_adapter(model, str(folder), adapter_name="default")
    assert same(logits(model), expected)


def test_tensors_that_a_file_lacks_are_named(tmp_path):
    model = wrap("sira")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors.pop(next(key for key in tensors if key.endswith("mixora_B")))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match=r"missing adapter keys.*mixora_B"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(("targets", "tokens"), [(["q_proj", "lm_head"], 64), (["q_proj"], 70)])
def test_embeddings_that_peft_saves_by_itself_come_back(targets, tokens, tmp_path):
    """Those that were resized, and heads that have an adapter."""
    base().save_pretrained(tmp_path / "base")
    models = [base(), base()]
    for model in models:
        model.resize_token_embeddings(tokens, mean_resizing=False)
        model.name_or_path = str(tmp_path / "base")
    model = adapt(models[0], mixora.recipe("lora", targets=targets)).eval()
    model.save_pretrained(tmp_path / "adapter")
    on_disk = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lm_head" in name and "mixora" not in name for name in on_disk)
    again = mixora.from_pretrained(models[1], tmp_path / "adapter")
    assert same(logits(again), logits(model))
    save_file(on_disk | {"foreign": torch.ones(1)}, tmp_path / "adapter" / "adapter_model.safetensors")
    models[1] = again.unload()
    with pytest.raises(CheckpointError, match="1 tensors do not fit the model:\n  foreign: unexpected"):
        mixora.from_pretrained(models[1], tmp_path / "adapter")


def test_fill_makes_a_difference():
    """What all of these tests rest on."""
    assert not same(logits(wrap("sira")), logits(base()))
    assert same(logits(fill(get_peft_model(base(), config("sira")), std=0.0)), logits(base()))
