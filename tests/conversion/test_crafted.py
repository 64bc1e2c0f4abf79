"""Released checkpoints of crafted models, made here by name and shape, against their formulas written out."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

import mixora
from mixora.cli import app
from mixora.errors import CheckpointError, ConfigError
from tests.models import INNER, VOCABULARY, WIDTH, tiny_llama, tiny_mistral, tiny_qwen2, token_ids

EXPERTS, RANK, SCALE, THETA, LAYERS, HEADS = 5, 6, 0.25, 50_000.0, 2, 4
IDS = token_ids(2, 7)
KINDS = {"camelidae": tiny_llama, "qwen2idae": tiny_qwen2, "sparsetral": tiny_mistral, "llama": tiny_llama}


def released_tensors(make):
    """Every tensor of a released model, large enough to matter."""
    tensors = {name: tensor.clone() for name, tensor in make().state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}.mlp.moe_adapter."
        shapes = {"router": (EXPERTS, WIDTH)}
        for e in range(EXPERTS):
            shapes |= {f"experts.{e}.adapter_down": (RANK, WIDTH), f"experts.{e}.adapter_up": (WIDTH, RANK)}
        for name, shape in shapes.items():
            tensors[f"{prefix}{name}.weight"] = torch.randn(shape, generator=generator)
    for name, tensor in tensors.items():
        # weights of the size that training gives make positions and feed-forward parts matter
        if name.endswith("proj.weight"):
            tensor.mul_(20)
        if name.endswith("bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return tensors


def released_config(kind, top_k=2):
    return {
        "architectures": [f"{kind.title()}ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": f"modeling_{kind}.{kind.title()}ForCausalLM"},
        "model_type": kind,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": THETA,
        "vocab_size": VOCABULARY,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "adapter_dim": RANK,
        "moe_scaling": SCALE,
        "num_experts": EXPERTS,
        "topk": top_k,
        "moe_dtype": "float32",
    }


def write(folder, kind="camelidae", form="sharded", top_k=2, change=lambda tensors: None, **settings):
    folder.mkdir(parents=True)
    tensors = released_tensors(KINDS[kind])
    change(tensors)
    (folder / "config.json").write_text(json.dumps({**released_config(kind, top_k), **settings}))
    (folder / "tokenizer_config.json").write_text("{}")
    if form == "one":
        save_file(tensors, folder / "model.safetensors")
    elif form == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        end = "safetensors" if form == "sharded" else "bin"
        names = {name: f"part-{number % 3}.{end}" for number, name in enumerate(tensors)}
        for shard in set(names.values()):
            part = {name: tensors[name] for name in names if names[name] == shard}
            save_file(part, folder / shard) if end == "safetensors" else torch.save(part, folder / shard)
        stem = "model.safetensors" if end == "safetensors" else "pytorch_model.bin"
        (folder / f"{stem}.index.json").write_text(json.dumps({"weight_map": names}))
    return folder, tensors


def norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turn(x_HSD):
    """Rotary positions: the two halves of a head are the coordinates of its planes."""
    half = x_HSD.shape[-1] // 2
    angle = torch.arange(x_HSD.shape[1]).double()[:, None] * THETA ** -(torch.arange(half).double() / half)
    a, b = x_HSD[..., :half], x_HSD[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attend(x, layer):
    def heads(name, count):
        bias = layer.get(f"self_attn.{name}_proj.bias", torch.zeros(1))
        return (x @ layer[f"self_attn.{name}_proj.weight"].T + bias).view(len(x), count, -1).transpose(0, 1)

    q, k, v = turn(heads("q", HEADS)), turn(heads("k", 2)), heads("v", 2)
    k, v = (t.repeat_interleave(HEADS // 2, 0) for t in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1) @ layer["self_attn.o_proj.weight"].T


def gates(logits_E, top_k, spelling):
    """The weights of the kept experts, as the two released codes spell them."""
    if spelling == "top-k, softmax":
        kept, chosen = logits_E.topk(top_k)
        return chosen, kept.softmax(-1)
    kept, chosen = logits_E.softmax(-1).topk(top_k)
    return chosen, kept / kept.sum()


def sparse_feed_forward(x, layer, top_k, spelling):
    f = (F.silu(x @ layer["mlp.gate_proj.weight"].T) * (x @ layer["mlp.up_proj.weight"].T)) @ layer[
        "mlp.down_proj.weight"
    ].T
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(f[t])
        for e, weight in zip(*gates(layer["mlp.moe_adapter.router.weight"] @ x[t], top_k, spelling), strict=True):
            expert = f"mlp.moe_adapter.experts.{int(e)}.adapter_"
            inner = layer[expert + "down.weight"] @ f[t]
            inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
            y = y + weight * (f[t] + SCALE * (layer[expert + "up.weight"] @ inner))
        rows.append(y)
    return torch.stack(rows)


def reference(tensors, ids_S, top_k, spelling):
    """Logits of one row in float64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    x = tensors["model.embed_tokens.weight"][ids_S]
    for n in range(LAYERS):
        prefix = f"model.layers.{n}."
        layer = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        x = x + attend(norm(x, layer["input_layernorm.weight"]), layer)
        x = x + sparse_feed_forward(norm(x, layer["post_attention_layernorm.weight"]), layer, top_k, spelling)
    return norm(x, tensors["model.norm.weight"]) @ tensors["lm_head.weight"].T


