"""One forward pass for every family: frozen vision tower, projector, decoder, head on chosen positions.

The vision tower is never trained and never pruned, so its output (the *projector input*) is computed once per image
and handed to whoever needs it: student, teacher, search candidates, and every evaluated stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BatchFeature
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..runtime.errors import UserError, memory_full, one_line
from .anatomy import decoder_of, projector_of

Batch = Mapping[str, Any]

ANSWERS = 512  # supervised tokens whose logits are held at once

# Models whose image tokens are the projector's output, in order; the others run their own vision pass every time.
PLAIN = ("llava", "internvl", "gemma3")
# What a model needs to know of its images beside the pixels.
IMAGE_INPUTS = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
# Models that are told which tokens stand for an image: for positions in two dimensions, or to look both ways.
TOKEN_TYPES = {"qwen2_5_vl": "mm_token_type_ids", "qwen3_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}


class Reached(Exception):
    """Control flow, never an error that a user sees: what was waited for has come, nothing else has to run."""


@torch.no_grad()
def _received(module: nn.Module, run: Callable[[], Any]) -> tuple[Any, ...] | None:
    """What a module receives when something runs, which goes no further; None where it is not called."""

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        raise Reached(args)

    with module.register_forward_pre_hook(stop):
        try:
            run()
        except Reached as reached:
            return reached.args[0]


def vision_features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    """Run the frozen vision tower and return what the projector receives.

    Args:
        model: An image-text-to-text model.
        pixel_values: Images or tiles, ``(images, channels, height, width)``.

    Returns:
        The projector's input, ``(images, tokens, vision width)``, without gradient.
    """
    look: Any = model.get_image_features
    if (received := _received(projector_of(model), lambda: look(pixel_values=pixel_values))) is None:
        raise RuntimeError(f"{type(model).__name__}: the projector was not called; see models/anatomy.py")
    return received[0].detach()


def segment_mask(attention_mask: Tensor, segment_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal mask in which each packed question sees the shared prefix and itself only.

    Args:
        attention_mask: 1 for real tokens, ``(batch, seq)``.
        segment_ids: 0 for the shared prefix, ``k > 0`` for a question that sees the prefix, ``k < 0`` for a question
            that sees itself alone, ``(batch, seq)``.
        dtype: Floating type of the decoder.

    Returns:
        Additive mask ``(batch, 1, seq, seq)``: 0 where attention is allowed, the most negative number elsewhere.
    """
    query, key = segment_ids.unsqueeze(2), segment_ids.unsqueeze(1)
    allowed = (query == key) | ((key == 0) & (query > 0))
    allowed &= attention_mask.bool().unsqueeze(1)
    allowed = allowed.tril()
    # A padded query attends to itself, so that no row is empty (an empty row is NaN in softmax).
    allowed |= torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device)
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min).unsqueeze(1)


def stock_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the model's own forward takes of a batch: its tokens, its images, and what it has to be told of them.

    Args:
        model: An image-text-to-text model.
        batch: A batch or prompt of `efficientllava.data.collator`.
    """
    family, image_token = model.config.model_type, model.config.image_token_id  # pyright: ignore[reportAttributeAccessIssue]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", *IMAGE_INPUTS) if batch.get(key) is not None}
    if family in TOKEN_TYPES:
        inputs[TOKEN_TYPES[family]] = (batch["input_ids"] == image_token).long()  # pyright: ignore[reportArgumentType]
    return inputs


def require_images(model: nn.Module, inputs: Batch) -> None:
    """Refuse a model that cannot take the images of its processor; the decoder does not run.

    Args:
        model: An image-text-to-text model.
        inputs: What its forward takes, such as `stock_inputs`.

    Raises:
        UserError: The sizes of images, or the numbers of features and image tokens, differ.
    """
    weight = next(model.parameters())
    try:
        _received(decoder_of(model), lambda: model(**to_device(inputs, weight.device, weight.dtype)))
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        if memory_full(error):
            raise
        raise UserError(
            f"model.path: it cannot take the images of its processor ({one_line(error)}); config.json and "
            "processor_config.json or preprocessor_config.json do not fit together: get the original files"
        ) from error


def decoder_inputs(model: nn.Module, batch: Batch, features: Tensor | None = None) -> dict[str, Any]:
    """Turn a collated batch into keyword arguments of ``model.forward``.

    Args:
        model: An image-text-to-text model.
        batch: A batch of `efficientllava.data.collator`.
        features: Output of `vision_features` for the batch's images; computed here when absent.

    Returns:
        ``input_ids``, ``attention_mask`` (4-D for packed batches), ``position_ids`` where given, and the projected
        image features as ``mm_encoder_outputs``, or the image inputs where the model is not one of `PLAIN`.
    """
    family: str = model.config.model_type  # pyright: ignore
    inputs = stock_inputs(model, batch)
    images = {key: inputs.pop(key) for key in IMAGE_INPUTS if key in inputs}
    if batch.get("segment_ids") is not None:
        # The decoder's type: while it trains in fp32, a frozen tower may stay in half precision.
        dtype = next(decoder_of(model).parameters()).dtype
        inputs["attention_mask"] = segment_mask(batch["attention_mask"], batch["segment_ids"], dtype)
    if batch.get("position_ids") is not None:
        inputs["position_ids"] = batch["position_ids"]
    if family not in PLAIN:
        return inputs | to_device(images, batch["input_ids"].device, next(model.parameters()).dtype)
    if features is None and batch.get("pixel_values") is not None:
        features = vision_features(model, batch["pixel_values"].to(next(model.parameters()).dtype))
    if features is not None and len(features):
        projected = projector_of(model)(features)
        # LLaVA takes the features as a list with one tensor per image, the others as one tensor.
        pooled = list(projected) if family == "llava" else projected
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=pooled)}  # pyright: ignore[reportArgumentType]
    return inputs


def going_on(output: Any) -> dict[str, Any]:
    """The keys and values that a forward pass has returned, under the name by which the next one takes them."""
    name = "cache" if "cache" in output else "past_key_values"  # as transformers called them once
    return {name: output[name]}


def forward_hidden(model: nn.Module, batch: Batch, features: Tensor | None = None) -> Tensor:
    """Run the decoder without the head.

    Args:
        model: An image-text-to-text model.
        batch: A collated batch.
        features: Output of `vision_features`, to skip the tower.

    Returns:
        Hidden states after the final norm, ``(batch, seq, hidden)``.
    """
    base = model.model
    return base(**decoder_inputs(model, batch, features), use_cache=False).last_hidden_state  # pyright: ignore[reportCallIssue]


def supervised_positions(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that predict a supervised token, and these tokens.

    Label ``t`` is predicted from hidden state ``t - 1``.

    Args:
        labels: ``(batch, seq)``, -100 where unsupervised.

    Returns:
        ``mask`` ``(batch, seq)``, true at position ``t - 1`` where label ``t`` is supervised; ``targets`` ``(count,)``.
    """
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    return mask, labels[:, 1:][mask[:, :-1]]


