"""The frozen teacher: the original unpruned model, outside every module tree, so that no checkpoint contains it.

Which hidden states of student and teacher belong together, and how they are captured.

Layers match by original index: the output of a kept layer is compared with the teacher's output of the same layer, or,
if layers were dropped after it, of the last dropped one before the next kept layer: that is the state which the next
kept layer was trained to receive. The deepest kept layer is measured after the final norm, as arXiv 2604.24380 does
(its `hidden_states[-1]`) and as the head sees it; all others are raw block outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..models.anatomy import decoder_of, projector_of
from ..models.forward import HostMemory, feature_cache, forward_hidden
from ..models.offload import Offload, offload_layers
from ..runtime.errors import UserError
from .losses import TeacherLogits
from .trainable import silence_dropout


@dataclass(frozen=True)
class Match:
    """One pair of hidden states.

    Attributes:
        student: Position of the layer in the student.
        teacher: Index of the layer in the teacher.
        final: Both are measured after the final norm.
    """

    student: int
    teacher: int
    final: bool


def match_layers(which: str | Sequence[int], kept: Sequence[int], depth: int) -> tuple[Match, ...]:
    """Pair the layers of a student with those of its teacher.

    Args:
        which: ``last`` (the deepest kept layer), ``all`` (every kept layer), or original layer indices, negative ones
            from the end; an index that was dropped stands for the kept layer before it.
        kept: Original indices of the student's layers, ascending.
        depth: Number of layers of the teacher.

    Returns:
        Matches, from shallow to deep, without repetition.

    Raises:
        UserError: An index outside the teacher, or one with no kept layer at or before it.
    """
    ends = [after - 1 for after in [*kept[1:], depth]]
    pairs = [Match(i, end, i == len(kept) - 1) for i, end in enumerate(ends)]
    if which == "last":
        return (pairs[-1],)
    if isinstance(which, str):
        return tuple(pairs)
    chosen = []
    for index in which:
        layer = index + depth if index < 0 else index
        if not kept[0] <= layer < depth:
            raise UserError(
                f"recover.hidden_layers: {index} has no kept layer at or before it; "
                f"the teacher has layers 0 to {depth - 1}, the student keeps {list(kept)}"
            )
        chosen.append(next(pair for pair in pairs if layer <= pair.teacher))
    return tuple(sorted(set(chosen), key=lambda pair: pair.student))


@contextmanager
def captured(decoder: nn.Module, layers: Sequence[int], mask: Tensor) -> Iterator[dict[int, Tensor]]:
    """Collect block outputs of one forward pass.

    Args:
        decoder: A bare decoder with ``layers``.
        layers: Positions of the wanted layers.
        mask: Wanted positions, ``(batch, seq)``.

    Yields:
        A dictionary that fills, by layer, with ``(positions, hidden)`` as the layers run.
    """
    states: dict[int, Tensor] = {}

    def keep(position: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
            states[position] = (output[0] if isinstance(output, tuple) else output)[mask]

        return hook

    blocks: nn.ModuleList = decoder.layers  # pyright: ignore[reportAssignmentType]
    handles = [blocks[i].register_forward_hook(keep(i)) for i in layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


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


class Taught(NamedTuple):
    """What a teacher says about the wanted positions of a batch, its rows.

    Attributes:
        final: States after the final norm, ``(rows, hidden)``; None where a cached teacher was not asked for them.
        states: Raw outputs of the wanted layers by index, ``(rows, hidden)``.
        logits: Gives the logits of a range of rows, or what is known of them.
    """

    final: Tensor | None
    states: Mapping[int, Tensor]
    logits: TeacherLogits


class TeacherSource(Protocol):
    """Where a recovery's targets come from: the live `Teacher`, or what it has said before."""

    def to(self, device: torch.device | str) -> TeacherSource:
        """Give answers on a device from now on."""
        ...

    def __call__(
        self, batch: Mapping[str, Any], features: Tensor | None, layers: Sequence[int], mask: Tensor
    ) -> Taught:
        """Answer for a batch; see `Teacher`."""
        ...


