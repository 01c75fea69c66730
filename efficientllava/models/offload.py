"""Weights that wait elsewhere while one part of a model at a time computes: in host memory, or in files."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..runtime import UserError, disk_full
from .anatomy import decoder_of

ALIGNED = 64  # bytes that the weights of a file begin at multiples of


class Offload:
    """Brings modules to the device for as long as they are worked on.

    A weight that nobody changed goes back to the very memory that it came from, so that nothing is copied back and a
    memory-mapped checkpoint stays mapped; a weight that is new or was changed in place is copied to the host.

    Args:
        device: Where modules compute.

    Attributes:
        device: The same.
        resident: Bytes of weights that are on the device now.
        peak: The most that ever were.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.resident = 0
        self.peak = 0
        self._open: set[nn.Module] = set()

    @contextlib.contextmanager
    def on_device(self, *modules: nn.Module, without: Sequence[nn.Module] = ()) -> Iterator[None]:
        """Keep modules on the device; those that are there already are left alone.

        Args:
            *modules: What is needed, with all their submodules.
            without: Submodules that are not.
        """
        opened = [module for module in modules if module not in self._open]
        left = {id(tensor) for tensor in _tensors(without)}
        brought = [(t, t.data, t._version) for t in _tensors(opened) if id(t) not in left]
        size = sum(host.nbytes for _, host, _ in brought)
        self._open.update(opened)
        self.resident += size
        self.peak = max(self.peak, self.resident)
        try:
            for tensor, *_ in brought:
                tensor.data = self.take(tensor)
            yield
        finally:
            for tensor, host, version in brought:
                tensor.data = host if tensor._version == version else self.put(tensor)
            known = left | {id(tensor) for tensor, _, _ in brought}
            for tensor in _tensors(opened):
                if id(tensor) not in known:
                    tensor.data = self.put(tensor)
            self._open.difference_update(opened)
            self.resident -= size

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Let a whole model run: its layers visit the device one by one, the rest is there all the while."""
        layers = decoder_of(model).layers
        handles = self.visits(layers)
        try:
            with self.on_device(model, without=layers):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def visits(self, layers: Sequence[nn.Module]) -> list[RemovableHandle]:
        """Have each of some layers, which run one after the other, on the device while it runs; returns the hooks."""
        visit = contextlib.ExitStack()
        before = [
            layer.register_forward_pre_hook(lambda module, _: visit.enter_context(self.on_device(module)))
            for layer in layers
        ]
        return before + [layer.register_forward_hook(lambda *_: visit.close(), always_call=True) for layer in layers]

    def take(self, tensor: Tensor) -> Tensor:
        """The copy of a parameter or buffer on the device."""
        return tensor.data.to(self.device)

    def put(self, tensor: Tensor) -> Tensor:
        """The copy of a parameter or buffer in host memory."""
        return tensor.data.to("cpu")


class Disk(Offload):
    """Brings modules into memory from the files that their weights are mapped from.

    There they are in the type that they are stored in, here in the type that computes. What is new or was changed goes
    to a file that has no name, and that ends with the process, and is mapped from there.

    Args:
        compute: Type that weights compute in.
        storage: Type that they are stored in.
        folder: Where the file is; on a disk, since a file system in memory would hold them after all.
    """

    def __init__(self, compute: torch.dtype, storage: torch.dtype, folder: Path) -> None:
        super().__init__("cpu")
        self._compute, self._storage, self._folder = compute, storage, folder

    @cached_property
    def _file(self) -> Any:
        return tempfile.TemporaryFile(dir=self._folder)

    def take(self, tensor: Tensor) -> Tensor:
        """A parameter in the type that computes; a buffer is left as it is."""
        return tensor.data.to(self._compute) if isinstance(tensor, nn.Parameter) else tensor.data

    def put(self, tensor: Tensor) -> Tensor:
        """A parameter in the type that is stored, mapped from the file."""
        return mapped_copy(self._file, tensor.data.to(self._storage))

    def settle(self, model: nn.Module) -> None:
        """Give all parameters the precision of the type that computes, as if the model had been loaded in it."""
        for parameter in model.parameters():
            rounded = parameter.data.to(self._compute).to(self._storage)
            if not torch.equal(rounded, parameter.data):
                parameter.data = self.put(rounded)


def offload_layers(model: nn.Module, device: torch.device | str) -> Offload:
    """Move a model to a device, except for its decoder layers: each visits it while it runs.

    Args:
        model: An image-text-to-text model that does not train.
        device: The device.

    Returns:
        What brings the layers.
    """
    decoder, offload = decoder_of(model), Offload(device)
    layers, decoder.layers = decoder.layers, nn.ModuleList()
    model.to(offload.device)
    decoder.layers = layers
    if offload.device.type == "cuda":  # a copy from pinned memory is several times as fast
        for tensor in _tensors(list(layers)):
            tensor.data = tensor.data.pin_memory()
    offload.visits(list(layers))
    return offload


@contextlib.contextmanager
def make_room(
    module: nn.Module, device: torch.device, folder: Path, without: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Leave a device to something else for a while: what a module has there goes to host memory and comes back.

    Where the device is the host it goes to a file, and stays mapped from it; what trains is copied as it changes.

    Args:
        module: What nothing computes with meanwhile; on the host it still can.
        device: The device.
        folder: Where the file is; it has no name, and ends with the process.
        without: Submodules that stay.

    Raises:
        UserError: The disk is full.
    """
    kept = {id(tensor) for tensor in _tensors(without)}
    there = [tensor for tensor in _tensors([module]) if tensor.device == device and id(tensor) not in kept]
    if device.type == "cpu":
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                for tensor in there:
                    tensor.data = mapped_copy(file, tensor.data)
        except OSError as error:
            if disk_full(error):
                raise UserError(
                    f"{folder}: the disk is full; free some space, or set paths.cache_dir elsewhere"
                ) from error
            raise
        yield
        return
    for tensor in there:
        tensor.data = tensor.data.cpu()
    try:
        yield
    finally:
        for tensor in there:
            tensor.data = tensor.data.to(device)


def mapped_copy(file: Any, tensor: Tensor) -> Tensor:
    """A copy of a tensor at the end of a file, mapped from there."""
    tensor = tensor.contiguous()
    if not tensor.numel():
        return tensor
    start = -(-file.seek(0, os.SEEK_END) // ALIGNED) * ALIGNED
    file.seek(start)
    file.write(tensor.view(-1).view(torch.uint8).numpy())
    file.flush()
    mapped = np.memmap(file, np.uint8, "c", start, (tensor.nbytes,))  # private: nothing writes to the file
    return torch.from_numpy(mapped).view(tensor.dtype).view(tensor.shape)


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Parameters and buffers of modules, shared ones once."""
    found = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return list({id(tensor): tensor for tensor in found}.values())
