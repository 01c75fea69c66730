"""Bad models and data: one clear line each, exit code 2 before the first stage and 1 after, nothing half-written."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from efficientllava import pipeline
from efficientllava.runtime.content import MEMO
from efficientllava.runtime.errors import UserError

from .runs import composed, save_tiny

RECORDS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2)


@pytest.fixture
def data(tmp_path):
    """A good data file with images; returns its records and a function that writes them."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (32, 32), (200, 10, 10)).save(images / "red.png")
    said = [{"from": "human", "value": "<image>\nwhich colour ?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": f"r{i}", "image": "red.png", "conversations": said} for i in range(RECORDS)]

    def write(content=None):
        file = tmp_path / "records.json"
        file.write_text(json.dumps(records) if content is None else content)
        return file

    return records, write


def overrides(model, tmp_path, *more):
    typed = [
        "model=checkpoint",
        f"model.path={model}",
        f"data.path={tmp_path}/records.json",
        f"data.image_root={tmp_path}/images",
        "data.batch_size=2",
        "calibration.samples=4",
        "recover.train=projector",
        "recover.epochs=null",
        "recover.steps=1",
        "prune.round_to=1",
        "evaluate.efficiency=false",
        f"paths.output_dir={tmp_path}/out",
        "logger=none",
        "callbacks=none",
        "trainer=cpu",
    ]
    known = {key.partition("=")[0] for key in more}
    return [o for o in typed if o.partition("=")[0] not in known] + list(more)


def run(model, tmp_path, *more):
    typed = overrides(model, tmp_path, *more)
    torch.set_num_threads(1)
    pipeline.run(composed(*typed), str(tmp_path / "run"), typed)


def refused(model, tmp_path, *more):
    with pytest.raises(UserError) as error:
        run(model, tmp_path, *more)
    return error.value


def nothing_written(tmp_path):
    made = [
        p
        for name in ("run", "out")
        for p in (tmp_path / name).rglob("*")
        if p.is_file() and not p.name.endswith(".lock") and p.name != MEMO  # what was read is remembered
    ]
    return made == []


