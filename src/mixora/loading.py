"""A saved adapter back on its base model, checked tensor by tensor."""

import re
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from peft.utils.constants import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from mixora.bases import TASK_TYPES, Task, load_base
from mixora.errors import MOST_NAMED, CheckpointError, ConfigError
from mixora.files.documents import read_json
from mixora.host.versions import MIXORA
from mixora.mixture import PREFIX
from mixora.planning import whole_modules

ROOT = "base_model.model."
"""Of the names of tensors in an adapter's file; what follows is the name in the base."""

FLOATS = ("F16", "BF16", "F32", "F64")
# what PEFT warns about is an error here
_TOLD_BELOW = "Some weights of|Found missing adapter keys"
Headers = dict[str, tuple[tuple[int, ...], str]]
"""Shape and type of each tensor in a file, by name."""


def task_of(config: PeftConfig) -> Task:
    """The task that an adapter was made for; a causal language model where it does not say."""
    return next((task for task, kind in TASK_TYPES.items() if kind == str(config.task_type)), "causal-lm")


def from_pretrained(
    base: PreTrainedModel | str | Path,
    adapter: str | Path,
    adapter_name: str = "default",
    is_trainable: bool = False,
    **for_base: Any,
) -> PeftModel:
    """The base model with a saved adapter on it, as `PeftModel.from_pretrained` gives it, after stricter checks.

    `base` is a model, or what `mixora.bases.load_base` takes (which also gets `for_base`: `dtype`, `num_labels`, ...).
    `adapter` is a folder written by `save_pretrained`, or a hub id. Weights that are missing, unexpected or of the
    wrong shape, numbers that are no floats or not finite, and a model that does not fit the adapter's plan, are a
    `CheckpointError` that names all of them. Where the adapter brings embeddings of more or fewer tokens, as PEFT saves
    those that were resized, the base gets as many.
    """
    folder = find_adapter(adapter)
    check_files(folder)
    config = read_adapter_config(folder)
    if not isinstance(base, PreTrainedModel):
        base, _ = load_base(base, task=task_of(config), **for_base)
    _check_names(base, config, folder, adapter)
    _resize(base, folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_TOLD_BELOW)
        model = PeftModel.from_pretrained(
            base, str(folder), adapter_name=adapter_name, is_trainable=is_trainable, ignore_mismatched_sizes=True
        )
    try:
        _check_tensors(model, adapter_name, folder, adapter)
    except CheckpointError:
        model.unload()
        raise
    return model


def add_pretrained(model: PeftModel, adapter: str | Path, adapter_name: str) -> None:
    """Put another saved adapter on `model`, frozen, after the checks of `from_pretrained`; the active one stays so.

    Raises `CheckpointError`; the model is then as it was.
    """
    folder = find_adapter(adapter)
    check_files(folder)
    _check_names(model.get_base_model(), read_adapter_config(folder), folder, adapter, is_first=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_TOLD_BELOW)
        model.load_adapter(str(folder), adapter_name, ignore_mismatched_sizes=True)
    try:
        _check_tensors(model, adapter_name, folder, adapter)
    except CheckpointError:
        model.delete_adapter(adapter_name)
        raise


def _check_names(base: nn.Module, config: PeftConfig, folder: Path, adapter: str | Path, is_first: bool = True) -> None:
    """Before PEFT, which raises a bare `KeyError` where a module that is trained whole lacks a tensor, and writes into
    the base what has the name of one of its weights. The first adapter may bring embeddings, as PEFT saves them.
    """
    on_disk, whole = _read_headers(folder), whole_modules.names_of(config)
    expected = {
        f"{ROOT}{path}.{key}": tensor
        for path, module in base.named_modules()
        # an adapter that is there already may have copies of its own
        if path.endswith(whole) and not re.search(r"\.(original_module|modules_to_save|base_layer)(\.|$)", path)
        for key, tensor in getattr(module, "original_module", module).state_dict().items()
        if PREFIX not in key and "base_layer" not in key
    }
    problems = [_tell_missing(name, expected[name]) for name in sorted(expected.keys() - on_disk)]
    own = {_name_in_base(name) for name in _names_of_tensors(base)}
    own -= _names_of_embeddings(base) if is_first else set()
    problems += [
        f"{name}: unexpected, since it is a weight of the base"
        for name in sorted(on_disk.keys() - expected)
        if _name_in_base(name.removeprefix(ROOT)) in own
    ]
    _refuse(problems, adapter)


def _names_of_tensors(module: nn.Module) -> list[str]:
    named = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return [name for name, _ in chain(*named)]


def _names_of_embeddings(base: Any) -> set[str]:
    """Of the tensors of a model's first and last layer, as PEFT finds these; none where a model does not tell them."""
    try:
        layers = (base.get_input_embeddings(), base.get_output_embeddings())
    except (AttributeError, NotImplementedError):
        return set()
    found = [(path, module) for path, module in base.named_modules() if any(module is layer for layer in layers)]
    return {_name_in_base(f"{path}.{name}") for path, module in found for name in _names_of_tensors(module)}


