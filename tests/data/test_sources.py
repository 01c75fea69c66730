from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from efficientllava.data import sources, table
from efficientllava.data.collator import Collator
from efficientllava.data.datamodule import RecoveryData
from efficientllava.data.records import (
    Subset,
    image_key,
    image_names,
    image_stamps,
    missing_images,
    open_images,
    usable,
)
from efficientllava.data.sources import BadRecordError, parts_of
from efficientllava.data.splits import calibration_records, draw, load_split
from efficientllava.data.table import read_conversations, row_of
from efficientllava.runtime.errors import UserError
from efficientllava.runtime.places import is_remote
from efficientllava.settings.schema import CalibrationConfig, DataConfig
from experiments.tiny_models.tiny import BUILDERS

HUB = "hf://datasets/org/name/folder/file.json"


def said(question: str = "what?", answer: str = "a cat") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    sources.locate.cache_clear()
    return tmp_path


# ---- large files ----------------------------------------------------------------------------------------------------


def test_large_files_are_read_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in the published mix: ids are numbers or text, and an image's id stands for several records.
    records = [{"id": i if i % 2 else str(i), "image": f"a/{i}.jpg", "conversations": said(f"{i}?")} for i in range(9)]
    file = tmp_path / "mix.json"
    file.write_text(json.dumps([*records, records[3], {"conversations": "?"}]))
    small = read_conversations(file, max_bad_fraction=0.5)
    monkeypatch.setattr(table, "SMALL", 0)
    monkeypatch.setattr(table, "BATCH", 4)
    monkeypatch.setattr(sources, "CHUNK", 50)  # less than a record
    large = read_conversations(file, max_bad_fraction=0.5)
    assert list(large) == list(small)
    assert [record.id for record in large] == [*map(str, range(9)), "3#2"]
    (arrow,) = (tmp_path / "cache" / "efficientllava" / "tables").glob("*/*.arrow")
    assert str(arrow) in {part.path for part in psutil.Process().memory_maps()}, "rows are read where they lie"
    monkeypatch.setattr(table, "raw_records", None)
    again = read_conversations(file, max_bad_fraction=0.5)
    assert list(again) == list(large)
    assert again.key == large.key
    assert len(again.problems) == 1


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_damaged_table_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, kept: int) -> None:
    monkeypatch.setattr(table, "SMALL", 0)
    file = tmp_path / "mix.json"
    file.write_text(json.dumps([{"id": str(i), "conversations": said(f"{i}?")} for i in range(9)]))
    whole = list(read_conversations(file))
    (arrow,) = (tmp_path / "cache").rglob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:kept])
    assert list(read_conversations(file)) == whole
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "rows.arrow is damaged; set aside and computed again" in told


def test_a_list_that_ends_too_early_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "SMALL", 0)
    file = tmp_path / "half.json"
    file.write_text(json.dumps([{"conversations": said()}] * 9)[:-20])
    with pytest.raises(UserError, match=r"half\.json' is not JSON"):
        read_conversations(file)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_only_images_that_are_used_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, config = tmp_path / "mix.json", DataConfig("conversations", str(tmp_path / "mix.json"), str(tmp_path))
    records = [{"id": str(i), "image": f"coco/{i}.png", "conversations": said("repeat red", "red")} for i in range(200)]
    file.write_text(json.dumps(records))
    calibration = CalibrationConfig(samples=4)
    used = [*draw(load_split(config, "train"), 0.1, 0), *calibration_records(calibration, config)]
    assert len(used) == len({record.id for record in used}) == 20
    (tmp_path / "coco").mkdir()
    for record in used:
        Image.new("RGB", (8, 8)).save(record.images[0])  # pyright: ignore[reportArgumentType]
    opened: list[Any] = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file: (opened.append(file), real(file))[1])
    processor = BUILDERS["tiny_llava"]()[1]
    data, collate = RecoveryData(config, processor, 0.1), Collator(processor, config.max_length)
    assert sorted(r.id for r in data.records) == sorted(r.id for r in used[:16])
    calibration_records(calibration, config, 0, collate)
    assert set(opened) == {record.image for record in used}
    # Beyond the limit none is opened, but a missing one is still found.
    opened.clear()
    monkeypatch.setattr("efficientllava.data.records.CHECK_LIMIT", 3)
    assert len(usable(data.records, collate, config)) == 16
    Path(used[5].images[0]).unlink()  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError) as error:
        usable(data.records, collate, config)
    for part in (
        "1 of 16 records",
        f"{used[5].id}.png' does not exist",
        f"data.image_root={tmp_path} is expected to hold coco",
    ):
        assert part in str(error.value)
    config.max_bad_fraction = 0.1
    assert len(usable(data.records, collate, config)) == 15
    assert opened == []


