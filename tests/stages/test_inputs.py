"""What the result of a stage depends on: each input alone gives a new key, and nothing else does."""

from __future__ import annotations

import json
import os
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efficientllava import stages as inputs
from efficientllava.data.records import image_contents, image_stamps
from efficientllava.data.splits import draw, load_split
from efficientllava.runtime import UserError
from efficientllava.runtime.content import Memo, closure, digest
from efficientllava.settings.compose import typed
from efficientllava.settings.schema import RunConfig
from efficientllava.stages import asked, inputs_of, numbers, places, request
from efficientllava.stages.run import clear, require_apart, require_own

from ..runs import (
    composed,
    run,
    save_tiny,
    small,
)

STAGES = ("evaluate", "prune", "search", "recover", "targets")
EVERYWHERE = {"model.dtype", "threads", "trainer.precision", "trainer.deterministic", "trainer._target_"}
CALLBACKS = {f"callbacks.{name}._target_" for name in ("mine", "progress", "learning_rate")}  # another one may do more
CALIBRATION = {"calibration.*", "data.max_length"}
# Settings that decide the result of a stage by themselves; what leads to content (paths, revisions, how much is read of
# them) counts as that content.
DECIDE = {
    "evaluate": {*EVERYWHERE, "evaluate.limit", "evaluate.max_new_tokens", "evaluate.batch_size", *CALLBACKS},
    "prune": {*EVERYWHERE, *CALIBRATION, "data.name", "seed", "prune.*", "search.*"},
    "search": {*EVERYWHERE, *CALIBRATION},
    "recover": {
        *EVERYWHERE,
        *(f"data.{name}" for name in ("name", "images", "max_length", "group_by_modality_length")),
        *("data.batch_size", "data.global_batch_size", "data_frac", "seed"),
        *("trainer.strategy", *CALLBACKS, "recover.*"),
    },
    "targets": {*EVERYWHERE, "data.max_length", "data.name", "recover.teacher.dtype"},
}
NOT = {
    *("calibration.path", "calibration.image_root"),
    *("prune.name", "prune.offload", "search.name", "recover.name", "recover.save_every"),
    *("recover.teacher.path", "recover.teacher.revision", "recover.teacher.offload"),
}
# What is of no stage by itself: it leads to content, or is of the run and not of its numbers.
NEITHER = {
    *("name", "optimized_metric", "dry_run", "reuse", "keep", "pretrain", "sweep.*", "paths.*", "logger.*", "deploy.*"),
    *("model.*", "data.path", "data.image_root", "data.test_questions", "data.max_bad_fraction", "data.num_workers"),
    "data.image_layout",
    *("evaluate.tasks", "evaluate.root", "evaluate.namespace", "evaluate.protocol", "evaluate.quantization"),
    *("evaluate.efficiency", "evaluate.repeats", "evaluate.new_tokens", "evaluate.speed_batches"),
    *("evaluate.num_workers", "evaluate.judge.*", "evaluate.lmms_eval.*", "evaluate.prose.path"),
    *("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.log_every_n_steps"),
    *(
        "trainer.enable_model_summary",
        "trainer.num_sanity_val_steps",
        "callbacks.learning_rate.*",
        "callbacks.progress.*",
    ),
}
CONTENT = {
    "evaluate": ("model", "device", "processes", "task", "questions", "images", "base", "lmms"),
    "prune": ("model", "device", "processes", "records", "files", "images", "written"),
    "search": ("model", "device", "records", "files", "images", "written"),
    "recover": ("model", "device", "processes", "original_layers", "teacher", "files", "images"),
    "targets": ("model", "device", "teacher", "files"),
}


@cache
def settings() -> RunConfig:
    """A run that uses everything: a search, a teacher, a trainer of its own."""
    config = typed(composed("prune=auto", "recover=kd_both", "trainer=cpu"))
    config.callbacks["mine"] = {"_target_": "mine.Callback"}
    return config


