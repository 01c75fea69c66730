"""Structured levels: KV groups and MLP channels are cut off, in the order and with the refit of one OBS elimination."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.anatomy import Component, reader_rows
from ..pruning.ranking import eliminate
from ..pruning.surgery import cut_component
from .generalization import LinearNorms
from .levels import Level, squares

STEPS = 20  # one MLP level per 5 % of the channels, and no round of the elimination takes more


@dataclass(frozen=True)
class Structured:
    """Every number of KV groups, and MLP channels in steps of 5 % down to the last 5 %; level 0 is whole.

    The kept sets of a gene are nested. The kept columns of the writer are solved again for its own dense output, by the
    elimination that also gives the order (`efficientllava.pruning.ranking.eliminate`).

    Args:
        damping: Share of each channel's own power that is added to Gram matrices, > 0.
        tokens: Positions that count, see `efficientllava.pruning.statistics.counted_positions`.
        round_to: Kept channels are a multiple of this, or all, >= 1.
        channels: Kept channels of each MLP level below the whole, descending; None: the steps of 5 %.
    """

    damping: float = 0.3
    tokens: str = "all"
    round_to: int = 1
    channels: tuple[int, ...] | None = None

    @property
    def granularity(self) -> str:
        """``structured``."""
        return "structured"

    def counts(self, component: Component) -> tuple[int, ...]:
        """Kept units of each level, descending."""
        units, unit = component.units, self.round_to
        if component.kind == "attention":
            return tuple(range(units, 0, -1))
        if self.channels is not None:
            return (units, *(count for count in self.channels if count < units))
        wished = (units * (STEPS - step) / STEPS for step in range(STEPS))
        rounded = {max(unit, unit * round(count / unit)) for count in wished}
        return (units, *sorted((count for count in rounded if count < units), reverse=True))

    def amounts(self, component: Component) -> tuple[float, ...]:
        """Share of units removed by each level, ascending."""
        return tuple(1 - count / component.units for count in self.counts(component))

    def inputs(self, component: Component) -> list[nn.Linear]:
        """The writer, which is what a lost unit is compensated in."""
        return [component.writer]

    def levels(self, component: Component, grams: list[Tensor], felt: Tensor | None = None) -> Iterator[Level]:
        """Make all levels in order.

        Args:
            component: A whole component.
            grams: Gram matrix of the writer's input; used up.
            felt: Weight of each output's error; None: all the same.

        Yields:
            Levels with ``units``, the kept ones, ascending, and ``columns``, the writer's ``(out_features, kept)``.
        """
        weight, whole = component.writer.weight.detach(), range(component.units)
        powers = [squares(linear.weight, 1) for linear, _ in reader_rows(component, whole)]
        powers.append(squares(weight, 0))
        yield Level(0, _norms(component, powers, whole, weight), error=0.0)
        counts, error, gram = self.counts(component), 0.0, grams.pop()
        felt = torch.ones(len(weight)) if felt is None else felt
        # Rows are compensated independently of each other, so that their weights only change costs and order.
        scale = felt.to(gram).clamp(min=1e-6 * float(felt.mean())).sqrt().unsqueeze(1)
        for state in eliminate(weight.to(gram.dtype) * scale, gram, component.width, self.damping, _rounds(counts)):
            units = state.alive.tolist()
            error += float(state.costs.sum())
            if len(units) not in counts:
                continue
            columns = state.columns / scale
            yield Level(
                (component.units - len(units)) * component.unit_parameters,
                _norms(component, powers, units, columns),
                {"units": state.alive.int(), "columns": columns.to(weight.dtype)},
                error,
            )

    def assemble(self, twin: Component, tensors: Mapping[str, Tensor]) -> None:
        """Cut a component down to a level.

        Args:
            twin: A whole component with its own modules; changed.
            tensors: As `levels` gave them.
        """
        cut_component(twin, tensors["units"].tolist(), tensors["columns"])


def _rounds(counts: Sequence[int]) -> Iterator[int]:
    """The counts below the first one, with more in between where a round would take more than a step of the units."""
    step = math.ceil(counts[0] / STEPS)
    for high, low in itertools.pairwise(counts):
        parts = math.ceil((high - low) / step)
        yield from (high - (high - low) * part // parts for part in range(1, parts + 1))


def _norms(
    component: Component, powers: Sequence[Tensor], units: Sequence[int], columns: Tensor
) -> tuple[LinearNorms, ...]:
    """Norms at a level, from squared rows of the readers, squared columns of the writer, and its new columns."""
    weight = component.writer.weight.detach()
    kept = component.columns(units).to(weight.device)
    places = [*reader_rows(component, units), (component.writer, kept)]
    changes = [0.0] * (len(places) - 1) + [float(squares(columns - weight[:, kept]))]
    result = []
    for power, change, (linear, index) in zip(powers, changes, places, strict=True):
        dense, masked = float(power.sum()), float(power[index.to(power.device)].sum())
        result.append(LinearNorms(linear.weight.numel(), dense, masked, dense - masked + change))
    return tuple(result)
