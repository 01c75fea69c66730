from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from efficientllava.models.outcomes import top_k
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


def random_logits(vocab: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(7, vocab, generator=generator), 3 * torch.randn(7, vocab, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_the_whole_vocabulary_as_top_k_is_the_full_divergence(direction, temperature):
    student, teacher = random_logits()
    loss = LogitKDLoss(direction, temperature)
    results = []
    for reference in (teacher, top_k(teacher, 23, temperature), top_k(teacher, 99, temperature)):
        leaf = student.clone().requires_grad_()
        total = loss(leaf, torch.zeros(7), reference)
        total.backward()
        results.append((total.detach(), leaf.grad))
    assert results[0][0] > 1
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_fewer_tokens_bound_the_divergence_from_below(direction):
    student, teacher = random_logits()
    loss = LogitKDLoss(direction)
    values = [loss(student, torch.zeros(7), top_k(teacher, k, 2.0)).item() for k in (1, 2, 4, 8, 16, 22)]
    assert values == sorted(values) and values[0] > 0
    assert values[-2] < values[-1] <= loss(student, torch.zeros(7), teacher).item() + 1e-5


def test_the_rest_is_one_outcome():
    """By hand: tokens 2 and 0 are the likeliest; tokens 1 and 3 make the third outcome."""
    p, q = torch.tensor([0.3, 0.1, 0.5, 0.1]), torch.tensor([0.2, 0.2, 0.2, 0.4])
    known = top_k(p.log()[None], 2, 1.0)
    assert known.tokens.tolist() == [[2, 0]]
    assert known.tail.exp().item() == pytest.approx(0.2)
    forward = LogitKDLoss("forward", 1.0)(q.log()[None], torch.zeros(1), known).item()
    reverse = LogitKDLoss("reverse", 1.0)(q.log()[None], torch.zeros(1), known).item()
    pairs = [(0.5, 0.2), (0.3, 0.2), (0.2, 0.6)]
    assert forward == pytest.approx(sum(a * math.log(a / b) for a, b in pairs))
    assert reverse == pytest.approx(sum(b * math.log(b / a) for a, b in pairs))


def test_a_student_equal_in_the_known_outcomes_has_no_gradient():
    _, teacher = random_logits()
    leaf = teacher.clone().requires_grad_()
    total = LogitKDLoss("forward")(leaf, torch.zeros(7), top_k(teacher, 5, 2.0))
    total.backward()
    assert abs(total.item()) < 1e-5
    assert leaf.grad is not None and leaf.grad.abs().max() < 1e-5
