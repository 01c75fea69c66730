"""Several processes: one folder, sums over ranks, one voice.

torch is imported by those who need it: the process of a sweep, which computes nothing, starts without.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def wanted(trainer: Mapping[str, Any], planned: bool = False) -> int:
    """Number of processes that a trainer node asks for on this machine.

    Args:
        trainer: The trainer node; ``devices`` may be a number, ``auto`` or -1.
        planned: See `on_gpu`.
    """
    devices = trainer.get("devices", 1)
    if str(devices) in ("auto", "-1"):
        import torch

        parallel = str(trainer.get("strategy", "auto")) != "auto"
        return torch.cuda.device_count() if parallel and on_gpu(trainer, planned) else 1
    return int(devices)


def on_gpu(trainer: Mapping[str, Any], planned: bool = False) -> bool:
    """Whether a trainer node computes on GPUs of this machine.

    Args:
        trainer: The trainer node; ``accelerator`` may be missing.
        planned: The run is for another machine, which has what the node insists on.

    Raises:
        UserError: It insists on GPUs, or shards over them, and there is none.
    """
    import torch

    accelerator, found = str(trainer.get("accelerator", "auto")), torch.cuda.is_available()
    if planned and accelerator in ("gpu", "cuda"):
        return True
    if sharded(trainer) and not (found and accelerator != "cpu"):
        raise UserError("trainer=fsdp: shards the model over GPUs and has none here; choose trainer=ddp or trainer=cpu")
    if accelerator in ("gpu", "cuda") and not found:
        raise UserError(f"trainer.accelerator={accelerator}: torch finds no GPU here; choose trainer=cpu")
    return found and accelerator in ("auto", "gpu", "cuda")


def sharded(trainer: Mapping[str, Any]) -> bool:
    """Whether a trainer node shares out one model over its processes."""
    return "Sharding" in str(trainer.get("strategy")) or "fsdp" in str(trainer.get("strategy")).lower()


def program(hydra: Any) -> list[str]:
    """The command that starts this program again.

    Args:
        hydra: Hydra's own node, which says where configuration lies that is not the program's; None: nowhere.
    """
    script = Path(sys.argv[0])
    installed = script.suffix != ".py" or script.name == "__main__.py"  # `efficientllava`, `python -m efficientllava`
    command = [sys.executable, *(["-m", "efficientllava"] if installed else [sys.argv[0]])]
    for source in hydra.runtime.config_sources if hydra else ():
        if source.provider == "command-line":
            command += ["--config-dir", source.path]
    if hydra and hydra.job.config_name not in (None, "config"):
        command += ["--config-name", hydra.job.config_name]
    return command


def launched() -> bool:
    """Whether this process was started by torchrun or a cluster that sets the same variables."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def adopt_srun() -> None:
    """Take the place that ``srun`` has given this process, as torchrun would say it, and let nobody else look for one.

    Lightning would believe every process of an allocation to be a task of its own, and refuse or recommend options of
    srun. ``MASTER_ADDR`` and ``MASTER_PORT`` may be set where the names of nodes lead nowhere.
    """
    told = os.environ
    tasks, interactive = int(told.get("SLURM_STEP_NUM_TASKS", 1)), told.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if tasks > 1 and not (launched() or interactive):
        from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

        nodes = int(told["SLURM_STEP_NUM_NODES"])
        step = int(told["SLURM_JOB_ID"]) * 16 + int(told["SLURM_STEP_ID"])
        place = {"WORLD_SIZE": tasks, "RANK": told["SLURM_PROCID"], "LOCAL_RANK": told["SLURM_LOCALID"]}
        place |= {"GROUP_RANK": told["SLURM_NODEID"], "LOCAL_WORLD_SIZE": tasks // nodes}
        told.update({key: str(value) for key, value in place.items()})
        first = SLURMEnvironment.resolve_root_node_address(told["SLURM_STEP_NODELIST"])
        told.setdefault("MASTER_ADDR", first)
        told.setdefault("MASTER_PORT", str(20000 + step % 12000))  # steps of one node do not meet
    for name in ("SLURM_NTASKS", "SLURM_NPROCS"):
        told.pop(name, None)


def nodes(trainer: Mapping[str, Any]) -> int:
    """Number of machines that this run's processes were started on.

    Args:
        trainer: The trainer node, which is believed where whoever launched them does not say it.
    """
    if not launched():
        return 1
    local = os.environ.get("LOCAL_WORLD_SIZE")
    return int(os.environ["WORLD_SIZE"]) // int(local) if local else int(trainer.get("num_nodes", 1))


def require_nodes(trainer: Mapping[str, Any]) -> None:
    """Refuse a run that was not started on as many machines as its trainer asks for.

    Args:
        trainer: The trainer node; ``num_nodes`` may be missing.

    Raises:
        UserError: Says how to start it.
    """
    asked, found = int(trainer.get("num_nodes", 1)), nodes(trainer)
    if asked not in (1, found):
        raise UserError(
            f"trainer.num_nodes={asked}: this run was started on {found}; start it with -m hydra/launcher=slurm, with "
            "srun --nodes --ntasks-per-node, or with torchrun"
        )


def environment() -> list[Any]:
    """Plugins of a Trainer that runs in this process alone, or in one that was launched.

    Lightning would look for a cluster, and recommend ``srun`` wherever it is installed.
    """
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    return [TorchElasticEnvironment() if launched() else LightningEnvironment()]


def connect(trainer: Mapping[str, Any]) -> None:
    """Join the process group where this process was launched as one of several.

    Args:
        trainer: The trainer node; decides between NCCL and Gloo.
    """
    if launched() and int(os.environ["WORLD_SIZE"]) > 1 and not _group():
        import torch
        import torch.distributed as dist

        if on_gpu(trainer):
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if on_gpu(trainer) else "gloo")


