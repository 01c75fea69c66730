import os

import numpy as np
import pytest
from PIL import Image

from efficientllava.data.records import Record, Turn
from efficientllava.evaluation.tasks.digits_vqa import digits_vqa
from efficientllava.report.pictures import choose, draw_samples
from efficientllava.runtime.errors import UserError


@pytest.fixture(scope="module")
def records():
    return digits_vqa(60).records()


def _count(path, colour):
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((np.abs(pixels - colour).max(-1) <= 2).sum())


GREEN, RED = (0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E)


def test_right_answers_are_green_and_wrong_ones_red(tmp_path, records):
    right = [(record.turns[0].answer, 1.0) for record in records]
    draw_samples(records, {"base": right}, tmp_path / "right.png")
    draw_samples(records, {"base": [("", 0.0) for _ in records]}, tmp_path / "wrong.png")
    assert _count(tmp_path / "right.png", GREEN) > 200 and _count(tmp_path / "right.png", RED) == 0
    assert _count(tmp_path / "wrong.png", RED) > 200 and _count(tmp_path / "wrong.png", GREEN) == 0
    draw_samples(records, {"base": [("x", None) for _ in records]}, tmp_path / "unknown.png")
    assert _count(tmp_path / "unknown.png", RED) == _count(tmp_path / "unknown.png", GREEN) == 0
    assert sorted(os.listdir(tmp_path)) == ["right.png", "unknown.png", "wrong.png"]


def test_small_images_are_enlarged_without_smoothing(tmp_path):
    pixels = np.random.default_rng(0).choice([0, 255], (4, 4, 3)).astype(np.uint8)
    record = Record("a", Image.fromarray(pixels), (Turn("what?", "red"),), True, "x")
    draw_samples([record], {"base": [("red", 1.0)]}, tmp_path / "one.png")
    picture = np.asarray(Image.open(tmp_path / "one.png").convert("RGB"))
    for colour in {tuple(int(v) for v in value) for value in pixels.reshape(-1, 3)}:
        share = (pixels.reshape(-1, 3) == colour).all(-1).sum() / 16
        assert _count(tmp_path / "one.png", colour) > 0.8 * share * (0.2 * picture.shape[1]) ** 2


def test_eight_different_types_are_chosen_without_looking_at_the_answers(records):
    chosen = choose(records)
    assert len(chosen) == 8 and chosen == sorted(chosen)
    assert len({records[index].turns[0].kind for index in chosen}) == 8
    assert all(records[index].image is not None for index in chosen)


def test_fewer_questions_than_asked_for(tmp_path, records):
    with_image = [record for record in records if record.image is not None][:3]
    assert choose(with_image) == [0, 1, 2]
    assert choose([record for record in records if record.image is None]) == []
    draw_samples(with_image, {"base": [("x " * 200, 0.0)] * 3, "recovered": [("", None)] * 3}, tmp_path / "few.png")
    assert Image.open(tmp_path / "few.png").width > 1000


def test_conversations_and_dollars_are_drawn_as_they_are(tmp_path, records):
    turns = (Turn(r"Is $\frac{1}{2}x$ \foo $\foo$ here?", r"$$x^2$$"), Turn("And now?", "no"))
    record = Record("a", records[0].image, turns, False, "x")
    draw_samples([record], {"base": [(r"$\begin{bmatrix}1\end{bmatrix}$", 0.0)]}, tmp_path / "one.png")
    assert _count(tmp_path / "one.png", RED) > 20


def test_a_folder_that_is_missing_is_a_user_error(tmp_path, records):
    with pytest.raises(UserError, match="cannot be written"):
        draw_samples(records, {"base": [("x", 0.0)] * len(records)}, tmp_path / "nowhere" / "samples.png")
