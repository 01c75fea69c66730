"""The search itself: generations of policies, selected in stages, in rounds between which the model may change.

EfficientLLaVA searches its policies by evolution, in alternation with an optimisation of the projector (arXiv
2503.15369, abstract). Numbers of parents, mutants and crossovers are those of the same group's released MCUFormer
code; budgets by repair, exchanges and selection in stages follow EvoPress (arXiv 2410.14649). Only a callable that
evaluates policies is needed, no model.
"""

from __future__ import annotations

import functools
import json
import math
import random
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..pruning.stream import silent
from ..runtime.console import Tick
from ..runtime.errors import UserError
from ..runtime.files import whole_file
from ..settings.schema import SearchConfig
from .space import Policy, SearchSpace

TRIES = 10  # draws until a child is given up that has been seen before


@dataclass(frozen=True)
class Risk:
    """Empirical risk of one policy.

    Args:
        loss: Cross-entropy of the answers, nats per supervised token.
        kl: ``KL(dense || pruned)`` per supervised token, nats.
        error: Share of answers with at least one wrong token, teacher-forced, [0, 1].
    """

    loss: float
    kl: float
    error: float


@dataclass(frozen=True)
class Objective:
    """``J = z(R) + lambda z(gap)``, both standardised on the first population (structural risk minimization).

    Args:
        risk: Which field of `Risk` is ``R``.
        weight: ``lambda``, >= 0.
        risk_mean: Mean of ``R`` in the first population.
        risk_std: Its standard deviation, > 0.
        gap_mean: Mean of the gap in the first population.
        gap_std: Its standard deviation, > 0.
    """

    risk: str
    weight: float
    risk_mean: float
    risk_std: float
    gap_mean: float
    gap_std: float

    @classmethod
    def fitted(cls, risk: str, weight: float, risks: Sequence[Risk], gaps: Sequence[float]) -> Objective:
        """Standardise on a population; a constant term gets a deviation of 1, overflows do not count."""
        return cls(risk, weight, *_moments([getattr(r, risk) for r in risks]), *_moments(gaps))

    def value(self, risk: Risk, gap: float) -> float:
        """``J`` of a policy; infinite where the risk overflowed."""
        empirical = (getattr(risk, self.risk) - self.risk_mean) / self.risk_std
        total = empirical + self.weight * (gap - self.gap_mean) / self.gap_std
        return total if math.isfinite(total) else math.inf


def _moments(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    return statistics.fmean(finite), statistics.pstdev(finite) or 1.0


@dataclass
class State:
    """Everything that a killed search goes on from; draws depend on the generation alone.

    Args:
        round: Closed rounds.
        generation: Generations that are done in the current round.
        theta: Version of the projector that the archive's scores belong to: how often it has changed.
        objective: Standardised on the first population; None before.
        archive: Best policies so far, best first.
        record: Every evaluation in order: ``policy``, ``removed`` (share of the resource), ``round``, ``generation``
            (0: first population, or the archive under a new projector), ``theta``, ``share`` of the samples, ``loss``,
            ``kl``, ``error``, ``gap`` and ``objective``.
        history: One entry per generation, and one where the archive is scored under a new projector: ``round``,
            ``generation``, ``theta``, ``best`` (objective of the best policy so far), ``mean`` (objective of the
            generation's policies that came to all samples; None if none did) and ``cost`` (evaluations so far; on a
            share of the samples they count as that share).
        projector: What became of the projector, one entry per time that it was trained.
    """

    round: int = 0
    generation: int = 0
    theta: int = 0
    objective: Objective | None = None
    archive: list[Policy] = field(default_factory=list)
    record: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    projector: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path | None) -> State:
        """What a killed search has left; an empty one where there is no file."""
        if path is None or not path.exists():
            return cls()
        known = json.loads(path.read_text(encoding="utf-8"))
        objective, archive = known.pop("objective"), map(tuple, known.pop("archive"))
        return cls(objective=objective and Objective(**objective), archive=list(archive), **known)

    def write(self, path: Path) -> None:
        """Write it so that a kill leaves the old file or the new one."""
        with whole_file(path) as file:
            file.write_text(json.dumps(asdict(self)), encoding="utf-8")


# Risks of policies on the first share of the samples, (0, 1].
Evaluate = Callable[[Sequence[Policy], float], list[Risk]]


