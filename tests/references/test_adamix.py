"""AdaMix from its formulas: a whole model with adapters put in by plain hooks, in float64; both passes, the consistency
of their predictions, and every gradient. Only the drawn routes are taken from the package."""

import math

import pytest
import torch
from peft import get_peft_model

import mixora
from mixora.routing.draws import Draw
from tests.models import fill, gradients, tiny_bert_classifier, tiny_llama, tiny_t5, token_ids

COEFFICIENT = 0.7
IDS = token_ids(3, 7)
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 6 + [0]])
LABELS = IDS.where(MASK == 1, -100).clone()
LABELS[0, :3] = -100
CLASSES = torch.tensor([0, 2, 1])


@pytest.fixture
def routes(monkeypatch):
    """What was drawn, as {path: {side: number}}, one such table for each pass."""
    seen, choose = {}, Draw.choose

    def spy(self, what, count):
        drawn = choose(self, what, count)
        if drawn is not None:
            seed, _, path = self.key.partition("/")
            seen.setdefault(seed, {}).setdefault(path, {})[what] = drawn
        return drawn

    monkeypatch.setattr(Draw, "choose", spy)
    return seen


def pick(tensors, kind, number):
    return tensors[f"{kind}_{number}"] if f"{kind}_{number}" in tensors else tensors[kind]


def lora(x, y, tensors, down, up, scale):
    a_RI, b_RO = pick(tensors, "A", down), pick(tensors, "B", up)
    return y + scale * sum((x * a_RI[r]).sum(-1, keepdim=True) * b_RO[r] for r in range(len(a_RI)))


def adapter(x, y, tensors, down, up, scale):
    d_RO, u_RO = pick(tensors, "A", down), pick(tensors, "B", up)
    inner, outer = pick(tensors, "bias_A", down), pick(tensors, "bias_B", up)[0]
    for r in range(len(d_RO)):
        hidden = (y * d_RO[r]).sum(-1, keepdim=True) + inner[r]
        outer = outer + hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))) * u_RO[r]
    return y + scale * outer


def run(base, tensors, routes, tied, formula, scale, batch):
    """The logits and loss of the plain model with `formula` at each site, as one pass has drawn."""
    hooks = []
    for path, of_site in tensors.items():
        down = routes[path].get("down", 0)
        up = down if tied else routes[path].get("up", 0)

        def hook(module, args, output, of_site=of_site, down=down, up=up):
            return formula(args[0], output, of_site, down, up, scale)

        hooks.append(base.get_submodule(path).register_forward_hook(hook))
    output = base(**batch)
    for hook in hooks:
        hook.remove()
    return output.logits, output.loss


def divergence(p_NC, q_NC):
    """1/2 [KL(sg(q) || p) + KL(sg(p) || q)], the mean over items."""
    p, q = p_NC.exp() / p_NC.exp().sum(-1, keepdim=True), q_NC.exp() / q_NC.exp().sum(-1, keepdim=True)
    forth = (q.detach() * (q.detach().log() - p.log())).sum(-1)
    back = (p.detach() * (p.detach().log() - q.log())).sum(-1)
    return (forth + back).mean() / 2


def supervised(logits, kind):
    if kind == "encoder":
        return logits
    if kind == "regression":
        return logits
    if kind == "decoder":
        return logits[:, :-1][LABELS[:, 1:] != -100]
    return logits[LABELS != -100]


KINDS = {
    "decoder": (tiny_llama, "CAUSAL_LM", LABELS),
    "encoder": (tiny_bert_classifier, "SEQ_CLS", CLASSES),
    "regression": (lambda: tiny_bert_classifier(num_labels=1), "SEQ_CLS", torch.tensor([0.3, -1.0, 2.0]).double()),
    "encoder-decoder": (tiny_t5, "SEQ_2_SEQ_LM", LABELS),
}
FORMS = [
    *(("adamix", {"share": share}) for share in ("up", "down", "none")),
    *(("adamix-lora", {"share": share}) for share in ("up", "down", "none")),
    ("adamix-lora", {"share": "none", "tied": True}),
]


@pytest.mark.parametrize(
    ("recipe", "changes"), FORMS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_losses_and_gradients(kind, recipe, changes, routes):
    make, task, labels = KINDS[kind]
    changes = {**changes, "losses.consistency.coefficient": COEFFICIENT}
    config = mixora.recipe(recipe, num_experts=3, rank=2, task_type=task, **changes)
    torch.manual_seed(0)
    names = ("mixora_A", "mixora_B", "mixora_bias")
    model = fill(get_peft_model(make(), config), names=names).double().train()
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    torch.manual_seed(1)
    loss, terms = mixora.compute_loss(model, batch)
    loss.backward()
    found = {name: g for name, g in gradients(model).items() if "mixora_" in name}

    assert len(routes) == 2
    tensors, leaves = {}, {}
    for name, parameter in model.named_parameters():
        if "mixora_" in name:
            path, _, rest = name.removeprefix("base_model.model.").partition(".mixora_")
            leaf = leaves[name] = parameter.detach().clone().requires_grad_()
            tensors.setdefault(path, {})[rest.removesuffix(".default")] = leaf
    base = make().double().eval()
    head = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    for name, parameter in head.items():
        path = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        base.get_parameter(path).data.copy_(parameter.data)
    formula, scale = (adapter, 1.0) if recipe == "adamix" else (lora, 16.0)
    tied = changes.get("tied", False)
    passes = [run(base, tensors, table, tied, formula, scale, batch) for table in routes.values()]
    p_NC, q_NC = (supervised(logits, kind) for logits, _ in passes)
    agreement = (p_NC - q_NC).square().mean() if kind == "regression" else divergence(p_NC, q_NC)
    expected = passes[0][1] + COEFFICIENT * agreement
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(terms["consistency"].double(), agreement, rtol=1e-6, atol=1e-8, check_dtype=False)
    wanted = torch.autograd.grad(expected, list(leaves.values()), allow_unused=True)
    for name, want in zip(leaves, wanted, strict=True):
        if want is None:
            assert name not in found, f"{name} was not drawn, and has a gradient"
        else:
            torch.testing.assert_close(found[name], want, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert len(found) >= len(tensors)
