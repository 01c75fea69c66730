from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from efficientllava.recovery.losses import (
    LOSSES,
    LogitKDLoss,
    SFTLoss,
    build_terms,
    describe,
    divisors,
    logit_sums,
    positions,
    term_sums,
)
from efficientllava.recovery.recover import recover
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import WeightsConfig

from .conftest import Data, make_cfg, make_factory, make_model

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "kd_losses.json").read_text())
LABELS = torch.tensor(VECTORS["recipe"]["labels"])


def normal(seed: int, last: int) -> Tensor:
    recipe = VECTORS["recipe"]
    return torch.randn(recipe["batch"], recipe["seq"], last, generator=torch.Generator().manual_seed(seed))


def parity_total(states: tuple[int, ...] = (-1,), **weights: Any) -> float:
    """The weighted sum as the study reduces it, on the reference tensors; heads are the identity."""
    recipe = VECTORS["recipe"]
    terms = build_terms(make_cfg(parity="vlmcompression", **weights))
    mask, targets = positions(LABELS, "vlmcompression")
    student, teacher = (2.0 * normal(seed, recipe["vocab"])[mask] for seed in (1, 2))
    pairs = [(normal(14 + i, recipe["hidden"])[mask], normal(26 + i, recipe["hidden"])[mask]) for i in states]
    sums = term_sums(terms, student, targets, nn.Identity(), lambda rows: teacher[rows], pairs, chunk=3)
    values = sums / divisors(terms, LABELS, "vlmcompression")
    return sum(term.weight * value for term, value in zip(terms, values.tolist(), strict=True))


@pytest.mark.parametrize("name", sorted(VECTORS["upstream_totals"]))
def test_parity_mode_has_the_released_values(name):
    kinds, _, rest = name.partition("|")
    alpha = float(rest.rpartition("alpha=")[2])
    states = (-1, -2) if "layers=-1,-2" in rest else (-1,)
    words = kinds.split(" ")[0].split("+")
    weights: dict[str, Any] = {"sft": 1 - alpha, "kl": "reverse" if "rkl" in words else "forward"}
    weights["logit"] = alpha if {"kl", "rkl"} & set(words) else 0.0
    weights["hidden"] = alpha if "l2" in words else 0.0
    assert parity_total(states, **weights) == pytest.approx(VECTORS["upstream_totals"][name], rel=1e-5)


def test_parity_components_have_the_released_values():
    known = VECTORS["components"]
    got = [parity_total(logit=1.0), parity_total(logit=1.0, kl="reverse"), parity_total(hidden=1.0)]
    keys = ("kl_sum_all_positions_over_batch_times_T2", "rkl_sum_all_positions_over_batch_times_T2")
    assert got[:2] == pytest.approx([known[key] for key in keys], rel=1e-5)
    assert got[2] == pytest.approx(known["mse_last_state_all_positions"], rel=1e-5)
    assert parity_total((-1, -2), hidden=1.0) == pytest.approx(known["mse_last_two_states_all_positions"], rel=1e-5)
    assert parity_total(sft=1.0) == pytest.approx(VECTORS["ce"], rel=1e-5)


def test_rows_are_the_positions_before_supervised_tokens():
    mask, targets = positions(LABELS, None)
    assert mask.tolist() == [[False, True, True, True, False], [True, True, True, False, False]]
    assert targets.tolist() == [3, 4, 2, 5, 6, 2]
    assert divisors(build_terms(make_cfg(sft=1, logit=1, hidden=1)), LABELS, None).tolist() == [6.0, 6.0, 6.0]


@pytest.mark.parametrize("chunk", [1, 3, 7, 8])
def test_chunks_change_neither_loss_nor_gradient(chunk):
    generator = torch.Generator().manual_seed(0)
    rows, taught = torch.randn(7, 5, generator=generator), torch.randn(7, 5, generator=generator)
    targets = torch.randint(0, 11, (7,), generator=generator)
    weight, other = torch.randn(11, 5, generator=generator), nn.Linear(5, 11)
    results = []
    for size in (100, chunk):
        head = nn.Linear(5, 11, bias=False)
        head.weight.data = weight.clone()
        leaf = rows.clone().requires_grad_()
        sums = logit_sums([SFTLoss(), LogitKDLoss()], leaf, targets, head, lambda part: other(taught[part]), size)
        (sums * torch.tensor([0.3, 0.7])).sum().backward()
        results.append((sums.detach(), leaf.grad, head.weight.grad))
        assert other.weight.grad is None
    torch.testing.assert_close(results[0], results[1])


