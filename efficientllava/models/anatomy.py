"""Where a backbone keeps its decoder, heads, channels and projector: the only place that knows attribute names."""

from __future__ import annotations

from torch import nn

PROJECTORS = ("multi_modal_projector", "connector")


def projector_of(model: nn.Module) -> nn.Module:
    """Return the vision projector of an image-text-to-text model."""
    base = model.model
    for name in PROJECTORS:
        if hasattr(base, name):
            return getattr(base, name)  # pyright: ignore[reportReturnType]
    raise TypeError(f"{type(model).__name__}: no projector among {PROJECTORS}")


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the bare decoder (embeddings, ``layers``, final norm) of an image-text-to-text model."""
    return model.get_decoder()  # pyright: ignore[reportCallIssue]
