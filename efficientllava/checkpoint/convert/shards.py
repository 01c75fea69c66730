"""Weight files, tensor by tensor: safetensors, or what ``torch.save`` has written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...runtime.errors import UserError

# As save_pretrained names them; safetensors are preferred where a folder has both.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Stored:
    """A tensor that is still in its file.

    Args:
        shape: Its shape.
        kind: Its type, as its file calls it.
        read: Reads it.
    """

    shape: tuple[int, ...]
    kind: str
    read: Callable[[], Tensor]


def shard_files(folder: Path) -> list[Path]:
    """The weight files of a folder, in order.

    Raises:
        UserError: There is none, the index cannot be read, or a shard that it names is missing.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]  # as stock transformers, whatever an index says
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = sorted({*json.loads(index.read_text("utf-8"))["weight_map"].values()})
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
                raise UserError(f"{index}: cannot be read ({reason}); get the complete folder") from error
            if not shards or not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
                raise UserError(f"{index}: must name files beside it; put all files into one folder")
            if missing := [shard for shard in shards if not (folder / shard).is_file()]:
                raise UserError(f"{folder}: shard {missing[0]} is missing; get the complete folder")
            return [folder / shard for shard in shards]
    raise UserError(f"{folder}: has none of {', '.join(WEIGHTS)}, nor an index of shards; get the complete folder")


def stored_tensors(folder: Path) -> dict[str, tuple[Stored, Path]]:
    """The tensors of a folder by name, each with its file; all files are opened, and no tensor is read.

    Raises:
        UserError: As `shard_files` and `open_shard`, or a tensor is stored twice.
    """
    found: dict[str, tuple[Stored, Path]] = {}
    for file in shard_files(folder):
        tensors = open_shard(file)
        if twice := found.keys() & tensors.keys():
            name = min(twice)
            first = found[name][1].name
            raise UserError(f"{folder}: tensor {name} is in {first} and in {file.name}; get the original files")
        found |= {name: (tensor, file) for name, tensor in tensors.items()}
    return found


def open_shard(file: Path) -> dict[str, Stored]:
    """The tensors of one weight file by name, unread; the file stays open as long as one of them is kept.

    Args:
        file: A safetensors file, or a file of ``torch.save`` that holds nothing but tensors.

    Raises:
        UserError: The file is truncated, damaged, or holds more than tensors.
    """
    if file.suffix == ".safetensors":
        try:
            handle = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or no safetensors file ({error}); get the file again") from error
        return {name: _lazy(handle, name) for name in handle.keys()}  # noqa: SIM118 - the handle is no mapping
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: holds more than tensors and is not opened; use a safetensors checkpoint") from error
    except (RuntimeError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: truncated or no weight file ({reason}); get the file again") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file}: holds more than tensors by name; get the original file")
    return {name: Stored(tuple(tensor.shape), str(tensor.dtype), tensor.clone) for name, tensor in tensors.items()}


def _lazy(handle: safe_open, name: str) -> Stored:
    part = handle.get_slice(name)
    return Stored(tuple(part.get_shape()), part.get_dtype(), lambda: handle.get_tensor(name))
