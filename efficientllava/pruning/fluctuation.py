"""FLAP: units go whose input to the writer hardly fluctuates; what it writes on average goes into the writer's bias.

Source: arXiv 2312.11983 and its released code (CASIA-IVA-Lab/FLAP, 3bb57db), whose numbers these are (WIFV, AL-AM).
With ``m_k`` the mean input of the first ``k`` records, the fluctuation of a channel is the code's running form of the
sample variance, ``1 / (N - 1) sum_k (k - 1) / k E_k (x - m_k)^2``: the first record has no share in it. A record counts
for one, however long it is; the published records are of equal length.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..models.anatomy import Component, Layer
from ..runtime.errors import UserError
from ..runtime.processes import gather
from .statistics import STRIP, CalibrationStream


class RecordMoments:
    """Mean and mean square of a writer's inputs, record by record."""

    def __init__(self) -> None:
        self._batches: list[list[tuple[Tensor, Tensor]]] = []

    def add(self, inputs: Tensor, counted: Tensor) -> None:
        """Add a batch: inputs ``(batch, seq, width)``, positions that count ``(batch, seq)``."""
        rows = [row[mask].float() for row, mask in zip(inputs, counted, strict=True) if mask.any()]
        double = {"dim": 0, "dtype": torch.float64}
        self._batches.append([(row.mean(**double).cpu(), row.square().mean(**double).cpu()) for row in rows])

    def close(self) -> tuple[Tensor, Tensor]:
        """Both moments of all records of all processes, each ``(records, width)``, in the order of the calibration."""
        rounds = itertools.zip_longest(*gather(self._batches), fillvalue=[])  # batches went round the processes
        records = [record for turn in rounds for batch in turn for record in batch]
        if len(records) < 2:
            raise UserError("prune.importance=flap: one calibration record has no fluctuation; give at least two")
        means, squares = zip(*records, strict=True)
        return torch.stack(means), torch.stack(squares)


def fluctuation(means: Tensor, squares: Tensor) -> Tensor:
    """Fluctuation of every channel from the moments of records, ``(width,)``; see the module for the formula."""
    order = torch.arange(1, len(means) + 1, dtype=means.dtype).unsqueeze(1)
    centre = means.cumsum(0) / order
    spread = (squares - 2 * centre * means + centre.square()).clamp(min=0)
    return (spread * (order - 1) / order).sum(0) / (len(means) - 1)


@torch.no_grad()
def layer_moments(
    stream: CalibrationStream, layer: Layer, index: int, hidden: list[Tensor]
) -> tuple[RecordMoments, RecordMoments]:
    """Look at what the writers of a whole layer read.

    Args:
        stream: The calibration stream.
        layer: The layer.
        index: Its position in the decoder.
        hidden: Layer inputs by batch; replaced by its outputs.

    Returns:
        Moments of the attention's and of the MLP's writer.
    """
    found = RecordMoments(), RecordMoments()
    seen: dict[nn.Module, Tensor] = {}

    def note(linear: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> None:
        seen[linear] = args[0]

    handles = [component.writer.register_forward_hook(note) for component in layer.components]
    try:
        for batch, _, _ in stream.run(layer.module, index, hidden):
            for component, moments in zip(layer.components, found, strict=True):
                moments.add(seen[component.writer], stream.counted[batch])
    finally:
        for handle in handles:
            handle.remove()
    return found


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
