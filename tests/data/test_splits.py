from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import pytest

from efficientllava.data.datamodule import ids_digest
from efficientllava.data.embedded.digits import Digits
from efficientllava.data.records import Record, Subset, Turn, column
from efficientllava.data.splits import (
    calibration_records,
    draw,
    groups_of,
    keep_back,
    load_split,
    split_folds,
)
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import CalibrationConfig, DataConfig, RunConfig

DIGITS = DataConfig(name="digits_vqa", images=200)


def ids(records) -> list[str]:
    return [records[index].id for index in range(len(records))]


@pytest.fixture
def talks(tmp_path: Path) -> DataConfig:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(50)]))
    return DataConfig(name="conversations", path=str(path))


def test_digits_splits_have_the_configured_sizes() -> None:
    assert len(load_split(DIGITS, "train")) == 200
    assert ids(load_split(DIGITS, "train", seed=0)) == ids(load_split(DIGITS, "train", seed=5))
    first, second = (ids(load_split(DIGITS, "calibration", seed))[:20] for seed in (0, 1))
    assert first != second
    assert first == ids(load_split(DIGITS, "calibration", 0))[:20]


def test_a_file_is_divided_without_overlap(talks: DataConfig) -> None:
    parts = {split: set(ids(load_split(talks, split, seed=3))) for split in ("train", "calibration", "minival")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 40, "calibration": 5, "minival": 5}
    assert len(set().union(*parts.values())) == 50
    assert parts["calibration"] == set(ids(load_split(talks, "calibration", seed=4)))


def test_calibration_is_a_seeded_draw(talks: DataConfig) -> None:
    eight = calibration_records(CalibrationConfig(samples=8), DIGITS, 0)
    assert len(eight) == 8
    assert [record.id for record in eight] == [
        record.id for record in calibration_records(CalibrationConfig(8), DIGITS)
    ]
    own = calibration_records(CalibrationConfig(samples=12, path=talks.path), DIGITS, 1)
    assert len({record.id for record in own}) == 12
    with pytest.raises(UserError, match=r"calibration.samples=51: only 50"):
        calibration_records(CalibrationConfig(samples=51, path=talks.path), DIGITS)


def test_draw_is_seeded_nested_and_stratified() -> None:
    records = [Record(str(i), None, (Turn("q", "a"),), False, "ab"[i % 4 == 0]) for i in range(100)]
    tenth, fifth = draw(records, 0.1, 0), draw(records, 0.2, 0)
    assert ids(tenth) == ids(draw(records, 0.1, 0))
    assert ids(tenth) != ids(draw(records, 0.1, 1))
    assert ids(tenth) == sorted(ids(tenth), key=int)
    assert Counter(record.source for record in fifth) == {"a": 15, "b": 5}
    assert set(ids(tenth)) - set(ids(fifth)) == set()
    assert len(tenth) == 10
    assert len(draw(records, 0.001, 0)) == 1
    assert draw(records, 1.0, 0) is records


def test_default_fraction_is_two_hundred_images() -> None:
    drawn = draw(Digits("train"), 0.05, 0)
    assert len(drawn) == 200
    assert column(drawn, "id")[3] == drawn[3].id


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_draw_rejects_what_is_no_share(fraction: float) -> None:
    with pytest.raises(UserError, match="data_frac"):
        draw(Digits("train"), fraction, 0)


def test_digest_tells_records_and_their_order_apart() -> None:
    data = Digits("train", 20)
    assert ids_digest(Subset(data, [0, 1, 2])) == ids_digest(Digits("train", 3))
    assert len({ids_digest(Subset(data, index)) for index in ([0, 1], [1, 0], [0, 2])}) == 3


