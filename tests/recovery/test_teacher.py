from __future__ import annotations

import copy

import pytest
import torch

from efficientllava.models import forward as module
from efficientllava.models.anatomy import decoder_of, projector_of
from efficientllava.models.forward import (
    FeatureCache,
    HostMemory,
    forward_hidden,
    supervised_positions,
)
from efficientllava.recovery.teacher import (
    FINAL,
    Match,
    Teacher,
    check_teacher,
    hidden_states,
    match_layers,
    record_keys,
    same_tower,
)
from efficientllava.runtime.errors import UserError

from .conftest import (
    Samples,
    collate,
    make_batch,
    make_cfg,
    make_model,
)


def everywhere(batch):
    return torch.ones_like(batch["labels"], dtype=torch.bool)


def test_the_teacher_is_frozen_and_without_dropout():
    model = make_model(attention_dropout=0.5).train()
    teacher = Teacher(model, make_model())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(getattr(m, "attention_dropout", 0.0) == 0.0 for m in model.modules())
    batch = make_batch(2)
    states, _ = teacher(batch, FeatureCache(model)(batch), [0], everywhere(batch))
    assert not states[FINAL].requires_grad and not states[0].requires_grad


def test_the_tower_runs_once_for_both_when_it_is_the_same(monkeypatch):
    model = make_model()
    student = copy.deepcopy(model)
    student.get_decoder().layers[0].mlp.up_proj.weight.data.zero_()
    runs = []
    original = module.vision_features
    monkeypatch.setattr(module, "vision_features", lambda *args: runs.append(1) or original(*args))
    features, teacher, batch = FeatureCache(student), Teacher(model, student), make_batch(4)
    for _ in range(3):
        states, _ = teacher(batch, features(batch), [], everywhere(batch))
    assert len(runs) == 1
    torch.testing.assert_close(states[FINAL], forward_hidden(model, batch).flatten(0, 1))


def test_a_teacher_with_another_tower_sees_through_its_own():
    model, student, batch = make_model(0), make_model(1), make_batch(4)
    assert not same_tower(model, student) and same_tower(model, copy.deepcopy(model).half())
    states, _ = Teacher(model, student)(batch, FeatureCache(student)(batch), [], everywhere(batch))
    torch.testing.assert_close(states[FINAL], forward_hidden(model, batch).flatten(0, 1))


def test_the_teacher_keeps_its_own_projector():
    model = make_model()
    student = copy.deepcopy(model)
    for p in projector_of(student).parameters():
        p.data.zero_()
    batch = make_batch(4)
    states, _ = Teacher(model, student)(batch, FeatureCache(student)(batch), [], everywhere(batch))
    torch.testing.assert_close(states[FINAL], forward_hidden(model, batch).flatten(0, 1))


def test_a_teacher_of_another_size_is_refused():
    student, other = make_model(), make_model()
    other.config.text_config.vocab_size += 1
    check_teacher(other.config, student, make_cfg(hidden=1.0))
    with pytest.raises(UserError, match=r"recover\.teacher\.path.*vocabulary is 38.*37"):
        check_teacher(other.config, student, make_cfg(logit=1.0))


def test_a_remembered_record_is_the_same_in_any_batch(monkeypatch):
    model = make_model()
    teacher, fresh = Teacher(model, model), Teacher(model, model)
    teacher.remember()
    data, runs = Samples(), []
    monkeypatch.setattr(
        "efficientllava.recovery.teacher.hidden_states", lambda *args: runs.append(1) or hidden_states(*args)
    )
    for rows in ([0, 1, 2, 3], [4, 5, 6, 0], [6, 2, 1, 5], [3], [0, 7], [2, 2]):
        batch = collate([data[i] for i in rows])
        mask, _ = supervised_positions(batch["labels"])
        got, expected = (t(batch, FeatureCache(model)(batch), [0, 2], mask) for t in (teacher, fresh))
        torch.testing.assert_close(got.states, expected.states)
    assert len(runs) == 6 + 3  # of a fresh one, and where the first, the second and the fifth hold something new


def test_memory_is_bounded():
    memory = HostMemory(limit_bytes=100)
    memory.put(["a", "b"], [torch.ones(2, 6), torch.ones(3, 6)])
    assert memory.get(["a"]) is not None and memory.get(["b"]) is None and memory.get(["a", "b"]) is None


def test_records_that_share_an_id_are_told_apart():
    one, other, padded = (collate([Samples()[i] for i in rows]) for rows in ([0], [1], [1, 0]))
    other["ids"] = one["ids"]
    assert record_keys(one) != record_keys(other)
    assert record_keys(one) == record_keys(padded)[1:]


KEPT = [0, 1, 4, 6]  # of 8: 2, 3, 5 and 7 were dropped


def test_a_kept_layer_stands_for_the_dropped_ones_after_it():
    expected = (Match(0, 0), Match(1, 3), Match(2, 5), Match(FINAL, FINAL))
    assert match_layers("all", KEPT, 8) == expected
    assert match_layers("last", KEPT, 8) == expected[-1:]


@pytest.mark.parametrize(
    ("which", "students"),
    [([0], [0]), ([2], [1]), ([3, 1], [1]), ([-1], [FINAL]), ([-4, 5], [2]), ([7, 0], [0, FINAL])],
)
def test_chosen_layers_are_original_indices(which, students):
    assert [match.student for match in match_layers(which, KEPT, 8)] == students


@pytest.mark.parametrize(("which", "kept"), [([8], KEPT), ([-9], KEPT), ([0], [1, 2])])
def test_impossible_choices_are_refused(which, kept):
    with pytest.raises(UserError, match=r"recover\.hidden_layers"):
        match_layers(which, kept, 8)


def test_captured_states_are_raw_block_outputs_and_hooks_go():
    model = make_model()
    decoder, batch = decoder_of(model), make_batch(4)
    mask = batch["labels"] != -100
    with torch.no_grad():
        states, final = hidden_states(model, batch, None, [1, 3, FINAL], mask), forward_hidden(model, batch)[mask]
    assert sorted(states) == [FINAL, 1, 3] and torch.equal(states[FINAL], final)
    torch.testing.assert_close(decoder.norm(states[3]), final)
    assert not torch.allclose(states[3], final)
    assert not any(block._forward_hooks for block in decoder.layers)
