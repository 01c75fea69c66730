"""Score: one number per unit (KV group, MLP channel), and the order in which units should go.

A `Ranking` is what every importance ends in: units of one component in removal order, with the marginal cost of each
removal. Scores are never compared between components without dividing by the parameters a unit carries.

A new importance is one function ``(component, seen, how) -> Ranking`` and its row in `IMPORTANCES`, which says what it
has to see: scoring, its memory and its cost follow from that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..models.anatomy import Component
from ..runtime.errors import UserError
from ..settings.schema import TAYLOR, PruneConfig
from .fluctuation import fluctuation
from .ranking import Ranking, obs_ranking
from .spd import DAMPING
from .statistics import STRIP


def activation_scores(component: Component, gram: Tensor) -> Tensor:
    """Root mean square of a unit's input to the writer.

    Args:
        component: Attention or MLP.
        gram: ``E[x x^T]`` of the writer's input.

    Returns:
        ``(units,)``.
    """
    return component.reduce_columns(gram.diagonal().clamp(min=0)).sqrt()


def wanda_scores(component: Component, gram: Tensor) -> Tensor:
    """Sum of ``|W_ij| sqrt(H_jj)`` over a unit's writer columns.

    Source: arXiv 2306.11695, eq. 1, summed over rows for structured removal (arXiv 2312.11983, Wanda-sp).

    Args:
        component: Attention or MLP.
        gram: ``E[x x^T]`` of the writer's input.

    Returns:
        ``(units,)``.
    """
    columns = component.writer.weight.detach().to(gram.dtype).abs().sum(0)
    return component.reduce_columns(columns * gram.diagonal().clamp(min=0).sqrt())


def magnitude_scores(component: Component) -> Tensor:
    """L2 norm of all weights of a unit, readers and writer.

    Args:
        component: Attention or MLP.

    Returns:
        ``(units,)``.
    """
    total = component.reduce_columns(component.writer.weight.detach().double().square().sum(0))
    for reader in component.readers:
        total = total + component.reduce_rows(reader, reader.linear.weight.detach().double().square().sum(1))
    return total.sqrt()


def random_scores(component: Component, generator: torch.Generator) -> Tensor:
    """Uniform scores, ``(units,)``."""
    return torch.rand(component.units, generator=generator, dtype=torch.float64)


def flap_ranking(component: Component, fluctuations: Tensor, biased: bool) -> Ranking:
    """Rank units by their score, standardised within the component, so that all layers can be ranked together.

    The score of a column is its fluctuation times its squared norm, squared again in the attention; a unit's is the
    mean of its columns. With grouped queries the published head becomes a KV group with all its query heads.

    Args:
        component: Attention or MLP.
        fluctuations: Of the writer's inputs, ``(units * width,)``.
        biased: Whether the cut model has biases: costs are scores times the parameters that a unit then takes with it.

    Returns:
        Removal order; costs may be negative.
    """
    rows = component.writer.weight.detach().split(STRIP)
    norms = torch.stack([part.double().square().sum(0) for part in rows]).sum(0).cpu()
    scores = fluctuations * norms  # WIFV
    if component.kind == "attention":
        scores = scores.square()
    spread = scores.std().clamp(min=torch.finfo(torch.float64).tiny)
    standard = component.reduce_columns((scores - scores.mean()) / spread) / component.width
    return Ranking.from_scores(standard * component.unit_price(biased), component.groups)


# What an importance sees of a component: its weights alone, the Gram matrix of what its writer reads, the moments of
# that record by record, or scores made of the gradients of the answer loss, ``(units,)``.
WEIGHTS, INPUTS, RECORDS, GRADIENTS = "weights", "inputs", "records", "gradients"


@dataclass(frozen=True)
class How:
    """What else a ranking may depend on.

    Args:
        config: The pruning node.
        what: Layer and component, for errors.
        generator: Source of randomness.
        felt: How much the answers feel an error of each output of the writer; None: not known.
    """

    config: PruneConfig
    what: str
    generator: torch.Generator
    felt: Tensor | None = None


@dataclass(frozen=True)
class Importance:
    """How units are ranked.

    Args:
        sees: `WEIGHTS`, `INPUTS`, `RECORDS` or `GRADIENTS`.
        rank: Given a component, what is seen of it, and how, the order in which its units should go.
    """

    sees: str
    rank: Callable[[Component, Any, How], Ranking]


def importance_of(name: str) -> Importance:
    """An importance by its name.

    Raises:
        UserError: There is no such importance.
    """
    if name not in IMPORTANCES:
        raise UserError(f"prune.importance={name}: unknown; choose one of {', '.join(IMPORTANCES)}")
    return IMPORTANCES[name]


def _levelled(component: Component, scores: Tensor) -> Ranking:
    """Rank by scores that have no common unit: a parameter costs 1 on average in every component of every layer."""
    ranking = Ranking.from_scores(scores, component.groups)
    scale = component.unit_parameters * component.units / (sum(ranking.costs) or 1.0)
    return replace(ranking, costs=tuple(cost * scale for cost in ranking.costs))


def _obs(component: Component, gram: Tensor, how: How) -> Ranking:
    weight = component.writer.weight.detach()
    if how.felt is not None:
        weight = weight.to(gram.dtype) * how.felt.to(gram).sqrt().unsqueeze(1)
    damping = how.config.damping or DAMPING
    return obs_ranking(weight, gram, component.width, damping, what=how.what, groups=component.groups)


IMPORTANCES = {
    "obs": Importance(INPUTS, _obs),
    **dict.fromkeys(TAYLOR, Importance(GRADIENTS, lambda unit, scores, _: Ranking.from_scores(scores, unit.groups))),
    "activation": Importance(INPUTS, lambda unit, gram, _: _levelled(unit, activation_scores(unit, gram))),
    "wanda": Importance(INPUTS, lambda unit, gram, _: _levelled(unit, wanda_scores(unit, gram))),
    "flap": Importance(RECORDS, lambda unit, seen, how: flap_ranking(unit, fluctuation(*seen), how.config.biased)),
    "magnitude": Importance(WEIGHTS, lambda unit, _seen, _how: _levelled(unit, magnitude_scores(unit))),
    "random": Importance(WEIGHTS, lambda unit, _seen, how: _levelled(unit, random_scores(unit, how.generator))),
}
