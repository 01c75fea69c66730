"""What is summed up of a layer while calibration passes through it: Gram matrices, block influence, records' moments.

FLAP (arXiv 2312.11983 and its released code, CASIA-IVA-Lab/FLAP, 3bb57db, whose numbers these are): units go whose
input to the writer hardly fluctuates; what it writes on average goes into the writer's bias. With ``m_k`` the mean
input of the first ``k`` records, the fluctuation of a channel is the code's running form of the sample variance, ``1 /
(N - 1) sum_k (k - 1) / k E_k (x - m_k)^2``: the first record has no share in it. A record counts for one, however long
it is; the published records are of equal length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.anatomy import Component, Layer
from ..runtime.errors import UserError
from ..runtime.processes import gather
from .stream import CalibrationStream, Reduce, captured, no_reduce

STRIP = 64  # rows of a matrix that are worked on at once where a whole copy would cost too much
POSITIONS = 2048  # positions that are widened to float32 or float64 at once


def gram_dtype(size: int) -> torch.dtype:
    """Gram matrices up to 4,096 columns are kept in float64: plans do not depend on the number of processes."""
    return torch.float64 if size <= 4096 else torch.float32


def add_product(total: Tensor, left: Tensor, right: Tensor, weights: Tensor) -> None:
    """Add ``left^T diag(weights) right`` of one batch to a running sum.

    Batches are multiplied in float32 (float64 if they are) and summed in the type of ``total``: much faster than
    float64 products, and as independent of how batches are spread over processes.

    Args:
        total: ``(m, n)``; changed in place.
        left: ``(positions, m)``; of ``right`` itself only the upper half of the sum is kept up.
        right: ``(positions, n)``.
        weights: ``(positions,)``.
    """
    dtype = torch.promote_types(right.dtype, torch.float32)
    roots = weights.to(dtype).sqrt().unsqueeze(1)
    for some, others, root in zip(left.split(POSITIONS), right.split(POSITIONS), roots.split(POSITIONS), strict=True):
        wide = others * root
        narrow = wide if left is right else some * root
        if dtype == total.dtype and total.device == wide.device:
            total.addmm_(narrow.T, wide)
            continue
        for start in range(0, len(total), STRIP):  # in strips, so that the product needs no second matrix
            first = start if left is right else 0  # what lies below the diagonal is mirrored in the end
            strip = narrow[:, start : start + STRIP].T @ wide[:, first:]
            total[start : start + STRIP, first:] += strip.to(total.device)


def total_weight(weight: float, reduce: Reduce) -> float:
    """Sum of the weights of all processes; tiny, not 0, where nothing counts."""
    return max(float(reduce(torch.tensor([weight], dtype=torch.float64))), torch.finfo(torch.float32).tiny)


class Gram:
    """Weighted sum of ``x x^T`` over counted positions.

    Args:
        size: Width of ``x``.
        device: Where the sum is kept.
    """

    def __init__(self, size: int, device: torch.device | str) -> None:
        self.matrix = torch.zeros(size, size, dtype=gram_dtype(size), device=device)
        self.weight = 0.0

    def add(self, rows: Tensor, weights: Tensor) -> None:
        """Add rows ``(positions, size)`` with their weights ``(positions,)``."""
        add_product(self.matrix, rows, rows, weights)
        self.weight += float(weights.double().sum())

    def mean(self, reduce: Reduce) -> Tensor:
        """Close the sum: ``E[x x^T]`` over the positions of all processes, ``(size, size)``; takes the sum's memory."""
        total = reduce(self.matrix).div_(total_weight(self.weight, reduce))
        for end in range(STRIP, len(total), STRIP):
            total[end:, end - STRIP : end] = total[end - STRIP : end, end:].T
        return total


@dataclass
class BlockInfluence:
    """Block influence ``1 - cos(h, h')`` of one block, summed over counted positions.

    Source: arXiv 2604.24380, eq. 2. The sum over positions is the released code's variant, the mean is the paper's.
    """

    total: float = 0.0
    count: int = 0

    def add(self, inputs: Tensor, outputs: Tensor, counted: Tensor) -> None:
        """Add one batch: inputs and outputs ``(batch, seq, hidden)``, counted ``(batch, seq)``; fp32, O(N d)."""
        for before, after in zip(inputs[counted].split(POSITIONS), outputs[counted].split(POSITIONS), strict=True):
            cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            self.total += float((1.0 - cosine).double().sum())
        self.count += int(counted.sum())

    def value(self, how: str, reduce: Reduce = no_reduce) -> float:
        """Reduce over processes.

        Args:
            how: ``mean`` over positions, or ``sum``.
            reduce: Sums over processes.
        """
        both = reduce(torch.tensor([self.total, float(self.count)], dtype=torch.float64))
        return float(both[0]) if how == "sum" else float(both[0] / both[1].clamp(min=1))


