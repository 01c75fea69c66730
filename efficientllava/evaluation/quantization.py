"""Weight-only quantization of a decoder, to see what it costs and saves on top of pruning."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import decoder_of

GROUP = 32  # neighbouring input channels that share a scale and a zero point, int4


def quantized(model: nn.Module, kind: str) -> Any:
    """A copy whose decoder computes with quantized weights; head, projector and vision tower are shared, not copied.

    Every linear layer of the decoder is quantized, whatever its width: for int4, input widths that are no multiple of
    `GROUP` (as pruning makes them) are filled up with zero channels, which change no result.

    Args:
        model: An image-text-to-text model.
        kind: ``int8`` (one scale per output channel) or ``int4`` (asymmetric, one scale per `GROUP` input channels;
            two weights a byte on a GPU in bfloat16, elsewhere one).

    Returns:
        The copy, on the model's device.
    """
    with _quiet_import():
        from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    decoder = decoder_of(twin)
    for module in decoder.modules():
        if kind == "int4" and isinstance(module, nn.Linear):
            _fill_up(module)
    quantize_(decoder, _scheme(kind, next(decoder.parameters())))
    return twin


def _fill_up(linear: nn.Linear) -> None:
    """Give a layer zero channels up to a multiple of `GROUP`."""
    if missing := -linear.in_features % GROUP:
        linear.in_features += missing
        linear.weight = nn.Parameter(nn.functional.pad(linear.weight.detach(), (0, missing)), requires_grad=False)
        linear.register_forward_pre_hook(partial(_widen, missing))


def _widen(missing: int, _linear: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return nn.functional.pad(inputs[0], (0, missing))


def _scheme(kind: str, weight: Tensor) -> Any:
    from torchao import quantization as ao  # pyright: ignore[reportMissingImports]

    if kind == "int8":
        return ao.Int8WeightOnlyConfig(set_inductor_config=False)
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        packing: Any = "tile_packed_to_4d"
        return ao.Int4WeightOnlyConfig(GROUP, set_inductor_config=False, int4_packing_format=packing)
    return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(GROUP))  # pyright: ignore


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Torchao warns of kernels for other GPUs, torch of what torchao does with it; neither is about this model."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
