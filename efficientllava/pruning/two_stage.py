"""Two stages: channels of every MLP by their norms, then whole attentions one by one (2SSP, arXiv 2501.17771).

How many attentions go depends on the share s of the layers' parameters that is to go: round(layers * s^(m / (1.5 a))),
with m and a the parameters of an MLP and of an attention (eq. 5 there). What is left to remove comes off the MLPs, the
same number of channels of each. Then, again and again, the attention goes without which the loss of a sample rises
least.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from ..runtime.errors import UserError
from ..runtime.processes import gather, rank
from ..settings.schema import PruneConfig
from .plan import LayerPlan, Ranking, ranked_plan
from .refit import SequentialPruner
from .selection import TOLERANCE, Space
from .stream import CalibrationStream

ALPHA = 1.5
SAMPLE = 2048  # positions whose loss decides which attention goes; one sequence as published


def stages(space: Space, ratio: float) -> tuple[int, int]:
    """Number of attentions that go, and channels that every MLP keeps.

    Raises:
        UserError: No such pair meets the ratio.
    """
    attentions, mlps = (
        sum(space.price(layer, kind, units, 0) for layer, units in enumerate(kept))
        for kind, kept in enumerate((space.groups, space.channels))
    )
    share, free = ratio * space.total / (attentions + mlps), _free(space)
    off = min(round(space.depth * share ** (mlps / attentions / ALPHA)), len(free))

    def miss(channels: int) -> float:
        return abs(space.ratio(_counts(space, free[:off], channels)) - ratio)

    channels = min(space.allowed_channels, key=miss)
    if miss(channels) > TOLERANCE:
        raise UserError(
            f"prune.ratio={ratio:g}: not met by {off} attentions off and {channels} channels of every MLP; ask for "
            "another one, or lower prune.round_to"
        )
    return off, channels


def _free(space: Space) -> list[int]:
    """Layers whose attention may go."""
    return [i for i, groups in enumerate(space.groups) if groups and i not in space.whole_attention]


def _counts(space: Space, gone: Sequence[int], channels: int) -> list[tuple[int, int]]:
    kept = space.counts(max(space.groups), channels)
    return [(0 if i in gone else groups, width) for i, (groups, width) in enumerate(kept)]


def two_stage_plan(
    stream: CalibrationStream, space: Space, config: PruneConfig, rankings: Sequence[tuple[Ranking, Ranking]]
) -> tuple[LayerPlan, ...]:
    """Choose the attentions that go on a sample; the model is unchanged.

    Args:
        stream: The calibration stream, of which the first batches are the sample.
        space: What can be removed.
        config: ``ratio``.
        rankings: Removal orders; those of the MLPs count.
    """
    off, channels = stages(space, config.ratio or 0.0)
    sample = _first(stream, config.tokens)
    pruner = SequentialPruner(sample, replace(config, refit=False))

    def plan(gone: Sequence[int]) -> tuple[LayerPlan, ...]:
        return ranked_plan(_counts(space, gone, channels), rankings)

    gone: list[int] = []
    for step in range(off):
        tried = [i for i in _free(space) if i not in gone]
        losses = {i: sample.answer_loss(pruner.run(plan([*gone, i]), commit=False)[0]) for i in tried}
        gone.append(min(losses, key=losses.__getitem__))
        stream.tick("choose attentions", step + 1, off)
    return plan(gone)


def _first(stream: CalibrationStream, tokens: str) -> CalibrationStream:
    """The sample: the first batches of all processes, which take turns, whatever their number."""
    known, sizes = stream.calibration, [int(counted.sum()) for counted in stream.counted]
    own = [(place in known.written, place, size) for place, size in enumerate(sizes)]
    order = sorted(
        (made, place, process, size) for process, theirs in enumerate(gather(own)) for made, place, size in theirs
    )
    before = itertools.accumulate((size for *_, size in order), initial=0)
    count = sum(process == rank() and seen < SAMPLE for (*_, process, _), seen in zip(order, before, strict=False))
    some = replace(known, batches=stream.batches[:count], compared=(), held=(), validated=())
    return CalibrationStream(stream.model, some, tokens)