def test_chunks_bound_the_logits_that_are_alive(monkeypatch):
    seen = []

    def head(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return rows @ torch.eye(4)

    logit_sums([SFTLoss()], torch.zeros(10, 4, requires_grad=True), torch.zeros(10, dtype=torch.long), head, None, 4)
    assert seen == [4, 4, 2]


def test_no_rows_stay_connected():
    head = nn.Linear(5, 11)
    rows = torch.zeros(0, 5, requires_grad=True)
    targets = torch.zeros(0, dtype=torch.long)
    sums = logit_sums([SFTLoss(), LogitKDLoss()], rows, targets, head, lambda part: head(rows.detach()[part]))
    sums.sum().backward()
    assert sums.tolist() == [0.0, 0.0]
    assert rows.grad is not None and torch.equal(head.weight.grad, torch.zeros(11, 5))


@pytest.mark.parametrize(
    ("cfg", "text"),
    [
        (make_cfg(sft=0.5, hidden=0.5), "0.5 x CE + 0.5 x L2(hidden)"),
        (make_cfg(sft=1.0), "1 x CE"),
        (make_cfg(sft=0.5, logit=0.25, hidden=0.25, kl="reverse", hidden_metric="cosine"),
         "0.5 x CE + 0.25 x RKL(T=2) + 0.25 x cosine(hidden)"),
        (make_cfg(logit=1.0, temperature=1.5, parity="vlmcompression"), "1 x KL(T=1.5) [as vlmcompression]"),
    ],
)  # fmt: skip
def test_the_loss_is_described(cfg, text):
    assert describe(cfg) == text


def test_every_weight_has_a_loss():
    assert {*LOSSES} == {each.name for each in fields(WeightsConfig)}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_given_what_its_weight_says_it_looks_at(name):
    cfg = make_cfg(**{name: 1.0})
    [term] = build_terms(cfg)
    rows, answers, asked = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), []

    def teacher(part: slice) -> Tensor:
        asked.append(part)
        return answers[part]

    sums = term_sums([term], rows, torch.zeros(3, dtype=torch.long), nn.Identity(), teacher, [(rows, answers)])
    sums.sum().backward()
    assert rows.grad is not None and rows.grad.abs().sum() > 0
    assert bool(asked) == cfg.looks("logits", "teacher")
    assert cfg.taught == ("teacher" in term.looks)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"kl": "sideways"}, "recover.kl=sideways"),
        ({"temperature": 0.0}, "recover.temperature=0"),
        ({"hidden_metric": "l1"}, "recover.hidden_metric=l1"),
        ({"parity": "mine"}, "recover.parity=mine"),
        ({"train": "half"}, "recover.train=half"),
        ({"scheduler": "steep"}, "recover.scheduler=steep"),
        ({"optimizer": "newton"}, "recover.optimizer=newton"),
        ({"steps": 0}, "recover.steps=0"),
        ({"steps": None, "epochs": -1}, "recover.epochs=-1"),
        ({"steps": None}, "recover.steps=None, recover.epochs=None"),
        ({"epochs": 1.0}, "recover.steps=6, recover.epochs=1.0"),
        ({"hidden_layers": "middle"}, "recover.hidden_layers=middle"),
        ({"hidden_layers": []}, "recover.hidden_layers="),
        ({"sft": 0.0}, "recover.weights"),
        ({"sft": -1.0}, "recover.weights.sft=-1"),
        ({"sft": float("nan")}, "recover.weights.sft=nan"),
    ],
)
def test_faults_name_the_key(tmp_path, changes, key):
    with pytest.raises(UserError, match=key):
        recover(make_model(), Data(), make_cfg(**{"sft": 1.0, **changes}), make_factory(), tmp_path, batch_size=4)
