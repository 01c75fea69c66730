from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from efficientllava.checkpoint.folder import load
from efficientllava.models.anatomy import language_parameters, layers_of
from efficientllava.models.offload import Disk, Offload, make_room
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.stream import Calibration
from efficientllava.runtime.processes import release_memory
from efficientllava.settings.schema import PruneConfig

from ..conftest import logits_of, make_batch, make_batches, make_model
from ..runs import save_tiny


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
            return tensor.data  # there is nothing to be read
        worst = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max
        blank = torch.tensor(worst, dtype=tensor.dtype).expand(tensor.shape)
        self._shelf[blank.data_ptr()] = (blank, tensor.data)
        return blank

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._shelf[tensor.data_ptr()][1] if tensor.numel() else tensor.data

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
            return tensor.data.clone()

        def put(self, tensor):
            return tensor.data.clone()

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


def typed(model, dtype):
    """A model with its parameters in another type; buffers stay."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [CONFIGS[name] for name in ("shape", "flap", "taylor", "layerwise")])
def test_pruning_from_files_is_pruning(config, compute, tmp_path):
    family = "phi" if config.bias else "llama_gqa"
    batches = make_batches(dtype=compute)
    memory = typed(typed(make_model(family), torch.float16), compute)
    plan, smaller, report = pruned(memory, Calibration(batches), config)
    disk = Disk(compute, torch.float16, tmp_path)
    again, filed, told = pruned(typed(make_model(family), torch.float16), Calibration(batches, offload=disk), config)
    disk.settle(filed)
    assert again == plan
    assert told == report
    for (name, one), (_, two) in zip(smaller.state_dict().items(), filed.state_dict().items(), strict=True):
        assert two.dtype == (torch.float16 if name in dict(filed.named_parameters()) else one.dtype)
        assert torch.equal(one.to(two.dtype), two), name
    assert not list(tmp_path.iterdir())


def test_a_whole_model_runs_from_files_as_in_memory(tmp_path):
    model, batch = typed(make_model("phi3"), torch.float16), make_batch()
    waiting = [p.data_ptr() for p in model.parameters()]
    disk = Disk(torch.float32, torch.float16, tmp_path)
    with torch.inference_mode(), disk.running(model):
        found = logits_of(model, batch)
    assert torch.equal(found, logits_of(typed(typed(make_model("phi3"), torch.float16), torch.float32), batch))
    assert [p.data_ptr() for p in model.parameters()] == waiting
    assert not any(layer.module._forward_hooks or layer.module._forward_pre_hooks for layer in layers_of(model))


OWN = """
import sys, threading, time
from pathlib import Path
import torch
from efficientllava.checkpoint.export import round_weights, save
from efficientllava.checkpoint.folder import load
from efficientllava.data.collator import Collator
from efficientllava.data.splits import calibration_records
from efficientllava.models.offload import Disk
from efficientllava.pruning.pruner import apply_plan, make_plan
from efficientllava.pruning.stream import Calibration
from efficientllava.settings.schema import CalibrationConfig, DataConfig, PruneConfig

def own():
    kinds = ("RssAnon", "RssShmem")
    return sum(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kinds)) << 10

torch.set_num_threads(1)
config, peak, done = PruneConfig("widthwise", "widthwise", 0.2, "magnitude", "local"), 0, False
records = calibration_records(CalibrationConfig(samples=2), DataConfig("digits_vqa"), 0)

def prune(folder):
    checkpoint = load(folder, offload="disk")
    disk = Disk(torch.float32, checkpoint.storage, Path(folder).parent)
    calibration = Calibration([Collator(checkpoint.processor)(list(records))], offload=disk)
    plan, _ = make_plan(checkpoint.model, calibration, config)
    smaller, _ = apply_plan(checkpoint.model, plan, calibration, config)
    disk.settle(smaller)
    round_weights(smaller, checkpoint.storage)
    save(checkpoint.after(smaller, plan.step, plan.kept_layers), folder + "-pruned")

def watch():
    global peak
    while not done:
        peak = max(peak, own())
        time.sleep(0.001)

prune(sys.argv[1])  # what libraries take, they have taken
before = own()
thread = threading.Thread(target=watch)
thread.start()
prune(sys.argv[2])
done = True
thread.join()
print(peak - before)
"""


@pytest.mark.slow
def test_a_model_in_files_never_has_more_than_a_few_layers_in_memory(tmp_path, monkeypatch):
    from experiments.tiny_models import tiny

    save_tiny(tmp_path / "small")
    monkeypatch.setattr(tiny, "HIDDEN", 1024)
    monkeypatch.setattr(tiny, "HEAD_DIM", 64)
    large = save_tiny(tmp_path / "large", layers=20)
    weights = (large / "model.safetensors").stat().st_size
    layer = sum(4 * p.numel() for p in layers_of(load(large).model)[0].module.parameters())
    command = [sys.executable, "-c", OWN, str(tmp_path / "small"), str(large)]
    allocator = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back at once
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=allocator)
    assert int(done.stdout.splitlines()[-1]) < 3 * layer < weights / 3


def test_layers_that_are_set_aside_are_not_held_in_memory_and_come_back_as_they_were(tmp_path):
    def held() -> int:
        release_memory()  # a block may lie where an allocator keeps what was freed
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024

    layers = nn.ModuleList(nn.Linear(4096, 4096) for _ in range(4))
    weights = [parameter.detach().clone() for parameter in layers.parameters()]
    before = held()
    with make_room(layers, torch.device("cpu"), tmp_path, without=[layers[3]]):
        assert 0.65 < (before - held()) / sum(weight.nbytes for weight in weights) < 0.85
        assert not list(tmp_path.iterdir())  # what is killed leaves nothing
    for parameter, weight in zip(layers.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight)
    with torch.no_grad():
        layers[0].weight.add_(1)
    assert torch.equal(layers[0].weight, weights[0] + 1)
    assert torch.equal(layers[1].weight, weights[2])
