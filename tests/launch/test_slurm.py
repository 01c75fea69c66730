"""Slurm for real, brought up for the test: `make test-cluster`.

Jobs that only have to run, fail or hang are a line of Python; sweeps, training and runs over two nodes are real ones.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from efficientllava import launch
from efficientllava.launch import slurm
from efficientllava.runtime import state
from efficientllava.runtime.errors import UserError

from ..runs import ROOT, save_tiny, small
from . import real, slurmd
from .real import HANG, TINY, check_sweep, interrupts, job, running, shell, sweep, when

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
SLURM = ("hydra/launcher=slurm", "hydra.launcher.poll_s=1")


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


def supervise(jobs, tmp_path, **options):
    given = {**OPTIONS, "submitit_folder": str(tmp_path / "submitit" / "%j"), **options}
    return real.supervise(jobs, slurm.Slurm(given, [{}]))


def key_of(folder):
    return state.read(folder, state.CLUSTER)["slurm"]


def test_every_end_of_a_job_has_its_reason(nodes, tmp_path, capfd):
    bodies = ["print('fine')", "print('error: the key: no', file=sys.stderr); sys.exit(1)", "os.kill(os.getpid(), 9)"]
    jobs = [job(number, tmp_path, body) for number, body in enumerate([*bodies, HANG])]
    when(lambda: running(tmp_path / "3"), lambda: shell("scancel", key_of(tmp_path / "3")))
    ended = supervise(jobs, tmp_path)
    assert [entry.state for entry in ended] == ["done", "failed", "failed", "failed"]
    assert ended[1].reason == "the key: no"
    assert "SIGKILL" in ended[2].reason and str(tmp_path / "2" / "job.log") in ended[2].reason
    assert ended[3].reason == "cancelled"
    assert "fine" in (tmp_path / "0" / "job.log").read_text()
    standings = state.standings(tmp_path)
    assert [entry.state for entry in standings] == ["done", "failed", "failed", "failed"]
    assert [entry.reason for entry in standings[1:]] == [entry.reason for entry in ended[1:]]
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
            threads.append(when(begun, lambda name=name: _time_is_over(tmp_path / name)))
    again = when(lambda: requeued(tmp_path / "0"), lambda: _at_once(tmp_path / "0"))
    also = when(lambda: requeued(tmp_path / "1"), lambda: _at_once(tmp_path / "1"))
    ended = supervise(jobs, tmp_path)
    for thread in (*threads, again, also):
        thread.join(5)
    assert [entry.state for entry in ended] == ["done", "failed"]
    assert [len((tmp_path / name / "attempts").read_text()) for name in told] == [2, 2]
    assert "timed out" in ended[1].reason and "timeout_min" in ended[1].reason


def _time_is_over(folder):
    time.sleep(1)  # past the imports
    shell("scancel", "--signal=USR2", key_of(folder))


def requeued(folder):
    """Whether a job waits that has been at work."""
    facts = state.read(folder)
    return facts.get("state") == state.WAITING and "pid" in facts


def _at_once(folder):
    """Slurm waits some minutes before it starts a requeued job again.

    A few seconds it must wait: of the second in which it ended a job, it has revoked the credentials.
    """
    for _ in range(60):
        if shell("scontrol", "update", f"JobId={key_of(folder)}", "StartTime=now+5seconds").returncode == 0:
            return
        time.sleep(1)


def test_jobs_stay_when_who_waits_for_them_goes_and_the_same_call_finds_them(nodes, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    jobs = [job(0, tmp_path, "while not (f / 'go').exists(): time.sleep(0.1)")]
    with interrupts(lambda: running(tmp_path / "0")), pytest.raises(KeyboardInterrupt):
        supervise(jobs, tmp_path)
    key = key_of(tmp_path / "0")
    told = capfd.readouterr().err
    assert f"scancel {key}" in told and f"python -m efficientllava.report {tmp_path}" in told and "--watch" in told
    assert slurm.look([key])[key][0] and running(tmp_path / "0")
    when(lambda: True, (tmp_path / "0" / "go").touch)
    assert supervise(jobs, tmp_path)[0].state == "done"
    assert key_of(tmp_path / "0") == key, "it was submitted once"


def test_the_second_interrupt_cancels(nodes, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(launch, "GRACE", 30)
    jobs = [job(0, tmp_path, HANG)]
    with interrupts(lambda: running(tmp_path / "0"), times=2), pytest.raises(KeyboardInterrupt):
        supervise(jobs, tmp_path)
    assert "1 jobs cancelled" in capfd.readouterr().err
    deadline = time.monotonic() + 30
    while slurm.look([key_of(tmp_path / "0")])[key_of(tmp_path / "0")][0] and time.monotonic() < deadline:
        time.sleep(0.3)
    assert slurm.look([key_of(tmp_path / "0")])[key_of(tmp_path / "0")] == (False, "cancelled")
    [standing] = state.standings(tmp_path)
    assert (standing.state, standing.reason) == ("failed", "cancelled")


def test_what_slurm_refuses_is_one_line(nodes, tmp_path):
    with pytest.raises(UserError, match=r"^hydra/launcher=slurm: sbatch refuses the jobs: .*partition"):
        supervise([job(0, tmp_path, "")], tmp_path, partition="nowhere")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2)


@pytest.mark.slow
def test_a_sweep_on_slurm_lies_in_one_folder_and_its_gaps_are_filled(nodes, model, tmp_path):
    check_sweep(model, tmp_path, "hydra/launcher=slurm", "hydra.launcher.poll_s=1")


@pytest.mark.slow
def test_two_nodes_share_what_is_computed(nodes, model, tmp_path):
    """Jobs that want the same pruned model at the same time: one makes it, the other waits and takes it."""
    line = small(model, tmp_path / "out", *TINY, "prune.ratio=0.3", "optimized_metric=null,ratio.achieved")
    done = sweep(*line, *SLURM, "hydra.launcher.cpus_per_task=3", "sweep.name=shared", place=tmp_path)
    folder = tmp_path / "out" / "sweeps" / "shared"
    assert done.returncode == 0, done.stdout + done.stderr
    told = [shell("scontrol", "show", "job", key_of(folder / name)).stdout for name in "01"]
    assert sorted(re.findall(r" NodeList=(\w+)", "".join(told))) == ["n1", "n2"]
    begun = [state.read(folder / name)["started"] for name in "01"]
    ends = [begin + state.read(folder / name)["seconds"] for begin, name in zip(begun, "01", strict=True)]
    assert max(begun) < min(ends), "they were at work at the same time"
    results = [json.loads((folder / name / "results.json").read_text()) for name in "01"]
    assert sorted(result["reused"] for result in results) == [[], ["prune"]]
    assert len(list((tmp_path / "out" / "cache" / "prune").glob("[!.]*/stage.json"))) == 1


@pytest.mark.slow
def test_training_whose_time_is_over_ends_with_the_numbers_of_one_that_had_enough(nodes, model, tmp_path):
    """Stopped in the middle by the signal that Slurm sends, requeued, and taken up from its last checkpoint."""
    more = (
        "recover.steps=150",
        "recover.save_every=2",
        "prune.ratio=0.3",
        "evaluate=none",
        "evaluate.efficiency=false",
    )
    whole = sweep(*small(model, tmp_path / "whole", *more), "sweep.name=x", "hydra/launcher=basic", place=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    out, folder = tmp_path / "out", tmp_path / "out" / "sweeps" / "x" / "0"
    when(lambda: any(out.glob("cache/recover/*.work/last.ckpt")), lambda: _time_is_over(folder))
    again = when(lambda: requeued(folder), lambda: _at_once(folder))
    done = sweep(*small(model, out, *more), *SLURM, "sweep.name=x", place=tmp_path)
    again.join(5)
    log = (folder / "job.log").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    assert log.count("\n$ ") == 2, "it was started twice"
    places = [tmp_path / "whole" / "sweeps" / "x" / "0", folder]
    left, right = (load_file(place / "recovered" / "model.safetensors") for place in places)
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    stats = [json.loads((place / "results.json").read_text())["reports"]["recover"]["stats"] for place in places]
    assert all(stats[0][name] == stats[1][name] for name in ("steps", "tokens", "final_losses"))


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
    ddp = ["trainer.strategy=ddp", *SLURM]
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
