"""What of the inputs of a model reaches its layers: tokens that are not those of the mask, wrappers, interruptions."""

import logging
import math

import pytest
import torch
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CLIPConfig,
    CLIPModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    XLNetConfig,
    XLNetModel,
)

import mixora
from mixora.passes import tracing
from mixora.passes.forward import _tell_misfit
from tests.models import INNER, WIDTH, adapt, tiny_bert, tiny_gemma3, tiny_llama, tiny_t5, token_ids

MASK = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
MARKS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def sira(**changes):
    """Top-k routing without a limit: what a token gets does not depend on other tokens."""
    sizes = {"num_experts": 4, "top_k": 2, "rank": 2, "targets": ["all-linear"], "expert_dropout": 0.0}
    return mixora.recipe("sira", **{**sizes, "capacity_factor": None, **changes})


@pytest.fixture
def warnings(caplog):
    """The one warning of a process may come again."""
    _tell_misfit.cache_clear()
    with caplog.at_level(logging.WARNING, logger="mixora"):
        yield caplog


def valid_by_path(model, **inputs):
    with tracing() as trace:
        model(**inputs)
    return [(o.path, o.routing.valid_T) for o in trace.observations]


def test_chunks_of_a_feed_forward_part_are_real_tokens(warnings):
    ids = token_ids(2, 6)
    model = adapt(tiny_bert(), sira())
    whole = model(input_ids=ids, attention_mask=MASK).last_hidden_state
    for module in model.modules():
        if hasattr(module, "chunk_size_feed_forward"):
            module.chunk_size_feed_forward = 2
    in_chunks = model(input_ids=ids, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(in_chunks[MASK.bool()], whole[MASK.bool()], rtol=1e-4, atol=1e-5)
    (said,) = warnings.messages
    assert "padding counts as real" in said


def test_a_model_that_counts_time_first_finds_its_tokens():
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": INNER, "vocab_size": 64, "dropout": 0.0}
    model = adapt(XLNetModel(XLNetConfig(**sizes)), sira(targets=["layer_1", "layer_2"], capacity_factor=0.6))
    ids = token_ids(2, 6)
    found = valid_by_path(model, input_ids=ids, attention_mask=MASK)
    assert found and all(torch.equal(valid_T, MASK.bool().T.flatten()) for _, valid_T in found)
    padded = model(input_ids=ids, attention_mask=MASK).last_hidden_state
    for row, length in enumerate((3, 5)):
        alone = model(input_ids=ids[row : row + 1, :length]).last_hidden_state
        torch.testing.assert_close(padded[row, :length], alone[0], rtol=1e-4, atol=1e-5)


def test_frames_are_not_the_samples_of_their_mask(warnings):
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": INNER}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (4, 4), "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    base = Wav2Vec2Model(Wav2Vec2Config(**sizes, **convolutions, **position))
    model = adapt(base, sira(targets=["q_proj"]))
    mask = torch.ones(1, 160, dtype=torch.long)
    mask[:, 100:] = 0
    ((_, valid_T),) = valid_by_path(model, input_values=torch.randn(1, 160), attention_mask=mask)
    assert valid_T.all() and len(warnings.messages) == 1


@pytest.mark.parametrize("kept", [2, torch.tensor([0, 4])])
def test_a_head_that_gets_some_tokens_knows_which(kept, warnings):
    model = adapt(tiny_llama(), sira(targets=["lm_head"]))
    inputs = {"input_ids": token_ids(2, 6), "attention_mask": MASK}
    columns = slice(-kept, None) if isinstance(kept, int) else kept
    ((_, valid_T),) = valid_by_path(model, **inputs, logits_to_keep=kept)
    assert torch.equal(valid_T, MASK[:, columns].bool().flatten())
    some, whole = model(**inputs, logits_to_keep=kept).logits, model(**inputs).logits[:, columns]
    torch.testing.assert_close(some, whole)
    assert not warnings.messages


class TwoTowers(nn.Module):
    """One encoder for questions and answers, whose inputs have names of their own."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, questions, questions_mask, answers, answers_mask):
        asked = self.encoder(questions, attention_mask=questions_mask).last_hidden_state[:, 0]
        return asked @ self.encoder(answers, attention_mask=answers_mask).last_hidden_state[:, 0].T


def test_each_call_of_an_encoder_inside_of_another_module_has_its_own_mask():
    model = adapt(TwoTowers(tiny_bert(1)), sira(targets=["query"]))
    ids = token_ids(2, 6)
    found = valid_by_path(model, questions=ids, questions_mask=MASK, answers=ids[:, :4], answers_mask=MASK[:, 2:])
    assert [valid_T.tolist() for _, valid_T in found] == [m.bool().flatten().tolist() for m in (MASK, MASK[:, 2:])]


def interrupt(model, path, **inputs):
    """Ctrl-C while the module at `path` of the base computes."""

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.get_base_model().get_submodule(path).register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    handle.remove()


def test_after_an_interruption_the_next_pass_reads_its_own_mask():
    model = adapt(tiny_llama(), sira())
    ids = token_ids(2, 6)
    plain = model(input_ids=ids).logits
    interrupt(model, "model.layers.1.mlp", input_ids=ids, attention_mask=MASK.flip(1))
    assert torch.equal(model(input_ids=ids).logits, plain)
    interrupt(model, "model.layers.1.mlp", input_ids=ids, attention_mask=MASK.flip(1))
    assert all(valid_T.all() for _, valid_T in valid_by_path(model.get_base_model().model, input_ids=ids))


def test_after_an_interruption_in_the_decoder_the_encoder_begins_a_pass():
    model = adapt(tiny_t5(), sira())
    ids = token_ids(2, 6)
    interrupt(model, "decoder.block.1", input_ids=ids, attention_mask=MASK, decoder_input_ids=ids)
    found = valid_by_path(model.get_base_model().get_encoder(), input_ids=ids)
    assert found and all(valid_T.all() for _, valid_T in found)


def test_after_an_interruption_routers_have_their_losses_and_routes_are_drawn():
    batch = {"input_ids": token_ids(2, 6), "labels": token_ids(2, 6)}
    model = adapt(tiny_llama(), sira()).train()
    interrupt(model, "model.layers.1.mlp", **batch)
    _, terms = mixora.compute_loss(model, batch)
    assert math.isfinite(terms["load_balance"])
    model = adapt(tiny_llama(), mixora.recipe("adamix-lora", rank=2, start="apart", coefficient=0.0)).train()
    interrupt(model, "model.layers.1.mlp", **batch)
    assert len({model(**batch).loss.item() for _ in range(10)}) > 1


class Student(nn.Module):
    """A layer that asks another model."""

    def __init__(self, inner, teacher):
        super().__init__()
        self.inner, self.ask = inner, [teacher]

    def forward(self, *args, **kwargs):
        self.ask[0](input_ids=token_ids(1, 4))
        return self.inner(*args, **kwargs)


def test_a_model_called_by_another_has_a_pass_of_its_own():
    student, teacher = adapt(tiny_llama(), sira(targets=["q_proj"])), adapt(tiny_llama(1), sira(targets=["q_proj"]))
    layers = student.get_base_model().model.layers
    layers[0] = Student(layers[0], teacher)
    found = valid_by_path(student, input_ids=token_ids(2, 6), attention_mask=MASK)
    assert [len(valid_T) for _, valid_T in found] == [4, 12, 12]
    assert all(torch.equal(valid_T, MASK.bool().flatten()) for _, valid_T in found[1:])


@pytest.mark.parametrize("recipe", ["mixlora", "sira"])
def test_a_tower_that_is_called_past_the_model_has_a_pass(recipe):
    """As `get_text_features`, and `generate` of models that see images, call it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_attention_heads": 4, "num_hidden_layers": 2}
    texts = {**sizes, "vocab_size": 64, "max_position_embeddings": 16, **MARKS}
    images = {**sizes, "image_size": 8, "patch_size": 4}
    base = CLIPModel(CLIPConfig(text_config=texts, vision_config=images, projection_dim=16))
    model = adapt(base, mixora.recipe(recipe)).eval()
    inputs = {"input_ids": token_ids(2, 6), "attention_mask": MASK, "pixel_values": torch.randn(2, 3, 8, 8)}
    whole = model(**inputs)
    found = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    torch.testing.assert_close(found / found.norm(dim=-1, keepdim=True), whole.text_embeds)
    with tracing() as trace:
        model.get_text_features(inputs["input_ids"], inputs["attention_mask"])
    assert all(torch.equal(o.routing.valid_T, MASK.bool().flatten()) for o in trace.observations)
    found = model.get_image_features(inputs["pixel_values"]).pooler_output
    torch.testing.assert_close(found / found.norm(dim=-1, keepdim=True), whole.image_embeds)


def tiny_bloom():
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=WIDTH, n_head=4, n_layer=2, **MARKS))


