"""``hydra/launcher=gpu_pool | slurm | ray``: every job of a sweep is a process of its own, here or on a cluster.

Hydra finds launchers in this package only, and imports it whenever it starts: what takes long is imported when used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from efficientllava.launch.local import POLL, Pool, cores, cpu_slots, gpu_slots
from efficientllava.launch.supervisor import Runner
from efficientllava.launch.sweep import ProcessLauncher
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import GpuPoolConfig

# Hydra runs this file before it is a module, so that no dataclass can be made here.
ConfigStore.instance().store(group="hydra/launcher", name="gpu_pool", node=GpuPoolConfig, provider="gpu_pool")


class GpuPoolLauncher(ProcessLauncher):
    """As many jobs at once as this machine has slots.

    Args:
        gpus_per_job: See `efficientllava.settings.schema.GpuPoolConfig`.
        slots: See `efficientllava.settings.schema.GpuPoolConfig`.
        timeout_min: See `efficientllava.settings.schema.GpuPoolConfig`.
    """

    def __init__(self, gpus_per_job: int | None, slots: int | None, timeout_min: float | None) -> None:
        super().__init__()
        self.poll = POLL
        self._gpus_per_job, self._slots, self._timeout_min = gpus_per_job, slots, timeout_min

    def check(self) -> None:
        """Refuse what is out of range."""
        for name, value in (("gpus_per_job", self._gpus_per_job), ("slots", self._slots)):
            if value is not None and value < 1:
                raise UserError(f"hydra.launcher.{name}={value}: must be 1 or more, or null")
        if self._timeout_min is not None and self._timeout_min <= 0:
            raise UserError(f"hydra.launcher.timeout_min={self._timeout_min:g}: must be above 0, or null")

    def runner(self, trainers: Sequence[Any]) -> AbstractContextManager[Runner]:
        """Leased GPUs or cores."""
        slots = self._environments(trainers) if trainers else []  # looks for GPUs, and imports torch for it
        return nullcontext(Pool(slots, self._timeout_min and 60 * self._timeout_min))

    def _environments(self, trainers: Sequence[Any]) -> list[dict[str, str]]:
        """The slots that the trainers of the jobs call for."""
        from efficientllava.runtime.processes import on_gpu, wanted

        if not any(on_gpu(trainer) for trainer in trainers):
            return cpu_slots(min(self._slots or cores(), len(trainers)))
        return gpu_slots(_visible_gpus(), self._gpus_per_job or max(wanted(trainer) for trainer in trainers))


class SlurmLauncher(ProcessLauncher):
    """Jobs of a Slurm cluster, submitted as one array.

    Args:
        **options: See ``conf/hydra/launcher/slurm.yaml``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = {key: _plain(value) for key, value in options.items()}
        self.poll = self._options["poll_s"]

    def runner(self, trainers: Sequence[Any]) -> AbstractContextManager[Runner]:
        """The queue."""
        from efficientllava.launch.slurm import Slurm

        return nullcontext(Slurm(self._options, trainers))

    def check(self) -> None:
        """Refuse what is out of range, or cannot work here."""
        from efficientllava.launch.slurm import require

        require(self._options)


class RayLauncher(ProcessLauncher):
    """Jobs on the CPUs and GPUs of a Ray cluster.

    Args:
        ray: See ``conf/hydra/launcher/ray.yaml``.
        poll_s: Seconds between two looks at the jobs.
    """

    def __init__(self, ray: DictConfig, poll_s: float) -> None:
        super().__init__()
        self._options, self.poll = _plain(ray), poll_s

    def runner(self, trainers: Sequence[Any]) -> AbstractContextManager[Runner]:
        """The cluster, which is left when the sweep has ended."""
        from efficientllava.launch.on_ray import Ray

        return Ray(self._options, trainers)

    def check(self) -> None:
        """Refuse what cannot work here."""
        from efficientllava.launch.on_ray import require

        require(self._options)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _visible_gpus() -> list[str]:
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
