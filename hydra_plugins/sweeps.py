"""``hydra/launcher=gpu_pool | slurm | ray`` and ``hydra/sweeper=arms``: how the jobs of a sweep are made and started.

Hydra finds launchers and sweepers in this package only, and imports it whenever it starts: what takes long is imported
when used. It runs this file before it is a module, so that no dataclass can be made here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Override

from efficientllava.launch import Runner
from efficientllava.launch.local import Pool, cores, cpu_slots, gpu_slots
from efficientllava.launch.sweep import ProcessLauncher, jobs_of
from efficientllava.settings.checks import require_valid
from efficientllava.settings.schema import GpuPoolConfig

for group, name, node in (
    ("launcher", "gpu_pool", GpuPoolConfig),
    ("sweeper", "arms", BasicSweeperConf(_target_="hydra_plugins.sweeps.ArmsSweeper")),
):
    ConfigStore.instance().store(group=f"hydra/{group}", name=name, node=node, provider=name)


class GpuPoolLauncher(ProcessLauncher):
    """As many jobs at once as this machine has slots; see `efficientllava.settings.schema.GpuPoolConfig`."""

    def check(self) -> None:
        """Refuse what is out of range."""
        require_valid(GpuPoolConfig(**self.options), "hydra.launcher.")

    def runner(self, trainers: Sequence[Any]) -> AbstractContextManager[Runner]:
        """Leased GPUs or cores."""
        slots = self._environments(trainers) if trainers else []  # looks for GPUs, and imports torch for it
        minutes = self.options["timeout_min"]
        return nullcontext(Pool(slots, minutes and 60 * minutes))

    def _environments(self, trainers: Sequence[Any]) -> list[dict[str, str]]:
        """The slots that the trainers of the jobs call for."""
        from efficientllava.runtime.processes import on_gpu, wanted

        if not any(on_gpu(trainer) for trainer in trainers):
            return cpu_slots(min(self.options["slots"] or cores(), len(trainers)))
        return gpu_slots(_visible_gpus(), self.options["gpus_per_job"] or max(wanted(trainer) for trainer in trainers))


class SlurmLauncher(ProcessLauncher):
    """Jobs of a Slurm cluster, submitted as one array; see ``conf/hydra/launcher/slurm.yaml``."""

    def runner(self, trainers: Sequence[Any]) -> AbstractContextManager[Runner]:
        """The queue."""
        from efficientllava.launch.slurm import Slurm

        return nullcontext(Slurm(self.options, trainers))

    def check(self) -> None:
        """Refuse what is out of range, or cannot work here."""
        from efficientllava.launch.slurm import require

        require(self.options)


class RayLauncher(ProcessLauncher):
    """Jobs on the CPUs and GPUs of a Ray cluster; see ``conf/hydra/launcher/ray.yaml``."""

    def runner(self, trainers: Sequence[Any]) -> AbstractContextManager[Runner]:
        """The cluster, which is left when the sweep has ended."""
        from efficientllava.launch.on_ray import Ray

        return Ray(self.options["ray"], trainers)

    def check(self) -> None:
        """Refuse what cannot work here."""
        from efficientllava.launch.on_ray import require

        require(self.options["ray"])


class ArmsSweeper(BasicSweeper):
    """Hydra's own sweeper, with ``sweep.arms`` as one more dimension: arms that have no grid in common.

    A grid cannot say "widthwise with and without refit, and layerwise, which knows none". ``sweep.arms`` names what is
    typed for each arm; ``hydra.sweeper.params`` and the command line make the grid. What the user types wins over both.
    """

    def split_arguments(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """Jobs in batches.

        Args:
            overrides: The grid.
            max_batch_size: Jobs of a batch; None: all in one.
        """
        [grid] = BasicSweeper.split_arguments(overrides, None)
        assert self.config is not None
        jobs = jobs_of(grid, self.config.sweep.arms, self.config.hydra.overrides.task)
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))  # pyright: ignore[reportArgumentType]


def _visible_gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
