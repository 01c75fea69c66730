from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from efficientllava.models.anatomy import Component, describe_layer, layers_of
from efficientllava.pruning.plan import LayerPlan, whole_layers
from efficientllava.pruning.refit import SequentialPruner
from efficientllava.pruning.solution import DAMPINGS, LayerError, Moments, Target, solve, validate
from efficientllava.settings.schema import PruneConfig

from ..conftest import (
    FAMILIES,
    LAYERS,
    logits_of,
    make_batches,
    make_model,
    make_packed,
    stream_of,
)

TARGETS = ["layer", "residual"]


def some_plan(model: Any, seed: int = 0, skip: Sequence[int] = ()) -> list[LayerPlan]:
    """Random units kept: what a refit must cope with after any importance."""
    generator = torch.Generator().manual_seed(seed)

    def draw(units: int, kept: int) -> tuple[int, ...]:
        return tuple(sorted(torch.randperm(units, generator=generator)[:kept].tolist()))

    layers = layers_of(model)
    return [
        LayerPlan(i, draw(layer.attention.units, layer.attention.units - 1 - i % 2), draw(layer.mlp.units, 40 - i))
        for i, layer in enumerate(layers)
        if i not in skip
    ]


def pruner(stream: Any, target: str = "adaptive", damping: float | None = None, refit: bool = True) -> SequentialPruner:
    return SequentialPruner(stream, PruneConfig(method="widthwise", refit=refit, refit_target=target, damping=damping))


def run(model: Any, plan: Sequence[LayerPlan], **options: Any) -> list[LayerError]:
    return pruner(stream_of(model, make_batches()), **options).run(plan, commit=True)[1]


@pytest.mark.parametrize("target", TARGETS)
def test_refit_never_raises_the_error_of_a_layer(family, target):
    model = make_model(family)
    errors = run(model, some_plan(model), target=target)
    assert len(errors) == 2 * LAYERS
    assert all(error.after <= error.before for error in errors)
    assert all(error.after < 0.999 * error.before for error in errors if error.component == "mlp")
    assert {error.component for error in errors} == {"attention", "mlp"}


def dense_writes(model: Any, layer: nn.Module, component: Component, kwargs: list[dict[str, Any]], hidden: list[Any]):
    """Inputs, outputs and residual streams around a writer, as the layer is now; only real positions."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = component.writer.register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        outputs = [layer(h, **k) for h, k in zip(hidden, kwargs, strict=True)]
    handle.remove()
    return seen, outputs


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", list(FAMILIES))
def test_refit_is_the_least_squares_solution(name, target):
    """Every writer of the pruned model solves the damped problem, which is built here from plain rows."""
    damping = 0.02
    dense, pruned = make_model(name, dtype=torch.float64), make_model(name, dtype=torch.float64)
    batches = make_batches(dtype=torch.float64)
    plans = some_plan(dense)
    stream = stream_of(pruned, batches)
    dense_hidden = pruned_hidden = stream.start()
    kwargs: list[dict[str, Any]] = []  # of a layer, by batch
    first = layers_of(pruned)[0].module
    handle = first.register_forward_pre_hook(lambda _m, _args, given: kwargs.append(given), with_kwargs=True)
    for batch, inputs in enumerate(dense_hidden):
        stream.call(first, 0, batch, inputs)
    handle.remove()
    masks = [b["attention_mask"].bool() for b in batches]
    pruner(stream, target, damping).run(plans, True)
    for plan, before, after in zip(plans, layers_of(dense), layers_of(pruned), strict=True):
        original = [(c.writer.weight.detach().clone(), c.columns(u)) for c, u in pairs(before, plan)]
        seen, dense_outputs = dense_writes(dense, before.module, before.attention, kwargs, dense_hidden)
        middle = [h + out for h, (_, out) in zip(dense_hidden, seen, strict=True)]
        for kind, goal in ((0, middle), (1, dense_outputs)):
            component, (weight, kept) = after.components[kind], original[kind]
            rows, outputs = dense_writes(pruned, after.module, component, kwargs, pruned_hidden)
            x = stack([r for r, _ in rows], masks)
            if target == "residual":
                wrote = [out for _, out in rows]
                rest = pruned_hidden if kind == 0 else [o - w for o, w in zip(outputs, wrote, strict=True)]
                y = stack([g - r for g, r in zip(goal, rest, strict=True)], masks)
                y = y if component.writer.bias is None else y - component.writer.bias
            else:
                y = layer_target(dense, before, plan, after, kind, kwargs, pruned_hidden, masks)
            residual = uncut_residual(dense, before, after, kind, kwargs, pruned_hidden)
            weights = 1 / stack(residual, masks).square().mean(1)
            expected = damped_least_squares(x, y, weight[:, kept], damping, weights / weights.sum())
            assert torch.allclose(component.writer.weight, expected, atol=1e-8, rtol=1e-7)
        pruned_hidden = dense_writes(pruned, after.module, after.mlp, kwargs, pruned_hidden)[1]
        dense_hidden = dense_outputs


def uncut(dense: Any, before: Any, after: Any, kind: int, kwargs: Any, hidden: Any):
    """Writes and outputs of a whole component on the pruned prefix; the MLP's attention is already cut."""
    module = before.module
    if kind == 1:
        module = copy.deepcopy(module)
        module.self_attn = after.module.self_attn
    component = describe_layer(module, dense.get_decoder().config).components[kind]
    return component, *dense_writes(dense, module, component, kwargs, hidden)


