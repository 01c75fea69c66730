"""The frozen teacher: the original unpruned model, outside every module tree, so that no checkpoint contains it.

Which hidden states of student and teacher belong together, and how they are captured.

Layers match by original index: the output of a kept layer is compared with the teacher's output of the same layer, or,
if layers were dropped after it, of the last dropped one before the next kept layer: that is the state which the next
kept layer was trained to receive. The deepest kept layer is measured after the final norm, as arXiv 2604.24380 does
(its `hidden_states[-1]`) and as the head sees it; all others are raw block outputs.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoint.folder import compute_dtype, load, read_config, resolve
from ..checkpoint.hub import folder_digest
from ..models.anatomy import decoder_of, projector_of
from ..models.forward import FeatureCache, HostMemory, forward_hidden
from ..models.offload import Offload, offload_layers
from ..runtime.content import Memo
from ..runtime.errors import UserError
from ..settings.schema import RecoverConfig, TeacherConfig
from .losses import TeacherLogits
from .student import silence_dropout, weights_of

FINAL = -1  # in place of a layer's position: after the final norm
MEMORY_LIMIT = 1 << 30  # bytes of remembered states


class Match(NamedTuple):
    """Positions of two layers whose outputs are compared, in student and teacher; both `FINAL` for the deepest one."""

    student: int
    teacher: int


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
    pairs = (*(Match(i, end) for i, end in enumerate(ends[:-1])), Match(FINAL, FINAL))
    if isinstance(which, str):
        return pairs if which == "all" else pairs[-1:]
    chosen = set()
    for index in which:
        layer = index + depth if index < 0 else index
        if not kept[0] <= layer < depth:
            raise UserError(
                f"recover.hidden_layers: {index} has no kept layer at or before it; "
                f"the teacher has layers 0 to {depth - 1}, the student keeps {list(kept)}"
            )
        chosen.add(bisect_left(ends, layer))
    return tuple(pairs[i] for i in sorted(chosen))


def hidden_states(
    model: nn.Module, batch: Mapping[str, Any], features: Tensor | None, layers: Collection[int], mask: Tensor
) -> dict[int, Tensor]:
    """Run a decoder once and keep what its layers say at some positions.

    Args:
        model: Student or teacher.
        batch: A collated batch.
        features: Vision features of the batch; None where there are none to share.
        layers: Positions of the wanted layers.
        mask: Wanted positions, ``(batch, seq)``.

    Returns:
        Raw outputs of the layers by position and, always, the states after the final norm as `FINAL`; each
        ``(positions, hidden)``.
    """
    states: dict[int, Tensor] = {}
    blocks: Any = decoder_of(model).layers

    def keep(layer: int, _module: nn.Module, _args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        output = output[0] if isinstance(output, tuple) else output
        # Earlier transformers checkpoint a layer with its hooks, which do not run again: they may save nothing for it.
        states[layer] = output if output.requires_grad else output[mask]

    if features is not None:
        features = features.to(weights_of(projector_of(model))[0].dtype)
    with ExitStack() as hooks:
        for layer in {*layers} - {FINAL}:
            hooks.enter_context(blocks[layer].register_forward_hook(partial(keep, layer)))
        states[FINAL] = forward_hidden(model, batch, features)
    return {layer: rows if rows.ndim == 2 else rows[mask] for layer, rows in states.items()}


class Answer(NamedTuple):
    """What a teacher says about the wanted positions of a batch, its rows.

    Attributes:
        states: Hidden states by layer, see `hidden_states`.
        logits: Gives the logits of a range of rows, or what is known of them.
    """

    states: Mapping[int, Tensor]
    logits: TeacherLogits


# Where the targets of a recovery come from, the live `Teacher` or what it has said before: given a collated batch, the
# student's vision features for it, the wanted layers, and the wanted positions, ``(batch, seq)``.
TeacherSource = Callable[[Mapping[str, Any], Tensor | None, Collection[int], Tensor], Answer]


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
        self.model: Any = model
        shared = same_tower(model, student)
        self._features = None if shared else FeatureCache(model)
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
        self, batch: Mapping[str, Any], features: Tensor | None, layers: Collection[int], mask: Tensor
    ) -> Answer:
        """Run the decoder once, or recall what it said about the same records.

        Args:
            batch: A collated batch.
            features: The student's vision features for the batch.
            layers: Wanted layers; the same in every call.
            mask: Wanted positions, ``(batch, seq)``; a function of the records.
        """
        keys, order = record_keys(batch) if self._memory else [], sorted({FINAL, *layers})
        if self._memory and (known := self._memory.get(keys)) is not None:
            states = dict(zip(order, torch.cat(known, dim=1).to(mask.device), strict=True))
        else:
            features = self._features(batch) if self._features else features
            states = hidden_states(self.model, batch, features, layers, mask)
            if self._memory:
                parts = torch.stack([states[layer] for layer in order]).split(mask.sum(1).tolist(), dim=1)
                self._memory.put(keys, parts)
        return Answer(states, lambda rows: self.model.lm_head(states[FINAL][rows]).float())


def check_teacher(teacher: Any, student: nn.Module, config: RecoverConfig) -> None:
    """Refuse a teacher that cannot teach this student.

    Args:
        teacher: The candidate's configuration.
        student: The pruned model.
        config: Says whether logits or hidden states are compared.

    Raises:
        UserError: The vocabularies or the widths of the residual stream differ.
    """
    logits, hidden = config.looks("logits", "teacher"), config.looks("hidden", "teacher")
    for needed, field, what in ((logits, "vocab_size", "vocabulary"), (hidden, "hidden_size", "hidden width")):
        ours, theirs = (getattr(c.get_text_config(), field) for c in (student.config, teacher))  # pyright: ignore
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


def same_tower(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two models have the same vision tower, bit for bit in the coarser of their two types.

    Returns:
        True when everything but decoder, head and projector has the same names, shapes and values.
    """
    first, second = _tower(one), _tower(other)
    return first.keys() == second.keys() and all(_equal(first[name], second[name]) for name in first)