def test_calibration_leaves_out_what_it_cannot_use(tmp_path: Path) -> None:
    config = DataConfig("conversations", str(tmp_path / "mix.json"), str(tmp_path), max_bad_fraction=0.1)
    records = [{"id": str(i), "image": "a.png", "conversations": said("repeat red", "red")} for i in range(100)]
    Path(str(config.path)).write_text(json.dumps(records))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    first = calibration_records(CalibrationConfig(samples=5), config)
    records[int(first[2].id)]["image"] = "gone.png"
    Path(str(config.path)).write_text(json.dumps(records))
    collate = Collator(BUILDERS["tiny_llava"]()[1], config.max_length)
    kept = [record.id for record in calibration_records(CalibrationConfig(samples=5), config, 0, collate)]
    assert kept[:4] == [record.id for record in first if record != first[2]]
    assert len(kept) == 5
    config.max_bad_fraction = 0
    with pytest.raises(UserError, match=r"gone.png' does not exist.*data.max_bad_fraction allows 0"):
        calibration_records(CalibrationConfig(samples=5), config, 0, collate)


# ---- lists of files -------------------------------------------------------------------------------------------------


def listed(folder: Path, **entries: dict[str, Any]) -> Path:
    for name in entries:
        rows = [{"id": i, "image": f"{i}.png", "conversations": said(f"{name} {i}?")} for i in range(10)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    given = {name: {"root": f"data/{name}", "annotation": f"{name}.jsonl", **more} for name, more in entries.items()}
    (folder / "list.json").write_text(json.dumps(given))
    return folder / "list.json"


def test_an_internvl_list_takes_prefixes_and_repeats_only_in_training(tmp_path: Path) -> None:
    file = listed(tmp_path, one={"repeat_time": 1}, some={"repeat_time": 0.35}, twice={"repeat_time": 2})
    records = read_conversations(file)
    assert Counter(record.source for record in records) == {"one": 10, "some": 3, "twice": 10}
    assert records[10].id == "some/0"
    assert records[10].image == tmp_path / "data" / "some" / "0.png"
    config = DataConfig("internvl_sft", str(file))
    parts = {split: load_split(config, split) for split in ("train", "calibration", "minival")}
    ids = {split: Counter(record.id for record in part) for split, part in parts.items()}
    assert {name: count for name, count in ids["train"].items() if count != 2 and name.startswith("twice")} == {}
    assert {count for name, count in ids["train"].items() if not name.startswith("twice")} == {1}
    assert sum(len(part) for part in ids.values()) == len(set().union(*ids.values())) == 23


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"repeat_time": 1.5}, "repeat_time=1.5 of 'one': must be a whole number"),
        ({"repeat_time": float("inf")}, "repeat_time=inf of 'one': must be a whole number up to 1,000,000"),
        ({"repeat_time": float("nan")}, "repeat_time=nan of 'one': must be a whole number up to 1,000,000"),
        ({"repeat_time": 10**400}, "must be a whole number up to 1,000,000"),
        ({"annotation": "x" * 3000}, "of 'one' does not exist"),
        ({"annotation": "gone.jsonl"}, "gone.jsonl' of 'one' does not exist; the paths in list.json start from"),
        ({"annotation": None}, "'one' names no annotation"),
    ],
)
def test_a_faulty_list_is_named(tmp_path: Path, entry: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        read_conversations(listed(tmp_path, one=entry))
    assert "\n" not in str(error.value)


def test_the_published_list_has_eight_files_of_the_hub() -> None:
    fetched: list[tuple[str, str]] = []
    patch = pytest.MonkeyPatch()
    patch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, **_: fetched.append((repo, file)) or __file__)
    with patch.context():
        parts = sources.parts_of("builtin:internvl_sft.json", "/data")
    patch.undo()
    assert len(parts) == len(set(fetched)) == 8
    assert {repo for repo, _ in fetched} == {"OpenGVLab/InternVL-Chat-V1-2-SFT-Data"}
    assert [part.root for part in parts][:3] == ["", "", "dvqa/"]


