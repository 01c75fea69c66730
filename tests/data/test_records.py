from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from efficientllava.data.records import (
    Record,
    Turn,
    open_image,
    open_images,
    text_contents,
)
from efficientllava.data.table import read_conversations
from efficientllava.runtime.errors import UserError


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "coco").mkdir()
    Image.new("L", (8, 6), 200).save(tmp_path / "coco" / "a.png")
    return tmp_path


def write(folder: Path, records: Any, name: str = "data.json") -> Path:
    path = folder / name
    lines = "\n".join(json.dumps(record) for record in records) if name.endswith("l") else json.dumps(records)
    path.write_text(lines, "utf-8")
    return path


GOOD: list[dict[str, Any]] = [
    {"id": "x", "image": "coco/a.png", "conversations": talk("<image>\nwhat?", "a cat", "sure?", "yes")},
    {"id": "y", "conversations": talk("hello", "hi")},
]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_records(folder: Path, name: str) -> None:
    first, second = read_conversations(write(folder, GOOD, name))
    assert first == Record(
        "x", folder / "coco" / "a.png", (Turn("what?", "a cat"), Turn("sure?", "yes")), False, "coco"
    )
    assert second == Record("y", None, (Turn("hello", "hi"),), False, "text")
    image = open_image(first)
    assert image is not None
    assert (image.size, image.mode) == ((8, 6), "RGB")
    assert open_image(second) is None


def test_a_table_of_both_styles_has_null_under_the_other_s_names(folder: Path) -> None:
    said = [{"from": None, "role": "user", "value": None, "content": "hello"}]
    said.append({"from": "gpt", "role": None, "value": "hi", "content": None})
    (record,) = read_conversations(write(folder, [{"id": "y", "conversations": None, "messages": said}]))
    assert record.turns == (Turn("hello", "hi"),)


def test_hugging_face_messages(folder: Path) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
    listed = {"images": ["coco/a.png"], "messages": [{"role": "user", "content": content}, answer]}
    inline = {
        "messages": [{"role": "user", "content": [{"type": "image", "path": "coco/a.png"}, *content[1:]]}, answer]
    }
    records = read_conversations(write(folder, [listed, inline]))
    assert [record.image for record in records] == [folder / "coco" / "a.png"] * 2
    assert all(record.turns == (Turn("what?", "a cat"),) for record in records)
    assert [record.id for record in records] == ["0", "1"]


def test_the_place_of_one_image_is_kept(folder: Path) -> None:
    middle = {"image": "coco/a.png", "conversations": talk("what is\n<image>\nthis?", "a cat")}
    later = {"image": "coco/a.png", "conversations": talk("hello", "hi", "what?\n<image>", "a cat")}
    first, second = read_conversations(write(folder, [middle, later]))
    assert first.turns == (Turn("what is\n\nthis?", "a cat", images_at=(8,)),)
    assert second.turns == (Turn("hello", "hi"), Turn("what?\n", "a cat", images_at=(6,)))


def test_several_images_stand_where_their_tags_do(folder: Path) -> None:
    Image.new("RGB", (3, 3)).save(folder / "b.png")
    images = ["coco/a.png", "b.png"]
    placed = {"image": images, "conversations": talk("A: <image>\nB: <image>\nsame? ", "no")}
    later = {"image": images, "conversations": talk("<image>what?", "a cat", "and\n<image>", "a dog")}
    loose = {"image": images, "conversations": talk("same?", "no")}
    first, second, third = read_conversations(write(folder, [placed, later, loose]))
    assert first.images == (folder / "coco" / "a.png", folder / "b.png")
    assert [image.size for image in open_images(first)] == [(8, 6), (3, 3)]
    assert first.turns == (Turn("A: B: same?", "no", images_at=(3, 6)),)
    assert second.turns == (Turn("what?", "a cat", images_at=(0,)), Turn("and\n", "a dog", images_at=(4,)))
    assert third.turns == (Turn("same?", "no"),)


def test_a_tag_inside_a_line_of_a_text_is_no_image(folder: Path) -> None:
    (record,) = read_conversations(write(folder, [{"conversations": talk("close <image> in XML", "with a slash")}]))
    assert (record.images, record.turns[0].question) == ((), "close  in XML")


