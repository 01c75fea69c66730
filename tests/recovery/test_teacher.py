from __future__ import annotations

import copy

import pytest
import torch

from efficientllava.errors import UserError
from efficientllava.models.anatomy import projector_of
from efficientllava.models.forward import forward_hidden
from efficientllava.recovery import teacher as module
from efficientllava.recovery.teacher import Teacher, check_teacher, same_tower, tower_features

from .conftest import make_batch, make_model


def test_the_teacher_is_frozen_and_without_dropout():
    model = make_model(attention_dropout=0.5).train()
    teacher = Teacher(model, make_model())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(getattr(m, "attention_dropout", 0.0) == 0.0 for m in model.modules())
    final, states = teacher(make_batch(2), tower_features(model)(make_batch(2)), [0], lambda hidden: hidden)
    assert not final.requires_grad and not states[0].requires_grad


def test_the_tower_runs_once_for_both_when_it_is_the_same(monkeypatch):
    model = make_model()
    student = copy.deepcopy(model)
    student.get_decoder().layers[0].mlp.up_proj.weight.data.zero_()
    runs = []
    original = module.vision_features
    monkeypatch.setattr(module, "vision_features", lambda *args: runs.append(1) or original(*args))
    features, teacher, batch = tower_features(student), Teacher(model, student), make_batch(4)
    for _ in range(3):
        final, _ = teacher(batch, features(batch), [], lambda hidden: hidden)
    assert len(runs) == 1
    torch.testing.assert_close(final, forward_hidden(model, batch))


def test_a_teacher_with_another_tower_sees_through_its_own():
    model, student, batch = make_model(0), make_model(1), make_batch(4)
    assert not same_tower(model, student) and same_tower(model, copy.deepcopy(model).half())
    final, _ = Teacher(model, student)(batch, tower_features(student)(batch), [], lambda hidden: hidden)
    torch.testing.assert_close(final, forward_hidden(model, batch))


def test_the_teacher_keeps_its_own_projector():
    model = make_model()
    student = copy.deepcopy(model)
    for p in projector_of(student).parameters():
        p.data.zero_()
    batch = make_batch(4)
    final, _ = Teacher(model, student)(batch, tower_features(student)(batch), [], lambda hidden: hidden)
    torch.testing.assert_close(final, forward_hidden(model, batch))


def test_a_teacher_of_another_size_is_refused():
    student, other = make_model(), make_model()
    other.config.text_config.vocab_size += 1
    check_teacher(other, student, logits=False, hidden=True)
    with pytest.raises(UserError, match=r"recover\.teacher\.path.*vocabulary is 38.*37"):
        check_teacher(other, student, logits=True, hidden=False)
