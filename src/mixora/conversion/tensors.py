"""Tensors on disk: read without running any code, compared by name and shape, written as an adapter."""

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mixora.errors import CheckpointError
from mixora.files import documents
from mixora.tuner import MixoraConfig

Shapes = dict[str, tuple[int, ...]]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a configuration file."""
    try:
        return documents.read_json(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.parent}: has no readable {file.name}: {error}") from None


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or of a `.bin` file that holds nothing else, on the CPU."""
    try:
        if file.suffix == ".bin":
            # tied tensors share their memory here, which safetensors cannot say
            found = torch.load(file, map_location="cpu", weights_only=True).items()
            return {name: tensor.detach().clone() for name, tensor in found}
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except Exception as error:
        # torch reports a damaged or unsafe file by half a dozen kinds of error
        raise CheckpointError(f"{file}: is damaged or holds more than tensors: {error}") from None


def read_shapes(files: list[Path]) -> Shapes:
    """The shapes of all tensors of some files; of safetensors files only the headers are read."""
    found: Shapes = {}
    for file in files:
        if file.suffix == ".bin":
            found.update(shapes_of(read_tensors(file)))
            continue
        try:
            with safe_open(file, framework="pt") as opened:
                found.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: is damaged: {error}") from None
    return found


def shapes_of(tensors: dict[str, Tensor]) -> Shapes:
    """Their shapes by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_shapes(found: Shapes, expected: Shapes, source: Path, kind: str) -> None:
    """Every tensor that is missing, unexpected or of the wrong shape, in one `CheckpointError`."""
    problems = [f"{name}: missing, expected {list(expected[name])}" for name in expected.keys() - found]
    problems += [f"{name}: unexpected" for name in found.keys() - expected]
    for name in expected.keys() & found:
        if found[name] != expected[name]:
            problems.append(f"{name}: got {list(found[name])}, expected {list(expected[name])}")
    if problems:
        shown = "\n  ".join(sorted(problems))
        raise CheckpointError(f"{source}: {len(problems)} tensors do not fit {kind}:\n  {shown}")


def write_adapter(
    folder: Path, dense: PreTrainedModel, config: MixoraConfig, base: str, tensors: dict[str, Tensor]
) -> None:
    """Save `tensors` as the adapter of `config` for `base`; `dense` is that base on the meta device, and is changed."""
    # the tuner completes the configuration with the plan that loading compares with
    saved: Any = get_peft_model(dense, config).peft_config["default"]
    saved.inference_mode = True
    saved.base_model_name_or_path = base
    saved.save_pretrained(folder)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