@pytest.mark.parametrize(
    ("data", "split", "says"),
    [
        (DIGITS, "dev", "'dev' is not one of"),
        (DataConfig(name="conversations"), "train", "data.path: not set"),
    ],
)
def test_faulty_requests_are_named(data: DataConfig, split: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_split(data, split)


def prose(*ids: str) -> list[dict]:
    return [
        {"id": i, "conversations": [{"from": "human", "value": f"on {i}"}, {"from": "gpt", "value": f"so {i}"}]}
        for i in ids
    ]


def test_documents_and_images_are_in_one_split_and_have_one_role(tmp_path: Path) -> None:
    records = prose(*(f"book{i // 5}/{i}" for i in range(200)))
    for index, record in enumerate(records[:100]):
        record |= {"id": f"x{index}", "image": f"{index // 4}.png"}
    (tmp_path / "data.json").write_text(json.dumps(records))
    data = DataConfig(name="conversations", path=str(tmp_path / "data.json"))
    parts = [load_split(data, split) for split in ("train", "calibration", "minival")]
    listed = [[part[i] for i in range(len(part))] for part in parts]
    every = [record for part in listed for record in part]
    group_of = dict(zip((record.id for record in every), groups_of(every), strict=True))
    groups = [{group_of[record.id] for record in part} for part in listed]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 45
    assert [len(part) for part in parts] == pytest.approx([160, 20, 20], abs=3)
    roles = [{group_of[record.id] for record in part} for part in split_folds(listed[0][:150])]
    assert all(roles) and sum(map(len, roles)) == len(set().union(*roles))
    table = [[record.id for record in part] for part in split_folds(parts[0])]  # which makes its records anew
    assert table == [[record.id for record in part] for part in split_folds(listed[0])] and all(table)


def test_images_that_lie_inside_the_data_are_in_one_split_as_well(tmp_path: Path) -> None:
    rows = [{"id": f"q{i}", "image": {"bytes": b"%d" % (i // 5), "path": None}} for i in range(200)]
    datasets.Dataset.from_list([row | {"conversations": prose("q")[0]["conversations"]} for row in rows]).to_parquet(
        tmp_path / "data.parquet"
    )
    data = DataConfig(name="conversations", path=str(tmp_path / "data.parquet"))
    shown = [{*groups_of(load_split(data, split))} for split in ("train", "calibration", "minival")]
    assert sum(map(len, shown)) == len(set().union(*shown)) == 40


def test_ids_that_name_one_document_are_cut_one_by_one() -> None:
    records = [Record(f"data/{i}", None, (Turn(f"q{i}", "a"),), False, "") for i in range(16)]
    assert [len(part) for part in split_folds(records)] == [8, 4, 4]


def kept_back(tmp_path: Path, count: int, samples: int, report: int = 8, data: str | None = None) -> tuple[list, list]:
    (tmp_path / "own.json").write_text(json.dumps(prose(*(f"book{i // 4}/{i}" for i in range(count)))))
    config = RunConfig(name="x", seed=1)
    config.calibration = CalibrationConfig(samples=samples, path=str(tmp_path / "own.json"), report=report)
    config.data = DataConfig(name="conversations", path=data)
    return keep_back(config, calibration_records(config.calibration, config.data, 1))


def test_losses_are_reported_on_what_no_choice_has_seen(tmp_path: Path) -> None:
    # Of 64 records all are drawn: whole documents among them are kept back.
    fit, report = kept_back(tmp_path, 64, 64)
    assert len(fit) + len(report) == 64 and 4 <= len(report) <= 8
    assert not {record.id.partition("/")[0] for record in fit} & {record.id.partition("/")[0] for record in report}
    # Of more, others are.
    fit, report = kept_back(tmp_path, 400, 32)
    assert (len(fit), len(report)) == (32, 8)
    assert not {record.id.partition("/")[0] for record in fit} & {record.id.partition("/")[0] for record in report}
    assert kept_back(tmp_path, 64, 64, report=0)[1] == []
    assert kept_back(tmp_path, 2, 2) == (kept_back(tmp_path, 2, 2, report=0)[0], [])


def test_the_minival_of_the_data_is_reported_on_without_what_calibrates(tmp_path: Path, talks: DataConfig) -> None:
    texts = [*prose(*(f"talk{i // 4}/{i}" for i in range(200)))]
    (tmp_path / "talks.json").write_text(json.dumps(texts))
    fit, report = kept_back(tmp_path, 64, 64, data=str(tmp_path / "talks.json"))
    minival = load_split(DataConfig(name="conversations", path=str(tmp_path / "talks.json")), "minival", 1)
    assert len(fit) == 64 and report == [minival[i] for i in range(len(minival))]
    # The same file: what was drawn is left out, and where nothing remains, part of it is kept back.
    (tmp_path / "talks.json").write_text((tmp_path / "own.json").read_text())
    fit, report = kept_back(tmp_path, 64, 64, data=str(tmp_path / "talks.json"))
    assert len(fit) + len(report) == 64 and report


def test_prose_is_mixed_into_calibration_records():
    found = calibration_records(CalibrationConfig(samples=8, prose=3), DIGITS)
    assert [record.source == "prose" for record in found] == [False, True] * 3 + [False] * 2
    assert found[::2][:3] == calibration_records(CalibrationConfig(samples=3), DIGITS)
    assert all(record.source == "prose" for record in calibration_records(CalibrationConfig(4, prose=4), DIGITS))
    with pytest.raises(UserError, match=r"calibration\.prose=5: must be at most calibration\.samples=4"):
        calibration_records(CalibrationConfig(4, prose=5), DIGITS)


def test_a_corpus_of_texts_is_no_document_and_leaves_images_to_training(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    texts = [{"id": f"{name}/{i}", "conversations": turns} for name in "abcde" for i in range(40)]
    shown = [{"id": f"s{i}", "image": f"{i}.png", "conversations": turns} for i in range(20)]
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps([*texts, *shown]))
    data = DataConfig(name="conversations", path=str(path))
    parts = {split: load_split(data, split) for split in ("train", "calibration", "minival")}
    assert [len(part) for part in parts.values()] == [176, 22, 22]
    assert all(any(record.images for record in part) for part in (parts["train"],))
    assert all(any(not record.images for record in part) for part in parts.values())


def test_a_text_under_two_ids_is_in_one_split_and_has_one_role(tmp_path: Path) -> None:
    once = prose(*(f"book{i // 5}/{i}" for i in range(200)))
    again = [record | {"id": f"copy{i}/{i}"} for i, record in enumerate(once)]
    for name, records in {
        "books": [*once, *again],
        "corpus": [r | {"id": str(i)} for i, r in enumerate(once + again)],
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
        data = DataConfig(name="conversations", path=str(tmp_path / f"{name}.json"))
        parts = [load_split(data, split) for split in ("train", "calibration", "minival")]
        texts = [{record.turns[0].question for record in (part[i] for i in range(len(part)))} for part in parts]
        assert sum(map(len, texts)) == 200 and all(texts)
        some = [parts[0][i] for i in range(len(parts[0]))]
        roles = [{record.turns[0].question for record in part} for part in split_folds(some)]
        assert all(roles) and sum(map(len, roles)) == len(set().union(*roles))


def test_records_of_several_images_share_none_with_another_split(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image><image>q"}, {"from": "gpt", "value": "a"}]
    pairs = [(i % 30, 30 + (7 * i) % 30) for i in range(60)]
    records = [
        {"id": f"m{i}", "images": [f"{a}.png", f"{b}.png"], "conversations": turns} for i, (a, b) in enumerate(pairs)
    ]
    singles = [{"id": f"s{i}", "image": f"{60 + i}.png", "conversations": turns[1:] and [
        {"from": "human", "value": "q"}, turns[1]]} for i in range(60)]  # fmt: skip
    path = tmp_path / "several.json"
    path.write_text(json.dumps([*records, *singles]))
    data = DataConfig(name="conversations", path=str(path))
    seen = [{str(image) for record in load_split(data, split) for image in record.images}
            for split in ("train", "calibration", "minival")]  # fmt: skip
    assert all(seen) and not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_an_image_that_all_records_show_binds_none(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image><image>q"}, {"from": "gpt", "value": "a"}]
    records = [{"id": f"m{i}", "images": [f"{i // 2}.png", "logo.png"], "conversations": turns} for i in range(100)]
    (tmp_path / "logo.json").write_text(json.dumps(records))
    data = DataConfig(name="conversations", path=str(tmp_path / "logo.json"))
    parts = [load_split(data, split) for split in ("train", "calibration", "minival")]
    assert [len(part) for part in parts] == [80, 10, 10]
    seen = [{str(part[i].images[0]) for i in range(len(part))} for part in parts]
    assert sum(map(len, seen)) == 50
