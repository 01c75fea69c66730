from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from efficientllava.models.anatomy import language_parameters, layers_of, projector_of
from efficientllava.models.forward import (
    FeatureCache,
    Offload,
    answer_loss,
    forward_hidden,
    segment_mask,
    supervised_positions,
    to_device,
    vision_features,
)
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.stream import Calibration
from efficientllava.settings.schema import PruneConfig

from ..conftest import (
    logits_of,
    make_batch,
    make_batches,
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


class Shelf(Offload):
    """A host whose memory the device cannot read: what lies there looks like NaN, or an index that does not exist."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("cpu")
        self._shelf: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.largest_layer = 0
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = self.put(tensor.data)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.numel():
            return tensor  # there is nothing to be read
        worst = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        blank = torch.tensor(worst, dtype=tensor.dtype).expand(tensor.shape)
        self._shelf[blank.data_ptr()] = (blank, tensor)
        return blank

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._shelf[tensor.data_ptr()][1] if tensor.numel() else tensor

    def release(self, model: nn.Module) -> None:
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = self.take(tensor.data)


CONFIGS = {
    "shape": PruneConfig("widthwise", "widthwise", 0.3, refit=True),
    "local, layer target": PruneConfig("w", "widthwise", 0.3, selection="local", refit=True, refit_target="layer"),
    "global": PruneConfig("widthwise", "widthwise", 0.3, "obs", "global"),
    "activation": PruneConfig("widthwise", "widthwise", 0.3, "activation", "global", refit=True),
    "wanda": PruneConfig("widthwise", "widthwise", 0.3, "wanda", "local"),
    "flap": PruneConfig("flap", "widthwise", 0.3, "flap", "global", bias=True),
    "wanda_sp": PruneConfig("wanda_sp", "widthwise", 0.3, "wanda", "floor", prefix="pruned"),
    "magnitude": PruneConfig("widthwise", "widthwise", 0.3, "magnitude", "global", refit=True),
    "random": PruneConfig("widthwise", "widthwise", 0.3, "random", "local"),
    "taylor": PruneConfig("widthwise", "widthwise", 0.3, "param_mix", "local"),
    "taylor, batch": PruneConfig("widthwise", "widthwise", 0.3, "param_first", "local", taylor_mean="batch"),
    "layerwise": PruneConfig("layerwise", "layerwise", 0.3, refit=True, iterative=True, final_norm=True),
}


def pruned(model, calibration, config):
    plan, report = make_plan(model, calibration, config)
    smaller, applied = apply_plan(model, plan, calibration, config)
    return plan, smaller, (report.loss_dense, applied.loss_pruned, applied.errors)


@pytest.mark.parametrize("family", ["llama_gqa", "phi3"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_pruning_from_host_memory_is_pruning(family, config):
    if config.bias and family == "phi3":
        family = "phi"  # which has biases
    plan, smaller, report = pruned(make_model(family), Calibration(make_batches()), config)
    model = make_model(family)
    sizes = [sum(t.nbytes for t in layer.module.parameters()) for layer in layers_of(model)]
    frame = sum(t.nbytes for t in [*model.parameters(), *model.buffers()]) - sum(sizes)
    shelf = Shelf(model)
    again, offloaded, told = pruned(model, Calibration(make_batches(), offload=shelf), config)
    shelf.release(offloaded)
    assert again == plan
    assert told == report
    for (name, one), (_, two) in zip(smaller.state_dict().items(), offloaded.state_dict().items(), strict=True):
        assert torch.equal(one, two), name
    assert shelf.resident == 0
    assert shelf.peak <= max(frame, max(sizes) + 1000)  # the final norm may be beside a layer
    assert shelf.peak < 4 * language_parameters(make_model(family))


def test_what_nobody_changed_returns_to_its_memory_and_what_changed_is_copied():
    layer = nn.Linear(4, 3)
    host = [p.data_ptr() for p in layer.parameters()]

    class Copying(Offload):
        def take(self, tensor):
            return tensor.clone()

        def put(self, tensor):
            return tensor.clone()

    offload = Copying("cpu")
    with offload.on_device(layer):
        assert offload.resident == 60
        assert layer.weight.data_ptr() != host[0]
        with offload.on_device(layer, nn.Linear(1, 1)):
            assert offload.resident == 68
        with torch.no_grad():
            layer.bias.add_(1.0)
        changed = layer.bias.clone()
    assert (offload.resident, offload.peak) == (0, 68)
    assert layer.weight.data_ptr() == host[0]
    assert layer.bias.data_ptr() != host[1]
    assert torch.equal(layer.bias, changed)


def test_a_failure_brings_everything_back():
    layer = nn.Linear(4, 3)
    host = layer.weight.data_ptr()
    offload = Offload("cpu")
    with contextlib.suppress(RuntimeError), offload.on_device(layer):
        raise RuntimeError
    assert offload.resident == 0
    assert layer.weight.data_ptr() == host
