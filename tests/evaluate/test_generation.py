import pytest
import torch

from mixora.errors import DataError
from mixora.evaluate import generate
from mixora.evaluate.generation import pad_prompts
from tests import models

PROMPTS = [[4], [5, 6, 7, 8], [9, 10], [4, 5, 6, 7, 8, 9, 10]]


def greedy(model, prompt, count):
    """Argmax, one token at a time, without padding or cache."""
    ids, new = list(prompt), []
    for _ in range(count):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        ids.append(new[-1])
        if new[-1] == 2:
            break
    return new


@pytest.mark.parametrize("size", [1, 3, 4])
def test_batches_give_what_argmax_gives_row_by_row(llama, tokenizer, size):
    llama.eval()
    expected = [tokenizer.decode(greedy(llama, p, 6), skip_special_tokens=True) for p in PROMPTS]
    llama.train()
    seen = []
    got = generate(
        llama, tokenizer, PROMPTS, max_new_tokens=6, batch_size=size, advance=lambda *counts: seen.append(counts)
    )
    assert got == expected
    assert llama.training
    assert seen[-1] == (4, 4)


def test_generation_stops_at_eos(llama, tokenizer):
    with torch.no_grad():
        llama.lm_head.weight.zero_()
        llama.model.norm.weight.zero_()
    llama.lm_head.bias = torch.nn.Parameter(torch.eye(20)[2])
    assert generate(llama, tokenizer, PROMPTS, max_new_tokens=5, batch_size=2) == [""] * 4


def test_a_model_with_sampling_habits_still_answers_greedily(llama, tokenizer):
    plain = generate(llama, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4)
    llama.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=5.0, top_k=1)
    assert generate(llama, tokenizer, PROMPTS, max_new_tokens=6, batch_size=4) == plain


def test_sampling_follows_the_ambient_generator(llama, tokenizer):
    def draw(seed):
        torch.manual_seed(seed)
        return generate(llama, tokenizer, PROMPTS, max_new_tokens=8, batch_size=4, do_sample=True, temperature=3.0)

    assert draw(1) == draw(1) != draw(2)


def test_encoder_decoder_batches_agree(t5, tokenizer):
    alone = [generate(t5, tokenizer, [p], max_new_tokens=5, batch_size=1)[0] for p in PROMPTS]
    assert generate(t5, tokenizer, PROMPTS, max_new_tokens=5, batch_size=4) == alone


def test_prompts_are_padded_on_the_side_asked_for():
    ids, mask = pad_prompts([[5], [6, 7]], 0, left=True)
    assert (ids.tolist(), mask.tolist()) == ([[0, 5], [6, 7]], [[0, 1], [1, 1]])
    ids, mask = pad_prompts([[5], [6, 7]], 0, left=False)
    assert (ids.tolist(), mask.tolist()) == ([[5, 0], [6, 7]], [[1, 0], [1, 1]])


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([], 1, "there are no rows to evaluate"),
        ([[4], []], 1, "prompt 2 has no tokens"),
        ([[4]], 0, "max_new_tokens: got 0; valid: 1 or more"),
    ],
)
def test_unusable_prompts(llama, tokenizer, prompts, count, message):
    with pytest.raises(DataError, match=message):
        generate(llama, tokenizer, prompts, max_new_tokens=count, batch_size=1)


@pytest.mark.parametrize(("build", "fits"), [(models.tiny_gpt2, (40, 25)), (models.tiny_bart, (64, 64))])
def test_answers_end_where_the_positions_do(build, fits, tokenizer):
    model, (length, count) = build().eval(), fits

    def ask(length, count):
        prompt = [5] * length
        return generate(
            model, tokenizer, [[4], prompt], max_new_tokens=count, batch_size=2, min_new_tokens=count, use_cache=True
        )

    ask(length, count)
    for more in [(length + 1, count), (length, count + 1)]:
        with pytest.raises(DataError, match=rf"{more[0]} and {more[1]} tokens; valid for this model: at most 6[45] "):
            ask(*more)


def test_an_end_is_needed(llama, tokenizer):
    tokenizer.eos_token = None
    llama.generation_config.eos_token_id = None
    with pytest.raises(DataError, match="neither the tokenizer nor the model names an EOS token"):
        generate(llama, tokenizer, [[4]], max_new_tokens=1, batch_size=1)
