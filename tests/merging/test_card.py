"""The card of a merged adapter, word for word, and the result that it tells of."""

from dataclasses import replace
from pathlib import Path

import pytest

from mixora import __version__
from mixora.cards import Facts
from mixora.merging.card import write_companions
from mixora.merging.comparison import Comparison
from mixora.merging.result import Merged, MergedSite
from mixora.merging.soup import Soup
from tests.cards.test_card import RECORD

SITES = (
    MergedSite("model.layers.0.q_proj", "exact", 4, 0.0),
    MergedSite("model.layers.1.q_proj", "exact", 8, 0.0),
    MergedSite("model.layers.0.mlp.1.up", "fitted", 4, 0.25),
    MergedSite("model.layers.1.mlp.1.up", "fitted", 4, 0.5),
    MergedSite("model.layers.2.q_proj", "exact", 6, 0.0),
)


def merged(folder, **changes):
    return replace(Merged(folder, "peft-lora", "org/base", "sira", SITES), **changes)


def card(result, task_type=None):
    write_companions(result, Facts(result.base, task_type, result.recipe))
    return (result.out / "README.md").read_text(encoding="utf-8")


def test_the_whole_card(tmp_path):
    changes = Comparison(1234, 2.1234567, 2.25, 0.0123456, 0.98765, 0.00123456)
    found = card(merged(tmp_path, fitted_on="3 batches of mine", changes=changes), "CAUSAL_LM")
    assert (
        found
        == f"""---
base_model: org/base
library_name: peft
pipeline_tag: text-generation
tags:
- mixora
- lora
- sira
---

# One LoRA adapter, merged from a mixture of adapters

Made by mixora {__version__} from an adapter with recipe `sira` on the base `org/base`.

LoRA experts on the attention linears, top-k routing with a capacity limit and expert dropout. SiRA: Sparse Mixture of \
Low Rank Adaptation, arXiv 2311.09179.

## How it was merged

- exact: computes what the mixture computes in evaluation, up to rounding.
- fitted: nearest LoRA by least squares over real tokens; the error is relative, of what the experts add there.
- Fitted on `3 batches of mine`.

| sites | number | method | rank | mean error | largest error |
|---|---|---|---|---|---|
| `model.layers.*.q_proj` | 3 | exact | 4-8 | 0 | 0 |
| `model.layers.*.mlp.1.up` | 2 | fitted | 4 | 0.375 | 0.5 |

## What changed

Measured over 1234 held-out predictions.

|  |  |
|---|---|
| loss of the mixture | 2.12346 |
| loss after merging | 2.25 |
| difference of a logit, mean | 0.0123 |
| difference of a logit, largest | 0.988 |
| KL divergence from the mixture, nats | 0.00123 |

## Load

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("org/base")
model = PeftModel.from_pretrained(base, "{tmp_path}")
```

## Limits

- Servers that read one rank for all modules, and no patterns, need it written with `--uniform-rank` where ranks differ.
- It was made for the weights of that base. Others of the same shape load, but do not fit.
- Nothing is known here of how the adapter was trained, or of its quality but what stands above.

## Licence

- Of this: not stated by its author.
- Of the base: not known here; look it up with the base.
"""
    )


def test_a_card_of_a_soup_of_other_sites(tmp_path):
    sites = (MergedSite("a.0.b", "averaged", 2, 0.0), MergedSite("a.0.c", "truncated", 1, 0.125))
    soup = Soup((0, 3), 1.23456789, 1.5, (2.0, 3.0, 4.0, 5.0))
    text = card(merged(tmp_path, form="averaged", recipe=None, sites=sites, soup=soup))
    assert "\n# Adapters with one expert, merged from a mixture of adapters\n" in text
    assert "from an adapter with rules of its own on the base `org/base`." in text
    how = text.split("## How it was merged\n\n")[1].splitlines()
    assert how[:4] == [
        "- averaged: the mean of the experts' weights, which is what the mixture computes with in evaluation.",
        "- truncated: the change of the weight, cut to its largest singular values; the error is relative, of that "
        "change.",
        "- Greedy soup: the mean of the experts 0, 3 of 4, chosen on held-out data:",
        "  loss 1.23457, with all experts 1.5.",
    ]
    assert text.split("```")[1].splitlines() == [
        "python",
        "import mixora  # PEFT and transformers know the adapter from here on",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        'base = AutoModelForCausalLM.from_pretrained("org/base")',
        f'model = PeftModel.from_pretrained(base, "{tmp_path}")',
    ]
    assert "What changed" not in text