def leaves(node: Any, prefix: str = "") -> list[str]:
    if is_dataclass(node):
        named = [(field.name, getattr(node, field.name)) for field in fields(node)]
    elif isinstance(node, dict) and node:
        named = list(node.items())
    else:
        return [prefix.rstrip(".")]
    return [leaf for name, child in named for leaf in leaves(child, f"{prefix}{name}.")]


def changed(config: RunConfig, key: str) -> RunConfig:
    config = deepcopy(config)
    node: Any = config
    *path, name = key.split(".")
    for part in path:
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    old = node[name] if isinstance(node, dict) else getattr(node, name)
    new = {bool: lambda: not old, int: lambda: old + 1, float: lambda: old + 0.5, list: lambda: [*old, 7]}
    value = new.get(type(old), lambda: f"{old} changed")()
    if isinstance(node, dict):
        node[name] = value
    else:
        setattr(node, name, value)
    return config


def named(key: str, names: set[str]) -> bool:
    return any(key == name or (name.endswith("*") and key.startswith(name[:-1])) for name in names)


def decides(stage: str, key: str) -> bool:
    return key not in NOT and named(key, DECIDE[stage])


def test_every_setting_is_sorted() -> None:
    """A new one decides something until somebody says that it does not."""
    open_ = [key for key in leaves(settings()) if not named(key, NEITHER | NOT | set().union(*DECIDE.values()))]
    assert open_ == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_setting_gives_a_new_key_where_it_decides_the_result_and_nowhere_else(stage: str) -> None:
    before, keys = digest(inputs_of(stage, settings())), leaves(settings())
    found = {key for key in keys if digest(inputs_of(stage, changed(settings(), key))) != before}
    assert found == {key for key in keys if decides(stage, key)} and len(keys) > 150


@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, names in CONTENT.items() for name in names])
def test_each_content_alone_gives_a_new_key(stage: str, name: str) -> None:
    content = dict.fromkeys(CONTENT[stage], "as it was")
    one, other = (digest(inputs_of(stage, settings(), **{**content, name: value})) for value in ("as it was", "new"))
    assert one != other


def test_what_does_not_depend_on_the_number_of_processes_is_shared() -> None:
    for stage in STAGES:
        one, two = (digest(inputs_of(stage, settings(), processes=count)) for count in (1, 2))
        assert (one == two) == (stage in ("search", "targets"))


