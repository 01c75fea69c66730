"""Policies, their budget, and the moves between them. No tensors, no model.

Every move ends in `SearchSpace.repair`: a policy that leaves this module meets the budget, so that no search ever has
to weigh a violated budget against a better loss.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..runtime.errors import UserError

Policy = tuple[int, ...]  # one level per gene

TOLERANCE = 0.005
GRID = 200  # cells of a tolerance; amounts are rounded to cells where combinations of levels are enumerated
TRIES = 4  # random sets of genes of one size that are released before a larger set is


@dataclass(frozen=True)
class Gene:
    """The attention or the MLP of one decoder layer; gene ``2 l`` is the attention of layer ``l``, ``2 l + 1`` its MLP.

    Args:
        layer: Index of the layer.
        kind: ``attention`` or ``mlp``.
        amounts: Share of the gene's units (structured) or weights (masks) that each level removes, ascending, [0, 1].
    """

    layer: int
    kind: str
    amounts: tuple[float, ...]

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.amounts)


@dataclass(frozen=True)
class Budget:
    """How much of an additive resource has to go.

    Args:
        resource: ``params`` (of language-model parameters, embeddings and head included), ``flops`` (of the language
            model's prefill), ``latency`` (of the measured dense latency) or ``weights`` (of decoder-linear weights).
        target: Share of the whole to remove, (0, 1).
        costs: ``costs[gene][level]``: share of the whole that the gene removes at the level, ascending.
        asked: The target in the user's words, for messages.
        tolerance: Largest distance from the target that counts as met, > 0.
    """

    resource: str
    target: float
    costs: tuple[tuple[float, ...], ...]
    asked: str = ""
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class SearchSpace:
    """All policies that meet a budget.

    Args:
        genes: What can be pruned.
        budget: What has to go; its costs are those of ``genes``, level by level.
    """

    genes: tuple[Gene, ...]
    budget: Budget

    def __post_init__(self) -> None:
        shape = [gene.levels for gene in self.genes]
        if shape != [len(costs) for costs in self.budget.costs]:
            raise ValueError("budget.costs must have one entry per gene and level")
        if any(high < low for costs in self.budget.costs for low, high in itertools.pairwise(costs)):
            raise ValueError("budget.costs must not fall from one level to the next")

    def removed(self, policy: Policy) -> float:
        """Share of the resource that a policy removes."""
        return sum(costs[level] for costs, level in zip(self.budget.costs, policy, strict=True))

    def feasible(self, policy: Policy) -> bool:
        """Whether a policy meets the budget."""
        return abs(self.removed(policy) - self.budget.target) <= self.budget.tolerance

    def require_feasible(self) -> None:
        """Refuse a budget that no policy meets.

        Raises:
            UserError: Names the range that policies reach.
        """
        self.repair(tuple(0 for _ in self.genes), random.Random(0))

    def repair(self, policy: Policy, rng: random.Random) -> Policy:
        """Bring a policy within the budget.

        Random genes go one level towards the target until it is reached or crossed. Where whole KV groups are coarse,
        a crossing may leave more than the tolerance: then a few random genes are set anew, to levels as near as
        possible to what they were, and more of them as long as no combination of theirs meets the budget.

        Args:
            policy: One level per gene.
            rng: Source of randomness.

        Returns:
            A feasible policy; ``policy`` itself if it is one.

        Raises:
            UserError: No policy of the space is feasible.
        """
        policy = policy if self.feasible(policy) else self._walk(policy, rng)
        size, everything = 1, len(self.genes)
        while not self.feasible(policy):
            for _ in range(TRIES if size < everything else 1):
                released = rng.sample(range(everything), min(size, everything))
                complete = self._complete(policy, released)
                if complete is not None:
                    return complete
            if size >= everything:
                raise UserError(self._infeasible())
            size *= 2
        return policy

    def _infeasible(self) -> str:
        low, high = self.removed(tuple(0 for _ in self.genes)), self.removed(tuple(g.levels - 1 for g in self.genes))
        budget = self.budget
        line = f"{budget.asked or f'{budget.target:g}'}: policies remove between {low:.3f} and {high:.3f}"
        if low <= budget.target <= high:
            return f"{line} of {budget.resource}, but their levels are too coarse for this share; change it"
        return f"{line} of {budget.resource} here; choose a share in this range"

    def _walk(self, policy: Policy, rng: random.Random) -> Policy:
        """Move random genes one level towards the target until it is reached or crossed, or none is left to move."""
        levels, missing = list(policy), self.budget.target - self.removed(policy)
        step = 1 if missing > 0 else -1
        movable = [i for i, gene in enumerate(self.genes) if 0 <= levels[i] + step < gene.levels]
        while movable and missing * step > 0:
            pick = rng.randrange(len(movable))
            index = movable[pick]
            costs = self.budget.costs[index]
            missing -= costs[levels[index] + step] - costs[levels[index]]
            levels[index] += step
            if not 0 <= levels[index] + step < self.genes[index].levels:
                movable[pick] = movable[-1]
                movable.pop()
        return tuple(levels)

    @cached_property
    def _cells(self) -> list[list[int]]:
        cell = self.budget.tolerance / GRID
        return [[round(cost / cell) for cost in costs] for costs in self.budget.costs]

    def _complete(self, policy: Policy, released: Sequence[int]) -> Policy | None:
        """Set the released genes so that the budget is met, each as near to its level as the later ones allow.

        ``reach[i]`` has bit ``b`` set if the genes after the ``i``-th released one can remove ``b`` cells together.
        """
        reach = [1]
        for index in reversed(released):
            bits = 0
            for cells in set(self._cells[index]):
                bits |= reach[-1] << cells
            reach.append(bits)
        reach.pop()
        fixed = self.removed(policy) - sum(self.budget.costs[i][policy[i]] for i in released)
        cell = self.budget.tolerance / GRID
        middle, slack = (self.budget.target - fixed) / cell, GRID - len(released) / 2 - 1  # each rounding costs <= 1/2
        low, high = round(middle - slack), round(middle + slack)
        levels = list(policy)
        for index in released:
            rest, cells = reach.pop(), self._cells[index]
            near = sorted(range(len(cells)), key=lambda level: abs(level - policy[index]))
            level = next((n for n in near if _any_bit(rest, low - cells[n], high - cells[n])), None)
            if level is None:
                return None
            levels[index] = level
            low, high = low - cells[level], high - cells[level]
        return tuple(levels)

    def random(self, rng: random.Random) -> Policy:
        """A feasible policy: every gene draws a level, then `repair`."""
        return self.repair(tuple(rng.randrange(gene.levels) for gene in self.genes), rng)

    def distance(self, one: Policy, other: Policy) -> float:
        """How differently two policies remove: sum over genes of the difference of their shares."""
        levels = zip(self.genes, one, other, strict=True)
        return sum(abs(gene.amounts[a] - gene.amounts[b]) for gene, a, b in levels)

    def uniform(self) -> Policy:
        """The feasible policy that removes the same share of every gene, as nearly as levels allow."""
        return self.shaped([1.0] * (1 + max(gene.layer for gene in self.genes)))

    def shaped(self, weights: Sequence[float]) -> Policy:
        """A feasible policy that removes less from influential layers: shares inversely proportional to the weights.

        Args:
            weights: One per layer of the model, > 0; for example the root of the block influence.
        """
        return self._cheapest(
            [
                [(low + high) / 2 * weights[gene.layer] for low, high in itertools.pairwise(gene.amounts)]
                for gene in self.genes
            ]
        )

    def ranked(self, errors: Sequence[Sequence[float]]) -> Policy:
        """A feasible policy that takes, over all genes, the levels that add least error per amount of the resource.

        Args:
            errors: ``errors[gene][level]``, in one unit, rising.
        """
        return self._cheapest(
            [
                [
                    (after - before) / max(high - low, sys.float_info.min)
                    for (before, after), (low, high) in zip(
                        itertools.pairwise(of_gene), itertools.pairwise(costs), strict=True
                    )
                ]
                for of_gene, costs in zip(errors, self.budget.costs, strict=True)
            ]
        )

    def _cheapest(self, prices: Sequence[Sequence[float]]) -> Policy:
        """Go up level by level where the next one has the lowest price, until the budget is met; then `repair`.

        Args:
            prices: ``prices[gene][level - 1]`` of going up to a level.
        """
        rng = random.Random(0)  # equal prices take turns in a fixed random order
        rises = [(price, rng.random(), index) for index, of_gene in enumerate(prices) for price in of_gene]
        levels, missing = [0] * len(self.genes), self.budget.target - self.removed((0,) * len(self.genes))
        for _, _, index in sorted(rises):
            costs = self.budget.costs[index]
            rise = costs[levels[index] + 1] - costs[levels[index]]
            if rise / 2 > missing:
                break
            levels[index] += 1
            missing -= rise
        return self.repair(tuple(levels), rng)

    def solve(self, costs: Sequence[Sequence[float]]) -> Policy:
        """The policy of the lowest total cost that removes the target, or as little more as levels allow.

        A multiple-choice knapsack, solved exactly on amounts that are rounded to cells (see `GRID`).

        Args:
            costs: ``costs[gene][level]``; infinite for levels that are not to be taken.

        Raises:
            UserError: No policy of finite cost meets the budget.
        """
        cell, slack = self.budget.tolerance / GRID, GRID - len(self.genes) // 2 - 1  # each rounding costs <= 1/2
        wanted = round(self.budget.target / cell)
        size = wanted + slack + 1
        best, taken = np.full(size, np.inf), []
        best[0] = 0.0
        for cells, prices in zip(self._cells, costs, strict=True):
            rows = np.full((len(cells), size), np.inf)
            for row, amount, price in zip(rows, cells, prices, strict=True):
                if amount < size:
                    row[amount:] = best[: size - amount] + price
            taken.append(rows.argmin(0))
            best = rows.min(0)
        reached = np.flatnonzero(np.isfinite(best))
        above = reached[reached >= wanted]
        place = int(above[best[above].argmin()]) if len(above) else int(reached[-1]) if len(reached) else 0
        levels = []
        for cells, choice in zip(reversed(self._cells), reversed(taken), strict=True):
            levels.append(int(choice[place]))
            place -= cells[levels[-1]]
        return self.repair(tuple(reversed(levels)), random.Random(0))

    def mutate(self, policy: Policy, rng: random.Random, probability: float = 0.2) -> Policy:
        """Draw genes anew, each with a probability, at least one; then `repair`."""
        always = rng.randrange(len(policy))
        drawn = (
            rng.randrange(gene.levels) if index == always or rng.random() < probability else level
            for index, (gene, level) in enumerate(zip(self.genes, policy, strict=True))
        )
        return self.repair(tuple(drawn), rng)

    def exchange(self, policy: Policy, rng: random.Random, moves: int | None = None) -> Policy:
        """Remove more here and less there, so that the budget is kept (arXiv 2410.14649, level-switch mutation).

        One gene goes one level up or down, or with halving probability 2, 4, 8... levels; another one goes as many
        levels the other way as meet the budget best. Where no single gene makes up for it, `repair` does.

        Args:
            policy: A feasible policy.
            rng: Source of randomness.
            moves: Number of exchanges; None draws the smaller of two numbers from 1 to 3.
        """
        for _ in range(moves or min(rng.randint(1, 3), rng.randint(1, 3))):
            policy = self._exchange_once(policy, rng)
        return policy

    def _exchange_once(self, policy: Policy, rng: random.Random) -> Policy:
        step = rng.choice((1, -1))
        order = rng.sample(range(len(policy)), len(policy))
        first = next((i for i in order if 0 <= policy[i] + step < self.genes[i].levels), None)
        if first is None:
            return policy
        size = 1
        while rng.random() < 0.5:
            size *= 2
        level = min(max(policy[first] + step * size, 0), self.genes[first].levels - 1)
        moved = _with(policy, first, level)
        for second in order:
            levels = range(policy[second] - step, -1 if step > 0 else self.genes[second].levels, -step)
            others = [_with(moved, second, level) for level in levels] if second != first else []
            best = min(others, key=lambda p: abs(self.removed(p) - self.budget.target), default=None)
            if best is not None and self.feasible(best):
                return best
        return self.repair(moved, rng)

    def crossover(self, one: Policy, other: Policy, rng: random.Random) -> Policy:
        """Take each gene from one of two policies, by a fair coin; then `repair`."""
        return self.repair(tuple(rng.choice(pair) for pair in zip(one, other, strict=True)), rng)


@dataclass(frozen=True)
class ShapeSpace(SearchSpace):
    """Policies that give every layer the same shape, so that a stock class can hold the result.

    Args:
        genes: What can be pruned.
        budget: What has to go.
        shapes: All policies of the space, at least one; they count as feasible.
    """

    shapes: tuple[Policy, ...] = ()

    def feasible(self, policy: Policy) -> bool:
        """Whether a policy is one of the shapes."""
        return policy in self.shapes

    def repair(self, policy: Policy, rng: random.Random) -> Policy:
        """The shape that is nearest to a policy, by levels."""
        return min(self.shapes, key=lambda shape: sum(abs(a - b) for a, b in zip(shape, policy, strict=True)))

    def solve(self, costs: Sequence[Sequence[float]]) -> Policy:
        """The shape of the lowest total cost."""
        return min(self.shapes, key=lambda s: sum(c[level] for c, level in zip(costs, s, strict=True)))

    def random(self, rng: random.Random) -> Policy:
        """One of the shapes."""
        return rng.choice(self.shapes)


def _with(policy: Policy, index: int, level: int) -> Policy:
    return (*policy[:index], level, *policy[index + 1 :])


def _any_bit(bits: int, low: int, high: int) -> bool:
    """Whether any of the bits ``low`` to ``high`` is set."""
    return high >= 0 and bool((bits >> max(low, 0)) & ((1 << (high - max(low, 0) + 1)) - 1))
