"""The frozen teacher: the original unpruned model, outside every module tree, so that no checkpoint contains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.anatomy import decoder_of, projector_of
from ..models.forward import HostMemory, feature_cache, forward_hidden
from .alignment import captured
from .trainable import silence_dropout

MEMORY_LIMIT = 1 << 30  # bytes of remembered states


def same_tower(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two models have the same vision tower, bit for bit in the coarser of their two types.

    Args:
        one: An image-text-to-text model.
        other: Another.

    Returns:
        True when everything but decoder, head and projector has the same names, shapes and values.
    """
    first, second = _tower(one), _tower(other)
    return first.keys() == second.keys() and all(_equal(first[name], second[name]) for name in first)


class Teacher:
    """A frozen model that gives hidden states and logits at chosen positions; not an `nn.Module` on purpose.

    It runs its *own* projector. Vision features are handed in when student and teacher have the same tower.

    Args:
        model: The original model; put in eval mode, without dropout and gradients.
        student: The model that learns from it, to see whether the vision tower is the same.
    """

    def __init__(self, model: nn.Module, student: nn.Module) -> None:
        model.eval().requires_grad_(False)
        silence_dropout(model)
        self.model = model
        self.depth = len(decoder_of(model).layers)
        self._features = None if same_tower(model, student) else feature_cache(model)
        self._memory: HostMemory | None = None

    def remember(self) -> None:
        """Keep what is said about each record for later epochs; needs batches whose ``ids`` name each row's record.

        A frozen model without dropout says the same in every epoch: with a small subset of the data and many steps,
        this saves nearly all of its passes.
        """
        self._memory = HostMemory(MEMORY_LIMIT)

    def to(self, device: torch.device | str) -> Teacher:
        """Move the model and return self."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        batch: Mapping[str, Any],
        features: Tensor | None,
        layers: Sequence[int],
        mask: Tensor,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the decoder once, or recall what it said about the same records.

        Args:
            batch: A collated batch.
            features: The student's vision features for the batch.
            layers: Layers whose raw outputs are wanted; the same in every call.
            mask: Wanted positions, ``(batch, seq)``; a function of the records.

        Returns:
            States of the wanted positions after the final norm, and of each wanted layer by index.
        """
        if self._memory is None:
            return self._run(batch, features, layers, mask)
        keys = record_keys(batch)
        if (known := self._memory.get(keys)) is not None:
            final, *states = torch.cat(known, dim=1).to(mask.device)
            return final, dict(zip(layers, states, strict=True))
        final, states = self._run(batch, features, layers, mask)
        stacked = torch.stack([final, *(states[layer] for layer in layers)])
        self._memory.put(keys, stacked.split(mask.sum(1).tolist(), dim=1))
        return final, states

    def _run(
        self, batch: Mapping[str, Any], features: Tensor | None, layers: Sequence[int], mask: Tensor
    ) -> tuple[Tensor, dict[int, Tensor]]:
        if self._features is not None:
            features = self._features(batch)
        if features is not None:
            features = features.to(next(projector_of(self.model).parameters()).dtype)
        with captured(decoder_of(self.model), layers, mask) as states:
            final = forward_hidden(self.model, batch, features)[mask]
        return final, states

    def head(self, rows: Tensor) -> Tensor:
        """Logits of rows after the final norm, ``(rows, hidden)`` to ``(rows, vocab)``."""
        return self.model.lm_head(rows)  # pyright: ignore[reportCallIssue]


def check_teacher(teacher: nn.Module, student: nn.Module, logits: bool, hidden: bool) -> None:
    """Refuse a teacher that cannot teach this student.

    Args:
        teacher: The candidate.
        student: The pruned model.
        logits: Logits are compared.
        hidden: Hidden states are compared.

    Raises:
        UserError: The vocabularies or the widths of the residual stream differ.
    """
    for needed, field, what in ((logits, "vocab_size", "vocabulary"), (hidden, "hidden_size", "hidden width")):
        ours, theirs = (getattr(m.config.get_text_config(), field) for m in (student, teacher))  # pyright: ignore
        if needed and ours != theirs:
            raise UserError(
                f"recover.teacher.path: the teacher's {what} is {theirs}, the student's {ours}; "
                "they must be equal, choose the checkpoint that was pruned"
            )


def record_keys(batch: Mapping[str, Any]) -> list[bytes]:
    """A key for the record in each row of a collated batch; ids of public data sets repeat, so its tokens count too."""
    tokens, lengths = batch["input_ids"].cpu().numpy(), batch["attention_mask"].sum(1).tolist()
    rows = zip(batch["ids"], tokens, lengths, strict=True)
    return [blake2b(row[:length].tobytes(), key=blake2b(name.encode()).digest()).digest() for name, row, length in rows]


def _tower(model: nn.Module) -> dict[str, Tensor]:
    ours: set[int] = set()
    for part in (decoder_of(model), projector_of(model), model.lm_head):
        ours |= {id(p) for p in part.parameters()}  # pyright: ignore[reportAttributeAccessIssue]
    return {name: p for name, p in model.named_parameters() if id(p) not in ours}


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    coarse = min(one.dtype, other.dtype, key=lambda t: t.itemsize)
    return torch.equal(one.to(coarse), other.to(one.device, coarse))
