"""Every recipe in small on every kind of base, and the one table of what a recipe cannot do.

    recipe        merged into the weights   beside a second active one   trained by single passes   re-entrant
    lora          yes                       yes                          yes                        yes
    adamix-lora   yes                       yes                          no: two are compared       yes
    adamix        no: behind the module     yes                          no: two are compared       yes
    molora        no: routed by the input   yes                          yes                        yes
    hydralora     no: routed by the input   yes                          yes                        yes
    pesc          no: behind the module     yes                          yes                        no
    mixlora       no: through the part      no: one adapter in a part    yes                        no
    all others    no: routed by the input   yes                          yes                        no

The last column is about activation checkpointing that runs a block without gradients first: a trainer that adds the
auxiliary loss itself is refused it.

Where a recipe cannot do something, its user gets one error, which the tests ask for in place of the result.
"""

import warnings
from functools import cache

import pytest
import torch
from peft import PeftModel

import mixora
from tests.models import adapt, tiny_bert_classifier, tiny_llama, tiny_t5, token_ids

RECIPES = mixora.recipe_names()
SMALL = {
    "adamix": {"num_experts": 3, "rank": 4},
    "adamix-lora": {"num_experts": 3, "rank": 2},
    "adamoe": {"num_experts": 4, "null_experts": 2, "top_k": 2, "rank": 2},
    "adamole": {"num_experts": 3, "rank": 2},
    "hilo": {"num_experts": [2, 3], "rank": [2, 3]},
    "hydralora": {"num_experts": 3, "rank": 2},
    "lora": {"rank": 2},
    "mixlora": {"num_experts": 3, "rank": 2},
    "mola": {"num_experts": [2, 3], "rank": 2},
    "molora": {"num_experts": 3, "rank": 2},
    "pesc": {"num_experts": 3, "rules.ffn.expert.rank": 4, "rules.shared.expert.rank": 2},
    "sira": {"num_experts": 4, "top_k": 2, "rank": 2},
}

CANNOT_MERGE = {
    **dict.fromkeys(RECIPES, "its router chooses experts by the input"),
    "adamix": "its experts stand behind the module",
    "pesc": "its experts stand behind the module",
    "mixlora": "its experts go through the feed-forward part",
}
CAN_MERGE = ["lora", "adamix-lora"]
for _name in CAN_MERGE:
    del CANNOT_MERGE[_name]
CANNOT_ADD_UP = {"mixlora": "go through the whole feed-forward part"}
CANNOT_TRAIN_BY_ONE_PASS = dict.fromkeys(["adamix", "adamix-lora"], "compares two passes over each batch")

CANNOT_RECOMPUTE_REENTRANTLY = {
    recipe: "re-entrant activation checkpointing cuts the router off"
    for recipe in RECIPES
    if recipe not in ("lora", "molora", "hydralora", "adamix", "adamix-lora")
}

IDS = token_ids(4, 6)
MASK = torch.tensor([[1] * 6, [1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
TEXT = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.where(MASK == 1, -100)}
CLASSES = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 2, 1])}
KINDS = {
    "decoder": (tiny_llama, "CAUSAL_LM", TEXT),
    "encoder": (tiny_bert_classifier, "SEQ_CLS", CLASSES),
    "encoder-decoder": (tiny_t5, "SEQ_2_SEQ_LM", TEXT),
}

each_recipe = pytest.mark.parametrize("recipe", RECIPES)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_mergeable = pytest.mark.parametrize("recipe", CAN_MERGE)


def config(recipe, kind="decoder", **changes):
    """The recipe in small, for a base of this kind."""
    return mixora.recipe(recipe, **{**SMALL[recipe], "task_type": KINDS[kind][1], **changes})


def base(kind="decoder", **changes):
    """The same base of this kind, each time a new one."""
    return KINDS[kind][0](**changes)


def batch(kind="decoder"):
    """Four rows, two of them padded, with labels."""
    return KINDS[kind][2]


def wrap(recipe, kind="decoder", seed=0, adapter_name="default", autocast_adapter_dtype=True, **changes):
    """A base with an adapter that makes a difference, in evaluation mode."""
    settings = {"adapter_name": adapter_name, "autocast_adapter_dtype": autocast_adapter_dtype}
    return adapt(base(kind), config(recipe, kind, **changes), seed, **settings).eval()


def add(model, name, recipe, kind="decoder", seed=7):
    """A second adapter on `model`, which makes a difference of its own."""
    before = {key: p.detach().clone() for key, p in model.named_parameters() if "mixora_" in key}
    torch.manual_seed(seed)
    model.add_adapter(name, config(recipe, kind))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key in before:
                continue
            if any(part in key for part in ("mixora_B", "mixora_router")):
                p.normal_(std=0.3)
    return model.eval()


def logits(model, kind="decoder"):
    """What the model computes in evaluation mode; the mode is left as it was."""
    was_training = model.training
    with torch.no_grad():
        found = model.eval()(**batch(kind)).logits
    model.train(was_training)
    return found


@cache
def plain_logits(kind="decoder"):
    """What the base of this kind computes."""
    return logits(base(kind), kind)


def same(found, expected):
    return torch.equal(found, expected)


def near(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=5e-4)


def load(folder, kind="decoder", **settings):
    """A saved adapter on a fresh base."""
    return PeftModel.from_pretrained(base(kind), folder, **settings)


def of_adapters(model, name=None):
    """The tensors of all adapters, or of the one with this name, by their names in the model."""
    mine = {key: p for key, p in model.named_parameters() if "mixora_" in key or "modules_to_save" in key}
    return {key: p for key, p in mine.items() if name is None or f".{name}" in key}


def of_base(model):
    """Copies of the frozen tensors by their names in the model without adapters."""
    return {
        key.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): p.clone()
        for key, p in model.state_dict().items()
        if "mixora_" not in key and "modules_to_save" not in key
    }


def train(model, kind="decoder", steps=1, lr=0.02):
    """So many steps of AdamW on all that is trainable; the losses."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    losses = []
    for _ in range(steps):
        loss, _ = mixora.compute_loss(model, batch(kind))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def warnings_of(action):
    """The texts of the warnings that `action` gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught]
