"""The processes of one run on this machine, one per device, set up as torchrun does."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from ..runtime.exit_codes import TRACEBACKS

GRACE = 10.0  # seconds between the failure of one process and the end of the others, politely and then for certain


def relaunch(processes: int, overrides: Sequence[str], output_dir: str) -> int:
    """Start the same run in several processes, set up as torchrun does, and wait for them.

    The first process speaks; of the others only errors that it has not told are repeated.

    Args:
        processes: Number of processes on this machine.
        overrides: The run's overrides as typed.
        output_dir: The run's folder, shared by all.

    Returns:
        Exit code of the run.
    """
    import torch

    # A sweep's job must not start the sweep again, and what was typed is checked.
    command = [sys.executable, sys.argv[0], *overrides, "hydra.mode=RUN", f"hydra.run.dir={output_dir}"]
    command += ["hydra.job.num=0"]
    own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // processes))}
    # Set for Hydra by our own wrapper; each process has that wrapper too.
    own["HYDRA_FULL_ERROR"] = os.environ.get(TRACEBACKS, "0")
    world = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    started: list[subprocess.Popen[str]] = []
    told: list[list[str]] = [[] for _ in range(processes)]
    listeners: list[threading.Thread] = []
    try:
        for index in range(processes):
            environment = {**os.environ, **own, **world, "RANK": str(index), "LOCAL_RANK": str(index)}
            quiet = subprocess.DEVNULL if index else None
            process = subprocess.Popen(command, env=environment, stdout=quiet, stderr=subprocess.PIPE, text=True)
            started.append(process)
            listeners.append(threading.Thread(target=_listen, args=(process, told[index], index == 0), daemon=True))
            listeners[-1].start()
        _wait(started)
    finally:
        for process in started:
            process.terminate()
        codes = [_ended(process) for process in started]
        for listener in listeners:
            listener.join()
    for index, lines in enumerate(told[1:], 1):
        for line in dict.fromkeys(line for line in lines if line not in told[0]):
            print(line.replace("error: ", f"error: process {index}: ", 1), file=sys.stderr)
    return next((code for code in codes if code > 0), int(any(codes)))


def _ended(process: subprocess.Popen[str]) -> int:
    """Exit code of a process that was asked to end; one that waits for another in native code cannot hear it."""
    try:
        return process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _listen(process: subprocess.Popen[str], errors: list[str], forward: bool) -> None:
    """Collect the error lines of a process, and pass everything on for the one that speaks."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("error: "):
            errors.append(line.rstrip())
        if forward:
            sys.stderr.write(line)
            sys.stderr.flush()


def _wait(started: Sequence[subprocess.Popen[str]]) -> None:
    """Wait until all have ended, or until one has failed and the others have had time to say why."""
    deadline = math.inf
    while None in (codes := [process.poll() for process in started]) and time.monotonic() < deadline:
        if deadline == math.inf and any(codes):
            deadline = time.monotonic() + GRACE
        time.sleep(0.05)
