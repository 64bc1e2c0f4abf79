"""Energy of full experts' first step beyond the adapters' rank: closed forms, and autograd on explicit maps."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

import mixora
from mixora.errors import DataError, ModelError
from mixora.mixture import mixtures_of
from tests.models import adapt, tiny_bert_classifier, tiny_llama, tiny_t5, token_ids

WIDTH = 5
IDS = token_ids(4, 8)
MASK = torch.tensor([[1] * 8, [1] * 8, [1] * 5 + [0] * 3, [0] * 2 + [1] * 6])
TEXT = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.where(MASK == 1, -100)}
CLASSES = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 2, 1])}


class Given(nn.Module):
    """f(x) = x, and a loss whose gradient at the output is `targets`."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        nn.init.eye_(self.mlp.weight)

    def forward(self, x, targets=None, attention_mask=None):
        y = self.mlp(x)
        return CausalLMOutput(loss=None if targets is None else (y * targets).sum(), logits=y)


def given(rank, experts=2, router=None):
    """Weights 1/2 for the first two of the experts, unless `router` [E, WIDTH] says otherwise."""
    expert = {"kind": "bottleneck", "rank": rank}
    route = {"kind": "topk", "num_experts": experts, "top_k": 2, "renormalise": True}
    model = adapt(Given(), mixora.MixoraConfig(rules={"ffn": {"targets": ["mlp"], "expert": expert, "router": route}}))
    (site,) = mixtures_of(model)
    with torch.no_grad():
        site.mixora_router["default"].copy_(torch.zeros(experts, WIDTH) if router is None else router)
    return model


def diagonal(values, **mask):
    return {"x": torch.eye(WIDTH).double()[None], "targets": torch.diag(torch.tensor(values)).double()[None], **mask}


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 6])
def test_singular_values_that_are_known(rank):
    (site,) = mixora.residual_energy(given(rank), diagonal([3.0, 1.0, -2.0, 5.0, 4.0]))
    assert site["path"] == "mlp" and site["adapter"] == "default"
    assert site["ranks"] == [rank] * 2 and site["tokens"] == [5, 5]
    expected = sum([25, 16, 9, 4, 1][rank:]) / 55
    assert site["beyond_rank"] == pytest.approx([expected] * 2, abs=1e-15)


def test_equal_singular_values_leave_the_most():
    (site,) = mixora.residual_energy(given(2), diagonal([1.0] * WIDTH))
    assert site["beyond_rank"] == pytest.approx([1 - 2 / WIDTH] * 2)


def test_a_gradient_of_the_experts_rank_leaves_nothing():
    generator = torch.Generator().manual_seed(0)
    x, left, right = (
        torch.randn(size, generator=generator).double() for size in [(2, 9, WIDTH), (2, 9, 2), (2, WIDTH)]
    )
    batch = {"x": x, "targets": left @ right}
    (enough,), (short,) = (mixora.residual_energy(given(rank), batch) for rank in (2, 1))
    assert max(enough["beyond_rank"]) < 1e-15
    assert min(short["beyond_rank"]) > 0.01


def test_padding_and_other_experts_tokens_do_not_count():
    mask = torch.tensor([[1, 1, 1, 0, 1]])
    # the first two tokens choose experts 0 and 1, the others 1 and 2; no token chooses expert 3
    router = torch.tensor([[9.0, 9, 0, 0, 0], [9, 9, 9, 9, 9], [0, 0, 9, 9, 9], [-9, -9, -9, -9, -9]])
    batch = diagonal([3.0, 1.0, 2.0, 100.0, 4.0], attention_mask=mask)
    (site,) = mixora.residual_energy(given(1, 4, router), batch)
    assert site["tokens"] == [2, 4, 2, 0]
    assert site["beyond_rank"][3] is None
    assert site["beyond_rank"][:3] == pytest.approx([1 / 10, 14 / 30, 4 / 20])


def test_batches_add_up():
    parts = [[3.0, 0, 0, 0, 0], [0, 4.0, 0, 0, 1.0], [-1.0, 0, 0, 0, 0]]
    (site,) = mixora.residual_energy(given(1), [diagonal(part) for part in parts])
    assert site["tokens"] == [15, 15]
    assert site["beyond_rank"] == pytest.approx([5 / 21] * 2)


