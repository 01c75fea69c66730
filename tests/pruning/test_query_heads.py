"""One query head of every KV group as the unit: the groups stay, and the cut model is an ordinary one."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from efficientllava.models.anatomy import decoder_of, language_parameters, layers_of
from efficientllava.pruning.obs import obs_ranking
from efficientllava.pruning.outline import outline
from efficientllava.pruning.plan import LayerPlan, PruningPlan, Ranking, plan_for
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.stream import Calibration
from efficientllava.pruning.surgery import check_plan, cut, pruned_config
from efficientllava.settings.schema import IMPORTANCES, PruneConfig

from ..conftest import (
    CHANNELS,
    FAMILIES,
    logits_of,
    make_batch,
    make_batches,
    make_model,
)
from .test_importance import problem, residual

GROUPED = [family for family, (_, heads, groups, _) in FAMILIES.items() if heads > groups]
SIZES = {"num_attention_heads": 12, "num_key_value_heads": 4}  # three query heads in each group, as in SmolLM2
DOUBLE = torch.float64


def widthwise(ratio: float = 0.3, **options: Any) -> PruneConfig:
    return PruneConfig(**{"name": "w", "method": "widthwise", "ratio": ratio, "heads": "query", **options})


def calibration() -> Calibration:
    return Calibration(make_batches(3))


def plan_of(model: Any, counts: list[int], skip: int | None = None) -> PruningPlan:
    """Layer ``i`` keeps ``counts[i]`` heads of each group, others in every group and layer."""
    layers = []
    for i, count in enumerate(counts):
        heads = sorted(3 * g + (g + i + h) % 3 for g in range(4) for h in range(count)) if count < 3 else ()
        layers.append(LayerPlan(i, tuple(range(4)), tuple(range(i, CHANNELS)), tuple(heads)))
    return plan_for(model, "widthwise", [layer for layer in layers if layer.index != skip], None)


def masked(model: Any, plan: PruningPlan) -> Any:
    """The same model whose writers do not see the removed heads and channels."""
    with torch.no_grad():
        for entry in plan.layers:
            layer = layers_of(model)[entry.index]
            heads = entry.heads or range(12)
            stay = torch.zeros(12 * layer.head_dim)
            for head in heads:
                stay[head * layer.head_dim : (head + 1) * layer.head_dim] = 1
            layer.attention.writer.weight.mul_(stay.to(DOUBLE))
            keep = torch.zeros(CHANNELS, dtype=DOUBLE)
            keep[list(entry.channels)] = 1
            layer.mlp.writer.weight.mul_(keep)
    return model


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("counts", [[2, 2, 2, 2], [1, 1, 1, 1], [3, 2, 1, 2]], ids=str)
def test_surgery_equals_masking(family, counts, tmp_path):
    model, batch = make_model(family, dtype=DOUBLE, **SIZES), make_batch(seed=9, dtype=DOUBLE)
    plan, before = plan_of(model, counts), language_parameters(model)
    expected = logits_of(masked(make_model(family, dtype=DOUBLE, **SIZES), plan), batch)
    smaller = cut(model, plan)
    assert torch.allclose(logits_of(smaller, batch), expected, atol=1e-9)
    assert 1 - language_parameters(smaller) / before == pytest.approx(plan.achieved, abs=1e-12)
    shapes = [(layer.attention.units, layer.heads_per_group) for layer in layers_of(smaller)]
    assert shapes == [(4, count) for count in counts]


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize("counts", [[2, 2, 2, 2], [3, 2, 1, 2]], ids=str)
def test_a_saved_model_loads_bit_for_bit(family, counts, tmp_path):
    model = make_model(family, **SIZES)
    plan = plan_of(model, counts)
    if len({*counts}) == 1:  # of equal width too
        same = tuple(range(CHANNELS - 5))
        layers = [LayerPlan(v.index, v.groups, same, v.heads) for v in plan.layers]
        plan = plan_for(model, "widthwise", layers, None)
    smaller, batch = cut(model, plan), make_batch(seed=9)
    smaller.save_pretrained(tmp_path)
    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(loaded.eval(), batch), logits_of(smaller, batch))
    text = decoder_of(loaded).config
    assert text.model_type.startswith("pruned_") != plan.uniform
    if plan.uniform:
        assert (text.num_attention_heads, text.num_key_value_heads) == (8, 4)


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("selection", ["local", "global"])
def test_every_importance_takes_one_head_of_every_group(importance, selection):
    model = make_model("llama_gqa", **SIZES)
    plan, _ = make_plan(model, calibration(), widthwise(importance=importance, selection=selection))
    assert plan.achieved == pytest.approx(0.3, abs=0.01)
    check_plan(model, plan)
    off = [()] if selection == "global" else []  # with the last head of every group keys and values go
    assert all(layer.groups in ((0, 1, 2, 3), *off) for layer in plan.layers)
    assert selection == "global" or all(layer.heads for layer in plan.layers)
    assert plan.uniform == (selection == "local")


@pytest.mark.parametrize("selection", ["shape", "floor", "global"])
@pytest.mark.parametrize("refit", [False, True])
def test_the_achieved_ratio_is_the_cut_models(selection, refit):
    model = make_model("phi3_gqa", **SIZES)
    before, config = language_parameters(model), widthwise(selection=selection, refit=refit)
    plan, _ = make_plan(model, calibration(), config)
    smaller, report = apply_plan(model, plan, calibration(), config)
    assert plan.achieved == pytest.approx(0.3, abs=0.01)
    assert 1 - language_parameters(smaller) / before == pytest.approx(plan.achieved, abs=1e-12)
    assert all(error.after <= error.before for error in report.errors)


def test_refit_restores_the_output_where_a_head_can_be_replaced():
    """Two heads of a group with equal queries write the same; whichever goes, the other takes over."""
    model, batch = make_model("llama_gqa", dtype=DOUBLE, **SIZES), make_batch(seed=9, dtype=DOUBLE)
    with torch.no_grad():
        for layer in layers_of(model):
            rows = layer.module.self_attn.q_proj.weight.view(4, 3, layer.head_dim, -1)
            rows[:, 2] = rows[:, 1]
    expected = logits_of(model, batch)
    layers = [
        LayerPlan(i, tuple(range(4)), tuple(range(CHANNELS)), tuple(h for h in range(12) if h % 3 != 2))
        for i in range(4)
    ]
    plan = plan_for(model, "widthwise", layers, None)
    config = widthwise(refit=True, damping=1e-9, refit_target="layer")
    smaller, _ = apply_plan(model, plan, Calibration(make_batches(3, dtype=DOUBLE)), config)
    assert torch.allclose(logits_of(smaller, batch), expected, atol=1e-4)


def test_with_one_query_head_per_group_both_units_are_the_same(family):
    if family in GROUPED:
        return
    for selection in ("local", "global"):
        plans = [
            make_plan(make_model(family), calibration(), widthwise(heads=heads, selection=selection))[0]
            for heads in ("group", "query")
        ]
        assert plans[0] == plans[1]


def test_biases_go_with_query_heads():
    model, config = make_model("llama_gqa", **SIZES), widthwise(importance="flap", selection="global", bias=True)
    before = language_parameters(model)
    plan, _ = make_plan(model, calibration(), config)
    smaller, _ = apply_plan(model, plan, calibration(), config)
    assert 1 - language_parameters(smaller) / before == pytest.approx(plan.achieved, abs=1e-12)
    assert plan.achieved == pytest.approx(0.3, abs=0.01)


def test_greedy_costs_are_the_residual_of_what_is_kept():
    weight, gram = problem(24, seed=1)
    ranking = obs_ranking(weight, gram.clone(), 2, 1e-10, groups=3)
    assert len(ranking.costs) == 4
    for count in range(4):
        kept = [2 * unit + i for unit in ranking.kept(count) for i in range(2)]
        assert sum(ranking.costs[: 4 - count]) == pytest.approx(residual(weight, gram, kept), rel=1e-5)
        by_group = [unit // 4 for unit in ranking.kept(count)]
        assert by_group == sorted([0, 1, 2] * count)


def test_scores_rank_heads_within_their_group():
    ranking = Ranking.from_scores(torch.tensor([5.0, 1.0, 3.0, 20.0, 30.0, 10.0]), groups=2)
    assert ranking.order == (1, 5, 2, 3, 0, 4)
    assert ranking.costs == (11.0, 23.0, 35.0)
    assert ranking.kept(1) == (0, 4)
    assert ranking.kept(3) == (0, 1, 2, 3, 4, 5)


@pytest.mark.parametrize("selection", ["local", "shape"])
def test_the_shape_is_known_before_the_data_are(selection):
    model, config = make_model("qwen2", **SIZES), widthwise(selection=selection, importance="magnitude")
    with torch.device("meta"):
        meta = type(model)(model.config)
    expected = outline(meta, config)
    plan, _ = make_plan(model, calibration(), config)
    heads = {len(layer.heads or range(12)) // 4 for layer in plan.layers}
    shape = (heads.pop(), len(plan.layers[0].channels))
    assert (shape,) * 4 in expected.options
    smaller = cut(model, plan)
    planned = pruned_config(meta, plan.kept_layers, (shape,) * 4, heads="query")
    assert planned.get_text_config().to_dict() == smaller.config.get_text_config().to_dict()


def test_a_cut_model_is_pruned_again():
    model = make_model("llama_gqa", **SIZES)
    smaller = cut(model, plan_of(model, [3, 2, 1, 2]))
    for heads, selection in itertools.product(("query", "group"), ("global",)):
        again = cut(smaller, make_plan(smaller, calibration(), widthwise(0.2, heads=heads, selection=selection))[0])
        logits_of(again, make_batch(seed=9))
        smaller = again


@pytest.mark.parametrize("heads", [(0, 1, 3), (0, 3, 6), (0, 1, 3, 6, 9), (0, 1, 3, 4, 6, 7, 9, 12)], ids=str)
def test_uneven_groups_are_refused(heads):
    model = make_model("llama_gqa", **SIZES)
    layers = plan_of(model, [3, 3, 3, 3]).layers
    bad = [LayerPlan(0, layers[0].groups, layers[0].channels, heads), *layers[1:]]
    with pytest.raises(ValueError, match=r"query heads of each|keeps some of"):
        check_plan(model, PruningPlan("widthwise", tuple(bad), 4, 3, None, 0.0))


def test_plans_of_earlier_versions_are_read():
    plan = plan_of(make_model("llama_gqa", **SIZES), [3, 2, 1, 2])
    assert PruningPlan.from_json(plan.to_json()) == plan
    old = json.loads(plan.to_json())
    for layer in old["layers"]:
        del layer["heads"]
    assert all(layer.heads == () for layer in PruningPlan.from_json(json.dumps(old)).layers)
