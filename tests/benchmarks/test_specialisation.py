"""Whether experts serve different groups of rows, against scikit-learn and by hand."""

import pytest
import torch
from peft import get_peft_model
from sklearn.metrics import mutual_info_score

import mixora
from benchmarks.quality.specialisation import count_by_row, judge_specialisation, measure_information
from tests.models import tiny_llama


def test_information_is_that_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(0, 4, (200,), generator=generator)
    groups = ["code" if expert < 2 else "math" for expert in experts]
    counts = {"site": torch.nn.functional.one_hot(experts, 4).double()}
    found = judge_specialisation(counts, groups)
    assert found["information"] == pytest.approx(mutual_info_score(groups, experts.tolist()))
    assert measure_information(counts, groups) == found["information"]
    assert found["p"] == 0.001 and found["by_chance"] < 0.05
    shuffled = [groups[place] for place in torch.randperm(200, generator=generator)]
    assert judge_specialisation(counts, shuffled)["p"] > 0.01
    assert judge_specialisation({}, groups) == {"sites": 0} and measure_information({}, groups) is None


def test_assignments_are_counted_by_row():
    model = get_peft_model(tiny_llama(), mixora.recipe("sira"))
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    counts = count_by_row(model, [{"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": mask}])
    assert counts and all(rows.sum(dim=1).tolist() == [16, 8] for rows in counts.values())


def test_one_batch_tells_that_nothing_is_routed():
    model = get_peft_model(tiny_llama(), mixora.recipe("lora"))
    # a second batch could not be run
    assert count_by_row(model, [{"input_ids": torch.ones(2, 4, dtype=torch.long)}, {}]) == {}
