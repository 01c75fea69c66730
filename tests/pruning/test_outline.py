"""What an outline promises of a plan is what the plan turns out to be."""

from __future__ import annotations

import pytest
import torch

from efficientllava.models.anatomy import language_parameters
from efficientllava.pruning.outline import outline
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.stream import Calibration
from efficientllava.pruning.surgery import cut, pruned_config
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import PruneConfig

from ..conftest import make_batches, make_model

EXACT = {
    "local": {"method": "widthwise", "selection": "local", "ratio": 0.3},
    "floor": {"method": "widthwise", "selection": "floor", "ratio": 0.3},
    "protected": {"method": "widthwise", "selection": "local", "ratio": 0.2, "protect": [0, -1], "round_to": 8},
    "share": {"method": "widthwise", "share": 0.4, "protect_scaled": True},
    "layerwise": {"method": "layerwise", "ratio": 0.4},
    "blocks": {"method": "layerwise", "drop_layers": 3},
    "nothing": {"method": "widthwise", "ratio": 0.0},
}
OPEN = {
    "shape": {"method": "widthwise", "selection": "shape", "ratio": 0.3},
    "global": {"method": "widthwise", "selection": "global", "ratio": 0.3},
    "coarse": {"method": "widthwise", "selection": "global", "ratio": 0.45, "round_to": 16},
}


def configured(options):
    return PruneConfig(**{"name": "test", "importance": "magnitude", **options})


def on_meta(model):
    with torch.device("meta"):
        return type(model)(model.config)


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_the_shape_is_known_before_the_data_are(family, options):
    model, config = make_model(family), configured(options)
    expected = outline(on_meta(model), config)
    before = language_parameters(model)
    plan, _ = make_plan(model, Calibration(make_batches(1)), config)
    assert expected.exact
    assert expected.options == (tuple(layer.shape for layer in plan.layers),)
    assert expected.achieved == (plan.achieved, plan.achieved)
    meta = on_meta(model)
    pruned = cut(model, plan)
    assert language_parameters(pruned) == before - expected.removed[0]
    config = pruned_config(meta, plan.kept_layers, expected.options[0])
    assert config.get_text_config().to_dict() == pruned.config.get_text_config().to_dict()


@pytest.mark.parametrize("options", OPEN.values(), ids=OPEN)
def test_what_the_data_choose_lies_within_the_bounds(family, options):
    model, config = make_model(family), configured(options)
    expected = outline(on_meta(model), config)
    plan, _ = make_plan(model, Calibration(make_batches(1)), config)
    low, high = expected.achieved
    assert not expected.exact
    assert low <= plan.achieved <= high <= expected.largest + 1e-9
    if config.selection == "shape":
        assert tuple(layer.shape for layer in plan.layers) in expected.options


@pytest.mark.parametrize("family", ["llama", "phi"])
@pytest.mark.parametrize("selection", ["floor", "global"])
def test_biases_that_a_plan_adds_are_counted(family, selection):
    config = configured({"method": "widthwise", "importance": "flap", "selection": selection, "bias": True})
    model, batches = make_model(family), Calibration(make_batches(2))
    meta, before = on_meta(model), language_parameters(model)
    expected = outline(meta, config)
    plan, _ = make_plan(model, batches, config)
    pruned, _ = apply_plan(model, plan, batches, config)
    low, high = expected.removed
    assert low <= before - language_parameters(pruned) <= high
    counts = [layer.shape for layer in plan.layers]
    planned = pruned_config(meta, plan.kept_layers, counts, biased=True)
    assert planned.get_text_config().to_dict() == pruned.config.get_text_config().to_dict()
    assert (low == high) == (selection == "floor")


def test_layers_of_different_size_leave_a_range():
    model = make_model("llama")
    share = configured({"method": "widthwise", "share": 0.5, "protect": [0]})
    plan, _ = make_plan(model, Calibration(make_batches(1)), share)
    pruned = cut(model, plan)
    config = configured({"method": "layerwise", "drop_layers": 2})
    expected = outline(pruned, config)
    again, _ = make_plan(pruned, Calibration(make_batches(1)), config)
    assert not expected.exact
    assert expected.achieved[0] < expected.achieved[1]
    assert expected.achieved[0] <= again.achieved <= expected.achieved[1]


@pytest.mark.parametrize(
    "options", [{"method": "layerwise"}, {"method": "widthwise", "selection": "local"}, {"method": "widthwise"}]
)
def test_the_largest_ratio_can_be_reached(options):
    model = make_model("llama")
    largest = outline(model, configured({**options, "ratio": 0.3})).largest
    achieved = outline(model, configured({**options, "ratio": largest})).achieved
    assert achieved == pytest.approx((largest, largest), abs=0.01)
    with pytest.raises(UserError, match=r"prune\.ratio"):
        outline(model, configured({**options, "ratio": 0.99}))
