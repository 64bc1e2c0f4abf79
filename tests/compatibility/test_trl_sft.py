"""TRL's supervised fine-tuning: packing, batches without padding, losses on the assistant's or completion's tokens."""

import pytest
import torch
import trl
from datasets import Dataset
from torch.nn.functional import cross_entropy

import mixora
from mixora.passes import entrances
from tests.compatibility.texts import Catch, each, make_tokenizer, words
from tests.models import adapt, tiny_llama
from tests.training.setups import ROWS, settings

TRAINERS = {"trl.SFTTrainer": trl.SFTTrainer, "mixora.SFTTrainer": mixora.SFTTrainer}


def make_model(attention="sdpa"):
    """Few places and experts that differ: what a token gets depends on its sequence, and on nothing outside."""
    sizes = {"num_experts": 4, "top_k": 2, "rank": 2, "expert_dropout": 0.0, "capacity_factor": 0.8, "min_capacity": 1}
    config = mixora.recipe("sira", **sizes, task_type="CAUSAL_LM", **{"losses.load_balance.coefficient": 0.5})
    return adapt(tiny_llama(attn_implementation=attention, use_cache=True), config)


def train(trainer_class, folder, rows, attention="sdpa", **changes):
    """One step over all rows that changes nothing: the trainer, its log line, and the gradients."""
    catch = Catch()
    foreign = [mixora.AuxiliaryLossCallback()] if trainer_class is trl.SFTTrainer else []
    trainer = trainer_class(
        model=make_model(attention),
        args=trl.SFTConfig(**settings(folder, per_device_train_batch_size=len(rows)), bf16=False, **changes),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        callbacks=[catch, *foreign],
    )
    trainer.train()
    return trainer, next(line for line in trainer.state.log_history if "loss" in line), catch.gradients


# prompts of two words: the first token of a sequence is never predicted, so every way counts the same tokens
COMPLETIONS = [{"prompt": words(row[:2]), "completion": " " + words(row[2:])} for row in ROWS[:6]]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": words(row[:3])},
            {"role": "assistant", "content": words(row[3:6])},
            {"role": "user", "content": words(row[6:7])},
            {"role": "assistant", "content": words(row[7:])},
        ]
    }
    for row in ROWS[:6]
]
PADDED = {"max_length": None}
FREE = {"padding_free": True, "max_length": None}
WAYS = {
    "`padding_free=True`: gradients equal those of the padded batch": FREE,
    "`padding_free=True` with `pad_to_multiple_of`: what fills up is no token": {**FREE, "pad_to_multiple_of": 64},
    "`packing=True` (bfd): gradients equal those of the padded batch": {"packing": True, "max_length": 26},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("trainer_class", "changes"),
    [
        pytest.param(trainer, changes, marks=pytest.mark.works_with(name, way), id=f"{name}-{way}")
        for name, trainer in TRAINERS.items()
        for way, changes in WAYS.items()
    ],
)
def test_sequences_side_by_side_train_as_padded_ones(trainer_class, changes, attention, tmp_path):
    _, expected, of_padded = train(trainer_class, tmp_path, COMPLETIONS, attention, **PADDED)
    trainer, found, gradients = train(trainer_class, tmp_path, COMPLETIONS, attention, **changes)
    batch = next(iter(trainer.get_train_dataloader()))
    assert "attention_mask" not in batch
    assert (batch["position_ids"] == 0).sum() >= len(COMPLETIONS)
    for name in ("loss", "load_balance"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert gradients.keys() == of_padded.keys()
    for name, gradient in of_padded.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.works_with(
    "trl.SFTTrainer", "packed batches: each sequence is a routing group of its own, filling is none"
)
def test_routers_know_where_a_packed_sequence_begins_and_what_fills_up(tmp_path):
    trainer, *_ = train(trl.SFTTrainer, tmp_path, COMPLETIONS, packing=True, max_length=26, pad_to_multiple_of=64)
    batch = next(iter(trainer.get_train_dataloader()))
    here, x_BSI = entrances._read_pass(trainer.model.train(), batch), torch.zeros(*batch["input_ids"].shape, 1)
    tokens = here.tokens("source", x_BSI)
    lengths = [len(row) + 1 for row in ROWS[:6]]
    assert len(tokens.valid_T) == 128
    assert tokens.group_T[tokens.valid_T].unique(return_counts=True)[1].sort().values.tolist() == sorted(lengths)


def loss_by_hand(model, ids, kept):
    """Mean cross entropy of the tokens `kept`, sequence by sequence, and how many they are."""
    total, count = 0.0, 0
    for row, is_kept in zip(ids, kept, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0, :-1]
        losses = cross_entropy(logits, torch.tensor(row[1:]), reduction="none")[torch.tensor(is_kept[1:])]
        total, count = total + losses.sum().item(), count + len(losses)
    return total / count, count


def task_loss(trainer_class, line):
    """What the trainer logs, without the auxiliary loss, which ours include."""
    return line["loss"] - line.get("auxiliary_loss", 0.0) * issubclass(trainer_class, mixora.SFTTrainer)


@each(TRAINERS, "`assistant_only_loss=True`: the loss is that of the assistant's tokens")
def test_only_what_the_assistant_says_counts(trainer_class, tmp_path):
    _, line, gradients = train(trainer_class, tmp_path, CHATS, assistant_only_loss=True, max_length=None)
    ids = [[4, *row[:3], 5, *row[3:6], 2, 4, row[6], 5, *row[7:], 2] for row in ROWS[:6]]
    kept = [[0] * 5 + [1] * 4 + [0] * 3 + [1] * (len(row) - 7 + 1) for row in ROWS[:6]]
    expected, count = loss_by_hand(make_model(), ids, [[bool(flag) for flag in flags] for flags in kept])
    assert count == sum(4 + len(row) - 6 for row in ROWS[:6])
    assert task_loss(trainer_class, line) == pytest.approx(expected, rel=1e-5)
    assert all(g.abs().max() > 0 for name, g in gradients.items() if "router" in name)


@each(TRAINERS, "rows of prompt and completion: the loss is that of the completion's tokens")
def test_only_completions_count(trainer_class, tmp_path):
    _, line, _ = train(trainer_class, tmp_path, COMPLETIONS, **PADDED)
    ids = [[*row, 2] for row in ROWS[:6]]
    expected, _ = loss_by_hand(make_model(), ids, [[False] * 2 + [True] * (len(row) - 1) for row in ROWS[:6]])
    assert task_loss(trainer_class, line) == pytest.approx(expected, rel=1e-5)
