"""The nearest LoRA of a routed mixture: against least squares on captured inputs, and on held-out batches from disk."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

import mixora
from mixora.errors import ConfigError, DataError
from mixora.merging import approximation as module
from mixora.mixture import Mixture
from mixora.routers import TopK
from tests.models import adapt, tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_t5, token_ids

SMALL = {"num_experts": 4, "top_k": 2, "rank": 2, "expert_dropout": 0.0}


def sira(**changes):
    return mixora.recipe("sira", **{**SMALL, **changes})


def rows(count=24, length=12, seed=0):
    """One batch of rows of unequal length, padded on the right."""
    ids = token_ids(count, length, seed)
    lengths = torch.randint(3, length + 1, (count,), generator=torch.Generator().manual_seed(seed + 1))
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def batches(count=3, seed=0, **settings):
    return [rows(seed=seed + 10 * n, **settings) for n in range(count)]


def material(seed=0, **settings):
    return mixora.Approximation(batches(seed=seed), batches(count=2, seed=seed + 500), **settings)


def sites(model):
    return [m for m in model.modules() if isinstance(m, Mixture)]


def fit(model, made_from, rank):
    """The pairs and errors by path."""
    return module.approximate(model, sites(model), "default", made_from, rank, lambda done, total: None)


def watch(model, given):
    """Real inputs and what the experts add to them, float64, by path: straight from the modules."""
    seen = {site.path: ([], []) for site in sites(model)}
    frozen, masks = {}, []
    hooks = []
    for site in sites(model):
        hooks.append(site.base_layer.register_forward_hook(lambda m, a, y, p=site.path: frozen.__setitem__(p, y)))

        def keep(m, args, y):
            real = masks[-1].bool()
            seen[m.path][0].append(args[0][real])
            seen[m.path][1].append((y - frozen[m.path])[real])

        hooks.append(site.register_forward_hook(keep))
    with torch.no_grad():
        for batch in given:
            masks.append(batch["attention_mask"])
            model.eval()(**batch)
    for hook in hooks:
        hook.remove()
    return {path: tuple(torch.cat(part).numpy() for part in parts) for path, parts in seen.items()}


@pytest.mark.parametrize("recipe", ["sira", "molora", "hydralora", "adamole"])
def test_full_rank_is_least_squares_on_what_the_sites_see(recipe):
    changes = {} if recipe != "sira" else SMALL
    model = adapt(tiny_llama().double(), mixora.recipe(recipe, targets=["attention", "down_proj"], **changes))
    given = material()
    found = fit(model, given, rank=64)
    assert len(found) == 10
    for path, (x, delta) in watch(model, given.fit).items():
        expected, *_ = np.linalg.lstsq(x, delta, rcond=None)
        pair, error = found[path]
        np.testing.assert_allclose(pair.delta_OI().T.numpy(), expected, atol=1e-8)
        assert abs(error - np.linalg.norm(x @ expected - delta) / np.linalg.norm(delta)) < 1e-8
        assert 0 < error < 1


def test_low_rank_keeps_the_largest_part_of_the_fitted_outputs():
    model = adapt(tiny_llama().double(), sira(targets=["q_proj", "v_proj"]))
    given = material()
    whole, cut = fit(model, given, rank=64), fit(model, given, rank=3)
    for path, (x, delta) in watch(model, given.fit).items():
        values = np.linalg.svd(x @ whole[path][0].delta_OI().T.numpy(), compute_uv=False)
        left = np.linalg.norm(x @ cut[path][0].delta_OI().T.numpy() - delta)
        expected = np.sqrt(np.linalg.norm(delta) ** 2 - (values[:3] ** 2).sum())
        np.testing.assert_allclose(left, expected, rtol=1e-9)
        np.testing.assert_allclose(cut[path][1], expected / np.linalg.norm(delta), rtol=1e-7)


def test_what_one_lora_computes_is_found_again(tmp_path):
    """A single expert has weight 1 for every token, though its router is one that chooses."""
    config = mixora.recipe("molora", num_experts=1, rank=4, targets=["all-linear"])
    model = adapt(tiny_llama().double(), config)
    for path, (pair, error) in fit(model, material(), rank=4).items():
        site = model.get_submodule(f"base_model.model.{path}")
        parts = site.parts["default"]
        b, a = (site.mixora_B["default"].detach(), site.mixora_A["default"].detach())
        expected = parts.expert.scale(parts.shape) * b.T @ a
        torch.testing.assert_close(pair.delta_OI(), expected, rtol=1e-8, atol=1e-8)
        assert error < 1e-7
    changes = mixora.merge(adapt(tiny_llama(), config), tmp_path / "out", approximation=material()).changes
    assert changes.mean_difference < 1e-6 and abs(changes.loss_of_merged - changes.loss_of_mixture) < 1e-6


def test_padding_and_the_cut_into_batches_do_not_matter():
    model, whole = adapt(tiny_llama().double(), sira()), rows()
    apart = []
    for n, length in enumerate(whole["attention_mask"].sum(1).tolist()):
        apart.append({name: tensor[n : n + 1, :length] for name, tensor in whole.items()})
    found = fit(model, mixora.Approximation([whole], [whole]), 3)
    for path, (pair, error) in fit(model, mixora.Approximation(apart, apart), 3).items():
        torch.testing.assert_close(found[path][0].delta_OI(), pair.delta_OI(), rtol=1e-8, atol=1e-10)
        assert abs(found[path][1] - error) < 1e-9


def test_small_groups_give_the_same_in_more_passes():
    model = adapt(tiny_llama(), sira(targets=["all-linear"]))
    told = []
    one = module.approximate(model, sites(model), "default", material(), 3, lambda *n: told.append(n))
    assert told == [(1, 3), (2, 3), (3, 3)]
    several = module.approximate(model, sites(model), "default", material(memory=1), 3, lambda *n: told.append(n))
    # four tensors a layer are read: by q, k, v; o; gate, up; down
    assert told[-1] == (24, 24) and len(told) == 27
    assert one.keys() == several.keys()
    for path, (pair, error) in one.items():
        assert torch.equal(pair.delta_OI(), several[path][0].delta_OI()) and error == several[path][1]


def test_sites_that_read_one_tensor_share_its_sums(monkeypatch):
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: calls.append(gram.shape) or eigh(gram))
    fit(adapt(tiny_llama(), sira(targets=["all-linear"])), material(), 3)
    assert len(calls) == 8


def test_a_site_is_fitted_to_the_routing_that_it_used(monkeypatch):
    """Each router decides once per pass: a second decision, made otherwise, could fall differently."""
    decisions, decide = [], TopK.decide

    def spy(self, *arguments):
        decisions.append(self)
        return decide(self, *arguments)

    monkeypatch.setattr(TopK, "decide", spy)
    settings = {"targets": ["o_proj"], "num_experts": 3, "top_k": 2, "rank": 2}
    model = adapt(tiny_llama(), mixora.recipe("sira", **settings))
    modules = [m for m in model.modules() if isinstance(m, Mixture)]
    batches = [{"input_ids": token_ids(2, 6, seed=n)} for n in range(3)]
    material = module.Approximation(fit=batches, held_out=batches)
    module.approximate(model, modules, "default", material, 2, lambda done, total: None)
    assert len(decisions) == len(modules) * len(batches)


def test_the_model_stays_as_it_was(tmp_path):
    model = adapt(tiny_llama(), sira()).train()
    model.base_model.model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    mixora.merge(model, tmp_path / "out", approximation=material())
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(site._forward_hooks for site in sites(model))


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (sira(), 4),
        (mixora.recipe("hilo", num_experts=[2, 4], rank=[2, 6]), 12),
        (mixora.recipe("molora", num_experts=3, rank=2), 6),
    ],
)
def test_the_rank_is_what_a_token_uses(config, rank, tmp_path):
    model = adapt(tiny_llama(), config)
    assert module.active_rank(sites(model), "default") == rank
    merged = mixora.merge(model, tmp_path / "out", approximation=material())
    for site in merged.sites:
        ranks = model.get_submodule(f"base_model.model.{site.path}").parts["default"].shape.ranks
        # no pair is wider than what the experts of the site can fill
        assert site.rank == min(rank, sum(ranks))


def measured(mixture, merged, held_out, logits_of):
    """Loss of both, mean and largest difference of a logit, KL: over supervised predictions, by the formulas."""
    first, second, labels = [], [], []
    for batch in held_out:
        with torch.no_grad():
            a, b = logits_of(mixture, batch), logits_of(merged, batch)
        kept = batch["labels"] if batch["labels"].dim() == 1 else None
        if kept is None:
            shift = 0 if mixture.config.is_encoder_decoder else 1
            kept = batch["labels"][:, shift:]
            a, b = (t[:, : t.shape[1] - shift][kept != -100] for t in (a, b))
            kept = kept[kept != -100]
        first.append(a.double()), second.append(b.double()), labels.append(kept)
    a, b, y = torch.cat(first), torch.cat(second), torch.cat(labels)
    p = a.softmax(-1)
    divergence = (p * (p.log() - b.softmax(-1).log())).sum(-1).mean()
    losses = (-t.log_softmax(-1)[range(len(y)), y].mean() for t in (a, b))
    return [len(y), *map(float, (*losses, (a - b).abs().mean(), (a - b).abs().max(), divergence))]


def classes(given):
    return [{**b, "labels": torch.arange(len(b["labels"])) % 3} for b in given]


MODELS = {
    "llama": (tiny_llama, sira(task_type="CAUSAL_LM"), lambda b: b),
    "bfloat16": (lambda: tiny_llama().bfloat16(), sira(task_type="CAUSAL_LM"), lambda b: b),
    "gpt2": (tiny_gpt2, sira(targets=["all-linear"], task_type="CAUSAL_LM"), lambda b: b),
    "bert": (tiny_bert_classifier, sira(task_type="SEQ_CLS", admission="token"), classes),
    "t5": (tiny_t5, sira(task_type="SEQ_2_SEQ_LM"), lambda b: b),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_reported_is_what_plain_peft_computes_from_disk(name, tmp_path):
    make, config, convert = MODELS[name]
    model = adapt(make(), config)
    given = mixora.Approximation(convert(batches()), convert(batches(count=2, seed=500)), origin="rows.jsonl")
    merged = mixora.merge(model, tmp_path / "out", rank=3, approximation=given)
    again = PeftModel.from_pretrained(make(), tmp_path / "out").eval()
    assert {c.peft_type.value for c in again.peft_config.values()} == {"LORA"}
    changes = merged.changes
    found = [changes.predictions, changes.loss_of_mixture, changes.loss_of_merged]
    found += [changes.mean_difference, changes.max_difference, changes.divergence]
    expected = measured(model.eval(), again, given.held_out, lambda m, b: m(**b).logits)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert changes.mean_difference > 1e-4
    card = (tmp_path / "out" / "README.md").read_text()
    assert "recipe `sira`" in card and "Fitted on `3 batches of rows.jsonl`." in card
    assert f"Measured over {changes.predictions} held-out predictions" in card
    assert f"| loss after merging | {changes.loss_of_merged:.6g} |" in card
    assert json.dumps(merged.to_dict())


def test_numbers_have_a_squared_error_and_no_divergence(tmp_path):
    model = adapt(tiny_bert_classifier(num_labels=1), sira(task_type="SEQ_CLS"))
    given = [{**b, "labels": torch.linspace(-1, 1, len(b["labels"]))} for b in batches()]
    merged = mixora.merge(model, tmp_path / "out", approximation=mixora.Approximation(given[:2], given[2:]))
    with torch.no_grad():
        expected = F.mse_loss(model.eval()(**given[2]).logits[:, 0], given[2]["labels"])
    assert abs(merged.changes.loss_of_mixture - float(expected)) < 1e-6
    assert merged.changes.divergence is None
    assert "KL" not in (tmp_path / "out" / "README.md").read_text()


def test_sites_without_routing_stay_exact_beside_fitted_ones(tmp_path):
    lora = {"expert": {"kind": "lora", "rank": 4}}
    rules = {
        "plain": {"targets": ["q_proj"], **lora, "router": {"kind": "single"}},
        "routed": {"targets": ["down_proj"], **lora, "router": {"kind": "soft", "num_experts": 2}},
    }
    model = adapt(tiny_llama(), mixora.MixoraConfig(rules=rules, task_type="CAUSAL_LM"))
    merged = mixora.merge(model, tmp_path / "out", approximation=material())
    assert [s.method for s in merged.sites] == ["exact", "fitted"] * 2
    assert [s.rank for s in merged.sites] == [4, 8] * 2
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    for site in sites(model)[::2]:
        twin = again.get_submodule(f"base_model.model.{site.path}")
        torch.testing.assert_close(twin.get_delta_weight("default"), site.get_delta_weight("default"))


def test_batches_must_be_there_with_labels(tmp_path):
    with pytest.raises(DataError, match="held_out: has no batches; valid: one or more"):
        mixora.Approximation(batches(), [])
    with pytest.raises(DataError, match="fit: got a generator, which can be gone through once; valid: a list"):
        mixora.Approximation((batch for batch in batches()), batches())
    model = adapt(tiny_llama(layers=1), sira())
    blind = [{name: t for name, t in batch.items() if name != "labels"} for batch in batches()]
    with pytest.raises(DataError, match="held_out: got batches of input_ids, attention_mask; valid: with labels"):
        mixora.merge(model, tmp_path / "a", approximation=mixora.Approximation(blind, blind))
    nothing = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in batches()]
    with pytest.raises(DataError, match="held_out: no token is supervised"):
        mixora.merge(model, tmp_path / "b", approximation=mixora.Approximation(blind, nothing))


def test_a_site_that_no_forward_runs_is_named(tmp_path):
    model = adapt(tiny_llama(), sira(targets=["q_proj"]))
    layers = model.base_model.model.model.layers
    layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(ConfigError, match=r"layers.1.self_attn.q_proj: is not run by a forward of this model"):
        mixora.merge(model, tmp_path / "out", approximation=material())
