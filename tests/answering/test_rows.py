"""Rows that enter and leave one cache get the tokens that transformers' own generation gives each of them alone."""

import pytest
import torch

import mixora
from mixora.answering.rows import Decoder
from mixora.errors import ModelError
from tests.models import (
    adapt,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_phi,
    tiny_qwen3,
    tiny_t5,
    token_ids,
)

SMALL = {"num_experts": 4, "top_k": 2, "rank": 2, "dropout": 0.0}
FULL = {"capacity_factor": 0.5, "min_capacity": 1, "capacity_at_inference": True}
LENGTHS = (3, 9, 1, 5)
TOKENS = 10


def make(base, recipe="mola", **settings):
    return adapt(base, mixora.recipe(recipe, **settings)).eval()


CASES = {
    "llama": lambda: make(tiny_llama(), **SMALL),
    "mistral, sliding": lambda: make(tiny_mistral(sliding_window=4), **SMALL),
    "gemma2, both kinds of attention": lambda: make(tiny_gemma2(), **SMALL),
    "gpt2, learnt positions": lambda: make(tiny_gpt2(), **SMALL),
    "qwen3, sira": lambda: make(tiny_qwen3(), "sira"),
    "sira, a limit of capacity": lambda: make(tiny_llama(), "sira", **FULL),
    "phi": lambda: make(tiny_phi(), **SMALL),
    "mixlora": lambda: make(tiny_llama(), "mixlora"),
    "pesc": lambda: make(tiny_llama(), "pesc"),
    "adamix-lora": lambda: make(tiny_llama(), "adamix-lora"),
}


def alone(model, prompt):
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", CASES)
def test_a_row_computes_what_it_would_alone_whoever_comes_and_goes(case):
    model = CASES[case]()
    prompts = [token_ids(1, length, seed=length)[0].tolist() for length in LENGTHS]
    decoder = Decoder(model, padding=0)
    said = {place: [] for place in range(len(prompts))}

    def note(places, logits_BV):
        for place, token in zip(places, logits_BV.argmax(dim=1).tolist(), strict=True):
            said[place].append(token)

    def advance(rows, places, times):
        for _ in range(times):
            note(places, decoder.advance(rows, [said[place][-1] for place in places]))

    rows, logits_BV = decoder.begin(prompts[:2])
    note([0, 1], logits_BV)
    advance(rows, [0, 1], 3)
    others, logits_BV = decoder.begin(prompts[2:])
    note([2, 3], logits_BV)
    rows.join(others)
    advance(rows, [0, 1, 2, 3], 2)
    # the longest one leaves, and with it the padding of the others
    rows.keep([3, 0, 2])
    assert rows.mask_BS.shape == (3, max(len(prompts[n]) + len(said[n]) - 1 for n in (0, 2, 3)))
    advance(rows, [3, 0, 2], TOKENS - 6)
    for place, prompt in enumerate(prompts):
        assert said[place] == alone(model, prompt)[: len(said[place])]
    assert [len(said[place]) for place in said] == [TOKENS, 6, TOKENS - 3, TOKENS - 3]


def test_logits_are_those_of_a_whole_pass():
    model = make(tiny_llama(), **SMALL)
    decoder, ids = Decoder(model, padding=0), token_ids(1, 8)
    rows, logits_BV = decoder.begin([ids[0, :6].tolist(), ids[0, :2].tolist()])
    with torch.no_grad():
        want_LV = model(input_ids=ids).logits[0]
    torch.testing.assert_close(logits_BV, want_LV[[5, 1]], rtol=1e-4, atol=1e-5)
    found_BV = decoder.advance(rows, [int(ids[0, 6]), int(ids[0, 2])])
    torch.testing.assert_close(found_BV, want_LV[[6, 2]], rtol=1e-4, atol=1e-5)


def test_what_cannot_answer_in_batches_is_refused():
    with pytest.raises(ModelError, match="t5: has an encoder, whose state rows of a batch cannot share"):
        Decoder(tiny_t5(), padding=0)
    hybrid = tiny_llama()
    hybrid.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="has linear_attention"):
        Decoder(hybrid, padding=0)
