"""Layers timed in the installed runtime."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from efficientllava.checkpoint.folder import load
from efficientllava.deploy.latency import seconds

from .conftest import needs_runtime


@needs_runtime
def test_more_layers_take_longer_and_the_same_ones_as_long(tmp_path: Path) -> None:
    checkpoint = load("builtin:tiny_internvl", "float32")
    clock = partial(seconds, checkpoint.processor, "f16", tmp_path)
    (alone,) = clock(checkpoint.model, [0], (32, 8), [nullcontext()])
    same, again = clock(checkpoint.model, range(4), (32, 8), [nullcontext(), nullcontext()])
    assert alone < same and again == pytest.approx(same, rel=0.5)
    assert not [*tmp_path.iterdir()]