# ---- the hub --------------------------------------------------------------------------------------------------------


def test_files_of_the_hub_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    (tmp_path / "file.json").write_text(json.dumps([{"conversations": said()}]))

    def fetch(repo: str, file: str, repo_type: str, revision: str | None) -> str:
        asked.append((repo, file, repo_type, revision))
        return str(tmp_path / "file.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    assert len(read_conversations(HUB)) == 1
    assert len(read_conversations(HUB.replace("name", "name@v1"))) == 1
    assert asked == [("org/name", "folder/file.json", "dataset", revision) for revision in (None, "v1")]


@pytest.mark.parametrize("path", [HUB, "org/name"])
def test_without_network_one_line_says_what_to_do(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"neither in the hub's cache nor can it be fetched \(no route\)") as error:
        read_conversations(path)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"data.path={path}")
    assert error.value.exit_code == 2


def test_what_is_remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "data").touch()
    found = [is_remote(path) for path in (HUB, "org/name", "my/data", "my/gone.json", "./org/name", "a/b/c")]
    assert found == [True, True, False, False, False, False]


@pytest.mark.parametrize("plural", [True, False])
def test_images_inside_parquet_are_read_when_opened(tmp_path: Path, plural: bool) -> None:
    def png(side: int) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.new("RGB", (side, 2)).save(buffer, "png")
        return {"bytes": buffer.getvalue(), "path": None}

    def talk(question: str, images: int) -> list[dict[str, Any]]:
        shown = [{"type": "image", "text": None}] * images
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
        return [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}, answer]

    first = 2 if plural else 1
    texts = datasets.Dataset.from_list([{"messages": talk(*it)} for it in (("a?", first), ("b?", 0), ("c?", 1))])
    if plural:
        images, kind = [[png(3), png(4)], [], [png(5)]], datasets.List(datasets.Image())
    else:
        images, kind = [png(3), None, png(5)], datasets.Image()
    name = "images" if plural else "image"
    rows = texts.add_column(name, images).cast_column(name, kind)  # pyright: ignore[reportCallIssue]
    rows.to_parquet(str(tmp_path / "data.parquet"))
    records = read_conversations(tmp_path / "data.parquet")
    assert records.problems == []
    sizes = [[image.size for image in open_images(record)] for record in records]
    assert sizes == [[(3, 2), (4, 2)][:first], [], [(5, 2)]]
    assert [record.turns[0].question for record in records] == ["a?", "b?", "c?"]
    assert [record.source for record in records] == ["images", "text", "images"]
    keys = [record.image and image_key(record.image) for record in records]
    names = [[image_key(image) for image in record.images] for record in records]
    assert [each[0] if each else None for each in names] == keys
    assert image_names(records) == image_names([*records]) == names
    assert image_names(Subset(records, [2, 1])) == [names[2], []]


def test_rows_of_parquet_are_those_of_the_file_that_is_there_now(tmp_path: Path) -> None:
    file, seen = tmp_path / "x.parquet", []
    for answer in ("one", "two"):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
        datasets.Dataset.from_list([{"messages": messages}] * 3).to_parquet(file)
        os.utime(file, ns=(10**18, 10**18))
        rows = read_conversations(file)
        seen.append((rows.key, rows[0].turns[0].answer))
    assert [answer for _, answer in seen] == ["one", "two"] and seen[0][0] != seen[1][0]


