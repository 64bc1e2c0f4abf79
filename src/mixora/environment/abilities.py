"""What works here and what does not, and why: tried where that takes no time, else read off what is installed."""

import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mixora.environment.packages import version_of
from mixora.errors import MixoraError

HUB = "https://huggingface.co"
HUB_SECONDS = 3
TRACKERS = ("trackio", "tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class Ability:
    """`works`: None where it was not tried. `is_needed`: nothing can be trained without."""

    name: str
    works: bool | None
    why: str
    is_needed: bool = False


def try_all(network: bool) -> tuple[Ability, ...]:
    """Training first, then kernels, bases, and what mixora works with."""
    training = _attempt("training", lambda: _train("auto"), "a step of a small mixture was made", is_needed=True)
    return (training, *_kernels(bool(training.works)), *_of_libraries(), _hub(network))


def _attempt(name: str, action: Callable[[], object], why: str, is_needed: bool = False) -> Ability:
    try:
        action()
    except Exception as error:
        return Ability(name, False, _reason(error), is_needed)
    return Ability(name, True, why, is_needed)


def _reason(error: Exception) -> str:
    """The first line of an error, without the path of the home folder."""
    line = (str(error).splitlines() or [""])[0].replace(str(Path.home()), "~")
    return line if isinstance(error, MixoraError) else f"{type(error).__name__}: {line}"


def _train(kernel: str) -> None:
    """A step of AdamW on one linear with two experts, on the accelerator if there is one."""
    import torch
    from peft import get_peft_model
    from torch import nn

    from mixora.tuner import MixoraConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rule = {
        "targets": ["0"],
        "expert": {"kind": "lora", "rank": 16},
        "router": {"kind": "topk", "num_experts": 2, "top_k": 1},
        "kernel": kernel,
    }
    with torch.random.fork_rng():
        model = get_peft_model(nn.Sequential(nn.Linear(32, 32)).to(device), MixoraConfig(rules={"all": rule}))
        optimiser = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        model(torch.randn(2, 8, 32, device=device)).square().mean().backward()
        optimiser.step()


def _kernels(can_train: bool) -> Iterator[Ability]:
    if not can_train:
        return
    from mixora.kernels import KERNELS

    for kernel in KERNELS:
        yield _attempt(f"kernel {kernel}", partial(_train, kernel), "a step was made")


def _of_libraries() -> Iterator[Ability]:
    yield _attempt("fused loss", _fuse, "the loss of a small head was computed")
    if version_of("bitsandbytes"):
        yield _attempt("bases in 4 and 8 bits, bitsandbytes", _quantise, "a small layer was computed in 4 bits")
    else:
        yield Ability("bases in 4 and 8 bits, bitsandbytes", False, 'pip install "mixora[quantised]"')
    yield _installed("quantised bases, torchao", "torchao")
    yield _flash_attention()
    trackers = [name for name in TRACKERS if version_of(name)]
    why = ", ".join(trackers) or f"none is installed; pip install one of {', '.join(TRACKERS)}"
    yield Ability("trackers, by report_to", bool(trackers), why)
    yield _installed("runs spread over a cluster, ray", "ray")
    yield _installed("benchmarks of language models, lm-eval", "lm-eval")


def _installed(name: str, package: str) -> Ability:
    version = version_of(package)
    return Ability(name, version is not None, f"{package} {version}" if version else f"pip install {package}")


def _fuse() -> None:
    import torch

    from mixora.losses.fused import cross_entropy

    hidden_TI, weight_VI = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8)
    cross_entropy(hidden_TI, weight_VI, torch.arange(4)).backward()


def _quantise() -> None:
    import torch
    from bitsandbytes.nn import Linear4bit

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layer = Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to(device)
    layer(torch.randn(2, 64, device=device))


def _flash_attention() -> Ability:
    name, instead = "flash attention, flash-attn", "PyTorch's own attention is used"
    try:
        import torch

        has_gpu = torch.cuda.is_available()
    except (ImportError, OSError):
        has_gpu = False
    if not has_gpu:
        return Ability(name, False, f"needs an NVIDIA GPU, and there is none; {instead}")
    version = version_of("flash-attn")
    why = f"flash-attn {version}" if version else f"the package is not installed; {instead}"
    return Ability(name, version is not None, why)


def _hub(network: bool) -> Ability:
    name = "Hugging Face hub"
    if not network:
        return Ability(name, None, "not tried; --network tries")
    try:
        with urllib.request.urlopen(urllib.request.Request(HUB, method="HEAD"), timeout=HUB_SECONDS):
            return Ability(name, True, "answers")
    except urllib.error.HTTPError:
        return Ability(name, True, "answers")
    except OSError as error:
        return Ability(name, False, f"{_reason(error)}; models and data have to be on this machine")
