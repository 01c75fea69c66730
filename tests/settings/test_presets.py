"""The presets of arXiv 2604.24380: they compose, and make the models whose sizes it prints."""

from __future__ import annotations

import importlib.util

import pytest

from efficientllava.estimate import forecast, shape_of
from efficientllava.report.study import table
from efficientllava.settings.compose import presets
from efficientllava.stages.request import check

from ..runs import ROOT

FOLDER = ROOT / "experiments" / "vlmcompression"


def load_sizes():
    spec = importlib.util.spec_from_file_location("sizes", FOLDER / "sizes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIZES = load_sizes()
PUBLISHED = [name for name in presets() if name.startswith("vlmcompression_")]


def test_there_is_one_for_every_published_model():
    printed = (
        (f, m, label) for f, methods in SIZES.PRINTED.items() for m, labels in methods.items() for label in labels
    )
    assert {*PUBLISHED} == {f"vlmcompression_{family}_{method}{label}" for family, method, label in printed}
    assert not {f"{name}.yaml" for name in presets()} & {p.name for p in (ROOT / "conf/experiment").iterdir()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_composes(name):
    settings = SIZES.settings_of(name)
    check(settings, [f"experiment={name}", "dry_run=true", "trainer=cpu"])
    family, kind = name.removeprefix("vlmcompression_").split("_")
    assert settings.name == name
    assert settings.model.name.removeprefix("mini_").startswith(family)
    assert settings.prune.name == {"w": "widthwise_paper", "l": "layerwise_paper"}[kind[0]]
    assert (settings.prune.share is None) == (kind[0] == "l")
    assert (settings.recover.weights.sft, settings.recover.weights.hidden) == (0.5, 0.5)
    assert settings.recover.train == "lora"


@pytest.mark.parametrize(
    ("name", "kept", "heads", "channels"),
    [
        # layers whose heads are cut, heads kept there; layers whose channels are cut, channels kept there
        ("vlmcompression_llava_w15", 32, (28, 26), (26, 11008 - 2202)),
        ("vlmcompression_llava_w60", 32, (28, 7), (26, 11008 - 8807)),
        ("vlmcompression_bunny_w30", 32, (28, 20), (26, 10240 - 4096)),
        ("vlmcompression_bunny_w60", 32, (28, 7), (26, 10240 - 8193)),
        ("vlmcompression_internvl_w45", 32, (26, 13), (26, 8192 - 4916)),
        ("vlmcompression_internvl_l60", 12, (0, 32), (0, 8192)),
        ("vlmcompression_llava_l60", 11, (0, 32), (0, 11008)),
    ],
)
def test_the_published_shapes(name, kept, heads, channels):
    plan = forecast(SIZES.settings_of(name))
    before, after = shape_of(plan.base)[0], shape_of(plan.pruned)
    assert len(after) == kept
    for index, (count, size) in ((0, heads), (2, channels)):
        cut = [layer[index] for layer in after if layer[index] != before[index]]
        assert cut == [size] * count


def test_the_table_in_the_readme_is_what_its_command_prints():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert table(SIZES.HEAD, SIZES.rows(), 2) in readme
    for label, printed in SIZES.PRINTED["llava"]["w"].items():
        _, left = SIZES.sizes(f"vlmcompression_llava_w{label}")
        # 4.95 B stands as 5.0 in print.
        assert abs(left - printed) <= 0.0505
