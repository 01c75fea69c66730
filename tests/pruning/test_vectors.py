"""The numbers of the published implementation for the tiny Llama recipe of tests/vectors/pruning_tiny_llama.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from efficientllava.models.anatomy import language_parameters, layers_of
from efficientllava.models.forward import answer_loss
from efficientllava.pruning.gradients import taylor_scores
from efficientllava.pruning.plan import Ranking, ranked_plan
from efficientllava.pruning.pruner import apply_plan, block_influences, make_plan
from efficientllava.pruning.selection import Space, nominal_shape
from efficientllava.pruning.stream import Calibration
from efficientllava.settings.schema import PruneConfig

from ..conftest import llava, logits_of, stream_of

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "pruning_tiny_llama.json").read_text())
RECIPE, CHECK, INFLUENCE = VECTORS["recipe"], VECTORS["check"], VECTORS["block_influence"]
SCORED = (1, 2, 3, 4)
PROTECTED = (0, 5)


def published_model() -> Any:
    model = llava(LlamaConfig(**RECIPE["config"]))
    decoder = {f"model.{name}": p for name, p in model.get_decoder().named_parameters()}
    parameters = dict(sorted({**decoder, "lm_head.weight": model.lm_head.weight}.items()))
    assert len(parameters) == CHECK["n_parameter_tensors"]
    with torch.no_grad():
        for i, (name, parameter) in enumerate(parameters.items()):
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(RECIPE["weight_seed"] + i))
            parameter.copy_(1 + 0.1 * draw if name.endswith("norm.weight") else RECIPE["weight_scale"] * draw)
    return model.eval()


@pytest.fixture
def model() -> Any:
    return published_model()


def batch_of(padded: bool = False) -> dict[str, Any]:
    ids = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(7))
    mask, labels = torch.ones_like(ids), ids.clone()
    if padded:
        mask[1, 12:] = 0
        labels[:, :6] = -100
        labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "ids": ["0", "1"]}


def rows(batch: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(2)]


def close(expected: Any, relative: float = 1e-4) -> Any:
    return pytest.approx(expected, rel=relative)


def test_the_recipe_gives_the_published_model(model):
    batch = batch_of()
    assert batch["input_ids"].tolist() == CHECK["input_ids"]
    assert language_parameters(model) == CHECK["n_params"]
    assert answer_loss(model, batch).item() == close(CHECK["loss_all_tokens"], 1e-5)
    assert answer_loss(model, batch_of(padded=True)).item() == close(CHECK["loss_masked_batch"], 1e-5)
    assert logits_of(model, batch).sum().item() == pytest.approx(CHECK["logits_sum"], abs=1e-3)


def influences(model: Any, padded: bool, **options: Any) -> list[float]:
    stream = stream_of(model, [batch_of(padded)])
    config = PruneConfig(**{"block_influence": "sum", "final_norm": True, **options})
    return block_influences(stream, range(6), config)


def test_block_influence_sums_over_tokens(model):
    assert influences(model, padded=False) == close(INFLUENCE["sum_unmasked_batch"])


def test_block_influence_of_the_last_block_before_the_final_norm(model):
    expected = [*INFLUENCE["sum_unmasked_batch"][:-1], INFLUENCE["last_layer_sum_before_final_norm"]]
    assert influences(model, padded=False, final_norm=False) == close(expected)


def test_block_influence_ignores_padding(model):
    assert influences(model, padded=True) == close(INFLUENCE["sum_padded_batch_real_tokens_only"])
    last = influences(model, padded=True, final_norm=False)[-1]
    assert last == close(INFLUENCE["last_layer_sum_real_tokens_only_before_final_norm"])


def test_mean_block_influence_is_the_sum_over_real_tokens_divided_by_their_number(model):
    expected = [s / INFLUENCE["n_real_tokens_padded_batch"] for s in INFLUENCE["sum_padded_batch_real_tokens_only"]]
    assert influences(model, padded=True, block_influence="mean") == close(expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_layerwise_removes_the_published_blocks(model, count):
    expected, batch = VECTORS["layer_removal"][f"n={count}"], batch_of()
    config = PruneConfig(method="layerwise", drop_layers=count, block_influence="sum", final_norm=True)
    plan, _ = make_plan(model, Calibration([batch]), config)
    smaller, _ = apply_plan(model, plan, None, config)
    assert list(plan.kept_layers) == expected["kept"]
    assert language_parameters(smaller) == expected["n_params"]
    assert answer_loss(smaller, batch).item() == close(expected["loss"], 1e-5)
    last = logits_of(smaller, batch)[15, :3].tolist()
    assert last == pytest.approx(expected["logits_first_row_last_pos_first3"], abs=1e-5)


def taylor(model: Any, variant: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Scores as published: the squared gradients are per row, the first-order ones of the mean over rows."""
    return taylor_scores(stream_of(model, rows(batch_of())), variant, "batch")


@pytest.mark.parametrize("variant", ["param_first", "vectorize", "param_second", "param_mix"])
def test_taylor_scores_are_the_published_ones(model, variant):
    expected, scores = VECTORS["width_scores"][variant], taylor(model, variant)
    for layer in SCORED:
        heads, channels = scores[layer]
        assert heads.tolist() == close(expected["heads"][str(layer)])
        published = expected["mlp"][str(layer)]
        assert channels.sum().item() == close(published["sum"])
        if "first8" in published:
            assert channels[:8].tolist() == close(published["first8"])
            assert torch.argsort(channels)[:10].tolist() == published["ten_lowest"]


@pytest.mark.parametrize("ratio", ["0.25", "0.3", "0.5"])
def test_widthwise_removes_the_published_units(model, ratio):
    expected = VECTORS["width_pruned_param_first"][f"ratio={ratio}"]
    space = Space.of(model, PROTECTED, PROTECTED)
    shape = nominal_shape(space, float(ratio), layers_of(model)[0].head_dim, 1)
    rankings = [(Ranking.from_scores(a), Ranking.from_scores(m)) for a, m in taylor(model, "param_first")]
    layers = ranked_plan(space.counts(*shape), rankings)
    assert [len(layer.groups) for layer in layers] == expected["heads"]
    assert [len(layer.channels) for layer in layers] == expected["intermediate"]
    for index in SCORED:
        assert sorted({*range(4)} - {*layers[index].groups}) == expected["removed_heads"][str(index)]
        assert sorted({*range(176)} - {*layers[index].channels}) == expected["removed_channels"][str(index)]


@pytest.mark.parametrize("ratio", ["0.25", "0.3", "0.5"])
def test_the_published_method_end_to_end(model, ratio):
    expected, batch = VECTORS["width_pruned_param_first"][f"ratio={ratio}"], batch_of()
    config = PruneConfig(
        method="widthwise",
        importance="param_first",
        taylor_mean="batch",
        share=float(ratio),
        protect=list(PROTECTED),
    )
    plan, _ = make_plan(model, Calibration([batch]), config)
    smaller, report = apply_plan(model, plan, Calibration([batch]), config)
    assert plan.requested is None
    assert plan.achieved == pytest.approx(expected["actual_ratio_of_all_params"], abs=1e-8)
    assert language_parameters(smaller) == expected["n_params"]
    assert report.loss_pruned == close(expected["loss"], 1e-5)
    assert answer_loss(smaller, batch).item() == close(expected["loss"], 1e-5)
    logits = logits_of(smaller, batch)
    assert logits.sum().item() == pytest.approx(expected["logits_sum"], abs=2e-3)
    assert logits[15, :5].tolist() == pytest.approx(expected["logits_first_row_last_pos_first5"], abs=1e-5)