def explicit_maps(model, batches, top_k):
    """Per site G_i by autograd on a parameter M_i [E, d, d], and tokens, with a routing straight from the formula."""
    maps, counts, frozen, hooks = {}, {}, {}, []
    real = None

    def add_maps(module, args, y, name):
        router = module.mixora_router["default"].detach()
        values, chosen = (args[0] @ router.T.to(args[0].dtype)).topk(top_k, dim=-1)
        weights = torch.zeros(*y.shape[:-1], len(router), dtype=y.dtype)
        weights = weights.scatter(-1, chosen, values.softmax(dim=-1)) * real[..., None]
        width = y.shape[-1]
        maps.setdefault(name, torch.zeros(len(router), width, width, dtype=y.dtype, requires_grad=True))
        counts[name] = counts.get(name, 0) + (weights > 0).sum(dim=(0, 1))
        return y + 0.25 * torch.einsum("bte,eij,btj->bti", weights.detach(), maps[name], frozen[name].detach())

    for name, module in model.named_modules():
        # PESC's other sites have one expert and no router
        if hasattr(module, "mixora_router"):
            keep = lambda _, args, f, name=name: frozen.__setitem__(name, f)  # noqa: E731
            hooks.append(module.base_layer.register_forward_hook(keep))
            hooks.append(module.register_forward_hook(lambda m, args, y, name=name: add_maps(m, args, y, name)))
    for batch in batches:
        real = batch["attention_mask"]
        model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    model.zero_grad()
    return [maps[name].grad.numpy() for name in maps], [counts[name].tolist() for name in maps]


@pytest.mark.parametrize(("make", "batch"), [(tiny_llama, TEXT), (tiny_bert_classifier, CLASSES)])
def test_the_same_as_autograd_on_explicit_maps(make, batch):
    overrides = {"num_experts": 4, "rules.ffn.expert.rank": 1, "rules.shared.expert.rank": 2}
    model = adapt(make().double(), mixora.recipe("pesc", **overrides)).double().eval()
    batches = [batch, {name: tensor[:3] for name, tensor in batch.items()}]
    gradients, counts = explicit_maps(model, batches, top_k=2)
    found = mixora.residual_energy(model, batches)
    assert len(found) == len(gradients) == 2
    for site, of_site, tokens in zip(found, gradients, counts, strict=True):
        assert site["tokens"] == tokens
        energies = np.linalg.svd(of_site, compute_uv=False) ** 2
        felt = [e for e in range(4) if energies[e].any()]
        expected = {e: energies[e, 1:].sum() / energies[e].sum() for e in felt}
        shares = {e: share for e, share in enumerate(site["beyond_rank"]) if share is not None}
        assert shares == pytest.approx(expected, rel=1e-9, abs=1e-14)
        assert max(expected.values()) > 1e-3


def test_both_streams_of_an_encoder_decoder():
    labels = token_ids(4, 6, seed=1)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    found = mixora.residual_energy(adapt(tiny_t5(), mixora.recipe("pesc", rank=2)), batch)
    real = {"encoder": int(MASK.sum()), "decoder": labels.numel()}
    assert [sum(site["tokens"]) for site in found] == [2 * real[site["path"].split(".")[0]] for site in found]
    assert len(found) == 4


def test_experts_that_serve_as_their_mean_have_one_gradient():
    (one, two) = mixora.residual_energy(adapt(tiny_llama(), mixora.recipe("adamix", rank=2)), TEXT)
    for site in (one, two):
        assert site["ranks"] == [2] * 4 and site["tokens"] == [int(MASK.sum())] * 4
        assert len(set(site["beyond_rank"])) == 1 and 0 < site["beyond_rank"][0] < 1 - 2 / 32


def test_the_model_stays_as_it_was_and_need_not_be_trainable():
    model = adapt(tiny_llama(), mixora.recipe("pesc", rank=2))
    model.get_submodule("base_model.model.model.layers.1").eval()
    mixora.compute_loss(model, TEXT)[0].backward()
    before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    found = mixora.residual_energy(model, TEXT)
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before
    for name, p in model.named_parameters():
        assert p.requires_grad == (name in gradients)
        assert p.grad is None or torch.equal(p.grad, gradients[name])
    model.requires_grad_(False)
    with torch.no_grad():
        assert mixora.residual_energy(model, TEXT) == found


@pytest.mark.parametrize("recipe", ["lora", "pesc"])
def test_a_model_without_such_experts_is_an_error(recipe):
    model = adapt(tiny_llama(), mixora.recipe(recipe, rank=2))
    with model.disable_adapter(), pytest.raises(ModelError, match="no active experts behind a module"):
        mixora.residual_energy(model, TEXT)
    if recipe == "lora":
        with pytest.raises(ModelError, match=r"no active experts behind a module.*'pesc'"):
            mixora.residual_energy(model, TEXT)


def test_batches_without_a_loss_are_an_error():
    model = adapt(tiny_llama(), mixora.recipe("pesc", rank=2))
    with pytest.raises(DataError, match="gives no loss on them; valid: batches with labels"):
        mixora.residual_energy(model, {"input_ids": IDS})
    nothing = {**TEXT, "labels": torch.full_like(IDS, -100)}
    with pytest.raises(
        DataError, match="the loss or its gradient is not finite; valid: batches in which a label counts"
    ):
        mixora.residual_energy(model, nothing)
    assert model.training