def _resize(base: PreTrainedModel, folder: Path) -> None:
    """Give the base as many tokens as the embeddings in an adapter's file, if there are any."""
    own = {name for name in _names_of_embeddings(base) if name.endswith(".weight")}
    rows = {shape[0] for name, (shape, _) in _read_headers(folder).items() if name.removeprefix(ROOT) in own and shape}
    if len(rows) == 1 and rows != {base.get_input_embeddings().weight.shape[0]}:
        # what the new rows hold is read from the file
        base.resize_token_embeddings(rows.pop(), mean_resizing=False)


def _name_in_base(name: str) -> str:
    """Without the steps that adapters put into it."""
    return re.sub(r"\.(original_module|base_layer)(?=\.)", "", name)


def _check_tensors(model: PeftModel, adapter_name: str, folder: Path, adapter: str | Path) -> None:
    _refuse(_compare(model, adapter_name, _read_headers(folder)), adapter)


def _refuse(problems: list[str], adapter: str | Path) -> None:
    """`CheckpointError` where there are any."""
    if problems:
        more = [f"and {len(problems) - MOST_NAMED} more"] if len(problems) > MOST_NAMED else []
        shown = "\n  ".join([*problems[:MOST_NAMED], *more])
        raise CheckpointError(f"{adapter}: {len(problems)} tensors do not fit the model:\n  {shown}")


def find_adapter(adapter: str | Path) -> Path:
    """The folder of an adapter; of one on the hub the copy in the local cache, which holds nothing but its two files.

    So a hub's adapter passes the same checks as a local one, and what else lies beside it is never read.
    """
    if Path(adapter).exists() or isinstance(adapter, Path):
        return Path(adapter)
    try:
        return Path(snapshot_download(adapter, allow_patterns=[CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{adapter}: no such folder, and the hub answered: {reason}") from None


def read_adapter_config(adapter: str | Path) -> PeftConfig:
    """The configuration of an adapter of ours in a folder; `CheckpointError` for others and damaged ones."""
    file = Path(adapter) / CONFIG_NAME
    try:
        if file.exists():
            # PEFT's own reader takes the last of equal keys, NaN, and any depth
            read_json(file)
        kind = PeftConfig._get_peft_type(str(adapter))
        if kind == MIXORA:
            return PeftConfig.from_pretrained(str(adapter))
    except ConfigError as error:
        raise CheckpointError(f"{adapter}: {CONFIG_NAME}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:
        raise CheckpointError(f"{adapter}: its {CONFIG_NAME} is damaged or not there: {error}") from None
    raise CheckpointError(f"{adapter}: is an adapter of type {kind}; valid: {MIXORA.value}")


def check_files(folder: Path) -> None:
    """`CheckpointError` where a folder does not hold a whole adapter."""
    missing = [name for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: has no {' and no '.join(missing)}; valid: a folder that save_pretrained wrote"
        )
    _read_headers(folder)


def count_outputs(folder: Path) -> int | None:
    """The number of outputs of the classifier's head that was trained with the adapter; None where there is none."""
    shapes = {name: shape for name, (shape, _) in _read_headers(folder).items()}
    # what PEFT calls the heads of classifiers; the last of several layers gives the outputs
    of_head = [name for name in shapes if re.search(r"\.(classifier|score)\.(.+\.)?weight$", name)]
    return shapes[max(of_head)][0] if of_head else None


def _read_headers(folder: Path) -> Headers:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (tuple(found.get_shape()), found.get_dtype()) for name, found in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged: {error}") from None


def _compare(model: PeftModel, adapter: str, on_disk: Headers) -> list[str]:
    # embeddings are not ours to save, and looking for them would ask the hub for the base
    state = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    if len(model.peft_config) == 1 and on_disk.keys() - state:
        # but PEFT saves those that were resized, or have an adapter, unless it is told not to
        saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=True)
        state |= {name: tensor for name, tensor in saved.items() if name in on_disk}
    problems = [_tell_missing(name, state[name]) for name in sorted(state.keys() - on_disk)]
    problems += [f"{name}: unexpected" for name in sorted(on_disk.keys() - state)]
    for name in sorted(state.keys() & on_disk):
        problems += [f"{name}: {problem}" for problem in _problems_of(state[name], *on_disk[name])]
    return problems


def _tell_missing(name: str, tensor: Tensor) -> str:
    return f"{name}: missing, expected {list(tensor.shape)}"


def _problems_of(loaded: Tensor, shape: tuple[int, ...], dtype: str) -> Iterator[str]:
    """What is wrong with a tensor of this shape and type on disk, which is `loaded` where the shapes are equal."""
    if tuple(loaded.shape) != shape:
        yield f"got {list(shape)}, expected {list(loaded.shape)}"
    if loaded.is_floating_point() and dtype not in FLOATS:
        yield f"got numbers of type {dtype}, expected one of {', '.join(FLOATS)}"
    elif loaded.is_floating_point() and tuple(loaded.shape) == shape:
        wrong = loaded.numel() - int(loaded.isfinite().sum())
        if wrong:
            yield f"{wrong} of {loaded.numel()} numbers are not finite"
