"""An accumulated step is the step of all its rows at once, whether or not the model divides its own loss."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

import mixora
from mixora.training.own_loss import reads_num_items
from tests.models import fill, tiny_bert, tiny_bert_classifier, tiny_llama, tiny_t5, token_ids

ROWS, LENGTH = 8, 6


def with_head(kind, model, **settings):
    torch.manual_seed(0)
    return kind(type(model.config)(**{**model.config.to_diff_dict(), "pad_token_id": 0, **settings}))


MODELS = {
    "causal language model": (tiny_llama, lambda ids: ids),
    "sequence to sequence": (tiny_t5, lambda ids: ids),
    "masked language model": (lambda: with_head(BertForMaskedLM, tiny_bert()), lambda ids: ids),
    "classes, encoder": (tiny_bert_classifier, lambda ids: ids[:, 0] % 2),
    "classes, decoder": (lambda: with_head(LlamaForSequenceClassification, tiny_llama()), lambda ids: ids[:, 0] % 2),
    "numbers": (
        lambda: with_head(BertForSequenceClassification, tiny_bert(), num_labels=1),
        lambda ids: ids[:, 0] / 10,
    ),
}


class Catch(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients_of(model)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_a_step(model, rows, folder, batch_size):
    """The loss that the trainer tells of one step, and its gradients."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=ROWS // batch_size,
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        label_names=["labels"],
        train_sampling_strategy="sequential",
    )
    catch = Catch()
    trainer = mixora.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[catch])
    return trainer.train().training_loss, catch.gradients


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("batch_size", [8, 2])
def test_an_accumulated_step_is_that_of_all_rows(name, batch_size, tmp_path):
    make, label = MODELS[name]
    ids = token_ids(ROWS, LENGTH)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": label(ids)}
    rows = [{key: value[n] for key, value in batch.items()} for n in range(ROWS)]
    model = get_peft_model(make(), mixora.recipe("lora", rank=2, targets=["all-linear"]))
    fill(model)
    model.train()
    (loss := model(**batch).loss).backward()
    by_torch = gradients_of(model)
    model.zero_grad()
    told, gradients = train_a_step(model, rows, tmp_path, batch_size)
    assert told == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(gradients, by_torch, rtol=1e-3, atol=1e-6)


def test_a_model_without_source_is_taken_at_the_trainers_word():
    made = type("Made", (torch.nn.Module,), {"forward": eval("lambda self, **kwargs: None")})
    assert reads_num_items(made())


class AtTheMargin(torch.nn.Module):
    def forward(self, **kwargs):
        return """A text
at the margin."""


def test_a_text_at_the_margin_of_a_source_is_no_error():
    assert not reads_num_items(AtTheMargin())


def test_a_source_that_is_half_a_line_is_taken_at_the_trainers_word(monkeypatch):
    monkeypatch.setattr("inspect.getsource", lambda made: "    lambda self, **kwargs: (\n")
    assert reads_num_items(AtTheMargin())
