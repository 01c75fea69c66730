"""Weights that stay in host memory while one part of the model at a time computes on the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .anatomy import decoder_of


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
            for tensor, host, _ in brought:
                tensor.data = self.take(host)
            yield
        finally:
            for tensor, host, version in brought:
                tensor.data = host if tensor._version == version else self.put(tensor.data)
            known = left | {id(tensor) for tensor, _, _ in brought}
            for tensor in _tensors(opened):
                if id(tensor) not in known:
                    tensor.data = self.put(tensor.data)
            self._open.difference_update(opened)
            self.resident -= size

    def take(self, tensor: Tensor) -> Tensor:
        """The tensor's copy on the device."""
        return tensor.to(self.device)

    def put(self, tensor: Tensor) -> Tensor:
        """The tensor's copy in host memory."""
        return tensor.to("cpu")


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
    for layer in layers:
        _bring_while_running(layer, offload)
    return offload


def _bring_while_running(layer: nn.Module, offload: Offload) -> None:
    if offload.device.type == "cuda":  # a copy from pinned memory is several times as fast
        for tensor in _tensors([layer]):
            tensor.data = tensor.data.pin_memory()
    visit = contextlib.ExitStack()
    layer.register_forward_pre_hook(lambda *_: visit.enter_context(offload.on_device(layer)))
    layer.register_forward_hook(lambda *_: visit.close(), always_call=True)


def _tensors(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Parameters and buffers of modules, shared ones once."""
    found = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    return list({id(tensor): tensor for tensor in found}.values())
