from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from efficientllava.models.forward import FeatureCache, answer_loss
from efficientllava.recovery.module import RecoveryModule, learning_rate_factor
from efficientllava.recovery.student import prepare, trainable
from efficientllava.recovery.teacher import Teacher, match_layers

from ..conftest import make_model as make_family
from ..conftest import make_packed
from .conftest import (
    LAYERS,
    drop_layers,
    make_batch,
    make_cfg,
    make_model,
    perturb,
)

ALL = {"sft": 0.2, "logit": 0.3, "hidden": 0.5, "hidden_layers": "all"}


def make_module(student: Any, teacher: Any = None, kept: list[int] | None = None, **changes: Any) -> RecoveryModule:
    cfg = make_cfg(**changes)
    frozen = Teacher(teacher, student) if teacher is not None else None
    prepare(student, cfg)
    matches = match_layers(cfg.hidden_layers, kept or list(range(LAYERS)), LAYERS) if cfg.looks("hidden") else ()
    module = RecoveryModule(student, cfg, 10, FeatureCache(student), frozen, matches)
    module.log = module.log_dict = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
    return module


def gradients(module: RecoveryModule) -> list[torch.Tensor]:
    found = [p.grad for p in trainable(module.student)]
    assert found and all(grad is not None for grad in found)
    return found  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_a_model_distilled_into_itself_has_no_loss_and_no_gradient(kl, metric):
    model = make_model()
    options: dict[str, Any] = {"kl": kl, "hidden_metric": metric, **ALL, "sft": 0.0}
    module = make_module(copy.deepcopy(model), model, **options)
    loss = module.training_step(make_batch(), 0)
    loss.backward()
    assert abs(loss.item()) < 1e-4  # a sum over about 40 tokens
    assert max(grad.abs().max().item() for grad in gradients(module)) < 1e-4
    reference = make_module(perturb(model), model, **options)
    loss = reference.training_step(make_batch(), 0)
    loss.backward()
    assert loss.item() > 1 and max(grad.abs().max().item() for grad in gradients(reference)) > 0.1


def test_cross_entropy_is_the_answer_loss():
    model, batch = make_model(), make_batch()
    module = make_module(copy.deepcopy(model), sft=1.0)
    loss = module.training_step(batch, 0)
    assert loss.item() == pytest.approx(answer_loss(model, batch, reduction="sum").item(), rel=1e-5)
    assert module.final_losses()["sft"] == pytest.approx(answer_loss(model, batch).item(), rel=1e-5)


@pytest.mark.parametrize("weights", [{"sft": 1.0}, {"hidden": 1.0}, ALL, {"hidden": 1.0, "hidden_layers": [0]}])
@pytest.mark.parametrize("data", [{"supervised": False}, {"images": False}])
def test_every_parameter_gets_a_gradient_whatever_the_batch(weights, data):
    model = make_model()
    module = make_module(perturb(model), model, **weights)
    loss = module.training_step(make_batch(**data), 0)
    loss.backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(module))
    if "supervised" in data:
        assert loss.item() == 0.0 and all(not grad.any() for grad in gradients(module))
    else:
        assert loss.item() > 0.0


@pytest.mark.parametrize("chunk", [1, 5])
def test_chunks_change_no_gradient(chunk):
    model, results = make_model(), []
    for size in (1000, chunk):
        module = make_module(perturb(model), model, chunk=size, **ALL)
        module.training_step(make_batch(), 0).backward()
        results.append(gradients(module))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_gradient_checkpointing_changes_no_gradient():
    model, results = make_model(), []
    for on in (False, True):
        module = make_module(perturb(model), model, gradient_checkpointing=on, **ALL)
        module.training_step(make_batch(), 0).backward()
        results.append(gradients(module))
    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["projector", "lora", "full"])
def test_half_precision_trains_on_packed_batches_of_every_family(family, mode):
    teacher = make_family(family, dtype=torch.bfloat16)
    module = make_module(perturb(teacher), teacher, train=mode, **ALL)
    loss = module.training_step(make_packed(), 0)
    loss.backward()
    assert loss.item() > 0 and all(torch.isfinite(grad).all() for grad in gradients(module))


def test_layers_align_by_original_index():
    """Dropped blocks that add nothing leave all aligned states equal; a shift by one layer would not."""
    model = make_model()
    dropped = {1, 3}
    for i in dropped:
        block = model.get_decoder().layers[i]
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    student = drop_layers(model, dropped)
    module = make_module(student, model, kept=[0, 2], hidden=1.0, hidden_layers="all")
    assert module.training_step(make_batch(), 0).item() < 1e-6
    model.get_decoder().layers[1].mlp.down_proj.weight.data.normal_()
    assert module.training_step(make_batch(), 0).item() > 1e-2


def test_the_teacher_is_in_no_state_dict():
    model = make_model()
    module = make_module(perturb(model), model, **ALL)
    assert len(module.state_dict()) == len(model.state_dict())
    assert {id(p) for p in module.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert set(checkpoint["state_dict"]) == {n for n, p in module.named_parameters() if p.requires_grad}
    assert not any("vision_tower" in name for name in checkpoint["state_dict"])


@pytest.mark.parametrize(
    ("step", "scheduler", "factor"),
    [(0, "cosine", 0.5), (1, "cosine", 1.0), (2, "cosine", 1.0), (6, "cosine", 0.5), (10, "cosine", 0.0),
     (6, "linear", 0.5), (9, "linear", 0.125), (9, "constant", 1.0), (0, "constant", 0.5)],
)  # fmt: skip
def test_the_schedule_rises_and_falls(step, scheduler, factor):
    assert learning_rate_factor(step, 10, 0.2, scheduler) == pytest.approx(factor)
