"""Ray for real, started for the test: a cluster of a sweep's own, and one that others have started."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from efficientllava import launch
from efficientllava.launch.on_ray import Ray
from efficientllava.runtime import state
from efficientllava.runtime.errors import UserError

from ..runs import ROOT, save_tiny
from . import real
from .real import HANG, check_sweep, interrupts, job, running, shell, when

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="no ray here (extra [ray])"),
]
RAY = str(Path(sys.executable).with_name("ray"))
STARTED = "Ray runtime started"
BODIES = ["print('fine')", "print('error: the key: no', file=sys.stderr); sys.exit(1)", "os.kill(os.getpid(), 9)"]


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2)


@pytest.fixture(scope="module")
def head():
    """A cluster of two CPUs that ``address=auto`` finds."""
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)  # where the address is written and looked for
        patch.setenv("PYTHONPATH", str(ROOT))
        log = Path(folder) / "head.log"
        process = None
        try:
            for _ in range(3):  # Ray gives its processes 30 seconds to start, however busy the machine is
                process = started(log)
                if STARTED in log.read_text():
                    break
                end(process)
            assert STARTED in log.read_text(), log.read_text()
            yield folder
        finally:
            if process:
                end(process)


def started(log):
    command = [RAY, "start", "--head", "--block", "--port=0", "--num-cpus=2", "--include-dashboard=false"]
    with log.open("wb") as handle:
        process = subprocess.Popen(command, stdout=handle, stderr=handle, start_new_session=True)
    deadline = time.monotonic() + 120
    while STARTED not in log.read_text() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(1)
    return process


def end(process):
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)


def supervise(jobs, address=None):
    options = {"init": {"address": address, "num_cpus": None if address else 2}, "remote": {"num_cpus": 1}}
    with Ray(options, [{}]) as queue:
        return real.supervise(jobs, queue)


def check_ends(tmp_path, address=None):
    ended = supervise([job(number, tmp_path, body) for number, body in enumerate(BODIES)], address)
    assert [entry.state for entry in ended] == ["done", "failed", "failed"]
    assert ended[1].reason == "the key: no"
    assert "SIGKILL" in ended[2].reason and str(tmp_path / "2" / "job.log") in ended[2].reason
    assert "fine" in (tmp_path / "0" / "job.log").read_text()
    standings = state.standings(tmp_path)
    assert [(entry.state, entry.reason) for entry in standings[1:]] == [("failed", entry.reason) for entry in ended[1:]]


@pytest.mark.parametrize(
    ("raised", "told"),
    [(ConnectionError("Could not find any\n Ray"), "Could not find any Ray"), (SystemExit(15), "nobody answers there")],
)
def test_no_cluster_is_one_line(monkeypatch, tmp_path, raised, told):
    def init(**_):
        raise raised

    monkeypatch.setattr("ray.init", init)
    with pytest.raises(UserError, match=rf"^hydra\.launcher\.ray\.init\.address=auto: {told}$"):
        supervise([job(0, tmp_path, "")], "auto")


def test_every_end_of_a_job_has_its_reason_and_nothing_stays_of_a_cluster_of_its_own(tmp_path, capfd):
    check_ends(tmp_path / "ends")
    jobs = [job(0, tmp_path, HANG)]
    with interrupts(lambda: running(tmp_path / "0")), pytest.raises(KeyboardInterrupt):
        supervise(jobs)
    assert "1 jobs cancelled" in capfd.readouterr().err
    [standing] = state.standings(tmp_path)
    assert (standing.state, standing.reason) == ("failed", "cancelled")
    assert not state.alive(state.read(tmp_path / "0"))


def test_every_end_of_a_job_has_its_reason_on_a_cluster_that_is_there(head, tmp_path):
    check_ends(tmp_path, "auto")


def test_jobs_stay_when_who_waits_for_them_goes_and_the_same_call_finds_them(head, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    jobs = [job(0, tmp_path, "while not (f / 'go').exists(): time.sleep(0.1)")]
    with interrupts(lambda: running(tmp_path / "0")), pytest.raises(KeyboardInterrupt):
        supervise(jobs, "auto")
    told = capfd.readouterr().err
    assert f"-m efficientllava.launch.on_ray {tmp_path}" in told and "--watch" in told
    assert running(tmp_path / "0") and state.alive(state.read(tmp_path / "0"))
    began = state.read(tmp_path / "0")["started"]
    # Not before somebody looks: who finds the job gone starts it anew.
    when(pytest.importorskip("ray").is_initialized, (tmp_path / "0" / "go").touch)
    assert supervise(jobs, "auto")[0].state == "done"
    assert state.read(tmp_path / "0")["started"] == began, "it was started once"


def test_the_line_that_is_told_cancels(head, tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "GRACE", 0.5)
    with interrupts(lambda: running(tmp_path / "0")), pytest.raises(KeyboardInterrupt):
        supervise([job(0, tmp_path, HANG), job(1, tmp_path, HANG), job(2, tmp_path, HANG)], "auto")
    done = shell(sys.executable, "-m", "efficientllava.launch.on_ray", str(tmp_path))
    assert done.returncode == 0 and "3 jobs cancelled" in done.stdout, done.stdout + done.stderr
    assert [(entry.state, entry.reason) for entry in state.standings(tmp_path)] == [("failed", "cancelled")] * 3
    assert not state.alive(state.read(tmp_path / "0"))


@pytest.mark.slow
@pytest.mark.parametrize("address", ["null", "auto"])
def test_a_sweep_on_ray_lies_in_one_folder_and_its_gaps_are_filled(request, model, tmp_path, address):
    if address == "auto":
        request.getfixturevalue("head")
    own = ["hydra.launcher.ray.init.num_cpus=2"] if address == "null" else []
    check_sweep(model, tmp_path, "hydra/launcher=ray", f"hydra.launcher.ray.init.address={address}", *own)
