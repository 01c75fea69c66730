from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from efficientllava.data.conversations import Record, Turn
from efficientllava.data.digits import Digits
from efficientllava.data.splits import calibration_records, digest, draw, load_split
from efficientllava.data.subset import Subset
from efficientllava.errors import UserError
from efficientllava.schema import CalibrationConfig, DataConfig

DIGITS = DataConfig(name="digits_vqa", images=200, test_questions=50)


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
    assert len(load_split(DIGITS, "test")) == 50
    assert ids(load_split(DIGITS, "test", seed=0)) == ids(load_split(DIGITS, "test", seed=5))
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
    assert drawn.record_id(3) == drawn[3].id  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5])
def test_draw_rejects_what_is_no_share(fraction: float) -> None:
    with pytest.raises(UserError, match="data_frac"):
        draw(Digits("train"), fraction, 0)


def test_digest_tells_records_and_their_order_apart() -> None:
    data = Digits("train", 20)
    assert digest(Subset(data, [0, 1, 2])) == digest(Digits("train", 3))
    assert len({digest(Subset(data, index)) for index in ([0, 1], [1, 0], [0, 2])}) == 3


@pytest.mark.parametrize(
    ("data", "split", "says"),
    [
        (DIGITS, "dev", "'dev' is not one of"),
        (DataConfig(name="conversations"), "train", "data.path: not set"),
        (DataConfig(name="conversations", path="x.json"), "test", "no test split"),
    ],
)
def test_faulty_requests_are_named(data: DataConfig, split: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_split(data, split)