@pytest.mark.parametrize("stage", STAGES)
def test_code_and_libraries_are_inputs(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [digest(inputs_of(stage, settings()))]
    monkeypatch.setattr(inputs, "library_versions", lambda: {"torch": "0"})
    keys.append(digest(inputs_of(stage, settings())))
    monkeypatch.setattr(inputs, "source_digest", lambda *parts: f"another {parts}")
    keys.append(digest(inputs_of(stage, settings())))
    assert len({*keys}) == 3


def test_the_code_of_every_stage_is_there() -> None:
    for module in (*request.STAGES, *inputs.SOURCES.values()):
        assert module in closure(module)


def test_what_a_training_does_not_use_is_no_input_of_it() -> None:
    plain = typed(composed("recover=sft"))
    for key in ("recover.teacher.dtype", "recover.teacher.top_k", "recover.teacher.path"):
        assert inputs_of("recover", plain) == inputs_of("recover", changed(plain, key))
    assert "teacher" not in places(plain, "recover")
    assert inputs_of("prune", plain) == inputs_of("prune", changed(plain, "search.rounds"))


def test_a_plan_tells_by_places_what_a_run_tells_by_content() -> None:
    for key in ("evaluate.tasks", "evaluate.root", "evaluate.quantization", "data.test_questions"):
        assert asked(settings()) != asked(changed(settings(), key))
    for stage, keys in {
        "prune": ("data.path", "data.image_root", "calibration.path", "calibration.image_root"),
        "recover": ("data.path", "recover.teacher.path"),
    }.items():
        assert all(places(settings(), stage) != places(changed(settings(), key), stage) for key in keys)


@pytest.mark.parametrize("key", [*inputs.NEUTRAL])
def test_what_decides_no_number_changes_no_run(key: str) -> None:
    config = deepcopy(settings())
    config.trainer |= {name.partition(".")[2]: 1 for name in inputs.NEUTRAL if name.startswith("trainer.")}
    assert numbers(config) == numbers(changed(config, key)) != numbers(changed(config, "seed"))


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty records with an image each."""
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]
    rows = [{"id": str(i), "image": f"{i}.png", "conversations": turns} for i in range(40)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    for i in range(40):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
    return tmp_path


def replace(file: Path) -> None:
    """Another picture of the same name, size and time."""
    times, size = file.stat(), len(file.read_bytes())
    content = bytearray(file.read_bytes())
    content[size // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def repaint(file: Path) -> None:
    """A picture that can be opened, of the same name and time."""
    times = file.stat()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).save(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_images_that_were_replaced_under_their_names_are_seen(data: Path) -> None:
    config = typed(composed("data=conversations", f"data.path={data}/data.json", f"data.image_root={data}")).data
    records = load_split(config, "train")
    some, memo = [records[i] for i in range(3)], Memo()
    before = image_stamps(records), image_stamps(some), image_contents(some, memo)
    assert len(before[0]) == len(records) == len({*before[0]}) and before[1] == before[0][:3]
    replace(Path(str(some[1].image)))
    after = image_stamps(records), image_stamps(some), image_contents(some, memo)
    assert [a == b for a, b in zip(*(x[0] for x in (before, after)), strict=True)].count(False) == 1
    assert before[1][1] != after[1][1] and before[2] != after[2]
    assert image_stamps(records, [2, 0]) == [before[0][2], before[0][0]]
    Path(str(some[0].image)).unlink()
    assert image_stamps(records)[0] not in before[0], "whoever opens it says that it is gone"


def test_a_run_is_another_one_when_what_a_judge_is_asked_has_changed(tmp_path: Path):
    model = save_tiny(tmp_path / "model", layers=1)
    (tmp_path / "prompts").mkdir()
    more = ["evaluate=mmvet", f"evaluate.judge.prompts={tmp_path}/prompts", "prune=none", "recover=none"]
    config, keys = typed(composed("model=checkpoint", f"model.path={model}", *more)), []
    for text in ("one", "one", "two"):
        (tmp_path / "prompts" / "mmvet.txt").write_text(text)
        keys.append(request.run_key(config))
    assert keys[0] == keys[1] != keys[2]


def test_what_another_configuration_has_left_in_a_folder_goes(tmp_path: Path):
    for name in ("pruned", "recovered", "gguf", "predictions"):
        (tmp_path / name).mkdir()
    for name in ("plan.json", "search.json", "search.png", "training.csv", "samples.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "results.json").write_text(json.dumps({"run_key": "own"}))
    clear(typed(composed("prune=auto", "recover=sft")), tmp_path, "own")
    assert (tmp_path / "results.json").exists()
    left = []
    for more in (["prune=auto", "recover=sft"], ["prune=layerwise", "recover=none"], ["prune=none", "recover=none"]):
        clear(typed(composed(*more)), tmp_path, "another")
        left.append(sorted(path.name for path in tmp_path.iterdir()))
    assert len(left[0]) == 7
    assert left[1:] == [["notes.txt", "plan.json", "pruned"], ["notes.txt"]]


@pytest.mark.parametrize("name", ["predictions", "gguf", "logs", "plan.json"])
def test_a_folder_where_no_run_has_been_loses_nothing(tmp_path: Path, name: str):
    (tmp_path / "notes.txt").touch()
    require_own(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name}: is of no run and would be lost"):
        require_own(tmp_path)
    (tmp_path / ".lock").touch()
    require_own(tmp_path)


@pytest.mark.parametrize("key", ["model.path", "recover.teacher.path", "data.path", "calibration.path"])
def test_a_run_does_not_lie_on_what_it_reads(tmp_path: Path, key: str):
    config = typed(composed("model=checkpoint", "model.path=x", "recover=kd_hidden", f"{key}={tmp_path}/run/pruned"))
    with pytest.raises(UserError, match=rf"{key}=.*lies in this run's own folder"):
        require_apart(config, tmp_path / "run")
    require_apart(config, tmp_path / "another")


@pytest.mark.parametrize("stage", ["prune", "recover"])
def test_a_run_is_another_one_when_an_image_that_it_uses_was_replaced(data: Path, stage: str) -> None:
    chosen = ["prune=widthwise", "recover=none"] if stage == "prune" else ["prune=none", "recover=sft"]
    model = save_tiny(data / "model", layers=1)
    common = ["model=checkpoint", f"model.path={model}", "model.name=tiny", "evaluate=none", "data=conversations"]
    common += [f"data.path={data}/data.json", f"data.image_root={data}", f"paths.cache_dir={data}/cache", *chosen]
    config = typed(composed(*common, *(["calibration.samples=2"] if stage == "prune" else [])))
    used = load_split(config.data, {"prune": "calibration", "recover": "train"}[stage], 0)
    keys = [request.run_key(config)]
    assert keys == [request.run_key(config)]
    replace(Path(str(used[1].image)))
    keys.append(request.run_key(config))
    weights = model / "model.safetensors"
    replace(weights)
    keys.append(request.run_key(config))
    assert len({*keys}) == 3


@pytest.mark.usefixtures("without_fresh_processes")
def test_a_stage_is_computed_again_when_an_image_that_it_uses_was_replaced(data: Path) -> None:
    model = save_tiny(data / "model", layers=1)
    rows = [
        {
            "question_id": str(i),
            "question": "is there a cat?",
            "answer": "yes",
            "image": f"{i}.png",
            "category": "random",
        }
        for i in range(40, 44)
    ]
    for row in rows:
        Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(data / row["image"])
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = (f"data.path={data}/data.json", f"data.image_root={data}", "data=conversations")
    asked = ("evaluate=pope", f"evaluate.root={data}/test.jsonl", "evaluate.max_new_tokens=2")
    typed_ = small(model, data / "out", *files, *asked, "recover=kd_hidden", "recover.teacher.source=cached")
    typed_ += [
        "evaluate.efficiency=false",
        "prune.selection=local",
        "calibration.samples=2",
        "data_frac=0.2",
        "recover.steps=4",
    ]
    typed_ = [
        each for each in typed_ if not each.startswith(("evaluate.repeats", "evaluate.new_tokens", "evaluate.speed"))
    ]
    config = typed(composed(*typed_)).data
    answers = {f"evaluate/{stage}/pope" for stage in ("base", "pruned", "recovered")}
    calibration, train = load_split(config, "calibration", 0)[0], draw(load_split(config, "train"), 0.2, 0)[0]
    asked_about = []
    for number, (image, reused) in enumerate(
        [
            (None, set()),
            (None, {"prune", "recover", *answers}),
            (data / "41.png", {"prune", "recover"}),
            (train.image, {"prune", "evaluate/base/pope", "evaluate/pruned/pope"}),
            (calibration.image, {"evaluate/base/pope"}),
        ]
    ):
        if image is not None:
            repaint(Path(str(image)))
        record = run(data / str(number), typed_)
        assert {*record["reused"]} == reused, number
        targets = record["reports"]["recover"]["stats"]["targets"]
        asked_about.append(targets["computed"] if "recover" not in record["reused"] else None)
    assert asked_about[1:3] == [None, None] and asked_about[3] == 1 and asked_about[4] == 0
