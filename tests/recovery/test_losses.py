from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from efficientllava.recovery.losses import (
    HiddenStateKDLoss,
    LogitKDLoss,
    SFTLoss,
)

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "kd_losses.json").read_text())
MASKED = VECTORS["masked_mean_variants"]


def normal(seed: int, last: int) -> Tensor:
    recipe = VECTORS["recipe"]
    return torch.randn(recipe["batch"], recipe["seq"], last, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def reference() -> dict[str, Tensor]:
    recipe = VECTORS["recipe"]
    labels = torch.tensor(recipe["labels"])
    mask = torch.zeros_like(labels, dtype=torch.bool)
    mask[:, :-1] = labels[:, 1:] != -100
    found = {
        "student": 2.0 * normal(1, recipe["vocab"]),
        "teacher": 2.0 * normal(2, recipe["vocab"]),
        "student_hidden": normal(13, recipe["hidden"]),
        "teacher_hidden": normal(25, recipe["hidden"]),
        "mask": mask,
        "targets": labels[:, 1:][mask[:, :-1]],
    }
    assert found["student_hidden"].sum().item() == pytest.approx(VECTORS["check"]["student_hidden_last_sum"])
    return found


def test_cross_entropy_has_the_reference_value(reference):
    rows = reference["student"][reference["mask"]]
    assert SFTLoss()(rows, reference["targets"]).item() / len(rows) == pytest.approx(VECTORS["ce"], rel=1e-5)


@pytest.mark.parametrize(("direction", "key"), [("forward", "kl"), ("reverse", "rkl")])
def test_masked_kl_has_the_reference_value(reference, direction, key):
    mask, targets = reference["mask"], reference["targets"]
    total = LogitKDLoss(direction, 2.0)(reference["student"][mask], targets, reference["teacher"][mask])
    expected = MASKED[f"{key}_mean_over_supervised_times_T2"]
    assert total.item() / MASKED["n_supervised_positions"] == pytest.approx(expected, rel=1e-5)


def test_masked_l2_has_the_reference_value(reference):
    mask = reference["mask"]
    student, teacher = reference["student_hidden"][mask], reference["teacher_hidden"][mask]
    total = HiddenStateKDLoss(normalise=False)(student, teacher).item()
    assert total / len(student) == pytest.approx(MASKED["mse_last_state_over_supervised"], rel=1e-5)


def test_l2_is_divided_by_the_power_of_the_teacher():
    teacher = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    # A student that says 0 is off by the whole teacher: distance 1 at any scale.
    assert HiddenStateKDLoss()(torch.zeros(3, 5), 1e3 * teacher).item() == pytest.approx(3.0)
    assert HiddenStateKDLoss()(3 * teacher, teacher).item() == pytest.approx(12.0)


def test_cosine_ignores_length_and_sees_direction():
    state = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert HiddenStateKDLoss("cosine")(5 * state, state).item() == pytest.approx(0.0, abs=1e-5)
    assert HiddenStateKDLoss("cosine")(-state, state).item() == pytest.approx(8.0)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_of_equal_distributions_is_zero_and_flat(direction):
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    total = LogitKDLoss(direction)(logits, torch.zeros(5), logits.detach().clone())
    total.backward()
    assert abs(total.item()) < 1e-6
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6
