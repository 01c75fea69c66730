"""Weight-only quantization of the decoder's linear layers, to see what it costs and saves on top of pruning."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..models.anatomy import decoder_of

GROUP = 32  # neighbouring input channels that share a scale and a zero point, int4


def require_groups(model: nn.Module) -> None:
    """Refuse a model that int4 would leave as it is in part, which torchao does without a word.

    Raises:
        UserError: Names the first linear layer whose input width is no multiple of `GROUP`.
    """
    for name, module in decoder_of(model).named_modules():
        if isinstance(module, nn.Linear) and module.in_features % GROUP:
            raise UserError(
                f"evaluate.quantization=int4: the input width {module.in_features} of {name} must be a multiple of "
                f"{GROUP}; set evaluate.quantization=int8, or prune.round_to={GROUP} where pruning made it"
            )


def quantized(model: nn.Module, kind: str) -> Any:
    """A copy whose decoder computes with quantized weights; head, projector and vision tower are shared, not copied.

    Args:
        model: An image-text-to-text model.
        kind: ``int8`` (one scale per output channel) or ``int4`` (asymmetric, one scale per `GROUP` input channels;
            two weights a byte on a GPU in bfloat16, elsewhere one).

    Returns:
        The copy, on the model's device.

    Raises:
        UserError: If int4 does not fit the widths (see `require_groups`).
    """
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]

    if kind == "int4":
        require_groups(model)
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    decoder = decoder_of(twin)
    quantize_(decoder, _scheme(kind, next(decoder.parameters())))
    return twin


def _scheme(kind: str, weight: torch.Tensor) -> Any:
    from torchao import quantization as ao  # pyright: ignore[reportMissingImports]

    if kind == "int8":
        return ao.Int8WeightOnlyConfig()
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        return ao.Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
    return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(GROUP))  # pyright: ignore
