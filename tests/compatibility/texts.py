"""Texts of words that stand for one token each, their tokenizer, and what the trainers of TRL are run with."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from tests.training.setups import VOCABULARY

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}w05 {% generation %}{{ message.content }} w02"
    "{% endgeneration %} {% else %}w04 {{ message.content }} {% endif %}{% endfor %}"
)


def make_tokenizer():
    """w02 ends a text; w04 and w05 head what a user and the assistant say."""
    raw = Tokenizer(models.WordLevel({f"w{i:02}": i for i in range(VOCABULARY)}, unk_token="w01"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="w00", eos_token="w02", chat_template=TEMPLATE)


def words(ids):
    return " ".join(f"w{token:02}" for token in ids)


class Catch(TrainerCallback):
    """The gradients of the adapter in the first step."""

    gradients = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.gradients is None:
            self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def each(trainers, what):
    """A test for each trainer, by name, and as a line of the table."""
    lines = [
        pytest.param(trainer, marks=pytest.mark.works_with(name, what), id=name) for name, trainer in trainers.items()
    ]
    return pytest.mark.parametrize("trainer_class", lines)
