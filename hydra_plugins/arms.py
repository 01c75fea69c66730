"""``hydra/sweeper=arms``: a sweep over arms that have no grid in common, each with every combination of the grid.

A grid cannot say "widthwise with and without refit, and layerwise, which knows none". ``sweep.arms`` names what is
typed for each arm; ``hydra.sweeper.params`` and the command line make the grid. What the user types wins over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from efficientllava.launch.sweep import jobs_of

NODE = BasicSweeperConf(_target_="hydra_plugins.arms.ArmsSweeper")
ConfigStore.instance().store(group="hydra/sweeper", name="arms", node=NODE, provider="arms")


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