def _group() -> Any:
    """``torch.distributed`` where this process is in a group, else None; torch is not imported to find out."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_initialized() else None


def rank() -> int:
    """Index of this process, 0 for a single one."""
    dist = _group()
    return dist.get_rank() if dist else 0


def world_size() -> int:
    """Number of processes."""
    dist = _group()
    return dist.get_world_size() if dist else 1


def barrier() -> None:
    """Wait for all processes."""
    if dist := _group():
        dist.barrier()


def from_first(value: Any) -> Any:
    """Return the first process's value on all of them."""
    box = [value]
    if dist := _group():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(compute: Callable[[], Any]) -> Any:
    """Compute a value on the first process and return it on all of them."""
    return from_first(compute() if rank() == 0 else None)


def gather(value: Any) -> list[Any]:
    """Return the values of all processes, in their order, on all of them."""
    values = [value] * world_size()
    if dist := _group():
        dist.all_gather_object(values, value)
    return values


def sum_over(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes; the same bits everywhere."""
    dist = _group()
    if not dist:
        return tensor
    import torch

    device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
    total = tensor.detach().to(device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def finish() -> None:
    """Leave the process group."""
    if dist := _group():
        dist.destroy_process_group()


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads in the block, None: as before; the jobs of a sweep may share this process."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def release_memory() -> None:
    """Give the system what was freed: allocators keep it for this process, and another one that needs it goes without.

    After four layers of a 7B model in bf16 were pruned, C's own allocator held 1.2 GB that were free.
    """
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of the GNU C library
        trim(0)


# Settings of the GNU C library's allocator, by the name that its environment has for them. By itself it keeps blocks
# below 32 MB for this process once they are freed, and weights of 13 MB that were rounded one by one were there twice.
# From 8 MB on every block goes back alone; 128 MB of what is below stay, so that layers need not ask for it anew.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": 8 << 20, "MALLOC_TRIM_THRESHOLD_": 128 << 20}
_MALLOPT = {"MALLOC_MMAP_THRESHOLD_": -3, "MALLOC_TRIM_THRESHOLD_": -1}


def return_large_blocks() -> None:
    """Have large blocks, such as weights, go back to the system as soon as they are freed, as in `ALLOCATOR`."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for name, value in ALLOCATOR.items():
            mallopt(_MALLOPT[name], value)
