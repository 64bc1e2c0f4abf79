"""What a merge says while it works and when it refuses, word for word, and what it foresees."""

import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file

import mixora.merging
from mixora.contracts import Shape
from mixora.errors import CheckpointError, ConfigError, MixoraError, ModelError
from mixora.merging.approximation import _group
from mixora.merging.export import _configure, _module_names, name_base
from mixora.merging.procedure import foresee
from mixora.mixture.low_rank import LowRank
from tests.models import adapt, tiny_bert_classifier, tiny_llama, token_ids

IDS = token_ids(2, 6)
BATCHES = [{"input_ids": IDS, "labels": IDS}]
Q_0, Q_1 = (f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1))


def lora(**changes):
    return adapt(tiny_llama(), mixora.recipe("lora", targets=["q_proj"], rank=4, **changes))


def routed(**changes):
    settings = {"targets": ["q_proj"], "num_experts": 4, "top_k": 2, "rank": 2, **changes}
    return adapt(tiny_llama(), mixora.recipe("sira", **settings))


def behind():
    return adapt(tiny_llama(), mixora.recipe("adamix", num_experts=2, rank=3))


class Heard:
    """Keeps what a stage is called and what it counts."""

    def __init__(self):
        self.said = []

    @contextmanager
    def __call__(self, what):
        self.said.append((what, []))
        yield lambda *numbers: self.said[-1][1].append(numbers)


def message(error, model, out, **settings):
    with pytest.raises(error) as caught:
        mixora.merge(model, out, **settings)
    assert not out.exists()
    return str(caught.value)


def test_refusals(tmp_path):
    out = tmp_path / "out"
    assert message(ConfigError, routed(), out) == (
        f"{Q_0} (and 1 more sites): cannot be merged exactly: router 'topk' of rule 'attention' weighs experts by the "
        "input, so no single LoRA computes the same; valid: --approximate (in Python: approximation=...) for the "
        "nearest one on data of yours, or keep the adapter"
    )
    assert message(ConfigError, routed(targets=[Q_1]), out).startswith(f"{Q_1}: cannot be merged exactly: router")
    assert message(ConfigError, lora(), out, rank=0) == "rank: got 0; valid: 1 or more"
    material = mixora.Approximation(BATCHES, BATCHES)
    assert message(ConfigError, lora(), out, approximation=material) == (
        "approximate: every site of this adapter is merged exactly; valid: merge it without"
    )
    assert message(ConfigError, behind(), out, rank=1, to="dense").partition(": ")[::2] == (
        "dense, rank",
        "model.layers.0.mlp has an adapter behind it, with a non-linearity inside, that no weight and no LoRA "
        "can hold; valid: averaged, an adapter of mixora's own with one expert",
    )
    assert message(ConfigError, lora(), out, to="averaged") == (
        "averaged: no expert of this adapter stands behind a module; valid: peft-lora"
    )
    assert message(ConfigError, lora(), out, to="lora").startswith("to: got 'lora'; did you mean 'peft-lora'?")
    assert message(ConfigError, lora(), out, to="dense", uniform_rank=True) == (
        "uniform_rank: a dense model has no ranks; valid: with peft-lora"
    )
    merged = lora()
    merged.merge_adapter()
    assert message(ConfigError, merged, out) == (
        "the adapter is merged into the weights; valid: call unmerge_adapter() first"
    )
    other = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    assert message(CheckpointError, other, out) == (
        "the active adapter 'default' is of type PeftType.LORA; valid: MIXORA"
    )


@pytest.mark.parametrize(
    ("make", "options", "way"),
    [
        (lora, {}, "exact"),
        (lora, {"rank": 1}, "cut to rank 1"),
        (lora, {"to": "dense"}, "exact"),
        (routed, {"approximate": True}, "fitted"),
        (routed, {"approximate": True, "to": "dense", "rank": 2}, "fitted"),
        (behind, {"to": "averaged"}, "averaged"),
    ],
)
def test_what_is_foreseen(make, options, way):
    ways = foresee(make(), **options)
    assert set(ways.values()) == {way}
    assert len(ways) == 2


def test_an_exact_merge(tmp_path):
    heard, model = Heard(), lora(alpha=8)
    merged = mixora.merge(model, tmp_path / "out", progress=heard)
    assert heard.said == [(f"writing {tmp_path / 'out'}", [])]
    assert [(site.path, site.method, site.rank, site.error) for site in merged.sites] == [
        (Q_0, "exact", 4, 0.0),
        (Q_1, "exact", 4, 0.0),
    ]
    assert (merged.form, merged.recipe, merged.fitted_on, merged.changes, merged.soup) == (
        "peft-lora",
        "lora",
        None,
        None,
        None,
    )
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["q_proj"])
    assert (config["inference_mode"], config["fan_in_fan_out"], config["rank_pattern"]) == (True, False, {})
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    served = model.get_submodule(f"base_model.model.{Q_0}").parameters_of("default")
    torch.testing.assert_close(tensors[f"base_model.model.{Q_0}.lora_A.weight"], served["A"].detach())
    torch.testing.assert_close(tensors[f"base_model.model.{Q_0}.lora_B.weight"], served["B"].detach().T)
    assert len(tensors) == 4
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_fitted_merge_counts_its_batches(tmp_path):
    heard = Heard()
    material = mixora.Approximation(BATCHES * 3, BATCHES * 2, origin="two rows")
    merged = mixora.merge(routed(), tmp_path / "out", approximation=material, rank=3, progress=heard)
    assert heard.said == [
        ("fitting, batches", [(1, 3), (2, 3), (3, 3)]),
        ("comparing on held-out batches", [(1, 2), (2, 2)]),
        (f"writing {tmp_path / 'out'}", []),
    ]
    assert merged.fitted_on == "3 batches of two rows"
    assert [(site.method, site.rank) for site in merged.sites] == [("fitted", 3)] * 2
    assert merged.changes.predictions == 2 * 10


