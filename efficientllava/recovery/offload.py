"""A frozen model whose decoder layers live in host memory and visit the device one at a time."""

from __future__ import annotations

import torch
from torch import nn

from ..models.anatomy import decoder_of


class Visitor:
    """A layer that is on the device only while it runs.

    Args:
        layer: The layer; its weights are on the host and do not change.
        device: Where it runs.

    Attributes:
        resident: Whether it is on the device now.
    """

    def __init__(self, layer: nn.Module, device: torch.device) -> None:
        self._device = device
        # A copy from pinned memory is several times as fast.
        self._home = [
            (tensor, tensor.data.pin_memory() if device.type == "cuda" else tensor.data)
            for tensor in (*layer.parameters(), *layer.buffers())
        ]
        self.resident = False
        layer.register_forward_pre_hook(self._arrive)
        layer.register_forward_hook(self._leave, always_call=True)

    def _arrive(self, *_: object) -> None:
        for tensor, home in self._home:
            tensor.data = home.to(self._device, copy=True, non_blocking=True)
        self.resident = True

    def _leave(self, *_: object) -> None:
        for tensor, home in self._home:
            tensor.data = home
        self.resident = False


def offload(model: nn.Module, device: torch.device | str) -> list[Visitor]:
    """Move a model to a device, except for its decoder layers, which visit it from now on.

    Args:
        model: An image-text-to-text model that does not train.
        device: The device.

    Returns:
        One visitor per layer.
    """
    decoder = decoder_of(model)
    layers, decoder.layers = decoder.layers, nn.ModuleList()
    model.to(device)
    decoder.layers = layers
    return [Visitor(layer, torch.device(device)) for layer in layers]
