from __future__ import annotations

import numpy as np
from numpy.random import PCG64, Generator

from efficientllava.data.embedded.scenes import (
    CELL,
    COLOURS,
    FULL,
    GLYPH,
    Glyph,
    compose,
    draw,
    strokes,
)


def test_parts_share_no_digit_image_and_cover_all() -> None:
    parts = {name: strokes(name) for name in ("train", "minival", "test")}
    images = {name: {image.tobytes() for image in part.images} for name, part in parts.items()}
    assert sum(len(part.images) for part in parts.values()) == 1797
    for first, second in (("train", "test"), ("train", "minival"), ("minival", "test")):
        assert not images[first] & images[second]
    for part in parts.values():
        assert all(len(index) > 5 for index in part.by_digit)


def test_enlarged_digits_keep_their_range_and_their_ink() -> None:
    from sklearn.datasets import load_digits

    every = np.concatenate([strokes(name).images for name in ("train", "minival", "test")])
    assert every.shape[1:] == (GLYPH, GLYPH)
    assert every.min() == 0
    assert every.max() <= FULL
    # Bilinear enlargement spreads the ink over (GLYPH / 8)^2 times as many pixels, but for the rim.
    ratio = every.mean() / GLYPH**2 / load_digits().images.mean()  # pyright: ignore[reportAttributeAccessIssue]
    assert 0.9 < ratio < 1.1


def test_scenes_hold_different_digits_in_different_places() -> None:
    rng = Generator(PCG64(0))
    sizes = set()
    for _ in range(200):
        scene = compose(rng, "test")
        sizes.add(len(scene))
        assert len({glyph.digit for glyph in scene}) == len({glyph.place for glyph in scene}) == len(scene)
        assert all(strokes("test").digits[glyph.stroke] == glyph.digit for glyph in scene)
    assert sizes == {1, 2, 3, 4}
    assert all(len(compose(rng, "train", max_digits=2)) <= 2 for _ in range(50))


def test_a_digit_is_painted_in_its_place_and_colour() -> None:
    images = np.full((1, GLYPH, GLYPH), FULL)
    picture = np.asarray(draw(Generator(PCG64(1)), (Glyph(3, "green", 2, 0),), images)).astype(float)
    inside = picture[CELL + 2 : 2 * CELL - 2, 2 : CELL - 2].reshape(-1, 3).mean(0)
    assert np.abs(inside - COLOURS["green"]).max() < 5
    assert picture[:CELL].max() < 60
    assert picture[:, CELL:].max() < 60
    assert 9 < picture[:CELL, CELL:].std() < 11
