"""Texts: by every way to ask for them, with a cache and without, and of the base while disabled."""

import pytest
import torch

from tests.behaviours.cases import IDS, MASK, base, each_recipe, wrap

INPUTS = {"input_ids": IDS[:2], "attention_mask": MASK[:2]}
LENGTHS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
each_writer = pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])


def write(model, **settings):
    return model.generate(**INPUTS, **{**LENGTHS, **settings})


@each_writer
@each_recipe
def test_with_a_cache_and_without(recipe, kind):
    model = wrap(recipe, kind)
    written = write(model, use_cache=True)
    assert written.shape == (2, 9 if kind == "decoder" else 4)
    assert torch.equal(write(model, use_cache=False), written)


@each_recipe
def test_by_beams_and_of_the_base_while_disabled(recipe):
    model = wrap(recipe)
    assert torch.equal(*(write(model, num_beams=2, use_cache=use_cache) for use_cache in (True, False)))
    with model.disable_adapter():
        assert torch.equal(write(model), write(base().eval()))


@each_recipe
def test_by_position_by_embeddings_and_by_chance(recipe):
    model = wrap(recipe)
    written = write(model)
    assert torch.equal(model.generate(input_ids=IDS[:1], attention_mask=MASK[:1], **LENGTHS), written[:1])
    assert torch.equal(model.generate(INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"], **LENGTHS), written)
    embedded = model.get_input_embeddings()(INPUTS["input_ids"])
    by_embeddings = model.generate(inputs_embeds=embedded, attention_mask=INPUTS["attention_mask"], **LENGTHS)
    assert torch.equal(by_embeddings, written[:, 6:])
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(write(model, do_sample=True, num_return_sequences=2))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (4, 9)
