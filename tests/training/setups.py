"""One tiny model, data set and tokenizer for every trainer, and the auxiliary gradient by the formula alone."""

import torch
import trl
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import mixora

VOCABULARY = 64
ROWS = [
    torch.randint(3, VOCABULARY, (12,), generator=torch.Generator().manual_seed(n)).tolist()[: 12 - n % 4]
    for n in range(16)
]
# in the second batch of four, and a token that stands in no other row
RARE_ROW = 6
RARE_TOKEN = next(t for t in ROWS[RARE_ROW] if sum(t in row for row in ROWS) == 1)


def make_model(task_type="CAUSAL_LM", **overrides):
    """A Llama of two layers with a mixture on q and v; B is zero, so the task gives the router no gradient."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    settings = {"num_experts": 4, "top_k": 2, "rank": 2, "expert_dropout": 0.0, "targets": ["q_proj", "v_proj"]}
    adapter = mixora.recipe("sira", **{**settings, "losses.load_balance.coefficient": 0.5, **overrides})
    adapter.task_type = task_type
    return get_peft_model(LlamaForCausalLM(config), adapter)


def make_tokenizer():
    words = {f"w{i}": i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), pad_token="w0", eos_token="w2"
    )


def dataset():
    return Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row), "labels": row} for row in ROWS])


def collate(rows):
    """Pad on the right; labels are the inputs."""
    tokens = [row["input_ids"] for row in rows]
    width = max(map(len, tokens))
    pad = lambda value: torch.tensor([row + [value] * (width - len(row)) for row in tokens])  # noqa: E731
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens])
    return {"input_ids": pad(0), "attention_mask": mask, "labels": pad(-100)}


def settings(folder, **changes):
    """Training arguments of one step that changes no weight."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.0,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0,
        "dataloader_pin_memory": False,
        "activation_checkpointing": False,
    }
    return {**defaults, **changes}


def make_trainer(trainer_class, folder, task_type="CAUSAL_LM", callbacks=(), model=None, **changes):
    """A trainer over the rows in their order."""

    class Sequential(trainer_class):
        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    common = {
        "model": model or make_model(task_type),
        "train_dataset": dataset(),
        "data_collator": collate,
        "callbacks": list(callbacks),
    }
    if issubclass(trainer_class, trl.SFTTrainer):
        args = trl.SFTConfig(**settings(folder, **changes), bf16=False, dataset_kwargs={"skip_prepare_dataset": True})
        return Sequential(args=args, processing_class=make_tokenizer(), **common)
    return Sequential(args=TrainingArguments(**settings(folder, **changes)), **common)


def accumulated_batches(count):
    """The micro-batches that one step of `count` accumulations sees."""
    rows = list(dataset())
    return [collate(rows[4 * n : 4 * n + 4]) for n in range(count)]


def balance_gradient(model, batches, coefficient=0.5, top_k=2):
    """Gradient of the mean over batches and sites of E sum_e f_e P_e: straight from the formula, with hooks on x."""
    inputs = {}
    sites = [(name, m) for name, m in model.named_modules() if hasattr(m, "mixora_router")]
    hooks = [
        m.base_layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].detach()))
        for name, m in sites
    ]
    model.eval()
    gradients = {name: 0.0 for name, _ in sites}
    for batch in batches:
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        real = batch["attention_mask"].bool()
        for name, module in sites:
            weight = module.mixora_router["default"].detach().clone().requires_grad_()
            probabilities = torch.softmax(inputs[name][real] @ weight.T, dim=-1)
            chosen = torch.zeros_like(probabilities)
            for token, p in enumerate(probabilities.tolist()):
                for expert in sorted(range(len(p)), key=lambda e, p=p: -p[e])[:top_k]:
                    chosen[token, expert] = 1.0
            share = chosen.sum(0) / chosen.sum()
            loss = weight.shape[0] * (share * probabilities.mean(0)).sum()
            (gradient,) = torch.autograd.grad(loss * coefficient / len(sites) / len(batches), weight)
            gradients[name] = gradients[name] + gradient
    for hook in hooks:
        hook.remove()
    return torch.cat([g.flatten() for g in gradients.values()])
