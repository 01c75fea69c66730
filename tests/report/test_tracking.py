"""W&B runs, offline, read back from the files that `wandb sync` uploads."""

from __future__ import annotations

import json
import runpy
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from omegaconf import OmegaConf

from efficientllava.report import dashboard
from efficientllava.runtime.errors import ConfigError, UserError
from efficientllava.settings.compose import typed
from efficientllava.settings.schema import RunConfig
from efficientllava.stages.request import check

from ..runs import (
    ROOT,
    RUN,
    composed,
    run,
    save_tiny,
    small,
)

QUICK = (
    "search=paper",
    "search.rounds=1",
    "search.generations=2",
    "search.population=6",
    "search.parents=3",
    "search.mutants=4",
)
QUICK = (*QUICK, "search.crossovers=1", "search.finalists=1")


@pytest.fixture(autouse=True)
def without_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def records(file: Path) -> Iterator[Any]:
    """The records of a ``.wandb`` file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(whole)
            whole = b""


def read_back(folder: Path) -> list[dict[str, Any]]:
    """What the offline runs of a folder hold, in the order of their making."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for _ in range(100):  # W&B's own process writes the end of the file
            if any(record.WhichOneof("record_type") == "exit" for record in records(file)):
                break
            time.sleep(0.1)
        told: dict[str, Any] = {"history": [], "summary": {}, "artifacts": [], "axes": {}, "exit": None}
        for record in records(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                told["run"] = record.run
            elif kind == "history":
                items = record.history.item
                told["history"].append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            elif kind == "summary":
                for item in record.summary.update:
                    told["summary"]["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
            elif kind == "metric":
                told["axes"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
            elif kind == "artifact":
                told["artifacts"].append(record.artifact)
            elif kind == "exit":
                told["exit"] = record.exit.exit_code
        found.append(told)
    return found


def curve(told: dict[str, Any], x: str, y: str) -> list[tuple[float, float]]:
    return [(row[x], row[y]) for row in told["history"] if y in row]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A searched and recovered job of a sweep with ``logger=wandb``: its folder, and what was written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("efficientllava.stages.run.reload_gate", lambda *_: None)
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", "/nowhere")
        place = tmp_path_factory.mktemp("sweep")
        (place / "my-sweep").mkdir()
        (place / "my-sweep" / "multirun.yaml").touch()
        wanted = ("prune=auto", *QUICK, "recover=kd_both", "logger=wandb", "logger.weights=true")
        typed = small("builtin:tiny_llava", place / "out", *wanted)
        results = run(place / "my-sweep" / "0", [*typed, "logger.tags=[mine]", "trainer.log_every_n_steps=1"])
    (told,) = read_back(place / "my-sweep" / "0")
    return place / "my-sweep" / "0", told, results


def test_a_job_is_one_finished_run_of_its_group(job):
    folder, told, _ = job
    assert (told["run"].run_group, told["run"].job_type, told["exit"]) == ("my-sweep", "recover", 0)
    assert list(told["run"].tags) == ["tiny", "auto", "kd_both", "mine"]
    assert told["run"].run_id == (folder / "wandb_id.txt").read_text().strip()
    config = {item.key: item.value_json for item in told["run"].config.update}
    assert json.loads(config["prune"])["ratio"] == 0.3 and json.loads(config["seed"]) == 0
    assert wandb.run is None


def test_every_stage_has_its_own_axis(job):
    folder, told, _ = job
    assert {name: axis for name, axis in told["axes"].items() if "*" in name} == {
        "search/*": "search/generation",
        "prune/*": "prune/layer",
        "recover/*": "recover/step",
    }
    rows = [row for row in told["history"] if any(name.startswith("recover/") for name in row)]
    assert [row["recover/step"] for row in rows] == [0, 1] and all(row["recover/loss"] > 0 for row in rows)
    assert [row["_step"] for row in told["history"]] == sorted({row["_step"] for row in told["history"]})
    searched = json.loads((folder / "search.json").read_text())["history"]
    assert curve(told, "search/generation", "search/best") == [(i, entry["best"]) for i, entry in enumerate(searched)]
    plan = json.loads((folder / "plan.json").read_text())
    kept = dict(curve(told, "prune/layer", "prune/kept_groups"))
    assert {layer for layer, share in kept.items() if share} == {layer["index"] for layer in plan["layers"]}


def test_the_summary_holds_the_final_numbers(job):
    _, told, results = job
    summary, last = told["summary"], results["stages"]["recovered"]
    assert summary["recovered/digits_vqa/n"] == 12
    assert summary["final/checkpoint_bytes"] == summary["recovered/checkpoint_bytes"] == last["checkpoint_bytes"]
    assert summary["final/score"] == last["metrics"]["digits_vqa"]["accuracy"]
    assert summary["ratio/achieved"] == results["ratio"]["achieved"]
    assert summary["base/latency_ms/decode"] == results["stages"]["base"]["latency_ms"]["decode"]


def test_plan_table_plots_and_weights_are_artifacts_whose_files_are_there(job):
    folder, told, _ = job
    contents = {}
    for artifact in told["artifacts"]:
        for entry in artifact.manifest.contents:
            assert Path(entry.local_path).is_file()
        contents[artifact.type] = {entry.path for entry in artifact.manifest.contents}
    assert contents["plan"] == {"plan.json", "search.json"}
    assert contents["plots"] == {"samples.png", "search.png"}
    assert "results.json" in contents["results"]
    assert contents["model"] == {
        str(path.relative_to(folder / "recovered")) for path in (folder / "recovered").rglob("*")
    }
    assert any(artifact.type == "run_table" for artifact in told["artifacts"])


def test_every_panel_of_the_dashboard_shows_a_metric_of_the_run(job):
    _, told, _ = job
    logged = {name for row in told["history"] for name in row}
    logged |= {name.removesuffix("/_type") for name in logged}  # a picture is a dictionary
    panels = [panel for section in OmegaConf.load(dashboard.DEFINITION).sections for panel in section.panels]
    for panel in panels:
        there = logged if panel.kind in ("LinePlot", "MediaBrowser") else told["summary"].keys()
        metrics = [panel.get(key, []) for key in ("x", "y", "metrics", "media_keys")]
        assert {name for each in metrics for name in ([each] if isinstance(each, str) else each)} <= there, panel


def test_the_dashboard_can_be_built():
    pytest.importorskip("wandb_workspaces")
    built = dashboard.workspace("me", "efficientllava")
    assert [len(section.panels) for section in built.sections] == [
        len(section.panels) for section in OmegaConf.load(dashboard.DEFINITION).sections
    ]


@pytest.mark.parametrize("arguments", [[], ["efficientllava"], ["me/"], ["me/p/q"], ["me/p", "x"]])
def test_the_dashboard_says_how_it_is_called(arguments):
    with pytest.raises(UserError, match="usage: "):
        dashboard.main(arguments)


def test_the_report_has_the_curve_too(job):
    folder, _, _ = job
    assert (folder / "training.csv").read_text().count("\n") == 3


@pytest.mark.usefixtures("without_fresh_processes")
def test_a_failed_job_is_finished_and_goes_on_in_the_same_run_from_the_cache(model, tmp_path, monkeypatch):
    typed = small(
        model, tmp_path / "out", "prune=layerwise", "prune.ratio=0.3", "logger=wandb", "trainer.log_every_n_steps=1"
    )
    stopped = KeyboardInterrupt()

    def stop(*_given):
        raise stopped

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("efficientllava.stages.record.write_record", stop)
        run(tmp_path / "run", typed)
    assert wandb.run is None
    run(tmp_path / "run", typed)
    run(tmp_path / "other", typed)
    first, second = read_back(tmp_path / "run")
    (other,) = read_back(tmp_path / "other")
    assert (first["exit"], second["exit"], other["exit"]) == (1, 0, 0)
    assert first["run"].run_id == second["run"].run_id != other["run"].run_id
    assert "final/score" not in first["summary"] and "final/score" in second["summary"]
    # What was trained by another run is drawn in this one.
    curves = [curve(told, "recover/step", "recover/loss") for told in (first, second, other)]
    assert curves[0] and curves[0] == curves[1] == curves[2]
    assert not any(artifact.type == "model" for artifact in other["artifacts"])


LAYERS = ("prune=layerwise", "prune.ratio=0.3", "logger=wandb", "trainer.log_every_n_steps=1")


@pytest.fixture
def shell(monkeypatch):
    """Start run.py in a process of its own."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return lambda place, *typed: subprocess.Popen(
        [*RUN, *typed, f"hydra.run.dir={place}"], cwd=place.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("without_fresh_processes")
def test_two_processes_are_one_run_with_the_same_metrics(model, tmp_path, shell):
    typed = small(model, tmp_path / "out", *LAYERS, "data.global_batch_size=4")
    run(tmp_path / "one", typed)
    typed = [o for o in typed if not o.startswith(("trainer=", "data.batch_size="))]
    typed += ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=2"]
    both = shell(tmp_path / "two", *typed)
    _, said = both.communicate()
    assert both.returncode == 0, said.decode()
    (one,), (two,) = read_back(tmp_path / "one"), read_back(tmp_path / "two")
    assert (two["exit"], two["axes"]) == (0, one["axes"])
    for told in (one, two):
        told["keys"] = {name for row in told["history"] for name in row}
    assert two["keys"] == one["keys"] and two["summary"].keys() == one["summary"].keys()
    assert [row for row in two["history"] if "recover/loss" in row]
    assert {artifact.type for artifact in two["artifacts"]} == {artifact.type for artifact in one["artifacts"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_that_is_ended_from_outside_closes_its_run_as_failed(model, tmp_path, shell):
    typed = small(model, tmp_path / "out", *LAYERS, "recover=none")
    endless = ["+callbacks.hang._target_=time.sleep", "+callbacks.hang._args_=[3600]"]
    hanging = shell(tmp_path / "run", *typed, *endless)
    assert hanging.stdout is not None and any(line.startswith(b"W&B run") for line in hanging.stdout)
    hanging.terminate()
    _, said = hanging.communicate()
    assert hanging.returncode == 130 and b"run the same command again" in said, said.decode()
    (told,) = read_back(tmp_path / "run")
    assert told["exit"] == 1


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_without_logger_wandb_nothing_is_opened_or_imported(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)  # whoever imports it fails
        for name in ("stages.run", "report.dashboard"):
            runpy.run_module(f"efficientllava.{name}")
    folder = tmp_path / "run"
    folder.mkdir()
    track = dashboard.track(RunConfig(logger={"_target_": None}), folder)
    track.scores("base", {})
    track.plan(folder)
    track.results(folder)
    track.finish(False)
    assert track.run is None and list(folder.iterdir()) == []


def test_a_refusal_says_what_to_do(tmp_path, monkeypatch):
    def refuse(**_told):
        raise wandb.errors.CommError("no route\nto host")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"logger=wandb: no route to host; set logger\.mode=offline"):
        dashboard.track(typed(composed("logger=wandb")), tmp_path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["logger.mode=of"], "logger.mode=of: must be one of null, online, offline, disabled"),
        (["logger.weights=true", "keep=none"], "logger.weights: has no effect here; no checkpoint stays"),
    ],
)
def test_faulty_options_are_refused(overrides, message):
    overrides = ["logger=wandb", *overrides]
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        check(typed(composed(*overrides)), overrides)


@pytest.mark.parametrize(("key", "mode", "online"), [(None, None, False), ("k", None, True), ("k", "offline", False)])
def test_online_only_with_a_key(monkeypatch, key, mode, online):
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", mode)):
        if value:
            monkeypatch.setenv(name, value)
    assert dashboard.logged_in() is online


def test_a_netrc_entry_is_a_login(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    (tmp_path / "keys").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / "keys").chmod(0o600)
    assert dashboard.logged_in()
