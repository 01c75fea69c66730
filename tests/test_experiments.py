"""The experiments: every job of every sweep is a valid run, on the tiny models and on the families of the papers."""

from __future__ import annotations

import json
import subprocess
from itertools import cycle

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from efficientllava.estimate import forecast
from efficientllava.launch import sweep
from efficientllava.launch.sweep import jobs_of
from efficientllava.report.runs import load_runs
from efficientllava.report.study import PUBLISHED, panels_of
from efficientllava.settings.compose import typed
from efficientllava.stages.request import check, register

from .evaluation.published import publish
from .runs import ROOT, RUN, save_tiny

SWEEPS = sorted(
    file.stem for file in (ROOT / "conf/experiment").glob("*.yaml") if "sweeper" in file.read_text(encoding="utf-8")
)
STUDY = OmegaConf.load(PUBLISHED)
FULL_SIZE = ("llava_1_5_7b", "bunny_3b", "mini_internvl_4b")


def jobs(experiment, *more):
    """The jobs of ``run.py experiment=…``."""
    return sweep.jobs(compose("config", [f"experiment={experiment}", *more], return_hydra_config=True))


def one_of_each_arm(found):
    """The last job of every arm."""
    return list({next((o for o in job if o.startswith("name=")), ""): job for job in found}.values())


@pytest.fixture(autouse=True)
def configuration():
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


@pytest.mark.parametrize("experiment", SWEEPS)
def test_every_job_is_a_valid_run_with_three_seeds(experiment):
    found = jobs(experiment)
    contents = {tuple(sorted(o for o in job if not o.startswith(("seed=", "name=")))) for job in found}
    assert len(found) == 3 * len(contents)
    for job in one_of_each_arm(found):
        check(typed(compose("config", job)), job)


@pytest.mark.parametrize("experiment", STUDY)
def test_the_published_rows_are_run(experiment):
    config = compose("config", [f"experiment={experiment}"], return_hydra_config=True)
    spec = STUDY[experiment]
    if spec.rows == "arm":
        rows = {name.partition("@")[0] for name in config.sweep.arms}
    else:
        swept = (config.hydra.sweeper.params or {}).get(spec.rows, OmegaConf.select(config, spec.rows))
        rows = {float(value) for value in str(swept).split(",")}
    assert set(spec["at"]) <= rows


@pytest.mark.parametrize(("experiment", "model"), list(zip(STUDY, cycle(FULL_SIZE), strict=False)))
def test_it_can_be_planned_for_the_models_of_the_papers(experiment, model):
    more = [f"model={model}", "dry_run=true", "trainer=cpu", "seed=0"]
    swept = experiment in SWEEPS
    found = one_of_each_arm(jobs(experiment, *more)) if swept else [[f"experiment={experiment}", *more[:-1]]]
    assert len(found) >= 3 or not swept
    for job in found:
        settings = typed(compose("config", job))
        check(settings, job)
        assert settings.model.name == model
    assert forecast(settings).pruned is not None


def test_arms_meet_the_grid_and_what_is_typed_wins():
    grid = [["seed=0", "experiment=x"], ["seed=1", "experiment=x"]]
    arms = {"with": ["prune=widthwise"], "without": ["prune=widthwise", "prune.refit=false"]}
    assert jobs_of(grid, arms, ["experiment=x"]) == [
        [*grid[0], "name=with", "prune=widthwise"],
        [*grid[1], "name=with", "prune=widthwise"],
        [*grid[0], "name=without", "prune=widthwise", "prune.refit=false"],
        [*grid[1], "name=without", "prune=widthwise", "prune.refit=false"],
    ]
    told = [[*point, "prune.refit=true"] for point in grid]
    # The arms differ in nothing else: each point is run once.
    assert jobs_of(told, arms, ["experiment=x", "prune.refit=true"]) == [
        [*point, "name=with", "prune=widthwise"] for point in told
    ]
    assert jobs_of([["seed=0"]], {"few": ["seed=5"]}, []) == [["name=few", "seed=5"]]


def test_the_recipe_of_efficientllava_is_planned():
    command = ["experiment=efficientllava_scienceqa", "dry_run=true", "trainer=cpu"]
    settings = typed(compose("config", command))
    check(settings, command)
    assert (settings.prune.method, settings.search.name, settings.search.granularity) == (
        "auto",
        "paper",
        "unstructured",
    )
    assert settings.evaluate.tasks == ["scienceqa"] and settings.calibration.samples == 64


@pytest.mark.slow
def test_the_recipe_of_efficientllava_runs_on_rows_of_scienceqa(tmp_path):
    model = save_tiny(tmp_path / "model", layers=2)
    publish(tmp_path / "rows", count=8)
    questions = [{"from": "human", "value": "which digit is red?\nA. 1\nB. 2"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "train.json").write_text(json.dumps([{"id": str(i), "conversations": questions} for i in range(6)]))
    budget = {"rounds": 1, "generations": 1, "population": 3, "parents": 2, "mutants": 1, "crossovers": 1}
    command = [
        *("experiment=efficientllava_scienceqa", "model=checkpoint", f"model.path={model}"),
        *(f"evaluate.root={tmp_path / 'rows'}", f"calibration.path={tmp_path / 'train.json'}", "evaluate.repeats=1"),
        *("calibration.samples=4", "trainer=cpu", "evaluate.max_new_tokens=2", f"paths.output_dir={tmp_path / 'out'}"),
        *(f"search.{key}={value}" for key, value in budget.items()),
    ]
    subprocess.run([*RUN, *command], cwd=tmp_path, check=True)
    [file] = tmp_path.glob("out/runs/*/*/results.json")
    results = json.loads(file.read_text())
    assert results["ratio"]["sparsity"] == pytest.approx(0.5, abs=0.01) and results["ratio"]["achieved"] == 0
    for stage in ("base", "pruned"):
        metrics = results["stages"][stage]["metrics"]["scienceqa"]
        assert (metrics["n"], metrics["n/IMG"]) == (8, 4) and 0 <= metrics["accuracy"] <= 1
    record = json.loads((file.parent / "search.json").read_text())
    assert record["settings"]["granularity"] == "unstructured" and record["gap"] == "fro"
    [panel] = panels_of(load_runs(file.parent), "scienceqa/accuracy")
    assert panel.ours["ours, all"][0.5].mean == pytest.approx(100 * metrics["accuracy"])
