"""Size, FLOPs and latency of models, measured side by side on one image-question.

Weight-only quantization of a decoder, to see what it costs and saves on top of pruning.
"""

from __future__ import annotations

import copy
import logging
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet, finalize

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..models.anatomy import decoder_of, sizes
from ..models.forward import (
    Batch,
    decoder_inputs,
    going_on,
    stock_inputs,
    to_device,
)
from ..settings.checks import require_valid
from ..settings.schema import EvaluateConfig

GROUP = 32  # neighbouring input channels that share a scale and a zero point, int4


def quantized(model: nn.Module, kind: str) -> Any:
    """A copy whose decoder computes with quantized weights; head, projector and vision tower are shared, not copied.

    Every linear layer of the decoder is quantized, whatever its width: for int4, input widths that are no multiple of
    `GROUP` (as pruning makes them) are filled up with zero channels, which change no result.

    Args:
        model: An image-text-to-text model.
        kind: ``int8`` (one scale per output channel) or ``int4`` (asymmetric, one scale per `GROUP` input channels;
            two weights a byte on a GPU in bfloat16, elsewhere one).

    Returns:
        The copy, on the model's device.
    """
    ao, shared = _torchao(), {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    decoder = decoder_of(twin)
    for module in decoder.modules():
        if kind == "int4" and isinstance(module, nn.Linear):
            _fill_up(module)
    ao.quantize_(decoder, _scheme(ao, kind, next(decoder.parameters())))
    return twin


def _fill_up(linear: nn.Linear) -> None:
    """Give a layer zero channels up to a multiple of `GROUP`."""
    if missing := -linear.in_features % GROUP:
        linear.in_features += missing
        linear.weight = nn.Parameter(nn.functional.pad(linear.weight.detach(), (0, missing)), requires_grad=False)
        linear.register_forward_pre_hook(partial(_widen, missing))


def _widen(missing: int, _linear: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return nn.functional.pad(inputs[0], (0, missing))


def _scheme(ao: Any, kind: str, weight: Tensor) -> Any:
    if kind == "int8":
        return ao.Int8WeightOnlyConfig(set_inductor_config=False)
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        return ao.Int4WeightOnlyConfig(GROUP, set_inductor_config=False, int4_packing_format="tile_packed_to_4d")
    return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(GROUP))  # pyright: ignore


def _torchao() -> Any:
    """Its warnings of kernels for other GPUs, and torch's of what it does with torch, are not about this model."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        from torchao import quantization  # pyright: ignore[reportMissingImports]
    finally:
        logging.disable(disabled)
    return quantization


WARM_UP = 2  # rounds that are run and not counted


# torch's counter has no formula for the attention kernel of the CPU.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_args, **_kwargs: (
        sdpa_flop_count(query, key, value)
    )
}


def checkpoint_bytes(folder: Path) -> int:
    """Size on disk of a checkpoint's weights (its safetensors files), in bytes; links are followed."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """What the stock forward takes. No mask: one prompt has no padding, and ``generate`` drops a mask of ones too."""
    weight = next(model.parameters())
    moved = to_device(batch, weight.device, weight.dtype)
    return stock_inputs(model, {**moved, "attention_mask": None})


def _count(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    # Not under inference mode: there the attention is not seen by the counter.
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        model(**inputs, logits_to_keep=1)
    return counter.get_total_flops()


def prefill_flops(model: nn.Module, batch: Batch) -> dict[str, int]:
    """Floating-point operations up to the first token (a multiplication and an addition are two).

    Matrix products, convolutions and attention are counted, as torch's counter does: causal attention at its full
    square, norms and activations not at all. The head runs on the last position only, as in ``generate``.

    Args:
        model: An image-text-to-text model.
        batch: One prompt: ``input_ids`` ``(1, T)`` and ``pixel_values`` where it has an image.

    Returns:
        ``prefill``: the whole model; ``prefill_language``: embeddings, decoder and head alone.
    """
    inputs = _inputs(model, batch)
    with torch.no_grad():
        language = decoder_inputs(model, {**inputs, "attention_mask": None})
    return {"prefill": _count(model, inputs), "prefill_language": _count(model, language)}


def now(device: torch.device) -> float:
    """The time in seconds, once the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def _round(model: nn.Module, inputs: Mapping[str, Any], new_tokens: int) -> tuple[float, float]:
    """Greedy decoding of one prompt without early stop; milliseconds to the first token and per further token."""
    device = inputs["input_ids"].device
    start = now(device)
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    token: Tensor = output.logits[:, -1:].argmax(-1)
    first = now(device)
    for _ in range(new_tokens - 1):
        output = model(input_ids=token, **going_on(output), use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return 1e3 * (first - start), 1e3 * (now(device) - first) / (new_tokens - 1)


def latencies(
    models: Mapping[str, nn.Module], inputs: Mapping[str, Mapping[str, Any]], repeats: int, new_tokens: int, batch: int
) -> dict[str, list[tuple[float, float]]]:
    """Milliseconds to the first token and per further token; round by round, after a warm-up.

    Rounds go over all models in turn, so that drift of the machine (clock, heat, neighbours) hits all alike.

    Args:
        models: By name.
        inputs: What the forward of each takes.
        repeats: Rounds that are counted.
        new_tokens: Tokens of a round, >= 2.
        batch: How often the prompt is repeated in a batch.
    """
    names = list(models)
    repeated = {name: _repeat(inputs[name], batch) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for index in range(WARM_UP + repeats):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            measured = _round(models[name], repeated[name], new_tokens)
            if index >= WARM_UP:
                times[name].append(measured)
    return times


def _repeat(inputs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The prompt ``count`` times, each with its own images."""
    return {key: torch.cat([value] * count) if torch.is_tensor(value) else value for key, value in inputs.items()}


def _summary(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range."""
    return {name: statistics.median(values), f"{name}_iqr": float(np.subtract(*np.percentile(values, [75, 25])))}


def _throughput(times: Sequence[tuple[float, float]], batch: int, new_tokens: int) -> dict[str, float]:
    """Generated tokens per second of a whole ``generate``, time to the first token included."""
    return _summary(
        f"batch_{batch}", [1e3 * batch * new_tokens / (first + later * (new_tokens - 1)) for first, later in times]
    )


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor holds; of a quantized one, those of its codes, scales and zero points."""
    if is_traceable_wrapper_subclass(tensor):
        return sum(tensor_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


class _Held(TorchDispatchMode):
    """Counts the bytes of results that are alive at once; what an operation needs inside itself is not seen."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self._bytes = 0
        self._seen = WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._change(storage.nbytes())
                finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, size: int) -> None:
        self._bytes += size
        self.peak = max(self.peak, self._bytes)


def _held_peak(model: nn.Module, inputs: Mapping[str, Any], new_tokens: int) -> int:
    """Most bytes of activations, keys and values that decoding holds at once."""
    given = [value for value in inputs.values() if torch.is_tensor(value)]
    with _Held([*model.parameters(), *model.buffers(), *given]) as held:
        _round(model, inputs, new_tokens)
    return held.peak


def _memory(model: nn.Module, inputs: Mapping[str, Any], new_tokens: int) -> dict[str, int]:
    """Bytes of the weights, and weights plus what decoding allocates on top (without an accelerator: see `_Held`)."""
    weights = sum(tensor_bytes(tensor) for tensor in [*model.parameters(), *model.buffers()])
    device = inputs["input_ids"].device
    if device.type != "cuda":
        return {"weights": weights, "peak": weights + _held_peak(model, inputs, new_tokens)}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    _round(model, inputs, new_tokens)
    return {"weights": weights, "peak": weights + torch.cuda.max_memory_allocated(device) - before}


def _setup(model: nn.Module, batch: Batch, cfg: EvaluateConfig) -> dict[str, Any]:
    weight = next(model.parameters())
    pixels = batch.get("pixel_values")
    return {
        "device": torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "batch_size": 1,
        "prompt_tokens": batch["input_ids"].shape[1],
        "image_size": list(pixels.shape[-2:]) if pixels is not None else [],
        "tiles": len(pixels) if pixels is not None else 0,
        "new_tokens": cfg.new_tokens,
        "repeats": cfg.repeats,
        "warm_up": WARM_UP,
    }


def measure(models: Mapping[str, nn.Module], batch: Batch, cfg: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """Measure several models on the same prompt, interleaved.

    Args:
        models: For example ``{"base": ..., "pruned": ..., "recovered": ...}``, each on the device it is measured on.
        batch: One prompt, without padding: ``input_ids`` ``(1, T)``, ``pixel_values`` where it has an image.
        cfg: ``repeats`` (>= 1), ``new_tokens`` (>= 2) and ``speed_batches``.

    Returns:
        Per model the entries of a stage in ``results.json``: ``parameters``, ``language_parameters``, ``memory_bytes``
        (``weights``; ``peak`` adds what decoding one prompt allocates), ``flops`` (see `prefill_flops`), ``latency_ms``
        (batch 1; medians ``prefill`` = time to first token from pixels on, and ``decode`` per token; ``prefill_iqr``
        and ``decode_iqr`` are interquartile ranges), ``tokens_per_second`` (``batch_8`` and ``batch_8_iqr`` for 8 in
        ``speed_batches``: generated tokens of the whole batch, the prefill's time included) and ``setup``, the
        conditions.

    Raises:
        UserError: If ``repeats`` or ``new_tokens`` is too small.
    """
    require_valid(cfg, "evaluate.")
    if batch["input_ids"].shape[0] != 1:
        raise ValueError(f"latency is measured on one prompt, got {batch['input_ids'].shape[0]}")
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    inputs = {name: _inputs(model, batch) for name, model in models.items()}
    times = {
        size: latencies(models, inputs, cfg.repeats, cfg.new_tokens, size) for size in sorted({1, *cfg.speed_batches})
    }
    measured = {}
    for name, model in models.items():
        prefill, decode = zip(*times[1][name], strict=True)
        speeds = [_throughput(times[size][name], size, cfg.new_tokens) for size in cfg.speed_batches]
        measured[name] = {
            **sizes(model),
            "memory_bytes": _memory(model, inputs[name], cfg.new_tokens),
            "flops": prefill_flops(model, batch),
            "latency_ms": {**_summary("prefill", prefill), **_summary("decode", decode)},
            "tokens_per_second": {key: value for speed in speeds for key, value in speed.items()},
            "setup": _setup(model, batch, cfg),
        }
        model.train(training[name])
    return measured