@pytest.mark.parametrize("kind", ["text", "image", "images"])
def test_images_that_parquet_names_are_stamped_and_start_from_the_image_root(tmp_path: Path, kind: str) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
    stored = io.BytesIO()
    Image.new("RGB", (5, 2)).save(stored, "png")
    names: list[Any] = [str(tmp_path / "a.png"), "b.png", "c.png"]
    cells = [{"bytes": None, "path": name} for name in names]
    cells[0] = {"bytes": stored.getvalue(), "path": "a.png"}
    rows = [{"conversations": said(str(i)), "image": name} for i, name in enumerate(names if kind == "text" else cells)]
    if kind == "images":
        rows = [{"conversations": said("0"), "images": cells[:2]}, {"conversations": said("1"), "images": cells[2:]}]
    feature = {"text": datasets.Value("string"), "image": datasets.Image(), "images": datasets.List(datasets.Image())}
    data = datasets.Dataset.from_list([{"conversations": row["conversations"]} for row in rows])
    column = "images" if kind == "images" else "image"
    data = data.add_column(column, [row[column] for row in rows]).cast_column(column, feature[kind])  # pyright: ignore[reportCallIssue]
    pq.write_table(data.data.table.cast(data.features.arrow_schema), tmp_path / "x.parquet")  # with paths as they are
    records = read_conversations(tmp_path / "x.parquet", tmp_path)
    before = image_stamps(records)
    assert [image.size for record in records for image in open_images(record)][1:] == [(2, 2), (2, 2)]
    Image.new("RGB", (2, 2), (9, 9, 9)).save(tmp_path / "c.png")
    after = image_stamps(records)
    assert before[:-1] == after[:-1] and before[-1] != after[-1]
    assert before[0] if kind != "image" else not before[0], "an image inside the data counts with them"
    (tmp_path / "c.png").unlink()
    assert "c.png' does not exist" in next(iter(missing_images(records).values()))


@pytest.mark.parametrize("form", ["parquet", "json", "list"])
def test_a_file_that_was_replaced_between_two_runs_of_a_process_is_seen(tmp_path: Path, form: str) -> None:
    file, found = tmp_path / f"x.{'parquet' if form == 'parquet' else 'json'}", []
    for answer in ("one", "two"):
        rows = [{"conversations": said("?", answer)}] * 20
        if form == "parquet":
            datasets.Dataset.from_list(rows).to_parquet(file)
        else:
            (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            listed = {"a": {"annotation": "rows.jsonl", "root": ""}}
            file.write_text(json.dumps(listed if form == "list" else rows))
        os.utime(file, ns=(10**18, 10**18))
        found.append(load_split(DataConfig("conversations", str(file)), "train")[0].turns[0].answer)
    assert found == ["one", "two"]


def test_a_damaged_table_of_a_parquet_file_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "x.parquet"
    monkeypatch.setattr(table, "SMALL", 0)
    datasets.Dataset.from_list([{"conversations": said("?", "right")}] * 20).to_parquet(file)
    assert read_conversations(file)[7].turns[0].answer == "right"
    (arrow,) = (tmp_path / "cache" / "efficientllava" / "tables").glob("*/*.arrow")
    for damage in (b"", arrow.read_bytes()[:-30], arrow.read_bytes().replace(b"right", b"wrong")):
        arrow.unlink()
        arrow.write_bytes(damage)
        caplog.clear()
        assert {record.turns[0].answer for record in read_conversations(file)} == {"right"}
        warned = [message for message in caplog.messages if not message.startswith("reading ")]
        assert [message.partition(".arrow is ")[2] for message in warned] == ["damaged; set aside and computed again"]


def test_texts_of_parquet_that_are_no_utf8_are_named(tmp_path: Path) -> None:
    columns = {"id": pa.array([b"\xff"]).view(pa.string()), "conversations": [said()]}
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    with pytest.raises(UserError, match=r"data\.parquet' is no parquet file"):
        read_conversations(tmp_path / "data.parquet")


@pytest.mark.parametrize("small", [True, False])
def test_a_list_names_parquet_files_with_images_of_both_kinds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    monkeypatch.setattr(table, "SMALL", table.SMALL if small else 0)
    (tmp_path / "coco").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "coco" / "a.png")
    content = io.BytesIO()
    Image.new("RGB", (5, 2)).save(content, "png")
    cells = [{"bytes": None, "path": "a.png"}, {"bytes": content.getvalue(), "path": "b.png"}] * 2
    rows = [{"conversations": said(f"{i}?"), "image": cell} for i, cell in enumerate(cells)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "some.parquet")
    entry = {"annotation": "some.parquet", "root": "coco", "repeat_time": 0.5}
    (tmp_path / "list.json").write_text(json.dumps({"some": entry}))
    records = read_conversations(tmp_path / "list.json")
    assert [image.size for record in records for image in open_images(record)] == [(3, 2), (5, 2)]
    assert [record.id for record in records] == ["some/0", "some/1"]


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"data\.parquet' is no parquet file"):
        read_conversations(tmp_path / "data.parquet")


