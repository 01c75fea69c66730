"""Which hidden states of student and teacher belong together, and how they are captured.

Layers match by original index: the output of a kept layer is compared with the teacher's output of the same layer, or,
if layers were dropped after it, of the last dropped one before the next kept layer: that is the state which the next
kept layer was trained to receive. The deepest kept layer is measured after the final norm, as arXiv 2604.24380 does
(its `hidden_states[-1]`) and as the head sees it; all others are raw block outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import UserError


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