class Search:
    """A search for the policy with the lowest objective.

    A round is a number of generations; after it the caller may change the model and tells so by `end_round`::

        while not search.finished:
            search.run_round()
            search.end_round(changed=train_projector(search.state.archive))
        cut(search.best)

    A search with a path writes its state after the first population, every generation and every round; made again with
    the same arguments, it goes on from there and ends with the same result.

    Args:
        space: What is searched.
        evaluate: Risks of policies under the model as it is, see `Evaluate`.
        gap: Generalization gap of a policy.
        config: Method, objective and sizes.
        seed: Seed of all draws.
        seeds: Policies that the first population starts with, such as ``space.uniform()``.
        path: State file, in a folder of this very search; None keeps the state in memory.
        writes: Whether this process writes the state; several processes that share a generation read the same file.
        tick: Progress.

    Attributes:
        state: What the search has found so far.

    Raises:
        UserError: No policy meets the budget.
    """

    def __init__(
        self,
        space: SearchSpace,
        evaluate: Evaluate,
        gap: Callable[[Policy], float],
        config: SearchConfig,
        seed: int = 0,
        seeds: Sequence[Policy] = (),
        path: Path | None = None,
        writes: bool = True,
        tick: Tick = silent,
    ) -> None:
        space.require_feasible()
        if list(config.stages) != sorted(set(config.stages)) or config.stages[-1:] != [1.0]:
            raise UserError(f"search.stages={list(config.stages)}: must rise and end with 1, such as [0.25, 1.0]")
        self._space, self._evaluate, self._gap, self._config = space, evaluate, functools.cache(gap), config
        self._seed, self._seeds, self._path, self._writes, self._tick = seed, seeds, path, writes, tick
        self.state = State.read(path)
        self._known: dict[tuple[int, float], dict[Policy, Risk]] = {}
        for entry in self.state.record:
            risk = Risk(entry["loss"], entry["kl"], entry["error"])
            self._risks(entry["theta"], entry["share"])[tuple(entry["policy"])] = risk

    @property
    def finished(self) -> bool:
        """Whether all rounds are closed."""
        return self.state.round >= self._config.rounds

    @property
    def best(self) -> Policy:
        """The best policy so far."""
        return self.state.archive[0]

    @property
    def plain(self) -> Policy:
        """The policy that looks at no layer: the first of the given ones."""
        return self._given(random.Random(0))[0]

    @property
    def risks(self) -> Mapping[Policy, Risk]:
        """Risks on all samples under the projector as it is, of the policies that came so far."""
        return self._risks(self.state.theta, 1.0)

    def run_round(self) -> None:
        """Run the generations that are left of the current round."""
        state = self.state
        if state.objective is None:
            self._begin()
        while state.generation < self._generations:
            state.generation += 1
            self._generation()
            self._save()
            done = state.round * self._generations + state.generation
            self._tick("search policies", done, self._config.rounds * self._generations)

    def end_round(self, changed: bool = False) -> None:
        """Close the current round.

        Args:
            changed: Whether the model has changed since: then the archive, and what goes on with it, is scored again.
        """
        state = self.state
        state.round += 1
        state.generation = 0
        if changed:
            again = self._again()
            state.theta += 1
            self._score(again, 1.0)
            self._select(again)
        self._save()

    def _again(self) -> list[Policy]:
        """What is scored again where the model has changed."""
        return [*self.state.archive]

    @property
    def _generations(self) -> int:
        """Generations of a round."""
        return self._config.generations

    def _begin(self) -> None:
        """Evaluate the first population on all samples and standardise the objective on it."""
        state, config, rng = self.state, self._config, self._rng()
        population = self._first(rng)
        risks = self._evaluate(population, 1.0)
        gaps = [self._gap(policy) for policy in population]
        weight = config.gap_weight if config.term else 0.0
        state.objective = Objective.fitted(config.risk, weight, risks, gaps)
        self._note(population, 1.0, risks)
        self._select(population)
        self._save()

    def _given(self, rng: random.Random) -> list[Policy]:
        return [self._space.repair(policy, rng) for policy in self._seeds]

    def _first(self, rng: random.Random) -> list[Policy]:
        """The first population."""
        return self._filled(dict.fromkeys(self._given(rng)), rng)

    def _facts(self, policy: Policy) -> dict[str, Any]:
        """What else is recorded of a policy."""
        return {}

    def _generation(self) -> None:
        """Make children, drop them stage by stage, and keep the best of them and their parents."""
        stages, parents = self._config.stages, self.state.archive
        children = self._children(self._rng())
        for share, following in zip(stages, [*stages[1:], None], strict=True):
            pool = [*parents, *children]
            self._score(pool, share)
            if following is not None:
                # Every stage costs the same: as many children fewer as it looks at more samples.
                room = len(parents) + math.ceil(self._config.population * stages[0] / following)
                going_on = set(self._ranked(pool, share)[:room])
                children = [child for child in children if child in going_on]
        self._select([*parents, *children], children)

    def _children(self, rng: random.Random) -> list[Policy]:
        """Policies that have not been evaluated under the current projector; fewer where the space is exhausted."""
        config, space, archive = self._config, self._space, self.state.archive
        children: dict[Policy, None] = {}
        if config.method == "random":
            return self._filled(children, rng)

        def mutant() -> Policy:
            if rng.random() < config.exchange:
                return space.exchange(rng.choice(archive), rng)
            return space.mutate(rng.choice(archive), rng, config.mutation)

        def crossover() -> Policy:
            return space.crossover(rng.choice(archive), rng.choice(archive), rng)

        for make in [mutant] * config.mutants + [crossover] * config.crossovers:
            self._add(children, make)
        return self._filled(children, rng)

    def _filled(self, policies: dict[Policy, None], rng: random.Random) -> list[Policy]:
        """Fill a population with random policies."""
        while len(policies) < self._config.population and self._add(policies, lambda: self._space.random(rng)):
            pass
        return list(policies)[: self._config.population]

    def _add(self, policies: dict[Policy, None], make: Callable[[], Policy]) -> bool:
        """Add a policy that is new; False if none was found."""
        for _ in range(TRIES):
            policy = make()
            if policy not in policies and not self._seen(policy):
                policies[policy] = None
                return True
        return False

    def _seen(self, policy: Policy) -> bool:
        return any(policy in self._risks(self.state.theta, share) for share in (*self._config.stages, 1.0))

    def _rng(self) -> random.Random:
        """Draws depend on the generation alone, so that a resumed search needs no state of a generator."""
        return random.Random(f"{self._seed}/{self.state.round}/{self.state.generation}")

    def _risks(self, theta: int, share: float) -> dict[Policy, Risk]:
        return self._known.setdefault((theta, share), {})

    def _score(self, policies: Iterable[Policy], share: float) -> None:
        """Evaluate the policies that have not been at this stage under the current projector."""
        known = self._risks(self.state.theta, share)
        missing = [policy for policy in dict.fromkeys(policies) if policy not in known]
        if missing:
            self._note(missing, share, self._evaluate(missing, share))

    def _note(self, policies: Sequence[Policy], share: float, risks: Sequence[Risk]) -> None:
        state = self.state
        self._risks(state.theta, share).update(zip(policies, risks, strict=True))
        place = {"round": state.round, "generation": state.generation, "theta": state.theta, "share": share}
        for policy in policies:
            entry = {"policy": list(policy), "removed": self._space.removed(policy), **place}
            entry |= {**asdict(self._risks(state.theta, share)[policy]), **self._facts(policy)}
            state.record.append(entry | {"gap": self._gap(policy), "objective": self._objective(policy, share)})

    def _objective(self, policy: Policy, share: float = 1.0) -> float:
        objective, risk = self.state.objective, self._risks(self.state.theta, share)[policy]
        if objective is None:
            raise RuntimeError("the first population has not been evaluated")
        return objective.value(risk, self._gap(policy))

    def _ranked(self, policies: Iterable[Policy], share: float = 1.0) -> list[Policy]:
        return sorted(set(policies), key=lambda policy: (self._objective(policy, share), policy))

    def _select(self, policies: Sequence[Policy], newcomers: Sequence[Policy] | None = None) -> None:
        """Keep the best policies and close the generation; ``newcomers`` are those of it that saw all samples."""
        state = self.state
        state.archive = self._ranked(policies)[: self._config.parents]
        values = [self._objective(policy) for policy in (policies if newcomers is None else newcomers)]
        finite = [value for value in values if math.isfinite(value)]
        state.history.append(
            {
                "round": state.round,
                "generation": state.generation,
                "theta": state.theta,
                "best": self._objective(self.best),
                "mean": statistics.fmean(finite) if finite else None,
                "cost": sum(entry["share"] for entry in state.record),
            }
        )

    def _save(self) -> None:
        if self._path and self._writes:
            self.state.write(self._path)
