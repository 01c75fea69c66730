"""Numbers that are not finite are an error with a name, never a value that something is decided by."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UserError

CHUNK = 1 << 24  # elements that are counted at once


class NotFiniteError(UserError):
    """NaN or infinity among weights, statistics, scores, losses or logits."""


@torch.no_grad()
def require_finite(tensor: Tensor, what: str, fix: str = "") -> None:
    """Refuse a tensor that holds NaN or infinity; no copy of it is made.

    Args:
        tensor: Any; integers, empty tensors and those on the meta device pass.
        what: Start of the message: what it is and where, such as ``layers.3.mlp: the Gram matrix``.
        fix: End of the message: what the user can do.

    Raises:
        NotFiniteError: Says how many elements are NaN and how many infinite.
    """
    if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point():
        return
    if torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all():  # NaN is passed on by both
        return
    chunks = tensor.detach().flatten().split(CHUNK)
    nan = sum(int(chunk.isnan().sum()) for chunk in chunks)
    infinite = sum(int(chunk.isinf().sum()) for chunk in chunks)
    counts = " and ".join(f"{n:,} {kind}" for n, kind in ((nan, "NaN"), (infinite, "infinite")) if n)
    raise NotFiniteError(f"{what}: not finite, {counts} of {tensor.numel():,}" + (f"; {fix}" if fix else ""))
