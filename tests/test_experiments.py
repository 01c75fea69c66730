"""The experiments: every job of every sweep is a valid run, on the tiny models and on the families of the papers."""

from __future__ import annotations

from itertools import cycle

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from efficientllava.checks import check
from efficientllava.config import register_schema, typed
from efficientllava.forecast import forecast
from efficientllava.report.study import PUBLISHED
from hydra_plugins.arms import jobs_of

from .runs import ROOT

SWEEPS = sorted(
    file.stem for file in (ROOT / "conf/experiment").glob("*.yaml") if "sweeper" in file.read_text(encoding="utf-8")
)
STUDY = OmegaConf.load(PUBLISHED)
FULL_SIZE = ("llava_1_5_7b", "bunny_3b", "mini_internvl_4b")


def jobs(experiment, *more):
    """The jobs of ``run.py experiment=…``."""
    told = [f"experiment={experiment}", *more]
    config = compose("config", told, return_hydra_config=True)
    grid = [*(f"{key}={value}" for key, value in config.hydra.sweeper.params.items()), *told]
    [points] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(grid), None)
    arms = OmegaConf.to_container(config.sweep.arms)
    return jobs_of(points, arms, told) if arms else points


def one_of_each_arm(found):
    """The last job of every arm."""
    return list({next((o for o in job if o.startswith("name=")), ""): job for job in found}.values())


@pytest.fixture(autouse=True)
def configuration():
    register_schema()
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
        rows = {float(value) for value in config.hydra.sweeper.params[spec.rows].split(",")}
    assert set(spec["at"]) <= rows


@pytest.mark.parametrize(("experiment", "model"), list(zip(STUDY, cycle(FULL_SIZE), strict=False)))
def test_it_can_be_planned_for_the_models_of_the_papers(experiment, model):
    more = [f"model={model}", "dry_run=true", "trainer=cpu", "seed=0"]
    found = one_of_each_arm(jobs(experiment, *more))
    assert len(found) >= 3
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
