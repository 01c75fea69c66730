"""Slurm and Ray for real, brought up for the test: `make test-cluster`.

Jobs that only have to run, fail or hang are a line of Python; a sweep and a run over two nodes are the real thing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from efficientllava.launch import cluster, slurm
from efficientllava.launch.spawn import Job
from efficientllava.runtime import state
from efficientllava.runtime.errors import UserError

from ..runs import (
    ROOT,
    RUN,
    save_tiny,
    small,
)
from . import slurmd

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
OPTIONS = {
    "cluster": "slurm",
    "poll_s": 0.5,
    "timeout_min": 5,
    "max_num_timeout": 1,
    "signal_delay_s": 20,
    "nodes": None,
    "tasks_per_node": None,
    "gpus_per_node": None,
    "array_parallelism": 16,
    "name": "test",
}


def no_slurm():
    return "no submitit here (extra [slurm])" if not importlib.util.find_spec("submitit") else slurmd.missing()


@pytest.fixture(scope="module")
def nodes():
    """A Slurm of two nodes, in the environment of this process."""
    if reason := no_slurm():
        pytest.skip(reason)
    with (
        tempfile.TemporaryDirectory(prefix="slurm") as folder,
        slurmd.slurm(Path(folder), cpus=4) as environment,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        yield environment


def job(number, folder, body):
    begin = (
        f"from efficientllava.runtime import state; from pathlib import Path; f = Path({str(folder / str(number))!r})\n"
    )
    command = (sys.executable, "-c", f"import os, sys, time\n{begin}state.begin(f, [])\n{body}\nstate.end(f, None)")
    return Job(number, f"job={number}", command, folder / str(number))


def supervise(jobs, tmp_path, show=lambda _: None, **options):
    queue = slurm.Slurm({**OPTIONS, "submitit_folder": str(tmp_path / "submitit" / "%j"), **options}, [{}])
    return cluster.supervise(jobs, queue, show, (), 0.5)


def running(folder):
    return state.read(folder).get("state") == state.RUNNING


def when(condition, action, seconds=120):
    def watch():
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.1)
        action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def shell(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


def key_of(folder):
    return state.read(folder, state.CLUSTER)["slurm"]


def test_every_end_of_a_job_has_its_reason(nodes, tmp_path, capfd):
    hang = "time.sleep(300)"
    bodies = ["print('fine')", "print('error: the key: no', file=sys.stderr); sys.exit(1)", "os.kill(os.getpid(), 9)"]
    jobs = [job(number, tmp_path, body) for number, body in enumerate([*bodies, hang])]
    when(lambda: running(tmp_path / "3"), lambda: shell("scancel", key_of(tmp_path / "3")))
    ended = supervise(jobs, tmp_path)
    assert [entry.failed for entry in ended] == [False, True, True, True]
    assert ended[1].reason() == "the key: no"
    assert "SIGKILL" in ended[2].reason() and str(tmp_path / "2" / "job.log") in ended[2].reason()
    assert ended[3].reason() == "cancelled"
    assert "fine" in (tmp_path / "0" / "job.log").read_text()
    standings = state.standings(tmp_path)
    assert [entry.state for entry in standings] == ["done", "failed", "failed", "failed"]
    assert [entry.reason for entry in standings[1:]] == [entry.reason() for entry in ended[1:]]
    # There is no accounting here, and nobody complains about it.
    assert not shutil.which("sacct") or "sacct" not in capfd.readouterr().err


ONCE = """
import pathlib
mark = pathlib.Path(f / "attempts")
mark.write_text(mark.read_text() + "x" if mark.exists() else "x")
time.sleep(300 if len(mark.read_text()) <= {} else 0)
"""


def test_a_job_whose_time_is_over_is_requeued_as_often_as_it_may(nodes, tmp_path):
    """The signal is what Slurm sends before the time limit."""
    jobs = [job(0, tmp_path, ONCE.format(1)), job(1, tmp_path, ONCE.format(9))]
    told = {"0": 1, "1": 2}
    threads = []
    for name, times in told.items():
        for attempt in range(1, times + 1):
            begun = lambda name=name, attempt=attempt: (  # noqa: E731
                running(tmp_path / name) and len((tmp_path / name / "attempts").read_text()) == attempt
                if (tmp_path / name / "attempts").exists()
                else False
            )
            threads.append(when(begun, lambda name=name: _time_is_over(tmp_path / name), 400))
    again = when(lambda: state.read(tmp_path / "0").get("reason") == "requeued", lambda: _at_once(tmp_path / "0"), 400)
    also = when(lambda: state.read(tmp_path / "1").get("reason") == "requeued", lambda: _at_once(tmp_path / "1"), 400)
    ended = supervise(jobs, tmp_path)
    for thread in (*threads, again, also):
        thread.join(5)
    assert [entry.failed for entry in ended] == [False, True]
    assert [len((tmp_path / name / "attempts").read_text()) for name in told] == [2, 2]
    assert "timed out" in ended[1].reason() and "timeout_min" in ended[1].reason()


def _time_is_over(folder):
    time.sleep(1)  # past the imports
    shell("scancel", "--signal=USR2", key_of(folder))


def _at_once(folder):
    """Slurm waits some minutes before it starts a requeued job again."""
    for _ in range(60):
        if shell("scontrol", "update", f"JobId={key_of(folder)}", "StartTime=now").returncode == 0:
            return
        time.sleep(1)


def test_jobs_stay_when_who_waits_for_them_goes_and_the_same_call_finds_them(nodes, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cluster, "GRACE", 0.5)
    jobs = [job(0, tmp_path, "while not (f / 'go').exists(): time.sleep(0.1)")]
    with interrupts(lambda: running(tmp_path / "0")), pytest.raises(KeyboardInterrupt):
        supervise(jobs, tmp_path)
    key = key_of(tmp_path / "0")
    told = capfd.readouterr().err
    assert f"scancel {key}" in told and f"python -m efficientllava.report {tmp_path}" in told and "--watch" in told
    assert slurm.look([key])[key][0] and running(tmp_path / "0")
    when(lambda: True, (tmp_path / "0" / "go").touch)
    assert not supervise(jobs, tmp_path)[0].failed
    assert key_of(tmp_path / "0") == key, "it was submitted once"


def test_the_second_interrupt_cancels(nodes, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cluster, "GRACE", 30)
    jobs = [job(0, tmp_path, "time.sleep(300)")]
    with interrupts(lambda: running(tmp_path / "0"), times=2), pytest.raises(KeyboardInterrupt):
        supervise(jobs, tmp_path)
    assert "1 jobs cancelled" in capfd.readouterr().err
    deadline = time.monotonic() + 30
    while slurm.look([key_of(tmp_path / "0")])[key_of(tmp_path / "0")][0] and time.monotonic() < deadline:
        time.sleep(0.3)
    assert slurm.look([key_of(tmp_path / "0")])[key_of(tmp_path / "0")] == (False, "cancelled")
    [standing] = state.standings(tmp_path)
    assert (standing.state, standing.reason) == ("failed", "cancelled")


class interrupts:
    """Ctrl-C when a condition holds."""

    def __init__(self, condition, times=1):
        self.condition, self.times = condition, times

    def __enter__(self):
        self.previous = signal.signal(signal.SIGINT, signal.default_int_handler)

        def press():
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)

        when(self.condition, press)

    def __exit__(self, *_):
        time.sleep(0.1)
        signal.signal(signal.SIGINT, self.previous)


def test_what_slurm_refuses_is_one_line(nodes, tmp_path):
    with pytest.raises(UserError, match=r"^hydra/launcher=slurm: sbatch refuses the jobs: .*partition"):
        supervise([job(0, tmp_path, "")], tmp_path, partition="nowhere")


TINY = ("recover=none", "evaluate=none", "evaluate.efficiency=false", "prune.selection=local", "reuse=true")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2)


def sweep(*typed, place):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [*RUN, "-m", *typed]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place, check=False)


def check_sweep(model, place, *launcher):
    """Four jobs, one of which cannot work and one of which is killed; and the same command once more."""
    line = small(model, place / "out", *TINY, "prune.ratio=0.2,0.3,0.4,1.5", *launcher)
    victim = lambda: next((place / "out" / "sweeps").glob("*/2"), place / "none")  # noqa: E731
    killer = when(lambda: running(victim()), lambda: os.kill(state.read(victim())["pid"], signal.SIGKILL), 400)
    first = sweep(*line, place=place)
    killer.join(5)
    [folder] = (place / "out" / "sweeps").iterdir()
    assert first.returncode == 1, first.stdout + first.stderr
    assert "error: 2 jobs of the sweep failed: [2, 3]" in first.stderr and "sacct" not in first.stderr, first.stderr
    assert [(folder / name / "results.json").exists() for name in "0123"] == [True, True, False, False]
    table, page = (folder / "results.md").read_text(), (folder / "report.html").read_text()
    for told in ("SIGKILL", "prune.ratio=1.5: must be in [0, 1)", str(folder / "2" / "job.log")):
        assert told in table and told in page, table
    again = sweep(*line, place=place)
    assert "job 0 was finished" in again.stdout and "job 1 was finished" in again.stdout, again.stdout
    assert (folder / "2" / "results.json").exists() and "[3]" in again.stderr, again.stderr
    assert [place.name for place in (place / "out" / "sweeps").iterdir()] == [folder.name]
    return folder


@pytest.mark.slow
def test_a_sweep_on_slurm_lies_in_one_folder_and_its_gaps_are_filled(nodes, model, tmp_path):
    folder = check_sweep(model, tmp_path, "hydra/launcher=slurm", "hydra.launcher.poll_s=1")
    done = sweep(
        *small(model, tmp_path / "out", *TINY, "prune.ratio=0.2,0.3", f"sweep.name={folder.name}"),
        "hydra/launcher=slurm",
        place=tmp_path,
    )
    assert done.returncode == 0 and done.stdout.count("was finished") == 2, done.stdout + done.stderr


@pytest.mark.slow
def test_a_sweep_on_ray_lies_in_one_folder_and_its_gaps_are_filled(model, tmp_path):
    if not importlib.util.find_spec("ray"):
        pytest.skip("no ray here (extra [ray])")
    check_sweep(model, tmp_path, "hydra/launcher=ray", "hydra.launcher.ray.init.num_cpus=2")


@pytest.mark.slow
def test_two_nodes_make_the_plan_of_one_process(nodes, model, tmp_path):
    """DDP over Gloo: srun starts one process per node; and one node with two devices, inside a job."""
    line = small(
        model,
        tmp_path / "out",
        "prune.ratio=0.3",
        "recover=none",
        "evaluate=none",
        "reuse=false",
        "evaluate.efficiency=false",
        "calibration.batch_size=2",
    )
    line = [typed for typed in line if typed != "trainer=cpu"] + ["trainer.accelerator=cpu"]
    ddp = ["trainer.strategy=ddp", "hydra/launcher=slurm", "hydra.launcher.poll_s=1"]
    plans = []
    for name, more in {
        "one": ["hydra/launcher=basic"],
        "nodes": [*ddp, "trainer.num_nodes=2"],
        "devices": [*ddp, "trainer.devices=2"],
    }.items():
        done = sweep(*line, *more, f"sweep.name={name}", place=tmp_path)
        log = tmp_path / "out" / "sweeps" / name / "0" / "job.log"
        assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")
        assert "srun" not in (log.read_text().lower() if log.exists() else "")
        plans.append(json.loads((tmp_path / "out" / "sweeps" / name / "0" / "plan.json").read_text()))
    assert plans[0] == plans[1] == plans[2]
    assert (tmp_path / "out" / "sweeps" / "nodes" / "0" / "job.1.log").exists()
