from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from efficientllava.models.anatomy import language_parameters, layers_of
from efficientllava.models.offload import Offload
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.scores import Calibration
from efficientllava.settings.schema import PruneConfig

from ..conftest import make_batches, make_model


class Shelf(Offload):
    """A host whose memory the device cannot read: what lies there looks like NaN, or an index that does not exist."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__("cpu")
        self._shelf: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.largest_layer = 0
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.data = self.put(tensor.data)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        worst = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        blank = torch.tensor(worst, dtype=tensor.dtype).expand(tensor.shape)
        self._shelf[blank.data_ptr()] = (blank, tensor)
        return blank

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._shelf[tensor.data_ptr()][1]

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
