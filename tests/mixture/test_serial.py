"""Experts behind a whole module, with adapters inside of it: wrapping, several adapters, unloading, refusals."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import mixora
from mixora.errors import ConfigError, MixoraError
from mixora.mixture import Mixture
from tests import versions
from tests.models import adapt, fill, tiny_bert, tiny_llama, tiny_t5, token_ids

IDS = token_ids(2, 8)
SMALL = {"num_experts": 4, "rank": 3, "task_type": "CAUSAL_LM"}
BOTTLENECK = {"expert": {"kind": "bottleneck"}, "router": {"kind": "topk", "renormalise": True}}


def pesc(**changes):
    return mixora.recipe("pesc", **{**SMALL, **changes})


def serial(targets):
    return mixora.MixoraConfig(rules={"ffn": {"targets": targets, **BOTTLENECK}})


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def names_of(model):
    return [name for name, _ in model.named_modules()]


@pytest.fixture
def saved(tmp_path):
    model = adapt(tiny_llama(), pesc())
    model.save_pretrained(tmp_path / "one", save_embedding_layers=False)
    return tmp_path / "one", logits(model)


def test_adapters_inside_a_wrapped_module_keep_their_paths():
    model = adapt(tiny_llama(), pesc()).get_base_model()
    block, gate = (model.get_submodule(f"model.layers.0.mlp{end}") for end in ("", ".gate_proj"))
    assert isinstance(block, Mixture) and isinstance(gate, Mixture)
    assert (block.path, gate.path) == ("model.layers.0.mlp", "model.layers.0.mlp.gate_proj")
    assert gate is block.base_layer.gate_proj
    assert not hasattr(block, "act_function")


def test_unloading_restores_every_module():
    model = adapt(tiny_llama(), pesc())
    unloaded = model.unload()
    assert names_of(unloaded) == names_of(tiny_llama())
    assert torch.equal(logits(unloaded), logits(tiny_llama()))
    assert not unloaded._forward_pre_hooks


def test_disabling_gives_the_dense_model():
    model = adapt(tiny_llama(), pesc())
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny_llama()))
    assert not torch.allclose(logits(model), logits(tiny_llama()), atol=1e-3)


@pytest.mark.parametrize("second", [pesc(rank=5), mixora.recipe("lora", targets=["down_proj", "q_proj"], rank=2)])
def test_a_second_adapter_reaches_inside_a_wrapped_module(saved, second):
    folder, first = saved
    other = adapt(tiny_llama(), second, seed=7)
    model = PeftModel.from_pretrained(tiny_llama(), folder, adapter_name="one")
    model.add_adapter("two", second)
    assert torch.equal(logits(model), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "mixora_" not in n)
    weights = {n.replace(".base_layer", "").replace("default", "two"): p for n, p in other.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".two"):
                parameter.copy_(weights[name.replace(".base_layer", "")])
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(other))
    model.set_adapter("one")
    model.delete_adapter("two")
    assert torch.equal(logits(model), first)
    assert names_of(model.unload()) == names_of(tiny_llama())


def test_an_adapter_around_modules_that_are_wrapped_already():
    """The first adapter stands inside of what the second one wraps."""
    model = adapt(tiny_llama(), mixora.recipe("lora", targets=["down_proj"]), adapter_name="inside")
    inside = logits(model)
    model.add_adapter("around", pesc())
    fill(model, seed=3)
    model.set_adapter("around")
    around = logits(model)
    assert not torch.allclose(around, inside, atol=1e-3)
    model.base_model.set_adapter(["inside", "around"])
    both = logits(model)
    assert not torch.allclose(both, around, atol=1e-3)
    assert names_of(model.unload()) == names_of(tiny_llama())


SECOND = [pesc(rank=5), mixora.recipe("lora", targets=["all-linear"], rank=2)]


@pytest.mark.parametrize("second", SECOND)
def test_two_adapters_from_disk_and_back(saved, second, tmp_path):
    """Where other adapters wrap a module does not show in an adapter's files."""
    folder, first = saved
    other = adapt(tiny_llama(), second, seed=7)
    other.save_pretrained(tmp_path / "two", save_embedding_layers=False)
    model = PeftModel.from_pretrained(tiny_llama(), folder, adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    assert torch.equal(logits(model), first)
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(other))
    model.save_pretrained(tmp_path / "both", save_embedding_layers=False)
    for name, expected in (("one", first), ("two", logits(other))):
        assert torch.equal(logits(mixora.from_pretrained(tiny_llama(), tmp_path / "both" / name)), expected)


@versions.native
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_transformers_loads_a_second_adapter_of_the_same_shape_and_no_other(saved, tmp_path):
    folder, first = saved
    others = [adapt(tiny_llama(), second, seed=7) for second in SECOND]
    for name, other in zip(("same", "inside"), others, strict=True):
        other.save_pretrained(tmp_path / name, save_embedding_layers=False)
    model = tiny_llama()
    model.load_adapter(str(folder), adapter_name="one")
    model.load_adapter(str(tmp_path / "same"), adapter_name="two")
    model.set_adapter("one")
    assert torch.equal(logits(model), first)
    model.set_adapter("two")
    assert torch.equal(logits(model), logits(others[0]))
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp: is wrapped by another adapter and not by this one"):
        model.load_adapter(str(tmp_path / "inside"), adapter_name="three")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_peft_model_loads_bit_for_bit(saved, low_cpu_mem_usage):
    folder, expected = saved
    model = PeftModel.from_pretrained(tiny_llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), expected)
    assert not any(p.requires_grad for p in model.parameters())