def _tower(model: nn.Module) -> dict[str, Tensor]:
    parts: Any = (decoder_of(model), projector_of(model), model.lm_head)
    others = {id(p) for part in parts for p in part.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in others}


def _equal(one: Tensor, other: Tensor) -> bool:
    coarse = min(one.dtype, other.dtype, key=lambda t: t.itemsize)
    return torch.equal(one.to(coarse), other.to(one.device, coarse))


# ---- where it is ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetCache:
    """Where a teacher's answers lie, and how the teacher is had if some are missing.

    Attributes:
        folder: Of the answers; its name stands for the content of teacher and data.
        config: The teacher's configuration.
        dtype: Type that the teacher computes in.
        load: Loads the teacher.
        memo: Digests of files.
    """

    folder: Path
    config: Any
    dtype: torch.dtype
    load: Callable[[], nn.Module]
    memo: Memo


def open_teacher(
    config: TeacherConfig, base: Mapping[str, str], device: str, folder: Path, memo: Memo
) -> nn.Module | TargetCache:
    """The teacher that a configuration asks for.

    Args:
        config: Where it is, and whether it is asked live.
        base: The original checkpoint, which teaches where none is named.
        device: Where it runs.
        folder: Of its answers, where they are cached.
        memo: Digests of files.

    Raises:
        UserError: It cannot be loaded.
    """
    path, revision = _place(config, base)
    if config.source == "live":
        return load(path, config.dtype, device, revision, offload=config.offload).model
    described, storage = read_config(resolve(path, revision), path)
    dtype = compute_dtype(config.dtype, storage, device)
    return TargetCache(folder, described, dtype, lambda: load(path, config.dtype, device, revision).model, memo)


def require_teacher(config: RecoverConfig, base: Mapping[str, str], student: nn.Module) -> None:
    """Refuse a recovery whose teacher is not there or cannot teach, before anything is computed.

    Args:
        config: Losses and teacher.
        base: As for `open_teacher`.
        student: The model, pruned or not.

    Raises:
        UserError: Says what is wrong with the teacher.
    """
    if not config.taught:
        return
    path, revision = _place(config.teacher, base)
    try:
        described, _ = read_config(resolve(path, revision), path)
    except UserError as error:
        raise UserError(str(error).replace("model.path=", "recover.teacher.path=", 1)) from error
    check_teacher(described, student, config)


def teacher_digest(config: TeacherConfig, base: Mapping[str, str], memo: Memo) -> str:
    """Digest of the checkpoint that teaches; arguments as for `open_teacher`."""
    return folder_digest(resolve(*_place(config, base)), memo)


def _place(config: TeacherConfig, base: Mapping[str, str]) -> tuple[str, str | None]:
    return (config.path, config.revision) if config.path else (base["path"], base.get("revision"))