# ---- half-read files ------------------------------------------------------------------------------------------------


def records_text(count: int = 6) -> str:
    return json.dumps([{"id": f"r{i}", "conversations": said(f'{i}? [ ] \\" }}')} for i in range(count)])


def record_text(**changes: Any) -> str:
    return json.dumps({"id": "x", "conversations": said(), **changes})


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (records_text() + "\n" + records_text(), "something follows the closing bracket, such as a second list"),
        (records_text() + " and more", "something follows the closing bracket"),
        (records_text() + "]", "something follows the closing bracket"),
        (records_text().replace('}, {"id": "r3"', '} {"id": "r3"'), "no comma and no closing bracket behind record 2"),
        (records_text().replace('"}]}, {"id": "r3"', '"}] {"id": "r3"'), "Expecting ',' delimiter"),
        (records_text()[:-1] + ",]", "nothing follows the comma behind record 5"),
        (records_text()[:-1], "no comma and no closing bracket behind record 5"),
        ("[,]", "Expecting value"),
        (records_text().replace("[{", "[,{", 1), "Expecting value"),
    ],
)
def test_no_list_is_half_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, content: str, told: str):
    monkeypatch.setattr(sources, "CHUNK", chunk)
    (tmp_path / "mix.json").write_text(content)
    with pytest.raises(UserError, match=rf"^data\.path: '.*mix\.json' is not JSON \({told}.*\); give a JSON list"):
        read_conversations(tmp_path / "mix.json", max_bad_fraction=0.9)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ('{"id": ' + "9" * 5000 + "}", "a number of too many digits"),
        ('{"id": "r2", "more": ' + "[" * 100_000 + '"]"' + "]" * 100_000 + "}", "too many brackets inside each other"),
        (record_text(id="\ud800"), "surrogate"),
        (record_text(source="\ud800"), "surrogate"),
        (record_text(conversations=said(answer="\udfff")), "surrogate"),
        (record_text(conversations=said("\ud800?")), "surrogate"),
        (record_text(image="\ud800.png"), "surrogate"),
        (record_text(conversations=[{"from": ["human"], "value": "a"}]), "role"),
        (record_text(id="\ud800", conversations=3), "neither 'conversations' nor"),
    ],
)  # fmt: skip
def test_a_record_that_nothing_can_be_made_of_is_named_and_counted(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    chunk: int,
    suffix: str,
    bad: str,
    told: str,
) -> None:
    monkeypatch.setattr(sources, "CHUNK", chunk)
    good = [json.dumps(record) for record in json.loads(records_text())]
    lines = [*good[:2], bad, *good[2:]]
    file = tmp_path / f"mix.{suffix}"
    file.write_text("[" + ",\n".join(lines) + "]" if suffix == "json" else "\n".join(lines))
    with pytest.raises(
        UserError, match=rf"1 of 7 records cannot be used, the first: (record 2|line 3|record '.*'): .*{told}"
    ):
        read_conversations(file)
    records = read_conversations(file, max_bad_fraction=0.2)
    assert [record.id for record in records] == [f"r{i}" for i in range(6)]
    assert "1 of 7 records cannot be used" in caplog.text


def test_bytes_that_are_no_utf8_cost_their_record(tmp_path: Path) -> None:
    file = tmp_path / "mix.json"
    file.write_bytes(records_text().encode().replace(b"3? ", b"3?\xe9"))
    with pytest.raises(
        UserError, match=r"1 of 6 records cannot be used, the first: record 'r3': .* bytes that are no UTF-8"
    ):
        read_conversations(file)
    assert len(read_conversations(file, max_bad_fraction=0.2)) == 5