def record_moments(inputs: Tensor, counted: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and mean square of a writer's inputs ``(batch, seq, width)``, record by record, where they count."""
    rows = [row[mask].float() for row, mask in zip(inputs, counted, strict=True) if mask.any()]
    double = {"dim": 0, "dtype": torch.float64}
    return [(row.mean(**double).cpu(), row.square().mean(**double).cpu()) for row in rows]


def all_moments(batches: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> tuple[Tensor, Tensor]:
    """Both moments of all records of all processes, each ``(records, width)``, in the order of the calibration.

    Args:
        batches: Output of `record_moments`, by batch of this process.
    """
    rounds = itertools.zip_longest(*gather(batches), fillvalue=[])  # batches went round the processes
    records = [record for turn in rounds for batch in turn for record in batch]
    means, squares = zip(*records, strict=True)
    return torch.stack(means), torch.stack(squares)


def fluctuation(means: Tensor, squares: Tensor) -> Tensor:
    """Fluctuation of every channel from the moments of records, ``(width,)``; see the module for the formula.

    Raises:
        UserError: There is one record only.
    """
    if len(means) < 2:
        raise UserError("prune.importance=flap: one calibration record has no fluctuation; give at least two")
    order = torch.arange(1, len(means) + 1, dtype=means.dtype).unsqueeze(1)
    centre = means.cumsum(0) / order
    spread = (squares - 2 * centre * means + centre.square()).clamp(min=0)
    return (spread * (order - 1) / order).sum(0) / (len(means) - 1)


@torch.no_grad()
def layer_moments(
    stream: CalibrationStream, layer: Layer, index: int, hidden: list[Tensor], without: Collection[int] = ()
) -> list[tuple[Tensor, Tensor]]:
    """Look at what the writers of a whole layer read.

    Args:
        stream: The calibration stream.
        layer: The layer.
        index: Its position in the decoder.
        hidden: Layer inputs by batch; replaced by its outputs.
        without: Batches that pass through only.

    Returns:
        Moments of the attention's and of the MLP's writer, see `all_moments`.
    """
    writers, batches = [component.writer for component in layer.components], ([], [])
    with captured(*writers) as seen:
        for batch, _, _ in stream.run(layer.module, index, hidden):
            for writer, mine in zip(writers, batches, strict=True):
                mine.append([] if batch in without else record_moments(seen[writer][0], stream.counted[batch]))
    return [all_moments(mine) for mine in batches]


def mean_written(component: Component, units: Sequence[int], mean: Tensor) -> Tensor:
    """What the columns that are not kept write on average, ``(out_features,)``.

    Args:
        component: The whole component.
        units: Kept units.
        mean: Mean input of the writer, ``(units * width,)``.
    """
    gone = torch.ones(len(mean), dtype=torch.bool)
    gone[component.columns(units)] = False
    weight = component.writer.weight.detach()
    gone, dtype = gone.to(weight.device), torch.promote_types(weight.dtype, torch.float32)
    lost = mean.to(weight.device, dtype)[gone]
    return torch.cat([part[:, gone].to(dtype) @ lost for part in weight.split(STRIP)])


Weigh = Callable[[int], Sequence[Tensor]]  # weights of a batch's counted positions, of attention and MLP


@torch.no_grad()
def layer_statistics(
    stream: CalibrationStream,
    layer: Layer,
    index: int,
    hidden: list[Tensor],
    linears: Sequence[nn.Linear] | None = None,
    weigh: Weigh | None = None,
    without: Collection[int] = (),
) -> list[Tensor]:
    """Look at what the linear layers of a whole layer read on the dense prefix.

    Args:
        stream: The calibration stream.
        layer: The layer.
        index: Its index in the decoder.
        hidden: Layer inputs by batch; become the layer's outputs.
        linears: Linear layers whose inputs are looked at; None: the writers of attention and MLP.
        weigh: What the counted positions of a batch weigh; None: as `CalibrationStream.weights` says for the residual
            stream behind attention and MLP.
        without: Batches that pass through only.

    Returns:
        Gram matrices ``E[x x^T]`` of the inputs.
    """
    linears = [c.writer for c in layer.components] if linears is None else linears
    grams = [Gram(linear.in_features, linear.weight.device) for linear in linears]
    attention = set(layer.attention.module.modules())
    with captured(*{*linears, layer.attention.writer}) as seen:
        for batch, inputs, outputs in stream.run(layer.module, index, hidden):
            if batch in without:
                continue
            residuals = (inputs + seen[layer.attention.writer][1], outputs)
            weights = weigh(batch) if weigh else [stream.weights(batch, residual) for residual in residuals]
            for linear, gram in zip(linears, grams, strict=True):
                gram.add(seen[linear][0][stream.counted[batch]], weights[linear not in attention])
    return [gram.mean(stream.reduce) for gram in grams]