class Teacher:
    """A frozen model that gives hidden states and logits at chosen positions; not an `nn.Module` on purpose.

    It runs its *own* projector. When student and teacher have the same vision tower, which never trains, its features
    are handed in and its weights are in memory once.

    Args:
        model: The original model; put in eval mode, without dropout and gradients.
        student: The model that learns from it, to see whether the vision tower is the same.
        offloaded: Keep the decoder layers in host memory; each visits the device while it runs.
    """

    def __init__(self, model: nn.Module, student: nn.Module, offloaded: bool = False) -> None:
        model.eval().requires_grad_(False)
        silence_dropout(model)
        self.model = model
        self.depth = len(decoder_of(model).layers)
        shared = same_tower(model, student)
        self._features = None if shared else feature_cache(model)
        self._twins = list(zip(*(_tower(m).values() for m in (model, student)), strict=True)) if shared else []
        self._offloaded = offloaded
        self._offload: Offload | None = None
        self._memory: HostMemory | None = None
        self._share_tower()

    def remember(self) -> None:
        """Keep what is said about each record for later epochs; needs batches whose ``ids`` name each row's record.

        A frozen model without dropout says the same in every epoch: with a small subset of the data and many steps,
        this saves nearly all of its passes.
        """
        self._memory = HostMemory(MEMORY_LIMIT)

    def to(self, device: torch.device | str) -> Teacher:
        """Move the model, after the student, and return self."""
        self._share_tower()
        if not self._offloaded:
            self.model.to(device)
        elif self._offload is None:
            self._offload = offload_layers(self.model, device)
        return self

    def _share_tower(self) -> None:
        for own, students in self._twins:
            if own.dtype == students.dtype:
                own.data = students.data

    @torch.no_grad()
    def __call__(
        self,
        batch: Mapping[str, Any],
        features: Tensor | None,
        layers: Sequence[int],
        mask: Tensor,
    ) -> Taught:
        """Run the decoder once, or recall what it said about the same records.

        Args:
            batch: A collated batch.
            features: The student's vision features for the batch.
            layers: Layers whose raw outputs are wanted; the same in every call.
            mask: Wanted positions, ``(batch, seq)``; a function of the records.
        """
        final, *states = self._recalled(batch, features, layers, mask)
        return Taught(final, dict(zip(layers, states, strict=True)), lambda rows: self.head(final[rows]))

    def _recalled(
        self, batch: Mapping[str, Any], features: Tensor | None, layers: Sequence[int], mask: Tensor
    ) -> Sequence[Tensor]:
        if self._memory is None:
            return self._run(batch, features, layers, mask)
        keys = record_keys(batch)
        if (known := self._memory.get(keys)) is not None:
            return list(torch.cat(known, dim=1).to(mask.device))
        states = self._run(batch, features, layers, mask)
        self._memory.put(keys, torch.stack(states).split(mask.sum(1).tolist(), dim=1))
        return states

    def _run(
        self, batch: Mapping[str, Any], features: Tensor | None, layers: Sequence[int], mask: Tensor
    ) -> list[Tensor]:
        if self._features is not None:
            features = self._features(batch)
        if features is not None:
            features = features.to(next(projector_of(self.model).parameters()).dtype)
        with captured(decoder_of(self.model), layers, mask) as states:
            final = forward_hidden(self.model, batch, features)[mask]
        return [final, *(states[layer] for layer in layers)]

    def head(self, rows: Tensor) -> Tensor:
        """Logits of rows after the final norm, ``(rows, hidden)`` to ``(rows, vocab)``, fp32."""
        return self.model.lm_head(rows).float()  # pyright: ignore[reportCallIssue]


def check_teacher(teacher: Any, student: nn.Module, logits: bool, hidden: bool) -> None:
    """Refuse a teacher that cannot teach this student.

    Args:
        teacher: The candidate, or what else has its ``config``.
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