@pytest.mark.parametrize("name", ["mix.json", "mix.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    records = json.loads(records_text())
    content = json.dumps(records) if name == "mix.json" else "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert len(read_conversations(tmp_path / name)) == 6


def test_a_name_that_stands_twice_in_a_list_of_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    entry = '"a": {"annotation": "a.jsonl"}'
    (tmp_path / "list.json").write_text(f"{{{entry}, {entry}}}")
    with pytest.raises(UserError, match="the key 'a' stands twice"):
        read_conversations(tmp_path / "list.json")


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("key", ["conversations", "value"])
def test_a_key_that_stands_twice_is_told_by_record(tmp_path: Path, suffix: str, key: str) -> None:
    good, bad = record_text(), record_text()
    at = bad.index(f'"{key}"')
    bad = bad[:at] + f'"{key}": 1, ' + bad[at:]
    file = tmp_path / f"x.{suffix}"
    file.write_text(f"[{good}, {bad}]" if suffix == "json" else f"{good}\n{bad}\n")
    records = read_conversations(file, max_bad_fraction=0.5)
    assert len(records) == 1 and f"the key {key!r} stands twice in one object" in records.problems[0]
    with pytest.raises(UserError, match=r"1 of 2 records cannot be used, the first: (record|line) \d: the key"):
        read_conversations(file)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_another_encoding_is_named(tmp_path: Path, encoding: str, suffix: str) -> None:
    (tmp_path / f"x.{suffix}").write_bytes(f"[{record_text()}]".encode(encoding))
    with pytest.raises(UserError, match=r"cannot be read \(it is in UTF-16 or UTF-32; save it as UTF-8\)"):
        read_conversations(tmp_path / f"x.{suffix}")


def test_a_name_that_no_file_can_have_is_that_of_a_missing_image(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(f"[{record_text(image='a' * 5000)}, {record_text(image=chr(0))}]")
    records = read_conversations(file)
    assert len(missing_images(records)) == 2 and all(image_stamps(records))


ASKED, SAID = {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}
PART = {"type": "image", "image": "a.png"}


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"video": "v.mp4", "conversations": [ASKED, SAID]}, "has 'video'; text and still images are supported"),
        ({"image": "a.png", "images": ["b.png"], "conversations": [ASKED, SAID]}, "name different images; keep one"),
        (
            {
                "images": ["b.png"],
                "messages": [{"role": "user", "content": [PART]}, {"role": "assistant", "content": "x"}],
            },
            "name different images; keep one",
        ),
        (
            {"messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": [PART]}]},
            "an answer shows an image; only questions do",
        ),
        ({"image": "data:image/png;base64,AAAA", "conversations": [ASKED, SAID]}, "holds an image inlined as text"),
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": "<image> or <image>?"}, SAID]},
            "one image, but 2 tags <image> in a question",
        ),
    ],
)
def test_what_would_be_read_as_something_else_is_refused(record, told):
    with pytest.raises(BadRecordError, match=re.escape(told)):
        row_of({"id": "1", **record}, 0)


def test_paths_that_are_absolute_need_no_root():
    row = row_of({"id": "1", "image": "/data/a.png", "conversations": [ASKED, SAID]}, 0, "imgs/")
    assert row["images"] == ["/data/a.png"]
    assert row_of({"id": "1", "image": "a.png", "conversations": [ASKED, SAID]}, 0, "imgs/")["images"] == ["imgs/a.png"]


def test_of_a_published_data_set_the_split_for_training_is_taken(tmp_path, caplog):
    for name in ("train-00000-of-00001", "test-00000-of-00001"):
        (tmp_path / f"{name}.parquet").touch()
    assert [part.file.name for part in parts_of(str(tmp_path))] == ["train-00000-of-00001.parquet"]
    assert "1 of 2 files are those of the split 'train'" in caplog.text
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    assert [part.file.name for part in parts_of(str(tmp_path))] == ["test-00000-of-00001.parquet"]
    for split in ("train", "test"):
        (tmp_path / "default" / split).mkdir(parents=True)
        (tmp_path / "default" / split / "0000.parquet").touch()
    assert [part.file for part in parts_of(str(tmp_path))] == [tmp_path / "default/train/0000.parquet"]
    own = tmp_path / "own"
    own.mkdir()
    for name in ("train_a", "mine"):
        (own / f"{name}.parquet").touch()
    assert len(parts_of(str(own))) == 2