@pytest.mark.parametrize(
    ("build", "attention"),
    [(tiny_bloom, "eager"), (tiny_llama, "eager"), (tiny_llama, "sdpa"), (tiny_gemma3, "eager"), (tiny_gemma3, "sdpa")],
)
def test_a_mask_may_go_on_behind_a_cache_of_fixed_size(build, attention):
    """Bloom fills its mask up to the size of a static cache: the last columns are those of tokens to come.

    Llama's says which key each query sees, Gemma's that for each kind of layer.
    """
    base = build()
    base.set_attn_implementation(attention)
    # limits of capacity, which padding would use up
    model = adapt(base, sira(capacity_factor=1.0)).eval()
    inputs = {"input_ids": token_ids(2, 6), "attention_mask": MASK.flip(1), "use_cache": True, "pad_token_id": 0}
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    growing = model.generate(**inputs, **settings, do_sample=False)
    with tracing() as trace:
        fixed = model.generate(
            **inputs, **settings, do_sample=False, cache_implementation="static", disable_compile=True
        )
    torch.testing.assert_close(fixed.logits, growing.logits)
    first = trace.observations[0].path
    prompt, *others = (o.routing.valid_T for o in trace.observations if o.path == first)
    assert torch.equal(prompt, MASK.flip(1).bool().flatten())
    assert len(others) == 3 and all(valid_T.all() for valid_T in others)
