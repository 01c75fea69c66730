"""The pool of slots, with jobs of a few milliseconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from efficientllava.launch import spawn as pool
from efficientllava.launch.progress import jobs_table
from efficientllava.launch.spawn import (
    Ended,
    Job,
    cores,
    cpu_slots,
    gpu_slots,
    run_jobs,
)
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.exit_codes import terminable


def job(number, folder, body):
    return Job(number, f"job {number}", (sys.executable, "-c", body), folder / str(number))


def test_every_job_runs_once_in_its_slot_and_results_keep_the_order(tmp_path):
    body = "import os, time; time.sleep({}); open('{}', 'x').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    jobs = [job(i, tmp_path, body.format(0.3 * (i == 0), tmp_path / f"ran{i}")) for i in range(5)]
    states = []
    ended = run_jobs(jobs, gpu_slots(["0", "1"], 1), show=states.append)
    assert [entry.job.number for entry in ended] == [0, 1, 2, 3, 4]
    assert not any(entry.failed for entry in ended)
    assert {(tmp_path / f"ran{i}").read_text() for i in range(5)} == {"0", "1"}
    assert max(len(state.running) for state in states) == 2
    for state in states:
        leased = [entry.slot for entry in state.running]
        assert len(set(leased)) == len(leased)
    assert len(states[-1].ended) == 5 and states[-1].seconds_left() == 0


def test_a_crash_stops_only_its_job_and_says_why(tmp_path):
    bodies = ["import sys; sys.exit('error: the key: no')", "import os; os.kill(os.getpid(), 9)", "pass", "1 / 0"]
    ended = run_jobs([job(i, tmp_path, body) for i, body in enumerate(bodies)], cpu_slots(2))
    assert [entry.failed for entry in ended] == [True, True, False, True]
    assert ended[0].reason() == "the key: no"
    assert "SIGKILL" in ended[1].reason() and "out of memory" in ended[1].reason()
    assert str(tmp_path / "3" / "job.log") in ended[3].reason()
    assert "ZeroDivisionError" in (tmp_path / "3" / "job.log").read_text()


def test_a_job_that_hangs_is_ended_with_all_that_it_has_started(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "GRACE", 0.3)
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    body = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    body += f"open('{tmp_path}/child', 'w').write(str(p.pid)); time.sleep(600)"
    ended = run_jobs([job(0, tmp_path, body), job(1, tmp_path, "pass")], cpu_slots(1), timeout=2)
    assert [entry.hung for entry in ended] == [True, False]
    assert "timeout_min" in ended[0].reason()
    assert is_gone(int((tmp_path / "child").read_text()))


def is_gone(pid):
    for _ in range(100):
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        ).stdout
        if not state.strip() or state.startswith("Z"):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_all_jobs(tmp_path, monkeypatch, number):
    monkeypatch.setattr(pool, "GRACE", 0.3)
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist ignore it
    pids = []

    def interrupt(state):
        pids[:] = [entry.process.pid for entry in state.running]
        if len(pids) == 2:
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()

    jobs = [job(i, tmp_path, "import time; time.sleep(600)") for i in range(3)]
    try:
        with pytest.raises(KeyboardInterrupt), terminable():
            run_jobs(jobs, cpu_slots(2), timeout=60, show=interrupt)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert len(pids) == 2 and all(is_gone(pid) for pid in pids)
    assert not (tmp_path / "2").exists()


def test_slots_divide_the_machine():
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in gpu_slots(["0", "2", "5"], 1)] == ["0", "2", "5"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in gpu_slots(["0", "1", "2"], 2)] == ["0,1"]
    with pytest.raises(UserError, match=r"gpus_per_job=4: 3 GPUs are visible"):
        gpu_slots(["0", "1", "2"], 4)
    threads = [int(slot["OMP_NUM_THREADS"]) for slot in cpu_slots(2)]
    assert threads == [max(1, cores() // 2)] * 2


def test_a_finished_job_starts_no_process_and_says_nothing_about_the_others(tmp_path, capsys):
    jobs = [job(i, tmp_path, "import time; time.sleep(0.3)") for i in range(3)]
    states = []
    with jobs_table() as show:
        ended = run_jobs(jobs, cpu_slots(1), show=lambda state: (states.append(state), show(state)), finished={0, 2})
    assert [(entry.job.number, entry.before, entry.failed) for entry in ended] == [
        (0, True, False),
        (1, False, False),
        (2, True, False),
    ]
    assert states[0].seconds_left() is None, "what took no time says nothing about what will"
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    told = capsys.readouterr().out
    assert "job 0 was finished  job 0" in told and "job 2 was finished" in told and "job 1 done after 0:0" in told
    assert [entry.before for entry in run_jobs(jobs, [], finished={0, 1, 2})] == [True] * 3


def test_success_is_exit_code_zero(tmp_path):
    assert not Ended(job(0, tmp_path, ""), 0, 1.0).failed
    assert Ended(job(0, tmp_path, ""), 0, 1.0, hung=True).failed
