"""Jobs that only have to run, fail or hang, as a line of Python; and a sweep that is the real thing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

from efficientllava.launch import Job
from efficientllava.launch import supervise as run
from efficientllava.runtime import state

from ..runs import ROOT, RUN, small

HANG = "time.sleep(300)"
TINY = ("recover=none", "evaluate=none", "evaluate.efficiency=false", "prune.selection=local", "reuse=true")


def job(number, folder, body):
    begin = (
        f"from efficientllava.runtime import state; from pathlib import Path; f = Path({str(folder / str(number))!r})\n"
    )
    command = (sys.executable, "-c", f"import os, sys, time\n{begin}state.begin(f, [])\n{body}\nstate.end(f, None)")
    return Job(number, (f"job={number}",), command, folder / str(number))


def supervise(jobs, runner):
    return run(jobs, runner, lambda _: None, (), 0.5)


def running(folder):
    return state.read(folder).get("state") == state.RUNNING


def when(condition, action, seconds=400):
    def watch():
        deadline = time.monotonic() + seconds
        while not (holds := condition()) and time.monotonic() < deadline:
            time.sleep(0.1)
        if holds:
            action()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def shell(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False)


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


def sweep(*typed, place):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [*RUN, "-m", *typed]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=place, check=False)


def check_sweep(model, place, *launcher):
    """Four jobs, one of which cannot work and one of which is killed; and the same command once more."""
    line = small(model, place / "out", *TINY, "prune.ratio=0.2,0.3,0.4,1.5", *launcher)
    victim = lambda: next((place / "out" / "sweeps").glob("*/2"), place / "none")  # noqa: E731
    killer = when(lambda: running(victim()), lambda: os.kill(state.read(victim())["pid"], signal.SIGKILL))
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
    logs = {log: log.read_bytes() for log in folder.glob("*/job.log")}
    done = sweep(*line, "prune.ratio=0.2,0.3,0.4", f"sweep.name={folder.name}", place=place)
    assert done.returncode == 0 and done.stdout.count("was finished") == 3, done.stdout + done.stderr
    assert {log: log.read_bytes() for log in folder.glob("*/job.log")} == logs, "something was started"
