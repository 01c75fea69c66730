"""Controls: is it the kept weights that carry the skill, or only the kept shape?"""

from __future__ import annotations

import torch
from torch import nn

from ..models.anatomy import decoder_of


@torch.no_grad()
def reinitialise(model: nn.Module, seed: int) -> None:
    """Give a pruned language model fresh weights and leave vision tower and projector as they are, in place.

    Matrices are drawn with variance 1 / fan-in, embeddings with unit norm on average, norms become the identity.

    Args:
        model: An image-text-to-text model.
        seed: Seed of the weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for owner in (decoder_of(model), model.lm_head):
        for module in owner.modules():  # pyright: ignore[reportAttributeAccessIssue]
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if weight is None:
                continue
            if weight.dim() == 1:
                weight.fill_(1.0)
            else:
                drawn = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
                weight.copy_(drawn)
            if bias is not None:
                bias.zero_()
