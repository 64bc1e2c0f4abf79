"""On two ranks: trainings that shard, and those that were asked to and do not. The last part: it changes accelerate."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import mixora
from mixora.errors import TrainingError
from mixora.tuner.keys import adapter_state
from tests.models import adapt, fill, tiny_llama, token_ids
from tests.training.setups import make_model, make_trainer

IDS = token_ids(4, 8)
STEPS = {"learning_rate": 1e-2, "max_steps": 3, "max_grad_norm": 1.0}
NO_BALANCE = {"losses.load_balance.coefficient": 0.0}
FSDP2 = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}


def make_sharded(config, base=None, checkpoints=False, **policy):
    model = adapt(base or tiny_llama(), config)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **policy)
    fully_shard(model, **policy)
    assert all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in model.parameters())
    return model


def train_under_fsdp2(folder):
    """Through the trainer: losses, and the adapter as its files hold it."""
    model = make_model(**NO_BALANCE)
    trainer = make_trainer(mixora.Trainer, folder, model=fill(model), **STEPS, **FSDP2)
    assert dist.get_world_size() == trainer.accelerator.num_processes == 2
    trainer.train()
    assert all(isinstance(p, DTensor) for p in trainer.model.parameters())
    trainer.save_model(folder)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"losses": torch.tensor(losses), "weights": adapter_state(trainer.model)}


def refuse(folder, **settings):
    try:
        make_trainer(mixora.Trainer, folder, model=make_model(**NO_BALANCE), **STEPS, **settings).train()
    except TrainingError as error:
        return str(error)
    return "was trained"


def step(model, rows, mask=None, **settings):
    """Gradients, whole, and the loss."""
    batch = {"input_ids": rows, "labels": rows, **({} if mask is None else {"attention_mask": mask})}
    loss, _ = mixora.compute_loss(model, batch, **settings)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def farthest(some, others):
    assert some.keys() == others.keys()
    return max(float((some[name] - others[name]).abs().max()) for name in others)


def compare_gradients(config, masks=None, **settings):
    """The largest difference between a sharded model's gradients and the mean of both ranks' without."""
    rank, whole = dist.get_rank(), adapt(tiny_llama(), config)
    rows, masks = IDS.chunk(2), masks or [None, None]
    for n in range(2):
        _, expected = step(whole, rows[n], masks[n])
    _, found = step(make_sharded(config, **settings), rows[rank], masks[rank])
    return farthest(found, {name: g / 2 for name, g in expected.items()})


def leave_a_rank_without_tokens(kernel):
    """On the second rank everything is padding, so that no expert there has a token."""
    config = mixora.recipe("mola", num_experts=4, top_k=2, rank=2, dropout=0.0, kernel=kernel, **NO_BALANCE)
    real = torch.ones_like(IDS[:2])
    return compare_gradients(config, [real, real * 0])


def serve(config):
    """Differences of logits and of written tokens from an unsharded model's."""
    whole, sharded = adapt(tiny_llama(), config).eval(), make_sharded(config).eval()
    with torch.no_grad():
        apart = (sharded(input_ids=IDS).logits - whole(input_ids=IDS).logits).abs().max()
    torch.distributed.fsdp.register_fsdp_forward_method(sharded, "generate")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    written = [model.generate(input_ids=IDS, **settings) for model in (whole, sharded)]
    return float(apart), torch.equal(*written)


def load_into_shards(folder, weights):
    model = make_model(**NO_BALANCE)
    fully_shard(model)
    model.load_adapter(folder, "default")
    assert all(isinstance(p, DTensor) for p in model.parameters())
    state = adapter_state(model)
    return all(torch.equal(state[name], value) for name, value in weights.items())


def find(folder):
    folder = folder / "sharded"
    config = mixora.recipe("mola", num_experts=4, top_k=2, rank=2, dropout=0.0, **NO_BALANCE)
    found = train_under_fsdp2(folder)
    found["loaded"] = load_into_shards(folder, found["weights"])
    found["version 1"] = refuse(f"{folder}/1", fsdp=True, fsdp_config={"version": 1, "sync_module_states": False})
    found["idle"] = [leave_a_rank_without_tokens(kernel) for kernel in ("loop", "sorted", "joint")]
    found["checkpoints"] = compare_gradients(config, checkpoints=True)
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    loss, gradients = step(make_sharded(config, mp_policy=low), IDS)
    found["low"] = [loss, step(adapt(tiny_llama(), config), IDS)[0]]
    found["low dtypes"] = sorted({str(g.dtype) for g in gradients.values()})
    found["apart"], found["written"] = serve(config)
    return found
