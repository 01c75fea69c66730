from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from efficientllava.data.embedded.digits import (
    IMAGE_KINDS,
    KINDS,
    TEXT_KINDS,
    Digits,
)
from efficientllava.data.embedded.scenes import strokes
from efficientllava.data.records import column
from efficientllava.runtime.errors import UserError


def test_records_are_the_same_on_every_machine() -> None:
    # Recorded once; integer arithmetic and PCG64 give the same bytes everywhere.
    hasher = hashlib.sha256()
    for split in ("train", "calibration", "minival", "test"):
        data = Digits(split)
        for index in range(50):
            record = data[index]
            turns = [(turn.question, turn.answer, turn.kind, turn.sees_image) for turn in record.turns]
            hasher.update(record.id.encode() + repr(turns).encode())
            hasher.update(record.image.tobytes() if record.image is not None else b"-")  # pyright: ignore
    assert hasher.hexdigest() == "8257e0a09937e384b8ec9e3d04a324ead45728ef03d22d84cb2400c6a09f91b8"


def test_splits_differ_and_draw_on_their_own_strokes() -> None:
    sizes = {split: len(Digits(split)) for split in ("train", "calibration", "minival", "test")}
    assert sizes == {"train": 4000, "calibration": 1000, "minival": 500, "test": 2000}
    pictures = {split: {Digits(split)[i].image.tobytes() for i in range(100)} for split in ("train", "calibration")}  # pyright: ignore
    assert not pictures["train"] & pictures["calibration"]
    for split, part in (("train", "train"), ("calibration", "train"), ("minival", "minival"), ("test", "test")):
        digits = strokes(part).digits
        assert all(digits[glyph.stroke] == glyph.digit for i in range(100) for glyph in Digits(split).scene(i))


def test_pool_asks_ten_questions_of_which_two_are_text_only() -> None:
    for index in range(50):
        record = Digits("train")[index]
        assert record.independent
        assert len(record.turns) == 10
        assert sum(turn.kind in TEXT_KINDS for turn in record.turns) == 2
        kinds = [turn.kind for turn in record.turns if turn.sees_image]
        assert len(set(kinds)) == 8


def test_test_split_asks_single_questions_of_all_kinds() -> None:
    data = Digits("test")
    counts = Counter(data[index].turns[0].kind for index in range(600))
    assert set(counts) == set(KINDS)
    assert all(counts[kind] == 48 for kind in IMAGE_KINDS)
    assert all(counts[kind] == 40 for kind in TEXT_KINDS)
    assert all((data[index].image is None) == (data[index].turns[0].kind in TEXT_KINDS) for index in range(100))


def test_options_change_what_they_name() -> None:
    assert Digits("train", seed=1)[0].turns != Digits("train")[0].turns
    assert all(len(Digits("pretrain", max_digits=2).scene(i)) <= 2 for i in range(50))
    assert len(Digits("train", questions=15)[0].turns) == 15
    extra = Digits("train", extra=("count", "count"))[0].turns
    assert len(extra) == 10
    assert sum(turn.kind == "count" for turn in extra) >= 2
    blank = Digits("train", images=np.zeros_like(strokes("train").images))
    assert np.asarray(blank[0].image).max() < 60
    assert column(Digits("train"), "id")[7] == Digits("train")[7].id
    assert len(Digits("train", 3)) == len(list(Digits("train", 3))) == 3


@pytest.mark.parametrize(("split", "size", "says"), [("dev", None, "'dev'"), ("train", 0, "0 is below 1")])
def test_faulty_requests_are_named(split: str, size: int | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Digits(split, size)


def test_records_are_made_once() -> None:
    data = Digits("train")
    assert data[3] is data[3]
    endless = Digits("pretrain")
    assert endless[3] is not endless[3]
    assert endless[3].turns == endless[3].turns
