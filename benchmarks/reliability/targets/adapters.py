"""Saved adapters with damages: their configuration, the bytes of their file, single tensors."""

import copy
import json
from typing import Any

import safetensors.torch
import torch

import mixora
from benchmarks.reliability.targets.drawing import Draw
from benchmarks.reliability.targets.material import adapter_config, adapter_files, fresh, make_base, write_files
from mixora.errors import CheckpointError

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
DTYPES = (torch.int8, torch.int32, torch.int64, torch.bool, torch.uint8)


def _load(files: dict[str, bytes]) -> Any:
    with fresh("adapter") as folder:
        write_files(folder, files)
        return mixora.from_pretrained(copy.deepcopy(make_base()), folder)


def read_config(data: bytes) -> None:
    """An adapter_config.json of any bytes, or with damages."""
    draw = Draw(data)
    if draw.byte() % 4:
        content = json.dumps(draw.damage(adapter_config()), default=str).encode()
    else:
        content = draw.alter(adapter_files()[CONFIG])
    _load({**adapter_files(), CONFIG: content})


def read_header(data: bytes) -> None:
    """A safetensors file whose header has damages: what loads has the header that was written."""
    draw, whole = Draw(data), adapter_files()[WEIGHTS]
    size = 8 + int.from_bytes(whole[:8], "little")
    kind = draw.below(8)
    if kind == 0:
        content = draw.pick((0, 1, 10**12, 2**63, 2**64 - 1, 10**8)).to_bytes(8, "little") + whole[8:]
    elif kind == 1:
        content = whole[: int.from_bytes(draw.data[:2], "big") % len(whole)]
    elif kind == 2:
        header = draw.damage(json.loads(whole[8:size]))
        text = json.dumps(header, default=str).encode()
        content = len(text).to_bytes(8, "little") + text + whole[size:]
    else:
        content = draw.alter(whole[:size]) + whole[size:]
    _load({**adapter_files(), WEIGHTS: content})
    assert _tensors(content) == _tensors(whole), "a damaged header was taken for another adapter"


def _tensors(content: bytes) -> dict[str, Any]:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    # other words in a header mean nothing
    return {
        name: [entry[word] for word in ("dtype", "shape", "data_offsets")]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_tensors(data: bytes) -> None:
    """Tensors that are missing, unexpected, of another shape or type, or not finite: one error that names all."""
    draw, whole = Draw(data), safetensors.torch.load(adapter_files()[WEIGHTS])
    tensors, damaged = dict(whole), []
    mildness = draw.pick((16, 64, 255))
    for name in sorted(whole):
        action = draw.below(mildness)
        if action < 6:
            damaged.append(name)
        if action == 0:
            del tensors[name]
        elif action == 1:
            tensors[name + "x"] = tensors[name].clone()
            damaged[-1] = name + "x"
        elif action == 2:
            tensors[name] = draw.pick((tensors[name][:-1], tensors[name].T, tensors[name].flatten(), torch.zeros(())))
            tensors[name] = tensors[name].contiguous()
        elif action == 3:
            tensors[name] = tensors[name].to(draw.pick(DTYPES))
        elif action in (4, 5):
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[draw.below(tensors[name].numel())] = draw.pick((torch.nan, torch.inf, -torch.inf))
    # a square matrix is its own other shape
    damaged = [name for name in damaged if not _is_same(tensors.get(name), whole.get(name))]
    try:
        model = _load({**adapter_files(), WEIGHTS: safetensors.torch.save(tensors)})
    except CheckpointError as error:
        assert damaged, error
        lacking = [name for name in damaged if f"{name}:" not in str(error)]
        assert not lacking, f"{lacking} not named in: {error}"
        raise
    assert not damaged, f"loaded in spite of {damaged}"
    state = mixora_state(model)
    for name, tensor in whole.items():
        assert torch.equal(state[name + ".default"], tensor)


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.dtype == other.dtype and bool(one.isfinite().all())


def mixora_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if "mixora_" in name}


def flip_bits(data: bytes) -> None:
    """Single bits of the whole file: what loads has the names, shapes and types that were written."""
    draw, whole = Draw(data), bytearray(adapter_files()[WEIGHTS])
    place = int.from_bytes(bytes((draw.byte(), draw.byte(), draw.byte())), "big") % len(whole)
    whole[place] ^= 1 << draw.below(8)
    model = _load({**adapter_files(), WEIGHTS: bytes(whole)})
    assert _tensors(bytes(whole)) == _tensors(adapter_files()[WEIGHTS])
    assert all(tensor.isfinite().all() for tensor in mixora_state(model).values())
