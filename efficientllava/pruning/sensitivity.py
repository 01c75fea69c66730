"""How much the model's answers feel an error of each writer: what costs of different layers are compared by.

With ``g_t`` the gradient of the answers' cross-entropy by what a writer writes at position ``t``, an error ``e_t``
there raises the divergence from the dense model by about ``E[(g_t e_t)^2] / 2``, where answers are sampled from the
model itself (the Fisher information). Positions are weighed by ``|g_t|^2``, outputs by their mean ``g_t^2``, as in the
usual factorisation of the Fisher matrix (arXiv 1503.05671; for pruning 2312.17244, for Gram matrices 2505.07004).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.anatomy import Layer, final_norm_of, layers_of
from ..models.forward import supervised_positions
from .statistics import ANSWERS, CalibrationStream, Reduce


@dataclass(frozen=True)
class Sensitivity:
    """Of the attention and the MLP of every layer.

    Args:
        positions: By layer, component and batch: ``|g_t|^2`` of the counted positions.
        outputs: By layer and component: mean ``g^2`` of each output, ``(out_features,)``.
    """

    positions: list[tuple[list[Tensor], list[Tensor]]]
    outputs: list[tuple[Tensor, Tensor]]

    def weigh(self, stream: CalibrationStream, index: int) -> Callable[[int], list[Tensor]]:
        """What the counted positions of a batch weigh in the Gram matrices of a layer's two writers."""
        return lambda batch: [stream.shares(batch) * by_batch[batch] for by_batch in self.positions[index]]


@torch.no_grad()
def sensitivity(
    stream: CalibrationStream,
    seed: int,
    reduce: Reduce,
    tick: Callable[[str, int, int], None],
) -> Sensitivity:
    """Run every batch forwards and backwards once; the graph of one layer exists at a time.

    Args:
        stream: The calibration stream.
        seed: Seed of the sampled answers.
        reduce: Sums over processes.
        tick: Progress.
    """
    layers = layers_of(stream.model)
    generator = torch.Generator().manual_seed(seed)
    positions: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in layers]
    sums = [
        tuple(torch.zeros(c.writer.out_features, dtype=torch.float64) for c in layer.components) for layer in layers
    ]
    count = torch.zeros(1, dtype=torch.float64)
    for batch, start in enumerate(stream.start()):
        hidden = [start]
        for index, layer in enumerate(layers):
            with stream.on_device(layer.module):
                hidden.append(stream.store(stream.call(layer.module, index, batch, stream.load(hidden[-1]))))
        gradient = _answer_gradient(stream, batch, stream.load(hidden.pop()), generator)
        counted = stream.counted[batch]
        count += float(counted.sum())
        for index in reversed(range(len(layers))):
            with stream.on_device(layers[index].module):
                gradient, found = _backward(stream, layers[index], index, batch, hidden.pop(), gradient)
            for component, by_output in enumerate(found):
                squares = by_output[counted].double().square()
                positions[index][component].append(squares.sum(1).float())
                sums[index][component].add_(squares.sum(0).cpu())
        tick("score layers", batch + 1, len(stream.batches))
    total = max(float(reduce(count)), 1.0)
    return Sensitivity(positions, [tuple(reduce(each) / total for each in pair) for pair in sums])  # pyright: ignore


@torch.enable_grad()
def _answer_gradient(stream: CalibrationStream, batch: int, output: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the summed cross-entropy of sampled answers by the last layer's output."""
    norm, head = final_norm_of(stream.model), stream.model.lm_head
    mask, _ = supervised_positions(stream.batches[batch]["labels"].to(stream.device))
    result, found = torch.zeros_like(output), []
    with stream.on_device(norm, head):  # pyright: ignore[reportArgumentType]
        for part in output[mask].split(ANSWERS):
            part = part.detach().requires_grad_()
            logits = head(norm(part)).float()  # pyright: ignore[reportCallIssue]
            cdf = logits.detach().softmax(-1).cumsum(-1)
            draws = torch.rand(len(part), 1, generator=generator).to(cdf.device) * cdf[:, -1:]
            sampled = torch.searchsorted(cdf, draws).squeeze(1).clamp(max=cdf.shape[1] - 1)
            loss = nn.functional.cross_entropy(logits, sampled, reduction="sum")
            found += torch.autograd.grad(loss, part)
    if found:
        result[mask] = torch.cat(found)
    return result


@torch.enable_grad()
def _backward(
    stream: CalibrationStream, layer: Layer, index: int, batch: int, stored: Tensor, gradient: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradients by the layer's input, and by what attention and MLP write."""
    written: list[Tensor] = []

    def note(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        written.append(output)

    handles = [component.writer.register_forward_hook(note) for component in layer.components]
    try:
        inputs = stream.load(stored).detach().requires_grad_()
        output = stream.call(layer.module, index, batch, inputs)
    finally:
        for handle in handles:
            handle.remove()
    before, *found = torch.autograd.grad(output, [inputs, *written], gradient)
    return before, found
