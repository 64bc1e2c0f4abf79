import pytest
import torch

from mixora.errors import DataError
from mixora.evaluate.choice import choose

PROMPTS = [[5, 6], [7], [8, 9, 10, 11]]
CHOICES = [[[4], [5, 6, 7]], [[12, 13], [14], [15]], [[4, 4], [5]]]
TEXTS = [["a", "bcd"], ["ij", "k", "l"], ["aa", "b"]]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_choices_are_those_of_the_summed_log_probabilities(llama, collate, size):
    llama.eval()
    expected, normalised = [], []
    for prompt, row, texts in zip(PROMPTS, CHOICES, TEXTS, strict=True):
        sums = []
        for ids in row:
            with torch.no_grad():
                logs = llama(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[len(prompt) + n - 1, i]) for n, i in enumerate(ids)))
        expected.append(sums.index(max(sums)))
        per_letter = [s / len(text) for s, text in zip(sums, texts, strict=True)]
        normalised.append(per_letter.index(max(per_letter)))
    assert choose(llama, PROMPTS, CHOICES, TEXTS, collate, size) == (expected, normalised)


def test_length_is_normalised_by_letters(llama, collate):
    with torch.no_grad():
        llama.lm_head.weight.zero_()  # every token is equally likely
    plain, normalised = choose(llama, [[5]], [[[4], [4, 5]]], [["a", "abc"]], collate, 2)
    assert (plain, normalised) == ([0], [1])


def test_encoder_decoder_choices_agree_over_batches(t5, collate):
    assert choose(t5, PROMPTS, CHOICES, TEXTS, collate, 1) == choose(t5, PROMPTS, CHOICES, TEXTS, collate, 8)


def test_a_choice_needs_tokens(llama, collate):
    with pytest.raises(DataError, match="row 2 has a choice without tokens"):
        choose(llama, PROMPTS, [[[4], [5]], [[4], []]], TEXTS, collate, 1)