def uncut_residual(dense: Any, before: Any, after: Any, kind: int, kwargs: Any, hidden: Any) -> list[torch.Tensor]:
    """The residual stream behind a whole component on the pruned prefix: errors count relative to its power."""
    _, rows, outputs = uncut(dense, before, after, kind, kwargs, hidden)
    return outputs if kind == 1 else [h + written for h, (_, written) in zip(hidden, rows, strict=True)]


def pairs(layer: Any, plan: LayerPlan) -> list[tuple[Component, tuple[int, ...]]]:
    return [(layer.attention, plan.groups), (layer.mlp, plan.channels)]


def stack(values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([v[m] for v, m in zip(values, masks, strict=True)])


def layer_target(dense: Any, before: Any, plan: LayerPlan, after: Any, kind: int, kwargs: Any, hidden: Any, masks: Any):
    """What the whole writer gives on the pruned prefix."""
    component, rows, _ = uncut(dense, before, after, kind, kwargs, hidden)
    bias = 0 if component.writer.bias is None else component.writer.bias
    return stack([out - bias for _, out in rows], masks)


def damped_least_squares(
    x: torch.Tensor, y: torch.Tensor, start: torch.Tensor, damping: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Solve ``min mean ||y - W x||^2 + lambda sum_j mean x_j^2 ||W_j - start_j||^2``, the penalty stacked as rows."""
    if weights is not None:
        x, y = x * weights.sqrt()[:, None], y * weights.sqrt()[:, None]
    left = torch.cat([x, (damping * x.square().sum(0)).sqrt().diag()])
    right = torch.cat([y - x @ start.T, torch.zeros(x.shape[1], y.shape[1], dtype=x.dtype)])
    return start + torch.linalg.lstsq(left, right, driver="gelsd").solution.T


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1.0])
def test_solve_reports_the_errors_of_the_rows(damping):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(50, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    gram = x.T @ x / 50
    target = Target(y.T @ x / 50, float(y.square().sum() / 50))
    kept = torch.tensor([0, 1, 3, 4, 6, 7])
    whole = torch.zeros(3, 8, dtype=torch.float64).index_copy(1, kept, weight)
    refitted, before, after = solve(whole, kept, gram.clone(), target, damping)
    assert before == pytest.approx(float((y - x @ weight.T).square().sum() / 50))
    assert after == pytest.approx(float((y - x @ refitted.T).square().sum() / 50))
    assert after < before
    assert torch.allclose(refitted, damped_least_squares(x, y, weight, damping))


def test_more_damping_stays_closer_to_the_plain_slice():
    model = make_model()
    plan = some_plan(model)[:1] + list(whole_layers(model)[1:])

    @torch.no_grad()
    def distance(damping: float) -> float:
        refitted = copy.deepcopy(model)
        run(refitted, plan, target="layer", damping=damping)
        kept = layers_of(model)[0].mlp.writer.weight[:, list(plan[0].channels)]
        return float((layers_of(refitted)[0].mlp.writer.weight - kept).norm())

    assert distance(0.001) > distance(0.1) > distance(100.0) > 0


@pytest.mark.parametrize("target", TARGETS)
def test_refit_is_exact_when_a_removed_channel_repeats_a_kept_one(family, target):
    model = make_model(family, dtype=torch.float64)
    layer = layers_of(model)[1]
    with torch.no_grad():
        for reader in layer.mlp.readers:
            reader.linear.weight[reader.offset + 5] = reader.linear.weight[reader.offset + 9]
            if reader.linear.bias is not None:
                reader.linear.bias[reader.offset + 5] = reader.linear.bias[reader.offset + 9]
    batches = make_batches(dtype=torch.float64)
    expected = [logits_of(model, b) for b in batches]
    whole = list(whole_layers(model))
    whole[1] = LayerPlan(1, whole[1].groups, tuple(c for c in whole[1].channels if c != 5))
    stream = stream_of(model, batches)
    _, (error, *_) = pruner(stream, target, 1e-9).run(whole, True)
    assert (error.layer, error.component) == (1, "mlp")
    assert error.after < 1e-12 < error.before
    for batch, logits in zip(batches, expected, strict=True):
        assert torch.allclose(logits_of(model, batch), logits, atol=1e-5)


def test_a_trial_changes_nothing_and_predicts_the_loss_of_the_cut():
    model = make_model("phi")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    plan, batches = some_plan(model), make_batches()
    stream = stream_of(model, batches)
    hidden = stream.start()
    subject = pruner(stream)
    (first, errors), (second, again) = (subject.run(plan, commit=False) for _ in range(2))
    assert errors == again and all(map(torch.equal, first, second))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(torch.equal(a, b) for a, b in zip(hidden, stream.start(), strict=True))
    assert not any("forward" in vars(module) for module in model.modules())
    committed, found = subject.run(plan, commit=True)
    assert stream.answer_loss(committed) == pytest.approx(stream.answer_loss(first), rel=1e-5)
    for cut, tried in zip(found, errors, strict=True):
        assert (cut.before, cut.after) == pytest.approx((tried.before, tried.after), rel=1e-3, abs=1e-9)


def test_the_dense_residual_stream_is_the_target_behind_dropped_layers():
    model = make_model()
    plan = [layer for layer in whole_layers(model) if layer.index != 1]
    errors = run(model, plan, target="residual")
    assert [(e.layer, e.component) for e in errors] == [(i, kind) for i in (2, 3) for kind in ("attention", "mlp")]
    assert all(e.after < e.before for e in errors)


def test_residual_target_brings_the_pruned_stream_closer_to_the_dense_one():
    def distance(**options: Any) -> float:
        model, dense = make_model(seed=3), make_model(seed=3)
        run(model, some_plan(model), **options)
        batches = make_batches()
        ends = []
        for m in (model, dense):
            stream = stream_of(m, batches)
            hidden = stream.start()
            for i, layer in enumerate(m.get_decoder().layers):
                stream.advance(layer, i, hidden)
            ends.append(stack(hidden, stream.counted))
        return float((ends[0] - ends[1]).norm())

    assert distance(target="residual") < distance(target="layer") < distance(refit=False)


@pytest.mark.parametrize("target", TARGETS)
def test_attention_is_not_replayed_outside_the_refit(target):
    model = make_model("phi3")
    run(model, some_plan(model), target=target)
    for layer in model.get_decoder().layers:
        assert "forward" not in vars(layer.self_attn)
        assert not layer.self_attn.o_proj._forward_hooks


def test_packed_batches_refit_like_others():
    model = make_model("llama_gqa")
    stream = stream_of(model, [make_packed(seed=s) for s in range(3)])
    _, errors = pruner(stream).run(some_plan(model), commit=True)
    assert all(error.after < error.before for error in errors)


def test_no_graph_is_built_for_biases():
    model = make_model("phi")
    assert all(p.requires_grad for p in model.parameters())
    run(model, some_plan(model))
    assert all(p.grad_fn is None and p.requires_grad for p in model.parameters())


def moments(seed: int, kept: list[int], weight: torch.Tensor, noise: float) -> tuple[Moments, Any]:
    """Of random inputs, and the error on them of any columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    own, part = x @ weight.T, x[:, kept]
    r = own + noise * torch.randn(30, 5, generator=generator, dtype=torch.float64) + 0.5 * part[:, :5]
    powers = tuple(float((a * b).sum()) / 30 for a, b in ((own, own), (own, r), (r, r)))
    found = Moments(part.T @ part / 30, own.T @ part / 30, r.T @ part / 30, powers, 30.0)  # pyright: ignore
    return found, lambda columns: float((r - part @ columns.T).square().sum()) / 30


@pytest.mark.parametrize("noise", [0.1, 2.0, 50.0])
def test_damping_and_repair_are_the_best_on_records_that_are_held_back(noise):
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    kept = [0, 2, 3, 5, 7, 8, 11]
    (fitted, _), (held, error) = moments(1, kept, weight, noise), moments(2, kept, weight, noise)

    def columns(damping: float, repair: float) -> torch.Tensor:
        if math.isinf(damping):
            return weight[:, kept]
        found, _ = moments(1, kept, weight, noise)
        return solve(weight, torch.tensor(kept), found.gram, found.target(repair), damping)[0]

    damping, repair = validate(weight, torch.tensor(kept), fitted, held, None, None, "x")
    tried = [error(columns(d, step / 50)) for d in DAMPINGS for step in range(51)]
    best = min(*tried, error(weight[:, kept]))
    assert error(columns(damping, repair)) <= best * (1 + 1e-9)
    assert 0 <= repair <= 1 and (damping in DAMPINGS or math.isinf(damping))
    assert validate(weight, torch.tensor(kept), fitted, held, 0.1, 1.0, "x") == (0.1, 1.0)
