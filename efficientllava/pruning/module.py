"""The pruner as a Lightning module: run it with ``trainer.predict`` and read `plan`, `pruned` and `report`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from ..data.splits import split_folds
from ..models.forward import Batch, FeatureCache
from ..models.offload import Offload
from ..runtime.console import Tick
from ..runtime.processes import gather, rank, sum_over, world_size
from ..settings.schema import PruneConfig
from .memory import CalibrationSize, micro_batch, store_on_host
from .plan import PruningPlan
from .pruner import PruneReport, apply_plan, make_plan
from .self_text import positions_of
from .stream import Beginning, Calibration, silent
from .surgery import reinitialise


def chunked(records: Sequence[Any], size: int) -> tuple[list[list[Any]], list[int]]:
    """Calibration records by batch, and the fold of each batch, see `efficientllava.data.splits.split_folds`."""
    parts = [[part[i : i + size] for i in range(0, len(part), size)] for part in split_folds(records)]
    return list(itertools.chain(*parts)), [fold for fold, part in enumerate(parts) for _ in part]


def with_roles(
    batches: Sequence[Batch],
    folds: Sequence[int],
    text: Sequence[Batch],
    compares: bool,
    **more: Any,
) -> Calibration:
    """Calibration batches, each with what it is for, and behind them what the model has written itself.

    Args:
        batches: Batches of the records.
        folds: Their folds, as of `chunked`.
        text: Batches that the model has written.
        compares: Whether candidates are compared on some record, be it another process's.
        **more: Further fields of `Calibration`.
    """
    held, compared = ([i for i, fold in enumerate(folds) if fold == kind] for kind in (1, 2))
    own = range(len(batches), len(batches) + len(text))
    # Choices of the refit are made on both kinds of text, but only where there are records to make them on.
    # Processes take turns at writing: the last quarter of all is the same for any number of them.
    total = sum(gather(len(text)))
    numbered = zip(own, itertools.count(rank(), world_size()), strict=False)
    last = [place for place, number in numbered if number >= total - total // 4] if compares else []
    roles: dict[str, Any] = {
        "compared": compared,
        "held": [*held, *last],
        "validated": [*compared, *last],
        "written": own,
    }
    return Calibration([*batches, *text], **roles, **more)


class PruningModule(LightningModule):
    """Calibration batches to statistics, statistics to scores, scores to a plan, and the plan to a smaller model.

    Every process looks at its share of the calibration batches, which are the same for any number of processes;
    statistics are summed, so that all arrive at the same plan and the same weights. Needs a Trainer with
    ``use_distributed_sampler=False`` and ``inference_mode=False``.

    Args:
        model: The model to prune; consumed.
        records: All calibration records.
        collate: Turns records into a batch.
        config: Method, ratio, importance, selection, refit.
        batch_size: Records per batch; Taylor scores take one at a time, see `efficientllava.pruning.gradients`.
        seed: Seed of random importance.
        features: Vision features by image.
        tick: Progress.
        offload: Brings layers to where they compute, while the model stays in host memory or in files.
        write: Has the dense model write text that enters the statistics, as of `efficientllava.pruning.self_text`.
        written_share: Share of the statistics that this text decides, (0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        records: Sequence[Any],
        collate: Any,
        config: PruneConfig,
        batch_size: int = 8,
        seed: int = 0,
        features: FeatureCache | None = None,
        tick: Tick = silent,
        offload: Offload | None = None,
        write: Callable[[nn.Module, tuple[int, int]], list[Batch]] | None = None,
        written_share: float = 0.5,
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._offload = offload
        # Lightning moves all modules that it knows of to the device.
        self._owned: nn.Module | tuple[nn.Module] = (model,) if offload else model
        self.plan: PruningPlan | None = None
        self.pruned: nn.Module | None = None
        self.report: PruneReport | None = None
        self._records, self._collate, self._config = records, collate, config
        self._batch_size = micro_batch(config, batch_size)
        self._seed, self._features, self._tick = seed, features, tick
        self._write, self._written_share = write, written_share
        self._batches: list[dict[str, Any]] = []
        self._folds, self._compares = list[int](), False

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """This process's share of the calibration batches."""
        mine = slice(self.trainer.global_rank, None, self.trainer.world_size)
        chunks, folds = chunked(self._records, self._batch_size)
        chunks, self._folds, self._compares = chunks[mine], folds[mine], 2 in folds
        # Lightning calls no hook on a process without batches, but all must take part in the sums.
        return DataLoader(chunks or [[]], batch_size=None, collate_fn=lambda chunk: chunk and self._collate(chunk))  # pyright: ignore[reportArgumentType]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave batches on the host: the stream brings one at a time to the device."""
        return batch

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep a batch; the statistics go over all of them, layer by layer."""
        if batch:
            self._batches.append(batch)

    def on_predict_epoch_end(self) -> None:
        """Score, select, refit, cut."""
        model = self._owned[0] if isinstance(self._owned, tuple) else self._owned
        batches, config = self._batches, self._config
        beginning = Beginning.of(batches, model.config.image_token_id)  # pyright: ignore
        on_gpu = next(model.parameters()).device.type != "cpu"
        text = self._write(model, (self.trainer.global_rank, self.trainer.world_size)) if self._write else []
        size = CalibrationSize.of(batches).joined(positions_of(text))
        # Host memory, where hidden states would take too much of a GPU's.
        storage = "cpu" if on_gpu and store_on_host(model, config, size) else None
        known: dict[str, Any] = {
            "features": self._features,
            "reduce": sum_over,
            "storage": storage,
            "offload": self._offload,
        }
        known |= {"tick": self._tick, "beginning": beginning, "written_share": self._written_share}
        calibration = with_roles(batches, self._folds, text, self._compares, **known)
        plan, scored = make_plan(model, calibration, config, self._seed)
        self.plan = replace(plan, calibration_ids=tuple(record.id for record in self._records))
        self.pruned, applied = apply_plan(model, self.plan, calibration, config)
        if config.reinitialise:
            reinitialise(self.pruned, self._seed)
        self._owned = self.pruned
        self.report = replace(scored, loss_pruned=applied.loss_pruned, errors=applied.errors)
        self._batches = []
