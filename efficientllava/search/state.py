"""State of a search on disk: what a killed search goes on from, and how it is told from another search's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.content import digest
from ..runtime.errors import UserError
from ..runtime.files import whole_file
from ..settings.schema import SearchConfig
from .objective import Objective
from .space import Policy, SearchSpace

FORMAT = 1  # version of the file


@dataclass
class State:
    """Everything that a killed search goes on from; draws depend on the generation alone.

    Args:
        round: Closed rounds.
        generation: Generations that are done in the current round.
        theta: Version of the projector: how often it has changed.
        objective: Standardised on the first population; None before.
        archive: Best policies so far, best first.
        record: Every evaluation, see `efficientllava.search.evolution.Search.record`.
        history: Every generation, see `efficientllava.search.evolution.Search.history`.
    """

    round: int = 0
    generation: int = 0
    theta: int = 0
    objective: Objective | None = None
    archive: list[Policy] = field(default_factory=list)
    record: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def identity_of(
    space: SearchSpace, config: SearchConfig, seed: int, seeds: Sequence[Policy], more: Mapping[str, str]
) -> dict[str, str]:
    """What two searches must agree in to be the same, by names that a user knows.

    Args:
        space: What is searched.
        config: Settings.
        seed: Seed of all draws.
        seeds: Policies that the first population starts with.
        more: What else matters, such as digests of model and samples.
    """
    settings = {f"search.{key}": json.dumps(value) for key, value in asdict(config).items()}
    levels = digest([[gene.layer, gene.kind, gene.amounts] for gene in space.genes] + [space.budget.costs])
    target = f"{space.budget.target!r} of {space.budget.resource}"
    return {**settings, "budget": target, "levels": levels, "seed": str(seed), "seeds": digest(seeds), **more}


def write(state: State, path: Path, identity: Mapping[str, str]) -> None:
    """Write a state so that a kill leaves the old file or the new one.

    Args:
        state: The state.
        path: File to write; its folder exists.
        identity: Output of `identity_of`.

    Raises:
        UserError: The file cannot be written.
    """
    plain = {**vars(state), "objective": state.objective and asdict(state.objective)}
    with whole_file(path) as file:
        file.write_text(json.dumps({"format": FORMAT, "identity": identity, "state": plain}), encoding="utf-8")


def read(path: Path, identity: Mapping[str, str]) -> State:
    """Read a state; an empty one where there is no file.

    Args:
        path: The file.
        identity: Output of `identity_of` for the search that wants to go on.

    Raises:
        UserError: The file is another search's, or no state at all; it stays as it is.
    """
    if not path.exists():
        return State()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written, state, version = content["identity"], State(**content["state"]), content["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is no state of a search; delete it, or set another paths.output_dir") from error
    differing = [key for key in {**identity, **written} if identity.get(key) != written.get(key)]
    if version != FORMAT or differing:
        what = ", ".join(differing) or "version of the file"
        raise UserError(
            f"{path}: is the state of another search (it differs in: {what}); delete it to search anew, "
            "or set another paths.output_dir"
        )
    state.objective = Objective(**content["state"]["objective"]) if state.objective else None
    state.archive = [tuple(policy) for policy in state.archive]
    return state
