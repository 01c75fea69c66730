"""A search over a few numbers: prices turn additive costs into policies, and the budget is met exactly.

Each policy is the solution of a multiple-choice knapsack over what every level of every gene costs. Only four prices
are searched, on samples that the levels were not fitted to: the fewer numbers are chosen, the less is fitted to the
samples that they are chosen on. Where candidates cost next to nothing, evolution goes on from the policies found.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..settings.schema import SearchConfig
from .evolution import Search
from .space import Gene, Policy

Errors = Sequence[Sequence[float]]  # of every gene at every level, in one unit, rising


@dataclass(frozen=True)
class Prices:
    """What a level costs beside its error.

    Args:
        attention: Logarithm of the factor that errors of the attention count more than those of the MLP.
        depth: Logarithm of the factor that errors of the last layer count more than those of the first.
        floor: Share of every gene that stays at least, [0, 1).
        power: Exponent of the errors, > 0; above 1 the loss is spread, below it gathers in few genes.
    """

    attention: float = 0.0
    depth: float = 0.0
    floor: float = 0.0
    power: float = 1.0

    def costs(self, genes: Sequence[Gene], errors: Errors) -> list[list[float]]:
        """Cost of every level of every gene; infinite below the floor."""
        last = max(max(gene.layer for gene in genes), 1)

        def factor(gene: Gene) -> float:
            return math.exp(self.attention * (gene.kind == "attention") + self.depth * (gene.layer / last - 0.5))

        return [
            [
                factor(gene) * error**self.power if amount <= 1 - self.floor else math.inf
                for amount, error in zip(gene.amounts, of_gene, strict=True)
            ]
            for gene, of_gene in zip(genes, errors, strict=True)
        ]

    def neighbours(self, step: float) -> Iterator[Prices]:
        """Prices that differ in one number."""
        for sign in (step, -step):
            yield replace(self, attention=self.attention + sign)
            yield replace(self, depth=self.depth + sign)
            yield replace(self, floor=min(max(self.floor + 0.2 * sign, 0.0), 0.8))
            yield replace(self, power=self.power * math.exp(0.5 * sign))


# The costs as they are; nothing of the attention (its price is high); losses spread, and gathered.
START = (Prices(), Prices(attention=20.0, power=2.0), Prices(power=2.0), Prices(power=0.7))
CHILDREN = 8  # neighbours of a point
EVOLVED = 2e12  # operations that evolution may take: seconds of a CPU
LONGEST = 12  # its generations at most


class KnapsackSearch(Search):
    """A `Search` whose policies come from prices: around the best ones, in steps that halve with every generation.

    Args:
        errors: Errors of all genes at all levels.
        evolved: Generations of evolution at the end of each round, see `affordable`.
        *args: As of `Search`.
        **more: As of `Search`.
    """

    def __init__(self, errors: Errors, evolved: int, *args: Any, **more: Any) -> None:
        self._errors, self._evolved = errors, evolved
        self._prices: dict[Policy, Prices] = {}
        super().__init__(*args, **more)
        for entry in self.state.record:
            if entry.get("prices"):
                self._prices[tuple(entry["policy"])] = Prices(**entry["prices"])

    @property
    def plain(self) -> Policy:
        """The better one of the policies that look at no layer: the same share of every gene, or of every MLP only."""
        return self._ranked(self._plain)[0]

    @property
    def _plain(self) -> list[Policy]:
        return [super().plain, self._solve(START[1])]

    def _again(self) -> list[Policy]:
        """The archive, and what prices go on from."""
        return list(dict.fromkeys([*super()._again(), *self._plain, *self._priced()[:1]]))

    def _priced(self) -> list[Policy]:
        """Policies that come from prices, the best one first."""
        return [policy for policy in self._ranked(self.risks) if policy in self._prices]

    @property
    def _generations(self) -> int:
        return self._config.generations + self._evolved

    def _first(self, rng: random.Random) -> list[Policy]:
        return list(dict.fromkeys([*self._given(rng), *map(self._solve, START)]))

    def _children(self, rng: random.Random) -> list[Policy]:
        config, state = self._config, self.state
        if state.generation > config.generations:
            return super()._children(rng)
        done = state.round * config.generations + state.generation - 1
        near = map(self._solve, self._prices[self._priced()[0]].neighbours(0.5**done))
        return [policy for policy in dict.fromkeys(near) if not self._seen(policy)]

    def _solve(self, prices: Prices) -> Policy:
        policy = self._space.solve(prices.costs(self._space.genes, self._errors))
        self._prices.setdefault(policy, prices)
        return policy

    def _facts(self, policy: Policy) -> dict[str, Any]:
        prices = self._prices.get(policy)
        return {"prices": prices and asdict(prices)}


def affordable(config: SearchConfig, operations: float) -> int:
    """Generations of evolution at the end of a round that cost next to nothing.

    Args:
        config: Rounds and population.
        operations: Of one policy on the samples.
    """
    return min(LONGEST, int(EVOLVED / (operations * config.population * config.rounds)))


def evaluations(config: SearchConfig, operations: float) -> int:
    """Most policies that a search evaluates; for the arguments see `affordable`."""
    prices, evolved = config.generations * CHILDREN, affordable(config, operations) * config.population
    return 3 + len(START) + config.rounds * (prices + evolved)