@versions.native
def test_transformers_loads_bit_for_bit(saved):
    folder, expected = saved
    native = tiny_llama()
    native.load_adapter(str(folder), adapter_name="other")
    assert torch.equal(logits(native), expected)
    native.disable_adapters()
    assert torch.equal(logits(native), logits(tiny_llama()))


def test_two_active_adapters_behind_one_module_both_read_the_frozen_output():
    model = adapt(tiny_llama(), serial(["ffn"]), adapter_name="one")
    model.add_adapter("two", serial(["ffn"]))
    fill(model, seed=5, std=1).eval()
    block, x, deltas = model.get_submodule("base_model.model.model.layers.0.mlp"), torch.randn(2, 3, 32), []
    for name in ("one", "two"):
        model.set_adapter(name)
        deltas.append(block(x) - block.base_layer(x))
    model.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(block(x), block.base_layer(x) + sum(deltas))


def test_a_copy_is_independent():
    model = adapt(tiny_llama(), pesc())
    model(input_ids=IDS, labels=IDS).loss.backward()
    twin, before = copy.deepcopy(model), logits(model)
    assert torch.equal(logits(twin), before)
    fill(twin, seed=4)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(twin), before)


def test_tensors_take_the_dtype_of_the_weights_inside():
    model = get_peft_model(tiny_llama().bfloat16(), pesc(), autocast_adapter_dtype=False)
    block = model.get_submodule("base_model.model.model.layers.0.mlp")
    assert {kind: tensor.dtype for kind, tensor in block.parameters_of("default").items()} == {
        "A": torch.bfloat16,
        "B": torch.bfloat16,
        "router": torch.float32,
    }
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("router", ["topk", "single"])
def test_merging_is_refused(router):
    model = adapt(
        tiny_llama(), mixora.MixoraConfig(rules={"a": {"targets": ["ffn"], **BOTTLENECK, "router": {"kind": router}}})
    )
    with pytest.raises(MixoraError, match="its experts stand behind the module, with a non-linearity inside"):
        model.merge_and_unload()
    assert not model.get_submodule("base_model.model.model.layers.0.mlp").supports_lora_conversion()


@pytest.mark.parametrize(
    ("targets", "paths"),
    [
        (["mlp"], ["model.layers.0.mlp", "model.layers.1.mlp"]),
        (r"model\.layers\.1\.mlp", ["model.layers.1.mlp"]),
        (["layers.0.mlp", "layers.1.self_attn.o_proj"], ["model.layers.0.mlp", "model.layers.1.self_attn.o_proj"]),
        ("ffn", ["model.layers.0.mlp", "model.layers.1.mlp"]),
    ],
)
def test_any_module_that_a_rule_names_can_be_wrapped(targets, paths):
    config = serial(targets)
    assert [site.path for site in mixora.plan(tiny_llama(), config).sites] == paths
    logits(get_peft_model(tiny_llama(), config))


class Odd(nn.Module):
    """A feed-forward part without linears, in a model without a configuration."""

    def __init__(self):
        super().__init__()
        self.act, self.proj = nn.ReLU(), nn.Linear(3, 4)

    def forward(self, x):
        return self.act(self.proj(x))


@pytest.mark.parametrize(
    ("make", "targets", "message"),
    [
        (tiny_llama, ["mpl"], r"rules\.ffn\.targets: 'mpl' matches no module of this model"),
        (
            tiny_llama,
            ["self_attn"],
            r"self_attn is a LlamaAttention, which reads position_embeddings.* beside the hidden",
        ),
        (
            tiny_bert,
            ["layer.0.output"],
            r"layer\.0\.output is a BertOutput, which reads input_tensor beside the hidden",
        ),
        (Odd, ["act"], r"'act' is a ReLU; valid here: linear modules and modules of known width"),
        (Odd, ["ffn"], r"'ffn' matches no module of this model"),
    ],
)
def test_modules_that_cannot_be_wrapped(make, targets, message):
    with pytest.raises(ConfigError, match=message):
        mixora.plan(make(), serial(targets))


def test_experts_beside_a_module_need_a_linear_one():
    with pytest.raises(ConfigError, match=r"'ffn' names whole modules, which an expert that reads the module's input"):
        mixora.plan(tiny_llama(), mixora.recipe("lora", targets=["ffn"]))


def test_a_linear_that_two_rules_name_by_path_is_refused():
    rules = {**pesc().rules, "shared": {**pesc().rules["shared"], "targets": ["output.dense"]}}
    with pytest.raises(ConfigError, match=r"rules\.shared\.targets: .*output\.dense is already taken by rule 'ffn'"):
        mixora.plan(tiny_bert(), mixora.MixoraConfig(rules=rules))


def test_each_half_of_an_encoder_decoder_reads_its_own_tokens():
    model = adapt(tiny_t5(), serial(["ffn"]))
    with mixora.passes.tracing() as trace:
        model(input_ids=token_ids(2, 6), labels=token_ids(2, 4))
    found = {o.path.split(".")[0]: len(o.routing.valid_T) for o in trace.observations}
    assert found == {"encoder": 12, "decoder": 8}
