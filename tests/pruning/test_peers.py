"""FLAP, Wanda-sp and 2SSP against the numbers of the released code in tests/vectors/peers_tiny_llama.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from efficientllava.models.anatomy import (
    decoder_of,
    language_parameters,
    layers_of,
    writer_without_bias,
)
from efficientllava.models.forward import answer_loss
from efficientllava.pruning.plan import LayerPlan, PruningPlan, plan_for, plan_ratio
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.statistics import all_moments, fluctuation, layer_moments, record_moments
from efficientllava.pruning.stream import Calibration
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import PruneConfig

from ..conftest import (
    CHANNELS,
    FAMILIES,
    logits_of,
    make_batch,
    make_batches,
    make_model,
    stream_of,
)
from .test_surgery import masked
from .test_vectors import published_model

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "peers_tiny_llama.json").read_text())
BIASED = [family for family in FAMILIES if family in ("llama", "llama_gqa", "phi")]
SEQUENCE = 16


def flap(ratio: float, **options: Any) -> PruneConfig:
    given = {"importance": "flap", "selection": "global", "bias": True, **options}
    return PruneConfig("flap", "widthwise", ratio, **given)


def wanda_sp(ratio: float, **options: Any) -> PruneConfig:
    return PruneConfig("wanda_sp", "widthwise", ratio, "wanda", **{"selection": "floor", "prefix": "pruned", **options})


def two_stage(ratio: float, **options: Any) -> PruneConfig:
    return PruneConfig("2ssp", "widthwise", ratio, "norm", "two_stage", **options)


def calibration(rows_per_batch: int = 3) -> Calibration:
    ids = torch.randint(3, 96, (8, SEQUENCE), generator=torch.Generator().manual_seed(11))
    rows = range(0, len(ids), rows_per_batch)
    parts = [(ids[start : start + rows_per_batch], range(start, start + rows_per_batch)) for start in rows]
    return Calibration(
        [
            {
                "input_ids": part,
                "attention_mask": torch.ones_like(part),
                "labels": part.clone(),
                "ids": [str(number) for number in numbers],
            }
            for part, numbers in parts
        ]
    )


def logits(model: Any) -> torch.Tensor:
    (batch,) = calibration(8).batches
    return logits_of(model, batch)


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-4, abs=1e-6)


def shapes_of(vectors: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    return [(layer["heads"], layer["channels"]) for layer in vectors["kept"]]


def pruned_as_released(model: Any, config: PruneConfig, kept: Any, expected: dict[str, Any]) -> Any:
    """The smaller model, which keeps the units that the released code keeps, and computes what its does."""
    plan, _ = make_plan(model, calibration(), config)
    assert [(list(layer.groups), list(layer.channels)) for layer in plan.layers] == kept
    smaller, _ = apply_plan(model, plan, calibration(), config)
    assert float(logits(smaller).double().sum()) == pytest.approx(expected["logits_sum"], abs=2e-2)
    return smaller


def removed(model: Any, kept: list[tuple[list[int], list[int]]], biased: bool = False) -> float:
    plans = [LayerPlan(i, tuple(heads), tuple(channels)) for i, (heads, channels) in enumerate(kept)]
    return plan_ratio(model, plans, biased)


def test_fluctuations_are_those_of_the_released_code():
    model, batches = published_model(), calibration()
    stream = stream_of(model, batches.batches)
    hidden = stream.start()
    for index, layer in enumerate(layers_of(model)):
        for component, moments in zip(layer.components, layer_moments(stream, layer, index, hidden), strict=True):
            if str(index) not in VECTORS["flap_statistics"]:
                continue
            expected = VECTORS["flap_statistics"][str(index)][component.kind]
            found = fluctuation(*moments)
            score = found * component.writer.weight.detach().double().square().sum(0)
            assert moments[0].mean(0)[:6].tolist() == close(expected["mean_first6"])
            assert (SEQUENCE * found)[:6].tolist() == close(expected["fluctuation_first6"])
            assert (SEQUENCE * score)[:6].tolist() == close(expected["wifv_first6"])
            assert float(SEQUENCE * score.sum()) == close(expected["wifv_sum"])


@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_flap_is_the_released_code(ratio):
    expected = VECTORS[f"flap AL-AM {ratio}"]
    kept, model = shapes_of(expected), published_model()
    config = flap(removed(model, kept, biased=True))
    smaller = pruned_as_released(model, config, kept, expected)
    layers = layers_of(smaller)
    assert [c.writer.bias[:4].tolist() for c in (layer.attention for layer in layers)] == [
        close(values) for values in expected["o_proj_bias"]
    ]
    assert [c.writer.bias[:4].tolist() for c in (layer.mlp for layer in layers)] == [
        close(values) for values in expected["down_proj_bias"]
    ]
    # The released class has no biases on readers; here they are zeros.
    zeros = sum(r.linear.out_features for layer in layers for c in layer.components for r in c.readers)
    assert language_parameters(smaller) == expected["language_parameters"] + zeros


@pytest.mark.parametrize("ratio", [0.2, 0.4])
def test_flap_with_one_shape_is_the_released_uniform_structure(ratio):
    kept, model = shapes_of(VECTORS[f"flap UL-UM {ratio}"]), published_model()
    plan, _ = make_plan(model, calibration(), flap(removed(model, kept, biased=True), selection="floor"))
    assert [(list(layer.groups), list(layer.channels)) for layer in plan.layers] == kept


@pytest.mark.parametrize(("structure", "ratio"), [("AL-AM", 0.2), ("AL-AM", 0.4), ("UL-UM", 0.4)])
def test_the_other_score_of_flap_is_the_released_code(structure, ratio):
    expected = VECTORS[f"flap_wifn {structure} {ratio}"]
    kept, model = shapes_of(expected), published_model()
    selection = "global" if structure == "AL-AM" else "floor"
    config = flap(removed(model, kept, biased=True), importance="flap_wifn", selection=selection)
    pruned_as_released(model, config, kept, expected)


@pytest.mark.parametrize("ratio", [0.2, 0.4, 0.6])
def test_2ssp_is_the_released_code(ratio):
    expected, model = VECTORS[f"2ssp {ratio}"], published_model()
    heads = [[] if i in expected["attentions_off"] else [0, 1, 2, 3] for i in range(6)]
    kept = [*zip(heads, expected["kept"], strict=True)]
    config = two_stage(removed(model, kept))
    pruned_as_released(model, config, kept, expected)


def test_2ssp_takes_the_attention_whose_absence_is_felt_least():
    """Of a sample of one batch, whatever the others say; protected ones stay."""
    model = published_model()
    config = two_stage(0.2, protect_attention=[5])
    plan, _ = make_plan(model, calibration(), config)
    [off] = [layer.index for layer in plan.layers if not layer.groups]
    losses = {}
    for index in range(5):
        layers = [replace(p, groups=() if p.index == index else tuple(range(4))) for p in plan.layers]
        other = plan_for(model, "widthwise", layers, None)
        smaller, _ = apply_plan(published_model(), other, calibration(), config)
        losses[index] = float(answer_loss(smaller, calibration(8).batches[0]))
    assert off == min(losses, key=losses.__getitem__)


def test_a_ratio_that_2ssp_does_not_reach_is_refused():
    with pytest.raises(UserError, match=r"^prune\.ratio=0\.99: not met by 6 attentions off"):
        make_plan(published_model(), calibration(), two_stage(0.99))


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_wanda_sp_is_the_released_code(ratio):
    expected = VECTORS[f"wanda_sp {ratio}"]
    kept, model = shapes_of(expected), published_model()
    config = wanda_sp(removed(model, kept))
    pruned_as_released(model, config, kept, expected)


def test_wanda_on_the_dense_model_is_another_method():
    kept, model = shapes_of(VECTORS["wanda_sp 0.5"]), published_model()
    plan, _ = make_plan(model, calibration(), wanda_sp(removed(model, kept), prefix="dense"))
    found = [(list(layer.groups), list(layer.channels)) for layer in plan.layers]
    assert found[0] == kept[0]
    assert found != kept


def test_batches_of_processes_are_put_back_in_order(monkeypatch):
    inputs = [torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    mask = torch.ones(2, 5, dtype=torch.bool)
    alone = [record_moments(each, mask) for each in inputs]
    expected = all_moments(alone)
    monkeypatch.setattr("efficientllava.pruning.statistics.gather", lambda _: [alone[::2], alone[1::2]])
    assert all(map(torch.equal, all_moments(alone[::2]), expected))


def test_padding_and_rows_without_counted_positions_have_no_share():
    inputs, mask = torch.randn(3, 6, 4), torch.ones(3, 6, dtype=torch.bool)
    mask[1, 4:] = False
    mask[2] = False
    means, squares = all_moments([record_moments(inputs, mask)])
    assert torch.allclose(means, torch.stack([inputs[0].mean(0), inputs[1, :4].mean(0)]).double(), atol=1e-6)
    assert torch.allclose(squares[1], inputs[1, :4].square().mean(0).double(), atol=1e-6)


def some_plan(model: Any) -> PruningPlan:
    layers = [
        LayerPlan(i, tuple(range(i % 2, layer.attention.units)), tuple(range(3 * (i % 2), CHANNELS - i)))
        for i, layer in enumerate(layers_of(model))
    ]
    return plan_for(model, "widthwise", layers, 0.3, biased=True)


@pytest.mark.parametrize("family", BIASED)
def test_surgery_with_biases_equals_masking_with_the_mean(family):
    double = torch.float64
    batches = make_batches(3, dtype=double)
    model, dense = make_model(family, dtype=double), make_model(family, dtype=double)
    plan = some_plan(model)
    smaller, _ = apply_plan(model, plan, Calibration(batches), flap(0.3))
    reference = masked(make_model(family, dtype=double), plan)
    stream = stream_of(dense, batches)
    hidden = stream.start()
    for index, (layer, cut) in enumerate(zip(layers_of(dense), layers_of(reference), strict=True)):
        for whole, part, moments in zip(
            layer.components, cut.components, layer_moments(stream, layer, index, hidden), strict=True
        ):
            lost = (whole.writer.weight - part.writer.weight) @ moments[0].mean(0)
            old = 0 if part.writer.bias is None else part.writer.bias
            part.writer.bias = torch.nn.Parameter((lost + old).detach())
    batch = make_batch(seed=9, dtype=double)
    assert torch.allclose(logits_of(smaller, batch), logits_of(reference, batch), atol=1e-9)
    assert 1 - language_parameters(smaller) / language_parameters(dense) == pytest.approx(plan.achieved, abs=1e-12)


@pytest.mark.parametrize("family", BIASED)
@pytest.mark.parametrize("selection", ["floor", "global"])
def test_biases_survive_saving(family, selection, tmp_path):
    model, batches = make_model(family), Calibration(make_batches(3))
    config = flap(0.3, selection=selection)
    plan, _ = make_plan(model, batches, config)
    assert plan.achieved == pytest.approx(0.3, abs=0.01)
    smaller, _ = apply_plan(model, plan, batches, config)
    smaller.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    batch = make_batch(seed=9)
    assert torch.equal(logits_of(loaded.eval(), batch), logits_of(smaller, batch))
    for kept, before, after in zip(plan.layers, layers_of(make_model(family)), layers_of(loaded), strict=True):
        for count, old, new in zip(kept.shape, before.components, after.components, strict=True):
            added = new.writer.bias - (0 if old.writer.bias is None else old.writer.bias)
            assert bool(added.abs().sum() > 0) == (count < old.units)
    stock = not decoder_of(loaded).config.model_type.startswith("pruned_")
    assert stock == (plan.uniform and family != "llama")  # 5 heads do not divide 48; Mistral has no biases


def test_biases_are_refused_where_the_class_stores_none(family):
    model, writer = make_model(family), writer_without_bias(make_model(family))
    names = {"mistral": "o_proj", "qwen2": "o_proj", "qwen3": "down_proj", "phi3": "o_proj", "phi3_gqa": "o_proj"}
    assert writer == names.get(family)
    if writer is None:
        return
    with pytest.raises(UserError, match=rf"prune\.bias=true: the {writer} of a \w+ decoder can have no bias"):
        make_plan(model, Calibration(make_batches(3)), flap(0.3))
    plan, _ = make_plan(model, Calibration(make_batches(3)), flap(0.3, bias=False))
    assert plan.achieved == pytest.approx(0.3, abs=0.01)


def test_what_the_table_says_of_biases_is_what_the_classes_store(family):
    """A configuration with the fields set makes linear layers with biases, in attention and MLP."""
    writer = writer_without_bias(make_model(family))
    fields = {"attention_bias": True, "mlp_bias": True}
    layer = layers_of(make_model(family, **fields))[0]
    stored = [component.writer.bias is not None for component in layer.components]
    assert all(stored) == (writer is None)
    if all(stored):
        linears = [r.linear for c in layer.components for r in c.readers]
        assert all(linear.bias is not None for linear in linears)


def test_one_record_has_no_fluctuation():
    with pytest.raises(UserError, match="at least two"):
        make_plan(make_model(), Calibration([make_batch(rows=1)]), flap(0.3))


def test_nothing_is_added_where_nothing_goes():
    model, batch = make_model(), make_batch(seed=9)
    expected = logits_of(model, batch)
    config = flap(0.0)
    plan, _ = make_plan(model, Calibration(make_batches(2)), config)
    same, _ = apply_plan(model, plan, Calibration(make_batches(2)), config)
    assert plan.achieved == 0
    assert torch.equal(logits_of(same, batch), expected)
