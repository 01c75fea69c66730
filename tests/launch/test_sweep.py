"""Sweeps: the pool launcher behind the command line, names of sweeps, and runs that are finished."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from efficientllava import pipeline
from efficientllava.launch.sweep import require_own
from efficientllava.runtime import state
from efficientllava.runtime.errors import UserError
from efficientllava.settings.compose import sweep_digest, typed
from efficientllava.stages import request

from ..runs import (
    RUN,
    composed,
    environment,
    run,
    save_tiny,
    small,
)

BARE = ("recover=none", "evaluate=none", "evaluate.efficiency=false", "prune.selection=local")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def command(model, output, *more):
    return small(model, output, *BARE, *more)


def test_a_sweep_is_named_by_what_was_typed(monkeypatch):
    names = []
    for typed_ in (["-m", "seed=0,1", "prune=widthwise"], ["prune=widthwise", "seed=0,1", "-m"], ["-m", "seed=0,2"]):
        monkeypatch.setattr(sys, "argv", ["run.py", *typed_, "paths.output_dir=/x", "hydra/launcher=gpu_pool"])
        names.append(sweep_digest())
    assert names[0] == names[1] != names[2]
    for number in range(2):
        monkeypatch.setattr(sys, "argv", ["run.py", "-m", f"hydra.sweeper.sampler.seed={number}"])
        names.append(sweep_digest())
    assert names[3] != names[4]


def test_a_folder_belongs_to_one_sweep_which_may_grow_and_drop_what_failed(tmp_path):
    def jobs(*ratios, more=()):
        return [[f"prune.ratio={ratio}", "seed=0", *more] for ratio in ratios]

    require_own(tmp_path, jobs(0.1))
    state.write(tmp_path, state.SWEEP, jobs=jobs(0.1, 0.2, 1.5))
    for number, how in enumerate((state.DONE, state.DONE, state.FAILED)):
        state.write(tmp_path / str(number), state=how)
    require_own(tmp_path, jobs(0.1, 0.2))
    require_own(tmp_path, jobs(0.1, 0.15, 0.2, more=("threads=2", "paths.cache_dir=/x")))
    for other in (jobs(0.1), jobs(0.1, 0.3), jobs(0.1, 0.2, more=("data_frac=0.5",))):
        with pytest.raises(UserError, match=r"jobs that this sweep does not have, such as prune\.ratio=0\.[12] seed"):
            require_own(tmp_path, other)
    state.begin(tmp_path / "1", jobs(0.2)[0])
    require_own(tmp_path, jobs(0.1, 0.2, 0.3))
    with pytest.raises(UserError, match=r"job 1 of .* is at work \(prune\.ratio=0\.2 seed=0\); wait"):
        require_own(tmp_path, jobs(0.1, 0.15, 0.2))


@pytest.mark.usefixtures("without_fresh_processes")
def test_a_finished_run_is_recognised_and_a_changed_one_runs_again(model, tmp_path, monkeypatch):
    started = []
    execute = pipeline.execute
    monkeypatch.setattr(pipeline, "execute", lambda *args: started.append(args) or execute(*args))
    metric = "optimized_metric=ratio.achieved"
    first = run(tmp_path / "run", command(model, tmp_path / "out", metric))
    again = pipeline.run(composed(*command(model, tmp_path / "out", metric)), str(tmp_path / "run"))
    assert len(started) == 1 and again == first["ratio"]["achieved"]
    run(tmp_path / "run", command(model, tmp_path / "out", metric, "seed=1"))
    assert len(started) == 2
    run(tmp_path / "run", command(model, tmp_path / "out", metric, "seed=1", "reuse=false"))
    assert len(started) == 3


def test_the_key_of_a_run_is_its_content_not_its_place(model, tmp_path):
    keys = [
        request.run_key(typed(composed(*command(model, output, *more))))
        for output, *more in ((tmp_path / "a",), (tmp_path / "b", "sweep.name=x"), (tmp_path / "a", "prune.ratio=0.2"))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_the_key_of_a_run_opens_no_data_that_no_stage_reads(model, tmp_path):
    file = tmp_path / "mine.json"
    common = ["data=conversations", f"data.path={file}", f"data.image_root={tmp_path}", "model=checkpoint"]
    common += [f"model.path={model}", "model.name=tiny", "evaluate=none", "prune=none"]
    assert len(request.run_key(typed(composed(*common, "recover=none")))) == 16
    with pytest.raises(UserError, match=r"mine\.json"):
        request.run_key(typed(composed(*common, "recover=sft")))


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # whoever imports it fails
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("without_fresh_processes")
@pytest.mark.parametrize("launcher", ["gpu_pool", "basic"])
def test_a_finished_sweep_ends_at_once_and_starts_nothing(model, tmp_path, launcher):
    typed_ = command(model, tmp_path / "out", "sweep.name=mine", "optimized_metric=ratio.achieved")
    folder = tmp_path / "out" / "sweeps" / "mine"
    for seed in (0, 1):
        run(folder / str(seed), [*typed_, f"seed={seed}"])
    line = [sys.executable, "-c", WITHOUT_TORCH, RUN[1], "-m", *typed_, "seed=0,1", f"hydra/launcher={launcher}"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    told = {"gpu_pool": "job {} was finished", "basic": f"{folder}/{{}} is finished: nothing to do"}[launcher]
    assert all(told.format(job) in done.stdout for job in (0, 1)), done.stdout
    assert (folder / "report.html").is_file() and not list(folder.glob("*/job.log"))


@pytest.mark.usefixtures("without_fresh_processes")
def test_a_run_that_has_something_to_remove_is_not_left_alone(model, tmp_path):
    typed_ = command(model, tmp_path / "out")
    run(tmp_path / "run", typed_)
    left = [
        request.nothing_to_do(typed(composed(*typed_, *more)), tmp_path / "run")
        for more in ((), ("keep=recovered",), ("keep=none",), ("seed=1",), ("reuse=false",))
    ]
    assert left == [True, True, False, False, False]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_pool_runs_a_sweep_and_the_same_command_fills_its_gaps(model, tmp_path):
    line = [*RUN, "-m", *command(model, tmp_path / "out", "sweep.name=mine", "prune.ratio=0.2,0.3,1.5")]
    line += ["hydra/launcher=gpu_pool", "hydra.launcher.slots=2"]

    def sweep():
        given = {"capture_output": True, "text": True, "cwd": tmp_path, "check": False}
        return subprocess.run(line, env=environment(), **given)

    first = sweep()
    assert first.returncode == 1 and "Traceback" not in first.stderr, first.stderr
    assert "error: job 2: prune.ratio=1.5: must be in [0, 1)" in first.stderr
    assert "error: 1 jobs of the sweep failed: [2]" in first.stderr
    folder = tmp_path / "out" / "sweeps" / "mine"
    achieved = [json.loads((folder / str(n) / "results.json").read_text())["ratio"]["achieved"] for n in (0, 1)]
    assert achieved == pytest.approx([0.2, 0.3], abs=0.02)
    times = [(folder / str(n) / "results.json").stat().st_mtime_ns for n in (0, 1)]
    (folder / "1" / "results.json").unlink()
    again = sweep()
    assert again.returncode == 1 and "job 0 was finished" in again.stdout
    assert (folder / "0" / "results.json").stat().st_mtime_ns == times[0]
    assert json.loads((folder / "1" / "results.json").read_text())["reused"] == ["prune"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launcher", ["basic", "gpu_pool", "submitit_local"])
def test_optuna_gets_the_optimised_metric_from_every_launcher(model, tmp_path, launcher):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="extra [sweep]")
    pytest.importorskip("submitit", reason="extra [sweep]")
    line = [
        *RUN,
        "-m",
        *command(model, tmp_path / "out", "sweep.name=mine", "keep=none", "prune.ratio=range(0.1,0.5,0.1)"),
    ]
    line += [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.sampler.seed=0",
    ]
    line += ["hydra.sweeper.direction=maximize", "optimized_metric=ratio.achieved", f"hydra/launcher={launcher}"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "sweeps" / "mine"
    achieved = [json.loads((folder / str(n) / "results.json").read_text())["ratio"]["achieved"] for n in (0, 1)]
    told = OmegaConf.load(folder / "optimization_results.yaml")
    assert told.best_value == max(achieved) and (folder / "report.html").is_file()
    assert not list((tmp_path / "out").rglob("*.safetensors"))
