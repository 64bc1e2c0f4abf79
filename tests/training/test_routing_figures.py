"""What the trainer logs of the routers, against `mixora.inspect` on the same rows; the alarm when they collapse."""

import logging
import math

import pytest
import torch
from peft import get_peft_model

import mixora
from mixora.diagnostics.collapse import measure_evenness
from tests.models import fill, tiny_llama
from tests.training.setups import ROWS, collate, make_model, make_trainer


def prepare(model, tmp_path, trainer_class=mixora.Trainer, **settings):
    """Four steps that see all rows once."""
    return make_trainer(trainer_class, tmp_path, model=model, **{"max_steps": 4, **settings})


def batch_of(rows):
    return collate([{"input_ids": row} for row in rows])


def lines_of(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def expect(sites):
    """The logged means by what `inspect` tells of each site, site after site."""
    count = len(sites)
    evenness = [measure_evenness(site["load"], site["experts_per_token"]) for site in sites]
    return {
        "routing/entropy": sum(site["entropy"] / site["max_entropy"] for site in sites) / count,
        "routing/evenness": sum(evenness) / count,
        "routing/largest_share": sum(max(site["load"]) * site["experts_per_token"] for site in sites) / count,
        "routing/dropped_share": sum(site["dropped_share"] for site in sites) / count,
        "routing/dead_experts": sum(len(site["dead_experts"]) for site in sites) / count,
    }


@pytest.mark.parametrize("name", ["Trainer", "SFTTrainer"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 2},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    ],
    ids=["plain", "accumulated", "checkpointed"],
)
def test_an_epoch_logs_what_inspect_finds_on_all_rows(changes, name, tmp_path):
    model = fill(make_model(capacity_factor=0.75, min_capacity=1, capacity_at_inference=True))
    settings = {"logging_steps": changes.get("max_steps", 4), **changes}
    trainer = prepare(model, tmp_path, getattr(mixora, name), **settings)
    sites = mixora.inspect(model, [batch_of(ROWS)])
    trainer.train()
    (line,) = lines_of(trainer)
    found = {name: value for name, value in line.items() if name.startswith("routing/")}
    assert found == pytest.approx(expect(sites), abs=1e-5)
    assert found["routing/dropped_share"] > 0


def test_soft_routing_is_told_by_weights(tmp_path):
    torch.manual_seed(0)
    adapter = mixora.recipe("molora", num_experts=4, rank=2, targets=["q_proj"], task_type="CAUSAL_LM")
    model = fill(get_peft_model(tiny_llama(), adapter))
    trainer = prepare(model, tmp_path, logging_steps=4)
    sites = mixora.inspect(model, [batch_of(ROWS)])
    trainer.train()
    (line,) = lines_of(trainer)
    assert line["routing/largest_share"] == pytest.approx(sum(max(s["load"]) for s in sites) / len(sites), abs=1e-5)
    assert line["routing/evenness"] == pytest.approx(
        sum(-sum(p * math.log(p) for p in s["load"]) / math.log(4) for s in sites) / len(sites), abs=1e-5
    )


@pytest.mark.parametrize("recipe", ["adamix-lora", "lora"])
def test_blind_routers_and_single_experts_log_nothing(recipe, tmp_path):
    model = get_peft_model(tiny_llama(), mixora.recipe(recipe, task_type="CAUSAL_LM"))
    trainer = prepare(model, tmp_path, max_steps=1)
    trainer.train()
    assert not any(name.startswith("routing/") for name in lines_of(trainer)[0])


def test_each_line_tells_of_its_own_interval(tmp_path):
    model = fill(make_model())
    trainer = prepare(model, tmp_path, logging_steps=2)
    trainer.train()
    first, second = (expect(mixora.inspect(model, [batch_of(rows)])) for rows in (ROWS[:8], ROWS[8:]))
    assert first != pytest.approx(second, abs=1e-3)
    for line, expected in zip(lines_of(trainer), (first, second), strict=True):
        assert {name: line[name] for name in expected} == pytest.approx(expected, abs=1e-5)


def test_neither_the_loss_nor_a_random_draw_changes(tmp_path, monkeypatch):
    losses = {}
    for is_on in (True, False):
        model = fill(make_model(expert_dropout=0.3))
        trainer = prepare(model, tmp_path, learning_rate=0.01, seed=3)
        if not is_on:
            monkeypatch.setattr(trainer.figures, "add", lambda model, trace: None)
        trainer.train()
        losses[is_on] = [line["loss"] for line in lines_of(trainer)], torch.rand(3).tolist()
    assert losses[True] == losses[False]


def collapse(model):
    """All tokens look the same, so that a router cannot but send them to the same experts."""
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(embedding[5].clone().expand_as(embedding))
    return model


def test_a_collapse_warns_once_and_names_sites_and_settings(tmp_path, caplog):
    trainer = prepare(collapse(fill(make_model())), tmp_path, max_steps=8)
    with caplog.at_level(logging.WARNING, logger="mixora"):
        trainer.train()
    (record,) = [r for r in caplog.records if r.name == "mixora"]
    assert record.getMessage() == trainer.alarm.note
    assert "Step 3: the routers of 4 of 4 sites have collapsed" in trainer.alarm.note
    assert "layer 0 self_attn.q_proj" in trainer.alarm.note
    assert "losses.load_balance.coefficient" in trainer.alarm.note


def test_healthy_routers_do_not_warn(tmp_path, caplog):
    trainer = prepare(fill(make_model()), tmp_path, max_steps=8)
    with caplog.at_level(logging.WARNING, logger="mixora"):
        trainer.train()
    assert trainer.alarm.note is None
    assert not [r for r in caplog.records if r.name == "mixora"]


def test_two_bad_intervals_are_no_collapse(tmp_path):
    trainer = prepare(collapse(fill(make_model())), tmp_path, max_steps=2)
    trainer.train()
    assert trainer.alarm.note is None