def answer_loss(model: nn.Module, batch: Batch, features: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the supervised tokens; the head runs on their positions only.

    Args:
        model: An image-text-to-text model.
        batch: A collated batch with ``labels``.
        features: Output of `vision_features`, to skip the tower.
        reduction: ``mean`` over supervised tokens, or ``sum``.

    Returns:
        Scalar loss in nats.
    """
    mask, targets = supervised_positions(batch["labels"])
    logits = model.lm_head(forward_hidden(model, batch, features)[mask])  # pyright: ignore[reportCallIssue]
    return nn.functional.cross_entropy(logits.float(), targets, reduction=reduction)


def to_device(batch: Batch, device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Move the tensors of a batch; floating tensors are cast to ``dtype`` where given.

    Args:
        batch: A collated batch.
        device: Target device.
        dtype: Target type of floating tensors.

    Returns:
        A new dictionary; values that are no tensors are passed on.
    """
    return dict(BatchFeature({**batch}).to(device, dtype=dtype))


class HostMemory:
    """Tensors by key, kept on the host.

    Args:
        limit_bytes: What would go beyond this size is not kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._kept: dict[Any, Tensor] = {}

    def get(self, keys: Sequence[Any]) -> list[Tensor] | None:
        """The tensors of all keys, or None unless all are kept."""
        return [self._kept[key] for key in keys] if all(key in self._kept for key in keys) else None

    def put(self, keys: Sequence[Any], tensors: Sequence[Tensor]) -> None:
        """Keep copies of tensors, one per key, as far as there is room."""
        for key, tensor in zip(keys, tensors, strict=True):
            if key not in self._kept and self._bytes + tensor.nbytes <= self._limit:
                self._kept[key] = tensor.to("cpu", copy=True)
                self._bytes += tensor.nbytes


class FeatureCache:
    """Vision features by image, computed once and kept on the host; base, pruned and recovered models share them.

    Args:
        model: The model whose frozen tower computes what is not kept; pixels are cast to its type. Where it is none of
            `PLAIN`, there are no features to share.
        limit_bytes: Features beyond this size are computed anew instead of kept.
    """

    def __init__(self, model: nn.Module, limit_bytes: int = 4 << 30) -> None:
        self._model, self._memory = model, HostMemory(limit_bytes)

    def __call__(self, batch: Batch) -> Tensor | None:
        """Return the features of a batch's images, in order.

        Args:
            batch: A collated batch with ``pixel_values``, ``image_ids`` and, where one image has several tiles,
                ``image_tiles`` (tiles per image).

        Returns:
            ``(tiles, tokens, width)`` on the device of ``pixel_values``; None when there is nothing to share.
        """
        pixels, family = batch.get("pixel_values"), self._model.config.model_type  # pyright: ignore
        if family not in PLAIN or pixels is None or not len(pixels):
            return None
        ids: list[str] = batch["image_ids"]
        tiles = pixels.split(batch.get("image_tiles") or [1] * len(ids))
        found = {key: kept[0] for key in ids if (kept := self._memory.get([key]))}
        # Several questions of a batch may show one image.
        missing = {key: part for key, part in zip(ids, tiles, strict=True) if key not in found}
        if missing:
            new = torch.cat(list(missing.values())).to(next(self._model.parameters()))
            features = vision_features(self._model, new).to(pixels.device)
            computed = features.split([len(part) for part in missing.values()])
            self._memory.put(list(missing), computed)
            found |= zip(missing, computed, strict=True)
        return torch.cat([found[key].to(pixels.device) for key in ids])

    def follow(self, model: nn.Module) -> None:
        """Compute what is lacking with a model that has the same tower; the one before is no longer kept alive."""
        self._model = model
