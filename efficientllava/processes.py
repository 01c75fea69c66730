"""Several processes: started with torchrun, one folder, sums over ranks, one voice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import UserError


def wanted(trainer: dict[str, Any]) -> int:
    """Number of processes that a trainer node asks for on this machine.

    Args:
        trainer: The trainer node; ``devices`` may be a number, a list, ``auto`` or -1.
    """
    devices = trainer.get("devices", 1)
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if str(devices) in ("auto", "-1"):
        parallel = str(trainer.get("strategy", "auto")) != "auto"
        on_gpu = trainer.get("accelerator") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        return torch.cuda.device_count() if parallel and on_gpu else 1
    return int(devices)


def launched() -> bool:
    """Whether this process was started by torchrun or a cluster that sets the same variables."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def relaunch(processes: int, overrides: Sequence[str], output_dir: str) -> int:
    """Start the same run in several processes and wait for them.

    Args:
        processes: Number of processes on this machine.
        overrides: The run's overrides as typed.
        output_dir: The run's folder, shared by all.

    Returns:
        Exit code of the run.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    # A sweep's job must not start the sweep again.
    fixed = ["hydra.mode=RUN", f"hydra.run.dir={output_dir}"]
    threads = max(1, torch.get_num_threads() // processes)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    return subprocess.run([*command, sys.argv[0], *overrides, *fixed], check=False, env=environment).returncode


def connect(accelerator: str) -> None:
    """Join the process group where this process was launched as one of several.

    Args:
        accelerator: The trainer's accelerator; decides between NCCL and Gloo.
    """
    if launched() and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if on_gpu else "gloo")


def rank() -> int:
    """Index of this process, 0 for a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def from_first(value: Any) -> Any:
    """Return the first process's value on all of them."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over(tensor: Tensor) -> Tensor:
    """Sum a tensor over all processes; the same bits everywhere."""
    if not dist.is_initialized():
        return tensor
    device = f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"
    total = tensor.detach().to(device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def fail_together(error: BaseException | None) -> None:
    """Raise on every process when one has failed, so that none waits for ever.

    Args:
        error: This process's failure.

    Raises:
        UserError: Another process failed; its own message is printed there.
    """
    if not dist.is_initialized():
        return
    failed: list[bool] = [False] * world_size()
    dist.all_gather_object(failed, error is not None)
    if error is None and any(failed):
        raise UserError(f"process {failed.index(True)} failed; see its message")


def finish() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
