"""What is told of the options is what is checked, and users add options of their own without touching the package."""

import json
import os
import subprocess
import sys

import pytest

from efficientllava.pruning import importance
from efficientllava.settings.schema import IMPORTANCES
from efficientllava.stages.request import page

from ..runs import ROOT, RUN, save_tiny


def test_the_page_of_the_options_is_what_its_command_writes():
    assert (ROOT / "docs/options.md").read_text(encoding="utf-8") == page()


def test_an_importance_and_the_settings_agree_about_what_it_sees():
    assert {name: each.sees for name, each in importance.IMPORTANCES.items()} == IMPORTANCES


# A user's own file by group.
MINE = {
    "recover": "name: mine\nweights: {sft: 1.0}\nsteps: 2\nepochs: null",
    "search": "name: mine\nrounds: 1\ngenerations: 1\npopulation: 3\nparents: 2\nmutants: 1\ncrossovers: 1",
    "prune": "name: mine\nmethod: auto\nratio: 0.2\nrefit: true",
    "data": "name: mine\npath: FOLDER/records.json\nbatch_size: 2",
    "evaluate": "tasks: []\nefficiency: false",
    "model": "# @package _global_\ndefaults:\n  - override /data: mine\nmodel: {name: mine, path: FOLDER/model}",
}
QUIET = ("logger=none", "callbacks=none", "threads=1", "model=mine", "recover=mine", "evaluate=mine")
SEARCHES = (*QUIET, "prune=mine", "search=mine", "calibration.samples=4", "calibration.generate=0", "trainer=cpu")
TRAINS = (*QUIET, "prune=none")


@pytest.fixture
def own(tmp_path):
    """A folder of a user's own options, beside the model and the records that they name."""
    said = [{"from": "human", "value": "which colour?"}, {"from": "gpt", "value": "red"}]
    save_tiny(tmp_path / "model", layers=1)
    (tmp_path / "records.json").write_text(json.dumps([{"id": str(i), "conversations": said} for i in range(80)]))
    for group, text in MINE.items():
        (tmp_path / "mine" / group).mkdir(parents=True)
        (tmp_path / "mine" / group / "mine.yaml").write_text(text.replace("FOLDER", str(tmp_path)))
    return tmp_path / "mine"


def run(own, *more, command=RUN, **environment):
    line = [*command, "--config-dir", str(own), *more]
    place = own.parent
    done = subprocess.run(
        line, cwd=place, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return place


def test_options_of_a_user_s_own_make_a_run(own):
    [file] = run(own, *SEARCHES).glob("outputs/runs/*/*/results.json")
    results = json.loads(file.read_text())
    assert file.parent.name.endswith("_mine-mine-mine")
    assert results["samples"]["recovery"] > 0 and results["ratio"]["achieved"] == pytest.approx(0.2, abs=0.1)
    assert json.loads((file.parent / "search.json").read_text())["settings"]["population"] == 3


@pytest.mark.slow
def test_they_reach_the_processes_of_a_run_and_of_a_sweep(own):
    run(own, *TRAINS, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
    run(own, "-m", *TRAINS, "hydra/launcher=gpu_pool", "trainer=cpu", "seed=0,1")


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """A folder into which the package is installed from its wheel, made of nothing but what belongs to it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("efficientllava", "hydra_plugins", "conf", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.mark.slow
def test_the_installed_command_does_what_run_py_does(installed, own):
    program = {"command": [sys.executable, str(installed / "bin/efficientllava")], "PYTHONPATH": str(installed)}

    def told(command, path):
        environment = {**os.environ, "PYTHONPATH": path}
        done = subprocess.run(
            [*command, "--help"], cwd=own, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert told(program["command"], str(installed)) == told(RUN, str(ROOT)).replace("python run.py", "efficientllava")
    place = run(own, *SEARCHES, "dry_run=true", **program)
    assert len([*place.glob("outputs/runs/*/*/dry_run.json")]) == 1
    run(own, "-m", *TRAINS, "hydra/launcher=gpu_pool", "trainer=cpu", "seed=0,1", **program)
    assert "efficientllava -m" in next(place.glob("outputs/sweeps/*/report.html")).read_text()