def test_good_data_runs(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("efficientllava.stages.run.reload_gate", lambda *_: None)
    data[1]()
    run(model, tmp_path)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["samples"] == {"calibration": 4, "written": 0, "report": 0, "recovery": RECORDS - 8}
    assert set(results["stages"]) == {"base", "pruned", "recovered"}


def test_a_global_batch_that_cannot_be_divided_is_told_before_the_first_stage(model, data, tmp_path):
    data[1]()
    error = refused(model, tmp_path, "data.global_batch_size=3")
    assert str(error).startswith("data.global_batch_size=3: must be a multiple") and error.exit_code == 2
    assert nothing_written(tmp_path)


def test_a_projector_is_not_trained_by_text_alone(model, data, tmp_path):
    records, write = data
    for record in records:
        del record["image"]
        record["conversations"] = [{"from": "human", "value": "which colour ?"}, {"from": "gpt", "value": "red"}]
    write()
    error = refused(model, tmp_path)
    assert str(error).startswith("recover.train=projector: none of the records has an image") and error.exit_code == 2
    assert nothing_written(tmp_path)


def spoil(records, at, **changes):
    records[at] = {**records[at], **changes}


def missing(records, _folder):
    spoil(records, 3, image="gone.png")


def broken(records, folder):
    (folder / "images" / "broken.png").write_bytes((folder / "images" / "red.png").read_bytes()[:40])
    spoil(records, 3, image="broken.png")


def overlong(records, _folder):
    said = [{"from": "human", "value": "<image>\n" + "read " * 600}, {"from": "gpt", "value": "red"}]
    for at in range(RECORDS):
        spoil(records, at, conversations=said)


def roles(records, _folder):
    spoil(records, 3, conversations=[{"from": "robot", "value": "hello"}])


FAULTS = [
    (missing, ["'r3'", "gone.png", "does not exist", "data.max_bad_fraction allows 0", "repair the data or raise it"]),
    (broken, ["'r3'", "broken.png", "cannot be read", "data.max_bad_fraction"]),
    (roles, ["'r3'", "role 'robot'", "human", "data.max_bad_fraction"]),
    (overlong, ["leaves no room for the answer", "the context holds 512 tokens", "data.max_length"]),
]


@pytest.mark.parametrize(("fault", "told"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_faulty_record_is_found_before_the_first_stage(model, data, tmp_path, fault, told):
    records, write = data
    fault(records, tmp_path)
    write()
    error = refused(model, tmp_path)
    assert error.exit_code == 2
    assert "\n" not in str(error)
    for part in told:
        assert part in str(error)
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{ this is no JSON", ["records.json", "is not JSON", "give a JSON list"]),
        ("", ["records.json", "is not JSON"]),
        ("[]", ["records.json", "holds no record"]),
        ('{"a": 1}', ["records.json", "holds a dict", "give a JSON list"]),
        ("[1, 2]", ["records.json", "2 of 2 records cannot be used", "int instead of an object"]),
    ],
)
def test_a_file_that_is_no_list_of_records(model, data, tmp_path, content, told):
    data[1](content)
    error = refused(model, tmp_path)
    assert error.exit_code == 2
    assert "\n" not in str(error)
    for part in told:
        assert part in str(error)
    assert nothing_written(tmp_path)


def test_corrupt_records_are_counted_and_tolerated_up_to_the_limit(model, data, tmp_path, caplog):
    from efficientllava.data.splits import load_split
    from efficientllava.settings.schema import DataConfig

    records, write = data
    roles(records, tmp_path)
    spoil(records, 7, image=3)
    file = write()
    config = DataConfig("conversations", str(file), str(tmp_path / "images"), max_bad_fraction=2 / RECORDS)
    total = sum(len(load_split(config, split)) for split in ("train", "calibration", "minival"))
    assert total == RECORDS - 2
    assert f"2 of {RECORDS} records cannot be used" in caplog.text
    error = refused(model, tmp_path, f"data.max_bad_fraction={1.5 / RECORDS}")
    assert f"2 of {RECORDS} records cannot be used" in str(error)


def test_a_file_of_calibration_records_that_is_too_short(model, data, tmp_path):
    records, write = data
    write()
    short = tmp_path / "short.json"
    short.write_text(json.dumps(records[:3]))
    error = refused(model, tmp_path, f"calibration.path={short}", f"calibration.image_root={tmp_path}/images")
    assert error.exit_code == 2
    assert "calibration.samples=4: only 3 records" in str(error)
    assert "in calibration.path; ask for fewer" in str(error)
    error = refused(model, tmp_path, "calibration.samples=64")
    assert "set aside for it (a tenth of the data); ask for fewer, or give a file of its own" in str(error)
    assert nothing_written(tmp_path)


def test_a_bad_model_folder_ends_the_run_before_it_begins(data, tmp_path):
    data[1]()
    error = refused(tmp_path / "nowhere", tmp_path)
    assert error.exit_code == 2
    assert "no such folder" in str(error)
    assert nothing_written(tmp_path)


def test_weights_that_are_not_finite_end_the_run_before_the_first_stage(data, tmp_path):
    data[1]()
    folder = save_tiny(tmp_path / "broken", layers=2)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.1.self_attn.o_proj.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    error = refused(folder, tmp_path)
    assert error.exit_code == 2
    assert "layers.1.self_attn.o_proj.weight: not finite, 1 NaN" in str(error) and "\n" not in str(error)
    assert nothing_written(tmp_path)


LARGER = {name: {"height": 64, "width": 64} for name in ("size", "crop_size")}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("processor_config.json", {"patch_size": 4}),
        ("processor_config.json", {"image_processor": LARGER}),
        ("config.json", {"image_token_id": 7}),
    ],
)
def test_a_processor_of_another_model_ends_the_run_before_the_first_stage(data, tmp_path, name, change):
    data[1]()
    file = save_tiny(tmp_path / "broken", layers=1) / name
    said = json.loads(file.read_text())
    for key, value in change.items():
        said[key] = {**said[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(said))
    error = refused(tmp_path / "broken", tmp_path)
    assert error.exit_code == 2 and "\n" not in str(error)
    assert str(error).startswith("model.path: it cannot take the images of its processor (")
    assert nothing_written(tmp_path)


@pytest.mark.parametrize("source", ["live", "cached"])
def test_a_teacher_that_cannot_teach_is_found_before_the_first_stage(model, data, tmp_path, source):
    data[1]()
    wider = save_tiny(tmp_path / "wider", "tiny_bunny", layers=2)
    for path, told in ((tmp_path / "gone", "no such folder"), (wider, "the teacher's hidden width is 128")):
        error = refused(model, tmp_path, f"recover.teacher.path={path}", f"recover.teacher.source={source}")
        assert error.exit_code == 2
        assert str(error).startswith("recover.teacher.path") and told in str(error)
    assert nothing_written(tmp_path)


def test_an_unknown_benchmark(model, data, tmp_path):
    data[1]()
    error = refused(model, tmp_path, "evaluate.tasks=[mmlu]")
    assert error.exit_code == 2
    assert "'mmlu' is not a benchmark; choose of ai2d, digits_vqa" in str(error)


def test_every_benchmark_without_rows_is_named_at_once(model, data, tmp_path):
    data[1]()
    (tmp_path / "rows").mkdir()
    error = refused(model, tmp_path, "evaluate.tasks=[pope,gqa,mmvet]", f"evaluate.root={tmp_path / 'rows'}")
    told = [line.partition("holds no rows of ")[2].partition(",")[0] for line in str(error).splitlines()]
    assert error.exit_code == 2 and told == ["pope", "gqa", "mmvet"]


def test_a_ratio_that_cannot_be_reached_names_the_largest_one(model, data, tmp_path):
    data[1]()
    error = refused(model, tmp_path, "prune.ratio=0.99")
    assert error.exit_code == 2
    assert "prune.ratio=0.99" in str(error)
    assert nothing_written(tmp_path)


@pytest.mark.parametrize(
    "full", [OSError(28, "No space left on device"), RuntimeError("I/O error: No space left (os error 28)")]
)
def test_a_full_disk_during_a_stage(model, data, tmp_path, monkeypatch, full):
    data[1]()

    def fail(*_, **__):
        raise full

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail, raising=False)
    error = refused(model, tmp_path)
    assert error.exit_code == 1
    assert "the disk is full" in str(error)
    assert "free some space or set paths.output_dir elsewhere" in str(error)
    assert nothing_written(tmp_path)


def test_a_folder_that_cannot_be_written(model, data, tmp_path, monkeypatch):
    data[1]()
    monkeypatch.setattr("os.access", lambda *_: False)
    error = refused(model, tmp_path)
    assert error.exit_code == 2
    assert "may not be written" in str(error)
