"""Jobs of a few milliseconds on the slots of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from efficientllava.launch import Job, jobs_table, local, supervise
from efficientllava.launch.local import Pool, cores, cpu_slots, gpu_slots
from efficientllava.runtime import state
from efficientllava.runtime.console import terminable
from efficientllava.runtime.errors import UserError


def job(number, folder, body):
    return Job(number, (f"a={number}",), (sys.executable, "-c", body), folder / str(number))


def run_jobs(jobs, slots, timeout=None, show=lambda _: None, finished=()):
    return supervise(jobs, Pool(slots, timeout), show, finished, 0.05)


def running(standings):
    return [job for job in standings if job.state == state.RUNNING]


def test_every_job_runs_once_in_its_slot_and_results_keep_the_order(tmp_path):
    body = "import os, time; time.sleep({}); open('{}', 'x').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [job(i, tmp_path, body.format(0.3 * (i == 0), tmp_path / f"ran{i}")) for i in range(5)]
    seen = []
    ended = run_jobs(jobs, gpu_slots(["0", "1"], 1), show=seen.append)
    assert [(entry.name, entry.state, entry.reason) for entry in ended] == [(str(i), "done", "") for i in range(5)]
    assert {(tmp_path / f"ran{i}").read_text() for i in range(5)} == {"0", "1"}
    assert max(len(running(standings)) for standings in seen) == 2
    for standings in seen:
        leased = [entry.place for entry in running(standings)]
        assert len(set(leased)) == len(leased) and {*leased} <= {"0", "1"}
    assert seen[-1] == ended


def test_a_crash_stops_only_its_job_and_says_why(tmp_path):
    bodies = ["import sys; sys.exit('error: the key: no')", "import os; os.kill(os.getpid(), 9)", "pass", "1 / 0"]
    ended = run_jobs([job(i, tmp_path, body) for i, body in enumerate(bodies)], cpu_slots(2))
    assert [entry.state for entry in ended] == ["failed", "failed", "done", "failed"]
    assert ended[0].reason == "the key: no"
    assert "SIGKILL" in ended[1].reason and "out of memory" in ended[1].reason
    assert str(tmp_path / "3" / "job.log") in ended[3].reason
    assert "ZeroDivisionError" in (tmp_path / "3" / "job.log").read_text()


def test_a_job_that_hangs_is_ended_with_all_that_it_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "GRACE", 0.3)
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    body = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    body += f"open('{tmp_path}/child', 'w').write(str(p.pid)); time.sleep(600)"
    ended = run_jobs([job(0, tmp_path, body), job(1, tmp_path, "pass")], cpu_slots(1), timeout=2)
    assert [entry.state for entry in ended] == ["failed", "done"]
    assert ended[0].reason == "ended after 0.0 min without result (hydra.launcher.timeout_min)"
    assert is_gone(int((tmp_path / "child").read_text()))


def is_gone(pid):
    for _ in range(100):
        command = ["ps", "-o", "stat=", "-p", str(pid)]
        told = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if not told.strip() or told.startswith("Z"):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_jobs(tmp_path, monkeypatch, number):
    monkeypatch.setattr(local, "GRACE", 0.3)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    pids = []

    def interrupt(standings):
        if not pids and len(running(standings)) == 2:
            pids.extend(state.read(entry.folder)["pid"] for entry in running(standings))
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()

    jobs = [job(i, tmp_path, "import time; time.sleep(600)") for i in range(3)]
    try:
        with pytest.raises(KeyboardInterrupt), terminable():
            run_jobs(jobs, cpu_slots(2), timeout=60, show=interrupt)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(pids) == 2 and all(is_gone(pid) for pid in pids)
    assert not (tmp_path / "2" / "job.log").exists(), "it was never started"
    assert [(entry.state, entry.reason) for entry in state.standings(tmp_path)] == [("failed", "cancelled")] * 3


def test_slots_divide_the_machine():
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in gpu_slots(["0", "2", "5"], 1)] == ["0", "2", "5"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in gpu_slots(["0", "1", "2"], 2)] == ["0,1"]
    with pytest.raises(UserError, match=r"gpus_per_job=4: 3 GPUs are visible"):
        gpu_slots(["0", "1", "2"], 4)
    threads = [int(slot["OMP_NUM_THREADS"]) for slot in cpu_slots(2)]
    assert threads == [max(1, cores() // 2)] * 2


def test_a_finished_job_starts_no_process_and_says_nothing_about_the_others(tmp_path, capsys):
    jobs = [job(i, tmp_path, "import time; time.sleep(0.3)") for i in range(3)]
    seen = []
    with jobs_table() as show:
        told = lambda standings: (seen.append(standings), show(standings))  # noqa: E731
        ended = run_jobs(jobs, cpu_slots(1), show=told, finished={0, 2})
    assert [entry.state for entry in ended] == ["done"] * 3
    assert [entry.seconds is None for entry in ended] == [True, False, True]
    assert state.seconds_left(seen[0]) is None, "what took no time says nothing about what will"
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    out = capsys.readouterr().out
    assert "job 0 was finished  a=0" in out and "job 2 was finished" in out and "job 1 done after 0:0" in out
    assert [entry.seconds for entry in run_jobs(jobs, [], finished={0, 1, 2})] == [None] * 3


def test_the_exit_code_decides_whatever_a_job_has_said_before(tmp_path):
    say = "from efficientllava.runtime import state; from pathlib import Path; "
    said = [
        "state.end(Path({!r}), None); raise SystemExit(3)",
        "state.end(Path({!r}), 'no')",
        "state.end(Path({!r}), 'no'); exit(1)",
    ]
    jobs = [job(i, tmp_path, say + body.format(str(tmp_path / str(i)))) for i, body in enumerate(said)]
    ended = run_jobs(jobs, cpu_slots(3))
    assert [entry.state for entry in ended] == ["failed", "done", "failed"]
    assert "exit code 3" in ended[0].reason and ended[2].reason == "no"
