"""A GGUF file as a folder of safetensors, unpacked once and kept in `$MIXORA_CACHE` (default `~/.cache/mixora`).

The weights are kept in float32: the scale and offset of a quantised block have float16 precision, so their
combination fits neither bfloat16 nor float16.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from mixora.bases.limits import check_sizes
from mixora.errors import ModelError


def unpack_gguf(file: Path) -> Path:
    """The folder of safetensors and tokenizer made from a GGUF file, known by the file's content.

    Not by its size and time: two fine-tunes of one model have equal sizes, and package tools flatten times.
    """
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{file}: is not a GGUF file; valid: a .gguf file or a folder written by save_pretrained")
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    cache = Path(os.environ.get("MIXORA_CACHE") or "~/.cache/mixora").expanduser()
    target = cache / f"{file.stem}-{digest[:16]}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=cache))
    except OSError as error:
        raise ModelError(f"{cache}: cannot be written ({error}); set MIXORA_CACHE to another folder") from error
    try:
        _convert(file, fresh)
        # A rename is all or nothing, so a folder with the final name is always whole.
        fresh.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first; its folder holds the same
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def _convert(file: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        # Without `dequantize` the model keeps a quantizer that refuses to be saved.
        check_sizes(AutoConfig.from_pretrained(**source), file)
        unpacked = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=unpacked, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except ModelError:
        raise
    except Exception as error:
        # as damaged files make it
        raise ModelError(
            f"{file}: transformers cannot unpack it as a causal language model; reason: {error}"
        ) from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
