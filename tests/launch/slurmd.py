"""A Slurm of two nodes on this machine, with its own key, ports and folders; it ends with the block."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus} State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why there can be no Slurm here; None: there can."""
    found = [name for name in PROGRAMS if not (shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin"))]
    if found:
        return f"no {found[0]} here (Debian: slurmctld, slurmd, slurm-client, munge)"
    return None if os.geteuid() == 0 else "slurmd runs as root only"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def slurm(folder: Path, cpus: int = 2) -> Iterator[dict[str, str]]:
    """Bring up a cluster.

    Args:
        folder: Where everything of it lies; its path is short, since it holds a socket.
        cpus: CPUs that each node claims to have.

    Yields:
        What to add to the environment of whoever uses it.
    """
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "MASTER_ADDR": "127.0.0.1"}
    for name in ("state", "n1", "n2"):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(1024))
    told = {"folder": folder, "ports": _free_ports(3), "host": socket.gethostname(), "user": "root", "cpus": cpus}
    (folder / "slurm.conf").write_text(CONF.format(**told))
    files = {"key-file": key, "socket": folder / "munge.sock", "pid-file": folder / "munged.pid"}
    files |= {"log-file": folder / "munged.log", "seed-file": folder / "munge.seed"}
    conf = str(folder / "slurm.conf")
    daemons = [["munged", "--foreground", "--force", *(f"--{name}={file}" for name, file in files.items())]]
    daemons += [["slurmctld", "-D", "-f", conf], *(["slurmd", "-D", "-f", conf, "-N", node] for node in ("n1", "n2"))]
    started = []
    try:
        for command in daemons:
            where = {"env": {**os.environ, **environment}, "start_new_session": True}
            program = shutil.which(command[0], path=path)
            quiet = subprocess.DEVNULL
            started.append(subprocess.Popen([str(program), *command[1:]], stdout=quiet, stderr=quiet, **where))
            deadline = time.monotonic() + 20
            while command[0] == "munged" and not (folder / "munge.sock").exists() and time.monotonic() < deadline:
                time.sleep(0.05)
        _until_idle(environment, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], env={**os.environ, **environment}, check=False)
        for process in reversed(started):
            process.terminate()
        for process in started:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _until_idle(environment: dict[str, str], folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    command = ["sinfo", "--noheader", "--Node", "--format=%t"]
    while time.monotonic() < deadline:
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
        if done.stdout.split() == ["idle", "idle"]:
            return
        time.sleep(0.3)
    logs = "\n".join(log.read_text("utf-8", "replace")[-2000:] for log in sorted(folder.glob("*.log")))
    raise RuntimeError(f"Slurm did not come up: {logs}")
