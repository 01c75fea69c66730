"""Weight shards, tensor by tensor: read from safetensors or .bin files, written as safetensors."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...runtime.errors import UserError

# As save_pretrained names them; safetensors are preferred where a folder has both.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Stored:
    """A tensor that is still in its file.

    Args:
        shape: Its shape.
        read: Reads it.
    """

    shape: tuple[int, ...]
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


def require_whole(folder: Path) -> None:
    """Open every weight file of a folder, so that what is missing or truncated is found before any tensor is read.

    Raises:
        UserError: As `shard_files` and `open_shard`; it names the file.
    """
    for file in shard_files(folder):
        with open_shard(file):
            pass


@contextmanager
def open_shard(file: Path) -> Iterator[dict[str, Stored]]:
    """Open one weight file without reading its tensors.

    Args:
        file: A safetensors file, or a file of ``torch.save`` that holds nothing but tensors.

    Yields:
        The file's tensors by name; they can be read inside the block.

    Raises:
        UserError: The file is truncated, damaged, or holds more than tensors.
    """
    if file.suffix == ".safetensors":
        try:
            opened = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: truncated or no safetensors file ({error}); get the file again") from error
        with opened as handle:
            yield {name: _lazy(handle, name) for name in handle.keys()}  # noqa: SIM118 - the handle is no mapping
        return
    try:
        tensors = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file}: holds more than tensors and is not opened; use a safetensors checkpoint") from error
    except (RuntimeError, OSError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: truncated or no weight file ({reason}); get the file again") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{file}: holds more than tensors by name; get the original file")
    yield {name: Stored(tuple(tensor.shape), tensor.clone) for name, tensor in tensors.items()}


def _lazy(handle: safe_open, name: str) -> Stored:
    return Stored(tuple(handle.get_slice(name).get_shape()), lambda: handle.get_tensor(name))


class ShardWriter:
    """Writes tensors into numbered safetensors shards with an index, as ``save_pretrained`` does.

    Args:
        folder: An existing folder.
        limit_bytes: A shard is written before it grows beyond this size; a larger tensor gets a shard of its own.
    """

    def __init__(self, folder: Path, limit_bytes: int = 1 << 30) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._tensors: dict[str, Tensor] = {}
        self._size = self._total = 0
        self._shards: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Append a tensor."""
        size = tensor.numel() * tensor.element_size()
        if self._tensors and self._size + size > self._limit:
            self._flush()
        self._tensors[name] = tensor.contiguous()
        self._size += size
        self._total += size

    def _flush(self) -> None:
        save_file(self._tensors, self._folder / f"{len(self._shards)}.part", {"format": "pt"})
        self._shards.append(list(self._tensors))
        self._tensors, self._size = {}, 0

    def finish(self) -> None:
        """Write the last shard, give the shards their names, write the index."""
        self._flush()
        stem, suffix = WEIGHTS[0].split(".")
        count, places = len(self._shards), {}
        for number, names in enumerate(self._shards):
            shard = f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}" if count > 1 else WEIGHTS[0]
            (self._folder / f"{number}.part").rename(self._folder / shard)
            places |= dict.fromkeys(names, shard)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": places}
            (self._folder / f"{WEIGHTS[0]}.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