CHOSEN = Soup((0, 2), 1.0, 1.5, (2.0, 3.0, 4.0))
AVERAGED = (MergedSite("a.0.b", "averaged", 2, 0.0),)


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"sites": SITES[:2]}, True),
        ({"sites": AVERAGED}, True),
        ({"sites": AVERAGED, "soup": replace(CHOSEN, members=(0, 1, 2))}, True),
        ({"sites": AVERAGED, "soup": CHOSEN}, False),
        ({"sites": (MergedSite("a.0.b", "truncated", 2, 0.5),)}, False),
        ({}, False),
    ],
)
def test_whose_the_scores_of_the_run_are(changes, is_same, tmp_path):
    write_companions(merged(tmp_path, **changes), Facts("org/base", record=RECORD))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    foreign = "They are those of the mixture before it was merged. What is here computes something else, as told below."
    assert (foreign in text) is not is_same
    assert ("value: 1.25" in text) is is_same and "| `loss` | 2.5 | 1.25 |" in text


@pytest.mark.parametrize(
    ("task_type", "auto"),
    [
        ("SEQ_CLS", "AutoModelForSequenceClassification"),
        ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM"),
        ("CAUSAL_LM", "AutoModelForCausalLM"),
        (None, "AutoModelForCausalLM"),
    ],
)
def test_a_card_of_a_dense_model(tmp_path, task_type, auto):
    text = card(merged(tmp_path, form="dense"), task_type)
    assert "\nlibrary_name: transformers\n" in text
    assert "\n# A dense model, merged from a mixture of adapters\n" in text
    assert text.split("```")[1].splitlines() == [
        "python",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{tmp_path}")',
    ]


def test_numbers_have_no_divergence(tmp_path):
    found = card(merged(tmp_path, changes=Comparison(2, 1.0, 1.0, 0.5, 0.5, None)))
    assert "difference of a logit, largest | 0.5 |" in found
    assert "divergence" not in found
    assert "| KL divergence from the mixture, nats | 0 |" in card(
        merged(tmp_path, changes=Comparison(2, 1.0, 1.0, 0.5, 0.5, 0.0))
    )


class Tokenizer:
    def save_pretrained(self, folder):
        assert isinstance(folder, str)
        (Path(folder) / "tokenizer.json").write_text("{}")


def test_the_tokenizer_stands_beside(tmp_path):
    write_companions(merged(tmp_path), Facts("org/base"), Tokenizer())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "tokenizer.json"]


def test_rows_and_plain_data(tmp_path):
    result = merged(tmp_path)
    assert result.rows() == [
        {"sites": "model.layers.*.q_proj", "count": 3, "method": "exact", "rank": "4-8", "mean_error": 0.0}
        | {"largest_error": 0.0},
        {"sites": "model.layers.*.mlp.1.up", "count": 2, "method": "fitted", "rank": "4", "mean_error": 0.375}
        | {"largest_error": 0.5},
    ]
    plain = result.to_dict()
    assert plain["out"] == str(tmp_path)
    assert plain["sites"][2] == {"path": "model.layers.0.mlp.1.up", "method": "fitted", "rank": 4, "error": 0.25}
    assert (plain["form"], plain["base"], plain["recipe"]) == ("peft-lora", "org/base", "sira")
    assert (plain["fitted_on"], plain["changes"], plain["soup"]) == (None, None, None)
