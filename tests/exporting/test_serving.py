"""The table of what can be served where: each row is made, read by each program or its restated rules, and compared."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import mixora
from mixora.errors import ConfigError, MixoraError
from mixora.recipes import recipe_names
from mixora.standalone import write_standalone, writing
from tests.exporting import readers
from tests.models import adapt, fill, tiny_llama, token_ids

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "serve_elsewhere.md"
IDS = token_ids(2, 9)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
BATCHES = [{"input_ids": token_ids(4, 8, seed), "labels": token_ids(4, 8, seed)} for seed in range(2)]
KINDS = ("mixora_A", "mixora_B", "mixora_router", "mixora_bias")


# over depth where the method says so
SMALL = {"hilo": {"num_experts": [2, 3], "rank": [1, 2]}, "mola": {"num_experts": [2, 3], "rank": 2}}


def mixture(recipe):
    """A mixture on a base that has a name, which adapters note down."""
    base = tiny_llama()
    base.name_or_path = base.config._name_or_path = "org/base"
    model = adapt(base, mixora.recipe(recipe, **SMALL.get(recipe, {"rank": 2}), task_type="CAUSAL_LM"))
    return fill(model, seed=3, std=0.2, names=KINDS).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def merged(recipe, folder, **settings):
    """The word of the table for the way it had to be merged, or the reason why it could not be."""
    try:
        mixora.merge(mixture(recipe), folder, **settings)
        return "exact"
    except ConfigError as error:
        if "--approximate" not in str(error):
            raise
    material = mixora.Approximation(BATCHES[:1], BATCHES[1:])
    mixora.merge(mixture(recipe), folder, approximation=material, **settings)
    return "approximate"


def compare(found, expected):
    return "exact" if torch.allclose(found, expected, rtol=0, atol=1e-5) else "approximate"


def by_mixora(recipe, folder, expected):
    mixture(recipe).save_pretrained(folder, save_embedding_layers=False)
    return compare(logits(mixora.from_pretrained(tiny_llama(), folder)), expected)


def by_dense(recipe, folder, expected):
    way = merged(recipe, folder, to="dense")
    assert way == compare(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    return way


def by_standalone(recipe, folder, expected):
    write_standalone(mixture(recipe), folder)
    return compare(logits(writing._read_back(folder, torch.float32)), expected)


def by_lora(recipe, folder, expected):
    """Plain PEFT, vLLM and llama.cpp give the same numbers, and to other servers no field is new."""
    way = merged(recipe, folder, uniform_rank=True)
    assert readers.problems_for_vllm(folder, LINEARS, max_lora_rank=64) == readers.problems_for_llama_cpp(folder) == []
    served = [readers.apply(tiny_llama(), folder, scale) for scale in (readers.vllm_scale, readers.llama_cpp_scale)]
    for model in (PeftModel.from_pretrained(tiny_llama(), folder), *served):
        assert way == compare(logits(model), expected)
    return way


WAYS = {
    by_mixora: ["mixora"],
    by_dense: ["dense"],
    by_standalone: ["standalone"],
    by_lora: ["plain PEFT", "vLLM", "llama.cpp", "other servers of LoRA"],
}


def table():
    """The words of the page's table, by recipe and column."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    head, _, *rows = cells[: 2 + len(recipe_names())]
    return {row[0].strip("`"): dict(zip(head[1:], row[1:], strict=True)) for row in rows}


def test_the_table_has_every_recipe():
    assert set(table()) == set(recipe_names())


@pytest.mark.parametrize("recipe", recipe_names())
def test_each_row_of_the_table(recipe, tmp_path):
    expected, found = logits(mixture(recipe)), {}
    assert not torch.allclose(logits(tiny_llama()), expected, atol=1e-3)
    for way, columns in WAYS.items():
        try:
            word = way(recipe, tmp_path / columns[0], expected)
        except MixoraError as error:
            assert re.search("non-linearity|does not compute", str(error))
            word = "no"
        found |= dict.fromkeys(columns, word)
    assert found == table()[recipe]


def test_unequal_ranks_are_not_for_servers_until_they_are_filled_up(tmp_path):
    """Of a LoRA with ranks that grow over depth, which is exact, and of HiLo."""
    grown = adapt(tiny_llama(4), mixora.recipe("lora", rank=[2, 4, 6, 8], alpha=12, targets=["q_proj", "v_proj"]))
    grown.peft_config["default"].base_model_name_or_path = "org/base"
    expected = logits(grown)
    mixora.merge(grown, tmp_path / "patterns")
    problems = readers.problems_for_vllm(tmp_path / "patterns", LINEARS)
    assert problems[0] == "rank_pattern is not read" and problems[-1].startswith("ranks [2, 4, 6, 8] where r is")
    for scale in (readers.vllm_scale, readers.llama_cpp_scale):
        served = readers.apply(tiny_llama(4), tmp_path / "patterns", scale)
        assert scale is readers.llama_cpp_scale or not torch.allclose(logits(served), expected, atol=1e-3)
    merged = mixora.merge(grown, tmp_path / "uniform", uniform_rank=True)
    assert {(site.rank, site.method, site.error) for site in merged.sites} == {(8, "exact", 0.0)}
    assert readers.problems_for_vllm(tmp_path / "uniform", LINEARS) == []
    assert readers.problems_for_llama_cpp(tmp_path / "uniform") == []
    again = PeftModel.from_pretrained(tiny_llama(4), tmp_path / "uniform")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)
    for scale in (readers.vllm_scale, readers.llama_cpp_scale):
        served = logits(readers.apply(tiny_llama(4), tmp_path / "uniform", scale))
        torch.testing.assert_close(served, expected, rtol=0, atol=1e-5)
    hilo = mixture("hilo")
    material = mixora.Approximation(BATCHES[:1], BATCHES[1:])
    mixora.merge(hilo, tmp_path / "hilo", approximation=material)
    assert "rank_pattern is not read" in readers.problems_for_vllm(tmp_path / "hilo", LINEARS)


def test_the_restated_checks_see_what_they_are_for(tmp_path):
    mixora.merge(mixture("adamix-lora"), tmp_path / "out")
    assert readers.problems_for_vllm(tmp_path / "out", LINEARS) == []
    assert readers.problems_for_vllm(tmp_path / "out", ("o_proj",)) == [
        "unexpected target modules ['q_proj', 'v_proj']"
    ]
    assert readers.problems_for_vllm(tmp_path / "out", LINEARS, 1) == ["rank 2 is greater than max_lora_rank 1"]
    config = tmp_path / "out" / "adapter_config.json"
    text = config.read_text()
    for field, value, problem in (
        ("modules_to_save", '["lm_head"]', "modules_to_save is not None"),
        ("use_dora", "true", "DoRA is not supported"),
        ("bias", '"all"', "bias is not none"),
    ):
        config.write_text(re.sub(rf'"{field}": [^,\n]*', f'"{field}": {value}', text))
        assert readers.problems_for_vllm(tmp_path / "out", LINEARS) == [problem]
    config.write_text(re.sub(r'"base_model_name_or_path": [^,\n]*', '"base_model_name_or_path": null', text))
    assert readers.problems_for_llama_cpp(tmp_path / "out") == ["base_model_name_or_path is missing"]
