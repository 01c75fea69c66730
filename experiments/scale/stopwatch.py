"""``run.py`` under a stopwatch: ``python -m experiments.scale.stopwatch <folder> <what is typed behind run.py>``.

Into the folder goes ``phases.json``: seconds and CPU seconds by phase, and what a plain matrix product of the same size
and type and a plain copy would have taken of the CPU, as measured just before. ``phase`` names the present one.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import shutil
import sys
import time
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from efficientllava.models.anatomy import decoder_of, parameters
from efficientllava.pruning.obs import OBS_ROUNDS

ROOT = Path(__file__).resolve().parents[2]
REST, GATE, OBS = "other", "reload gate", "OBS"
# Phase to what is done in it, where it is looked up; what happens in another phase inside of it counts there.
PHASES = {
    "records": ("stages.opening:open_data", "stages.opening:calibration_records", "stages.opening:_recovery"),
    "load": ("stages.run:load",),
    "convert": ("checkpoint.convert:convert",),
    "digest": ("checkpoint.folder:folder_digest", "checkpoint.convert:folder_digest"),
    "vision tower": ("pruning.stream:CalibrationStream.start",),
    "decoder layers": ("pruning.stream:CalibrationStream.call",),
    "Gram matrices": ("pruning.statistics:add_product", "pruning.refit:add_product", "pruning.statistics:Gram.mean"),
    OBS: ("pruning.importance:obs_ranking",),
    "choose damping": ("pruning.refit:validate",),
    "solve": ("pruning.refit:solve",),
    "cut": ("pruning.refit:cut_component", "pruning.pruner:rebuild"),
    "loss": ("pruning.stream:CalibrationStream.answer_loss",),
    "write": ("stages.run:round_weights", "stages.run:write"),
    GATE: ("stages.run:reload_gate",),
    "ask the teacher": ("recovery.recover:cached_teacher",),
    "train": ("stages.recover:train",),
    "questions": ("stages.evaluate:_answer",),
}
# Where a phase goes over the weight files of a folder, which of the arguments that is.
FILES = {"load": 0, "convert": 0, "folder_digest": 0, "write": 1, "reload_gate": 0}
aten: Any = torch.ops.aten
# Operations of what torch has no formula for, from the shapes of arguments and result.
OPERATIONS: dict[Any, Callable[..., float]] = {
    aten.linalg_cholesky_ex: lambda a, *_, **__: a.shape[-1] ** 3 / 3 * a[..., 0, 0].numel(),  # of each matrix
    aten.cholesky_inverse: lambda a, *_, **__: a.shape[-1] ** 3 * 2 / 3,
    aten.linalg_solve_triangular: lambda a, b, **_: a.shape[-1] * b.numel(),
    aten.linear: lambda inputs, weight, *_: 2 * inputs.numel() * len(weight),  # whole in inference mode, else in parts
    aten.addmm_: lambda total, a, b, **_: 2 * a.shape[0] * a.shape[1] * b.shape[1],
}


def eliminated(weight: torch.Tensor, gram: torch.Tensor, width: int) -> float:
    """Operations of a greedy ranking: an inverse, and what each round takes from it and from the writer's columns."""
    size, out = len(gram), len(weight)
    step = width if width > 1 else max(1, size // OBS_ROUNDS)
    return size**3 + sum(2 * step * left * (left + out) for left in range(size - step, 0, -step))


def cpu_seconds() -> float:
    """CPU time of this process and of those that it has waited for."""
    used = os.times()
    return time.process_time() + used.children_user + used.children_system


class Rates:
    """What a plain matrix product and a plain copy reach here, per CPU second.

    Args:
        folder: Where a file is copied.
    """

    def __init__(self, folder: Path) -> None:
        sides = {
            torch.bfloat16: (640, 4096, 4096),
            torch.float32: (2048, 2048, 2048),
            torch.float64: (1024, 2048, 2048),
        }
        self.flops = {dtype: 2 * a * b * c / _shortest(_product(dtype, a, b, c)) for dtype, (a, b, c) in sides.items()}
        block = torch.ones(1 << 27, dtype=torch.uint8)
        target = torch.empty_like(block)
        self.copy = 2 * block.nbytes / _shortest(lambda: target.copy_(block))
        one, two = folder / "copied", folder / "copy"
        one.write_bytes(block.numpy().tobytes())
        self.file = block.nbytes / _shortest(lambda: shutil.copyfile(one, two))
        one.unlink()
        two.unlink()

    def of(self, dtype: torch.dtype) -> float:
        """Operations per second in a type; one of two bytes is stored, and computes in bfloat16."""
        return self.flops.get(dtype, self.flops[torch.bfloat16 if dtype.itemsize == 2 else torch.float32])


def _product(dtype: torch.dtype, a: int, b: int, c: int) -> Callable[[], Any]:
    return partial(torch.matmul, torch.ones(a, b, dtype=dtype), torch.ones(b, c, dtype=dtype))


def _shortest(function: Callable[[], Any]) -> float:
    return max(min(timeit.repeat(function, timer=cpu_seconds, repeat=4, number=1)), 1e-9)


class Stopwatch(TorchDispatchMode):
    """Seconds, CPU seconds and floors by phase.

    Args:
        folder: Where the present phase is told.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.rates = Rates(folder)
        self.seconds, self.cpu, self.floor = (defaultdict[str, float](float) for _ in range(3))
        self._stack, self._told = [REST], os.open(folder / "phase", os.O_CREAT | os.O_WRONLY)
        self._last = time.perf_counter(), cpu_seconds()
        self._switch()

    def _switch(self, name: str | None = None) -> None:
        """Charge the time since the last switch to the phase that was on; start another, or go back."""
        now, phase = (time.perf_counter(), cpu_seconds()), self._stack[-1]
        self.seconds[phase] += now[0] - self._last[0]
        self.cpu[phase] += now[1] - self._last[1]
        self._last = now
        if name:
            self._stack.append(name)
        elif len(self._stack) > 1:
            self._stack.pop()
        os.pwrite(self._told, f"{self._stack[-1]:<30}".encode(), 0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase; inside of another one it is taken out of that."""
        self._switch(name)
        try:
            yield
        finally:
            self._switch()

    def wrap(self, phase: str, place: str) -> None:
        """Time a function of the package."""
        module, _, path = place.partition(":")
        owner: Any = importlib.import_module(f"efficientllava.{module}")
        *classes, name = path.split(".")
        for each in classes:
            owner = getattr(owner, each)
        function, files = getattr(owner, name), FILES.get(name)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            # In the gate both sides must take the same kernels; long lists of numbers take long under this mode.
            with self.phase(phase), _disable_current_modes() if phase in (GATE, OBS) else nullcontext():
                result = function(*args, **kwargs)
            if phase == OBS:
                self.floor[phase] += eliminated(*args[:3]) / self.rates.flops[args[1].dtype]
            if phase == GATE:  # a prompt here and one in the process that loads: its products with every weight
                model, inputs = args[1:3]
                count = 2 * parameters(decoder_of(model).layers) * inputs["input_ids"].numel()
                self.floor[phase] += 2 * count / self.rates.of(next(model.parameters()).dtype)
            if files is not None:
                read = sum(file.stat().st_size for file in Path(args[files]).glob("*.safetensors"))
                self.floor[phase] += read / self.rates.file
            return result

        setattr(owner, name, timed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count what a matrix operation takes at least: its products, or the bytes that it reads and writes."""
        kwargs = kwargs or {}
        result, packet = func(*args, **kwargs), func._overloadpacket
        formula = OPERATIONS.get(packet)
        if formula or packet in flop_registry:
            made = result[0] if isinstance(result, tuple) else result
            count = formula(*args, **kwargs) if formula else flop_registry[packet](*args, **kwargs, out_val=result)
            moved = sum(tensor.nbytes for tensor in (*args, made) if isinstance(tensor, torch.Tensor))
            self.floor[self._stack[-1]] += max(count / self.rates.of(made.dtype), moved / self.rates.copy)
        return result

    def report(self) -> dict[str, Any]:
        """What was measured."""
        self._switch()
        phases = {
            name: {"seconds": self.seconds[name], "cpu": self.cpu[name], "floor": self.floor[name]}
            for name in self.seconds
        }
        rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.rates.flops.items()}
        return {"phases": phases, "rates": {**rates, "copy": self.rates.copy, "file": self.rates.file}}


def main(folder: Path, typed: list[str]) -> None:
    """Run ``run.py``."""
    torch.set_num_threads(1)
    watch = Stopwatch(folder)
    for phase, places in PHASES.items():
        for place in places:
            watch.wrap(phase, place)
    sys.argv = [str(ROOT / "run.py"), *typed]
    try:
        with watch:
            runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        (folder / "phases.json").write_text(json.dumps(watch.report()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