def test_a_soup_counts_its_experts(tmp_path):
    heard = Heard()
    model = adapt(tiny_llama(), mixora.recipe("adamix-lora", targets=["q_proj"], num_experts=2, rank=2))
    merged = mixora.merge(model, tmp_path / "out", soup=BATCHES, progress=heard)
    assert [what for what, _ in heard.said] == ["cooking a soup, experts", f"writing {tmp_path / 'out'}"]
    assert heard.said[0][1] == [(done, 4) for done in range(1, 5)]
    assert len(merged.soup.losses) == 2


def pair(rank, scale):
    return LowRank(torch.ones(rank, 3), torch.full((rank, 2), 0.5), scale)


@pytest.mark.parametrize(
    ("pairs", "rank", "alpha", "ranks", "alphas", "scaled"),
    [
        ({"a.0.q": (4, 2.0), "a.1.q": (4, 2.0)}, 4, 8, {}, {}, False),
        ({"a.0.q": (4, 2.0), "a.1.q": (2, 2.0), "b": (4, 2.0)}, 4, 8, {r"^a\.1\.q": 2}, {r"^a\.1\.q": 4}, False),
        ({"a.0.q": (4, 1.0), "a.1.q": (4, 2.0)}, 4, 4, {}, {}, True),
        ({"a.0.q": (4, 0.3), "a.1.q": (4, 0.3)}, 4, 4, {}, {}, True),
    ],
)
def test_ranks_and_alphas(pairs, rank, alpha, ranks, alphas, scaled):
    given = {path: pair(*sizes) for path, sizes in pairs.items()}
    config, written = _configure(given)
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (rank, alpha, ranks, alphas)
    for path, (_, scale) in pairs.items():
        expected = 0.5 * scale if scaled else 0.5
        torch.testing.assert_close(written[path].B_rO, torch.full_like(written[path].B_rO, expected))


def test_names_are_those_without_adapters():
    names = list(_module_names(lora().get_base_model()))
    assert set(names) == {name for name, _ in tiny_llama().named_modules() if name}


def test_what_is_written_names_its_base_and_asks_nobody_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *names: pytest.fail("asks the hub")
    )
    model = adapt(tiny_bert_classifier(), mixora.recipe("lora", targets=["query"], task_type="SEQ_CLS"))
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.peft_config["default"].revision = "second"
    mixora.merge(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "second")
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == list(model.peft_config["default"].modules_to_save)


def test_names_that_only_mixora_knows_become_paths(monkeypatch):
    def resolve(name):
        if name == "unknown":
            raise ModelError(name)
        return Path("/somewhere") / name

    monkeypatch.setattr("mixora.merging.export.resolve_base", resolve)
    assert [name_base(name) for name in ("short", "unknown", None)] == [str(Path("/somewhere/short")), "unknown", None]


@pytest.mark.parametrize(("memory", "sizes"), [(575, [1, 1, 1]), (576, [2, 1]), (863, [2, 1]), (864, [3])])
def test_groups_of_sites_fill_the_memory_they_are_given(memory, sizes):
    """A site of 4 inputs, 6 outputs and rank 2 takes 2 (4 + 6) + 4^2 numbers of 8 bytes."""
    part = SimpleNamespace(shape=Shape(4, 6, (2,)))
    readers = [[SimpleNamespace(parts={"default": part})] for _ in range(3)]
    assert [len(group) for group in _group(readers, "default", memory)] == sizes


def test_a_dense_model_of_weights_that_are_not_finite_is_refused(tmp_path):
    model = lora()
    with torch.no_grad():
        model.get_submodule(f"base_model.model.{Q_1}").parameters_of("default")["B"].fill_(float("inf"))
    with pytest.raises(MixoraError, match=f"^{Q_1}: merging gives weights that are not finite"):
        mixora.merge(model, tmp_path / "out", to="dense")


def test_the_package_offers_what_it_names():
    names = ["Approximation", "Comparison", "Form", "Merged", "MergedSite", "foresee", "merge"]
    assert mixora.merging.__all__ == names
    assert all(hasattr(mixora.merging, name) for name in names)
