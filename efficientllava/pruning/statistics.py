"""Calibration statistics, layer by layer: nothing ever holds the hidden states of more than one layer boundary.

`CalibrationStream` runs the model once up to its first decoder layer, records what every layer is called with, and then
moves the hidden states of all calibration batches through one layer at a time. Gram matrices, block influence and refit
targets are collected on the way and freed with the layer.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import decoder_of, final_norm_of
from ..models.forward import (
    Batch,
    FeatureCache,
    feature_cache,
    forward_hidden,
    supervised_positions,
    to_device,
)
from ..models.offload import Offload
from ..runtime.errors import UserError
from ..runtime.processes import gather

STRIP = 64  # rows of a matrix that are worked on at once where a whole copy would cost too much
POSITIONS = 2048  # positions that are widened to float32 or float64 at once
ANSWERS = 512  # supervised tokens whose logits are held at once

Reduce = Callable[[Tensor], Tensor]
Write = Callable[[Tensor], Tensor]
TOKENS = ("all", "image", "text", "answer")


def no_reduce(tensor: Tensor) -> Tensor:
    """The reduction of a single process."""
    return tensor


def counted_positions(batch: Batch, tokens: str, image_token_id: int) -> Tensor:
    """Positions that enter the statistics; padding never does.

    Args:
        batch: A collated batch.
        tokens: ``all``, ``image``, ``text`` (all but image) or ``answer`` (supervised tokens).
        image_token_id: Id of the image placeholder.

    Returns:
        Boolean mask ``(batch, seq)``.
    """
    real = batch["attention_mask"].bool()
    if tokens == "all":
        return real
    image = batch["input_ids"] == image_token_id
    if tokens == "image":
        return real & image
    if tokens == "text":
        return real & ~image
    if tokens == "answer":
        return real & (batch["labels"] != -100)
    raise ValueError(f"tokens must be one of {TOKENS}, got {tokens!r}")


@dataclass(frozen=True)
class Beginning:
    """The tokens that all records begin with, such as those of a chat template.

    Args:
        ids: Token ids, up to the first image.
        records: Number of records of all processes.
    """

    ids: tuple[int, ...] = ()
    records: int = 1

    @classmethod
    def of(cls, batches: Sequence[Batch], image_token_id: int) -> Beginning:
        """What the batches of all processes have in common; to be called by all of them."""
        rows = [
            ids[mask.bool()].tolist()
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        parts = gather((_common(rows), len(rows)))
        shared, count = [ids for ids, n in parts if n], sum(n for _, n in parts)
        if count < 2:
            return cls()
        ids = _common(shared)
        return cls(tuple(ids[: ids.index(image_token_id)] if image_token_id in ids else ids), count)


ALONE = Beginning()


def _common(rows: Sequence[list[int]]) -> list[int]:
    """The longest common beginning."""
    if not rows:
        return []
    first, last = min(rows), max(rows)  # in lexical order, what these two share all share
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def position_weights(batch: Batch, counted: Tensor, beginning: Beginning) -> Tensor:
    """What each position counts for: 1, or for what all records begin with, once for all of them together.

    Args:
        batch: A collated batch.
        counted: Positions that count at all, ``(batch, seq)``.
        beginning: See the class.

    Returns:
        ``(batch, seq)``, float32.
    """
    weights = counted.float()
    shared = list(beginning.ids)
    for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], weights, strict=True):
        places = mask.nonzero()[: len(shared), 0]
        if ids[places].tolist() == shared:
            row[places.to(row.device)] /= beginning.records
    return weights


@contextlib.contextmanager
def forwarded(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module compute something else for a while."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def narrowed(writer: nn.Linear, kept: Tensor, write: Write | None = None) -> Iterator[None]:
    """Let a writer read only its kept columns.

    Args:
        writer: The writer.
        kept: Indices of the columns.
        write: What it then computes from them; None: as it does now.
    """
    kept = kept.to(writer.weight.device)
    if write is None:
        write = partial(nn.functional.linear, weight=writer.weight[:, kept], bias=writer.bias)
    with forwarded(writer, lambda inputs: write(inputs[..., kept])):
        yield


@contextlib.contextmanager
def recorded_calls(layers: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Replace every layer by the identity and record what it is called with."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def record(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            raise RuntimeError("decoder layers are expected to be called with keywords")
        calls.append((hidden, kwargs))
        return hidden

    for layer in layers:
        layer.forward = record
    try:
        yield calls
    finally:
        for layer in layers:
            del layer.forward


def _moved(value: Any, device: torch.device | str | None, shared: dict[int, Tensor]) -> Any:
    """Move the tensors of a nested value; one that occurs several times is moved once, and ``shared`` with others."""
    if isinstance(value, Tensor) and device is not None:
        return shared.setdefault(id(value), value.to(device))
    if isinstance(value, dict):
        return {key: _moved(item, device, shared) for key, item in value.items()}
    return type(value)(_moved(item, device, shared) for item in value) if type(value) in (list, tuple) else value


class CalibrationStream:
    """What every decoder layer is called with, and the means to move hidden states of all batches through one layer.

    Args:
        model: An image-text-to-text model in eval mode.
        batches: Collated batches on any device; the images of one at a time are brought to the one that computes.
        tokens: Which positions count, see `counted_positions`.
        features: Vision features by image, shared with other stages; None keeps its own.
        storage: Device that keeps hidden states, masks and the like between layers; None keeps them where they are.
        offload: Brings weights to the device where they stay in host memory; activations are then stored there too.
        beginning: What all records begin with; it counts once.
        shares: What a position of each batch counts for; None: 1.

    Attributes:
        counted: Positions that count, by batch.
        device: Where layers compute.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        tokens: str = "all",
        features: FeatureCache | None = None,
        storage: torch.device | str | None = None,
        offload: Offload | None = None,
        beginning: Beginning = ALONE,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.device = offload.device if offload else next(model.parameters()).device
        decoder = decoder_of(model)
        self.depth = len(decoder.layers)
        image_token_id = model.config.image_token_id  # pyright: ignore[reportAttributeAccessIssue]
        self.counted = [counted_positions(b, tokens, image_token_id).to(self.device) for b in batches]  # pyright: ignore[reportArgumentType]
        found = (position_weights(b, c, beginning) for b, c in zip(batches, self.counted, strict=True))
        self._shares = [w * s for w, s in zip(found, [1.0] * len(batches) if shares is None else shares, strict=True)]
        self._kwargs: list[list[dict[str, Any]]] = []
        self._added: list[list[Tensor | None]] = []
        self._features = features or feature_cache(model)
        self._storage, self._offload = "cpu" if offload else storage, offload

    @property
    def storage(self) -> torch.device | str:
        """Where what is kept between layers lies."""
        return self.device if self._storage is None else self._storage

    def on_device(self, *modules: nn.Module, without: Sequence[nn.Module] = ()) -> AbstractContextManager[None]:
        """Have modules where they compute, see `efficientllava.models.offload.Offload.on_device`."""
        return self._offload.on_device(*modules, without=without) if self._offload else contextlib.nullcontext()

    def over(self, batches: Sequence[Batch]) -> CalibrationStream:
        """A stream of the same model over other batches, with the same vision features; all positions count."""
        return CalibrationStream(self.model, batches, "all", self._features, self._storage, self._offload)

    @torch.no_grad()
    def start(self) -> list[Tensor]:
        """Inputs of the first layer by batch, ``(batch, seq, hidden)``; computed anew, so that no copy has to be kept.

        The layers must be as they were made: after a cut there is no start any more.
        """
        hidden, kwargs, added = [], [], []
        layers = decoder_of(self.model).layers
        with self.on_device(self.model, without=layers):
            for batch in self.batches:
                here = to_device(batch, self.device)
                with recorded_calls(layers) as calls:
                    forward_hidden(self.model, here, self._features(here))
                hidden.append(self.store(calls[0][0]))
                shared: dict[int, Tensor] = {}
                kwargs.append([_moved(keywords, self._storage, shared) for _, keywords in calls])
                # The layers are idle: what changes between two of them the decoder adds itself, as DeepStack does.
                steps = itertools.pairwise(inputs for inputs, _ in calls)
                changes = [None if after is before else after - before for before, after in steps]
                added.append([*_moved(changes, self._storage, shared), None])
        self._kwargs, self._added = kwargs, added
        return hidden

    def store(self, hidden: Tensor) -> Tensor:
        """Move hidden states to the device that keeps them between layers."""
        return hidden if self._storage is None else hidden.to(self._storage)

    def load(self, stored: Tensor) -> Tensor:
        """Move hidden states to the device that computes on them."""
        return stored.to(self.device)

    def call(self, layer: nn.Module, position: int, batch: int, inputs: Tensor) -> Tensor:
        """Run one layer on one batch.

        Args:
            layer: The layer, original or cut, on the compute device.
            position: Its index in the original decoder, which decides mask and position embeddings.
            batch: Index of the batch.
            inputs: ``(batch, seq, hidden)`` on the compute device; what requires a gradient gets a graph.

        Returns:
            The next layer's input, like ``inputs``.
        """
        keywords, added = _moved((self._kwargs[batch][position], self._added[batch][position]), self.device, {})
        with torch.set_grad_enabled(inputs.requires_grad):
            output = layer(inputs, **keywords)
        return output if added is None else output + added

    def run(self, layer: nn.Module, position: int, hidden: list[Tensor]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Move all batches through one layer: its outputs take the place of its inputs as they are made.

        Args:
            layer: See `call`.
            position: See `call`.
            hidden: Layer inputs by batch; overwritten.

        Yields:
            ``(batch index, input, output)``, both ``(batch, seq, hidden)`` on the compute device.
        """
        with self.on_device(layer):
            for batch, stored in enumerate(hidden):
                inputs = self.load(stored)
                output = self.call(layer, position, batch, inputs)
                hidden[batch] = self.store(output)
                yield batch, inputs, output

    def shares(self, batch: int) -> Tensor:
        """What the counted positions of a batch count for beside each other, ``(counted,)``."""
        return self._shares[batch][self.counted[batch]]

    def weights(self, batch: int, residual: Tensor) -> Tensor:
        """What the counted positions of a batch weigh in a Gram matrix: as the next norm sees an error there.

        An error in the residual stream matters relative to its length. Positions with massive activations, of thousands
        of times the others' power, would rule every matrix, cost and damping otherwise.

        Args:
            batch: Index of the batch.
            residual: The residual stream behind the writer, ``(batch, seq, hidden)``.

        Returns:
            ``(counted,)``, > 0.
        """
        residual = residual[self.counted[batch]]
        power = residual.to(torch.promote_types(residual.dtype, torch.float32)).square().mean(-1)
        return self.shares(batch) / power.clamp(min=torch.finfo(torch.float32).tiny ** 0.5)

    def advance(self, layer: nn.Module, position: int, hidden: list[Tensor]) -> None:
        """Replace the layer's inputs by its outputs, for all batches."""
        for _ in self.run(layer, position, hidden):
            pass

    def require_counted(self, tokens: str, reduce: Reduce = no_reduce) -> None:
        """Refuse calibration records in which no position counts.

        Args:
            tokens: What was asked for, see `counted_positions`.
            reduce: Sums over processes.

        Raises:
            UserError: No batch of any process has such a position.
        """
        count = sum(float(mask.sum()) for mask in self.counted)
        if not float(reduce(torch.tensor([count], dtype=torch.float64))):
            raise UserError(f"prune.tokens={tokens}: the calibration records have no such token; use prune.tokens=all")

    @torch.no_grad()
    def answer_loss(self, hidden: Sequence[Tensor], reduce: Reduce = no_reduce) -> float:
        """Mean cross-entropy of the supervised tokens, from the last layer's outputs.

        Args:
            hidden: Outputs of the last layer, before the final norm.
            reduce: Sums over processes.

        Returns:
            Nats per supervised token.
        """
        norm, head = final_norm_of(self.model), self.model.lm_head
        total = torch.zeros(2, dtype=torch.float64)
        with self.on_device(norm, head):  # pyright: ignore[reportArgumentType]
            for batch, state in zip(self.batches, hidden, strict=True):
                mask, targets = supervised_positions(batch["labels"].to(self.device))
                rows = self.load(state)[mask]
                for part, wanted in zip(rows.split(ANSWERS), targets.split(ANSWERS), strict=True):
                    logits = head(norm(part)).float()  # pyright: ignore[reportCallIssue]
                    loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
                    total += torch.tensor([float(loss), float(len(wanted))], dtype=torch.float64)
        total = reduce(total)
        return float(total[0] / total[1].clamp(min=1))


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