def test_leading_answer_is_dropped_and_repeated_ids_are_numbered(folder: Path) -> None:
    leading = {"id": "y", "conversations": [{"from": "gpt", "value": "hm"}, *talk("hello", "hi")]}
    records = read_conversations(write(folder, [*GOOD, leading]))
    assert records[2].turns == (Turn("hello", "hi"),)
    assert [record.id for record in records] == ["x", "y", "y#2"]
    records = read_conversations(write(folder, [{**GOOD[1], "id": name} for name in ("y", "y", "y#2", "y")]))
    assert [record.id for record in records] == ["y", "y#2", "y#2#2", "y#3"]


def test_an_image_that_is_null_hides_no_images(folder: Path) -> None:
    both = {**GOOD[0], "image": None, "images": ["coco/a.png"]}
    (record,) = read_conversations(write(folder, [both]))
    assert record.images == (folder / "coco" / "a.png",)


BAD = {
    "roles do not alternate": {"conversations": [*talk("a"), *talk("b", "c")]},
    "roles do not": {"conversations": talk("a")},
    "role 'robot'": {"conversations": [{"from": "robot", "value": "a"}]},
    "neither 'conversations'": {"image": "coco/a.png"},
    "2 images, but 1 tags": {"image": ["coco/a.png", "coco/a.png"], "conversations": talk("<image> a", "b")},
    "image is a int": {"image": 3, "conversations": talk("a", "b")},
    "shows <image>, but neither": {"img": "coco/a.png", "conversations": talk("<image>\nwhat?", "b")},
    "an empty answer": {"conversations": talk("a", " ")},
    "instead of an object": "text",
}


@pytest.mark.parametrize("says", BAD)
def test_corrupt_records_fail_or_are_counted(folder: Path, says: str, caplog: pytest.LogCaptureFixture) -> None:
    path = write(folder, [*GOOD, BAD[says]])
    with pytest.raises(UserError, match=f"1 of 3 records cannot be used.*{says}.*data.max_bad_fraction"):
        read_conversations(path)
    assert [record.id for record in read_conversations(path, max_bad_fraction=0.4)] == ["x", "y"]
    assert "1 of 3 records cannot be used" in caplog.text


def test_a_broken_line_is_one_corrupt_record(folder: Path) -> None:
    path = write(folder, GOOD, "data.jsonl")
    path.write_text(path.read_text() + "\n{oops\n")
    with pytest.raises(UserError, match="line 3: not JSON"):
        read_conversations(path)
    assert len(read_conversations(path, max_bad_fraction=0.5)) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [("{oops", "is not JSON"), ('{"a": 1}', "holds a dict"), ("[]", "holds no record"), (None, "cannot be read")],
)
def test_faulty_files_are_named(folder: Path, text: str | None, says: str) -> None:
    path = folder / "data.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        read_conversations(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_missing_image_root_is_named(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.image_root: .*nowhere"):
        read_conversations(write(folder, GOOD), folder / "nowhere")


def test_everything_that_a_record_says_is_content() -> None:
    turn = Turn("what is it?", "a cat")
    record = Record("x", None, (turn,), False, "")
    turns = [
        {"question": "where?"},
        {"answer": "a dog"},
        {"kind": "pet"},
        {"sees_image": False},
        {"images_at": (3,)},
    ]
    assert {name for change in turns for name in change} == {field.name for field in fields(Turn)}
    others = [replace(record, turns=(replace(turn, **change),)) for change in turns]
    others += [replace(record, id="y"), replace(record, independent=True), replace(record, details={"a": 1})]
    assert len({text_contents([each]) for each in [record, *others]}) == 1 + len(others)


def test_broken_image_is_named_when_it_is_opened(folder: Path) -> None:
    whole = (folder / "coco" / "a.png").read_bytes()
    (folder / "coco" / "a.png").write_bytes(whole[: len(whole) // 2])
    record = read_conversations(write(folder, GOOD))[0]
    with pytest.raises(UserError, match=r"record 'x': image .*a.png' cannot be read"):
        open_image(record)


def test_an_image_that_is_a_decompression_bomb_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match=r"record 'x': image .*a.png' cannot be read .*48 pixels.* exceeds"):
        open_image(read_conversations(write(folder, GOOD))[0])
