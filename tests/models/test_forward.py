from __future__ import annotations

import pytest
import torch

from efficientllava.models.anatomy import projector_of
from efficientllava.models.forward import (
    FeatureCache,
    answer_loss,
    forward_hidden,
    segment_mask,
    supervised_positions,
    to_device,
    vision_features,
)

from ..conftest import (
    logits_of,
    make_batch,
    make_model,
    make_packed,
)


@torch.no_grad()
def test_the_shared_forward_is_the_models_own(family):
    model, batch = make_model(family), make_batch()
    expected = logits_of(model, batch)
    for features in (None, vision_features(model, batch["pixel_values"])):
        hidden = forward_hidden(model, batch, features)
        assert torch.equal(model.lm_head(hidden)[batch["attention_mask"].bool()], expected)


@torch.no_grad()
def test_the_answer_loss_is_the_models_own(family):
    model, batch = make_model(family), make_batch()
    own = model(**{k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}, use_cache=False).loss
    count = int((batch["labels"][:, 1:] != -100).sum())
    assert answer_loss(model, batch).item() == pytest.approx(own.item(), rel=1e-5)
    assert answer_loss(model, batch, reduction="sum").item() == pytest.approx(own.item() * count, rel=1e-5)


@torch.no_grad()
def test_packed_questions_are_answered_as_if_they_were_alone(family):
    model, packed = make_model(family), make_packed(rows=1)
    hidden = forward_hidden(model, packed)[0]
    segments = packed["segment_ids"][0]
    for segment in (1, 2, -1):
        own = segments == segment
        seen = own | (segments == 0) if segment > 0 else own
        alone = {"input_ids": packed["input_ids"][:, seen], "attention_mask": torch.ones(1, int(seen.sum()))}
        if segment > 0:
            alone["pixel_values"] = packed["pixel_values"]
        assert torch.allclose(forward_hidden(model, alone)[0][own[seen]], hidden[own], atol=1e-4)


def test_the_segment_mask_lets_every_query_see_itself():
    attention = torch.tensor([[1, 1, 1, 1, 1, 0]])
    mask = segment_mask(attention, torch.tensor([[0, 1, 1, 2, -1, 0]]), torch.float32)[0, 0]
    allowed = (mask == 0).int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 0, 1],
    ]


def test_positions_predict_the_next_label():
    mask, targets = supervised_positions(torch.tensor([[-100, 5, -100, 7], [4, -100, -100, 6]]))
    assert mask.tolist() == [[True, False, True, False], [False, False, True, False]]
    assert targets.tolist() == [5, 7, 6]


def test_vision_features_stop_before_the_projector(family):
    model, batch = make_model(family), make_batch()
    ran: list[int] = []
    projector_of(model).register_forward_hook(lambda *_: ran.append(1))
    features = vision_features(model, batch["pixel_values"])
    assert not ran
    assert not features.requires_grad
    assert len(features) == len(batch["pixel_values"])


@pytest.fixture
def tower(monkeypatch) -> list[int]:
    """Images that the tower has looked at, call by call; it only flattens them."""
    calls: list[int] = []

    def look(_model, pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return pixels.flatten(1)

    monkeypatch.setattr("efficientllava.models.forward.vision_features", look)
    return calls


def test_features_are_computed_once_and_kept_within_a_limit(tower):
    model, batch = make_model(), make_batch()
    generous, tight = FeatureCache(model), FeatureCache(model, limit_bytes=3 * 16 * 16 * 4)
    for cache, expected in ((generous, [2]), (tight, [2, 1])):
        tower.clear()
        first, second = cache(batch), cache(batch)
        assert torch.equal(first, batch["pixel_values"].flatten(1))
        assert torch.equal(second, first)
        assert tower == expected
    assert generous(make_batch(images=False)) is None


def test_an_image_of_several_questions_passes_the_tower_once(tower):
    cache = FeatureCache(make_model())
    first, second, third = torch.randn(3, 2, 3, 4, 4)  # of two tiles each
    ask = {"pixel_values": torch.cat([first, second, first]), "image_ids": ["a", "b", "a"], "image_tiles": [2, 2, 2]}
    assert torch.equal(cache(ask), torch.cat([first, second, first]).flatten(1))
    ask = {"pixel_values": torch.cat([third, second]), "image_ids": ["c", "b"], "image_tiles": [2, 2]}
    assert torch.equal(cache(ask), torch.cat([third, second]).flatten(1))
    assert tower == [4, 2]


def test_to_device_casts_floating_tensors_only():
    moved = to_device(make_batch(), "cpu", torch.float16)
    assert moved["pixel_values"].dtype == torch.float16
    assert moved["input_ids"].dtype == torch.long
    assert moved["ids"] == ["0/0", "0/1", "0/2"]