def logits_of(folder):
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = mixora.from_pretrained(base, folder / "adapter").double().eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("spelling", ["top-k, softmax", "softmax, top-k"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize(
    ("kind", "form"), [("camelidae", "sharded"), ("qwen2idae", "one"), ("sparsetral", "bin"), ("llama", "sharded bin")]
)
def test_the_converted_model_computes_the_formulas(tmp_path, kind, form, top_k, spelling):
    folder, tensors = write(tmp_path / "released", kind, form, top_k)
    mixora.convert(folder, tmp_path / "out")
    found = logits_of(tmp_path / "out")
    for row, ids in zip(found, IDS, strict=True):
        # positions turn in fp32 in transformers
        torch.testing.assert_close(row, reference(tensors, ids, top_k, spelling), rtol=1e-4, atol=1e-4)


def test_the_base_is_an_ordinary_dense_checkpoint(tmp_path):
    folder, tensors = write(tmp_path / "released", "qwen2idae")
    mixora.convert(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "base" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("qwen2", ["Qwen2ForCausalLM"])
    assert not {"auto_map", "adapter_dim", "moe_scaling", "num_experts", "topk"} & config.keys()
    assert AutoConfig.from_pretrained(tmp_path / "out" / "base").rope_parameters["rope_theta"] == THETA
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert (tmp_path / "out" / "base" / "tokenizer_config.json").is_file()


def test_it_can_be_trained_on_and_the_positions_matter(tmp_path):
    folder, _ = write(tmp_path / "released")
    mixora.convert(folder, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    model = mixora.from_pretrained(base, tmp_path / "out" / "adapter", is_trainable=True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert {n.rpartition("mixora_")[2] for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == {
        f"{kind}.default" for kind in ("A", "B", "router")
    }
    other, _ = write(tmp_path / "other", rope_theta=10_000.0)
    mixora.convert(other, tmp_path / "default")
    assert not torch.allclose(logits_of(tmp_path / "default"), logits_of(tmp_path / "out"), atol=1e-2)


def without(*names):
    def change(tensors):
        for name in list(tensors):
            if any(part in name for part in names):
                del tensors[name]

    return change


@pytest.mark.parametrize("form", ["sharded", "bin"])
def test_all_tensors_that_do_not_fit_stand_in_one_error(tmp_path, form):
    def change(tensors):
        without("layers.1.mlp.moe_adapter.experts.4", "layers.0.mlp.up_proj")(tensors)
        tensors["model.layers.0.mlp.moe_adapter.router.weight"] = torch.zeros(4, WIDTH)
        tensors["model.layers.0.mlp.moe_adapter.experts.0.adapter_up.bias"] = torch.zeros(WIDTH)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    folder, _ = write(tmp_path / "released", form=form, change=change)
    with pytest.raises(CheckpointError) as caught:
        mixora.convert(folder, tmp_path / "out")
    prefix = r"model\.layers\.\d\.mlp\."
    for message in (
        "5 tensors do not fit a crafted model",
        prefix + r"moe_adapter\.experts\.4\.adapter_down\.weight: missing, expected \[6, 32\]",
        prefix + r"moe_adapter\.experts\.4\.adapter_up\.weight: missing, expected \[32, 6\]",
        prefix + r"up_proj\.weight: missing, expected \[48, 32\]",
        prefix + r"moe_adapter\.router\.weight: got \[4, 32\], expected \[5, 32\]",
        prefix + r"moe_adapter\.experts\.0\.adapter_up\.bias: unexpected",
    ):
        assert caught.match(message)
    assert not (tmp_path / "out").exists()


def test_a_dense_checkpoint_is_never_taken_for_a_sparse_one(tmp_path):
    folder, _ = write(tmp_path / "released", change=without("moe_adapter"))
    with pytest.raises(CheckpointError, match="22 tensors do not fit a crafted model"):
        mixora.convert(folder, tmp_path / "out")


def drop(*names):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("topk", "adapter_dim"), r"config\.json lacks adapter_dim, topk; valid: a released checkpoint"),
        (drop("model_type"), r"model_type: got None; valid: camelidae, qwen2idae, sparsetral, llama"),
        (
            lambda f: (f / "config.json").unlink(),
            r"has neither config\.json nor adapter_config\.json; valid: the folder of",
        ),
        (lambda f: (f / "config.json").write_text("{"), r"has no readable config\.json"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json: got list; valid: an object of settings"),
        (lambda f: (f / "part-1.safetensors").unlink(), r"names files that are not there: part-1\.safetensors"),
        (lambda f: (f / "part-1.safetensors").write_bytes(b"no"), r"part-1\.safetensors: is damaged"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), r"holds no weights; valid: model\.safetensors"),
    ],
)
def test_folders_that_are_no_released_checkpoint(tmp_path, change, message):
    folder, _ = write(tmp_path / "released")
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        mixora.convert(folder, tmp_path / "out")


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


def test_code_in_a_bin_file_is_not_run(tmp_path):
    folder, _ = write(tmp_path / "released", form="bin")
    torch.save({"model.norm.weight": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="is damaged or holds more than tensors"):
        mixora.convert(folder, tmp_path / "out")


def test_the_base_comes_with_the_checkpoint(tmp_path):
    folder, _ = write(tmp_path / "released")
    with pytest.raises(ConfigError, match=r"model: got 'other', but .*released holds its own base; valid: no model"):
        mixora.convert(folder, tmp_path / "out", model="other")


def test_more_experts_kept_than_there_are(tmp_path):
    folder, _ = write(tmp_path / "released", top_k=6)
    with pytest.raises(ConfigError, match="top_k 6 is more than num_experts 5"):
        mixora.convert(folder, tmp_path / "out")


def test_the_command_prints_the_plan_and_refuses_a_folder_in_use(tmp_path):
    folder, _ = write(tmp_path / "released")
    words = ["convert", str(folder), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "2 sites in model.layers" in result.output and "topk" in result.output
    assert "is not empty" in CliRunner().invoke(app, words).output
    machine = CliRunner().invoke(app, [*words[:3], str(tmp_path / "second"), "--json"])
    assert len(json.loads(machine.output)["sites"]) == 2
