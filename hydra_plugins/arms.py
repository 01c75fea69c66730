"""``hydra/sweeper=arms``: a sweep over arms that have no grid in common, each with every combination of the grid.

A grid cannot say "widthwise with and without refit, and layerwise, which knows none". ``sweep.arms`` names what is
typed for each arm; ``hydra.sweeper.params`` and the command line make the grid. What the user types wins over both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from efficientllava.config import key_of

NODE = BasicSweeperConf(_target_="hydra_plugins.arms.ArmsSweeper")
ConfigStore.instance().store(group="hydra/sweeper", name="arms", node=NODE, provider="arms")


def jobs_of(grid: Sequence[Sequence[str]], arms: Mapping[str, Sequence[str]], typed: Sequence[str]) -> list[list[str]]:
    """The jobs of a sweep.

    Args:
        grid: Overrides of every point of the grid, what the user typed included.
        arms: Overrides of every arm by its name, which becomes the job's ``name``; none: the grid is all there is.
        typed: What the user typed; an arm may not set these keys to something else.

    Returns:
        Overrides of every job, arm after arm; arms that differ in nothing but what the user typed are run once.
    """
    if not arms:
        return [list(point) for point in grid]
    fixed = {key_of(override) for override in typed}
    jobs: dict[tuple[str, ...], list[str]] = {}
    for name, overrides in arms.items():
        arm = [override for override in (f"name={name}", *overrides) if key_of(override) not in fixed]
        told = {key_of(override) for override in arm}
        for point in grid:
            rest = [override for override in point if key_of(override) not in told]
            content = (*rest, *(override for override in arm if key_of(override) != "name"))
            jobs.setdefault(tuple(sorted(content)), [*rest, *arm])
    return list(jobs.values())


class ArmsSweeper(BasicSweeper):
    """Hydra's own sweeper, with ``sweep.arms`` as one more dimension."""

    _typed: Sequence[str] = ()

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep.

        Args:
            arguments: What the user typed.
        """
        self._typed = arguments
        return super().sweep(arguments)

    def split_arguments(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Jobs in batches.

        Args:
            overrides: The grid.
            max_batch_size: Jobs of a batch; None: all in one.
        """
        [grid] = BasicSweeper.split_arguments(overrides, None)
        typed = [str(o.key_or_group) for o in OverridesParser.create().parse_overrides(list(self._typed))]
        jobs = jobs_of(grid, self.config.sweep.arms if self.config else {}, typed)
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))  # pyright: ignore[reportArgumentType]
