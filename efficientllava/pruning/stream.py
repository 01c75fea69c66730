"""Calibration, layer by layer: nothing ever holds the hidden states of more than one layer boundary.

`CalibrationStream` runs the model once up to its first decoder layer, records what every layer is called with, and then
moves the hidden states of all calibration batches through one layer at a time. What is looked at on the way is freed
with the layer.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.anatomy import decoder_of, final_norm_of
from ..models.forward import (
    ANSWERS,
    Batch,
    FeatureCache,
    Reached,
    forward_hidden,
    supervised_positions,
    to_device,
)
from ..models.offload import Offload
from ..runtime.console import Tick
from ..runtime.errors import UserError
from ..runtime.processes import gather

Reduce = Callable[[Tensor], Tensor]
Write = Callable[[Tensor], Tensor]
# Positions that count, of a batch and where its image tokens are.
TOKENS: dict[str, Callable[[Batch, Tensor], Tensor]] = {
    "all": lambda _batch, image: torch.ones_like(image),
    "image": lambda _batch, image: image,
    "text": lambda _batch, image: ~image,
    "answer": lambda batch, _image: batch["labels"] != -100,
}


# Share of written text in what a shape per layer is chosen by. Of `prune.selection=global` at 0, 0.05, 0.2 and 0.5 near
# text rose by 0.33, 0.36, 0.45 and 0.55 nats and a novel by 0.72, 0.59, 0.53 and 0.52 (`experiments/real_weights`).
CHOSEN = 0.05


def written_weight(share: float, read: float, made: float) -> float:
    """What a position of written text counts for, so that all of them have a share of the whole.

    Args:
        share: The share, (0, 1).
        read: Positions of the records, each of which counts for one.
        made: Positions of the written text.
    """
    return share / (1 - share) * read / made if read and made else 1.0


def no_reduce(tensor: Tensor) -> Tensor:
    """The reduction of a single process."""
    return tensor


def silent(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody sees."""


def counted_positions(batch: Batch, tokens: str, image_token_id: int) -> Tensor:
    """Positions that enter the statistics; padding never does.

    Args:
        batch: A collated batch.
        tokens: ``all``, ``image``, ``text`` (all but image) or ``answer`` (supervised tokens).
        image_token_id: Id of the image placeholder.

    Returns:
        Boolean mask ``(batch, seq)``.
    """
    return batch["attention_mask"].bool() & TOKENS[tokens](batch, batch["input_ids"] == image_token_id)


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

    def weights(self, batch: Batch, counted: Tensor) -> Tensor:
        """What each position counts for: 1, or for what all records begin with, once for all of them together.

        Args:
            batch: A collated batch.
            counted: Positions that count at all, ``(batch, seq)``.

        Returns:
            ``(batch, seq)``, float32.
        """
        weights, shared = counted.float(), list(self.ids)
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], weights, strict=True):
            places = mask.nonzero()[: len(shared), 0]
            if ids[places].tolist() == shared:
                row[places.to(row.device)] /= self.records
        return weights


def _common(rows: Sequence[list[int]]) -> list[int]:
    """The longest common beginning."""
    if not rows:
        return []
    first, last = min(rows), max(rows)  # in lexical order, what these two share all share
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


@dataclass(frozen=True)
class Calibration:
    """What scoring and refit look at.

    Args:
        batches: Collated batches, on any device; the images of one at a time are brought to the one that computes.
        features: Vision features by image, shared with other stages; None: a stream keeps its own.
        reduce: Sums over processes.
        storage: Device that keeps hidden states, masks and the like between layers; None is the compute device.
        offload: Brings weights to the device where they stay in host memory, as activations then do; None: the model
            computes where it is.
        tick: Progress.
        beginning: What all records begin with; it counts once.
        compared: Indices of the batches that candidates are compared on.
        held: Indices of the batches that a candidate's refit makes its own choices on; it is fitted to the remaining.
        validated: Indices of the batches that the last refit makes its own choices on, before it is fitted to all.
        written: Indices of the batches that the model has written itself, the last ones; they are not in the loss of
            the records.
        written_share: Share of the statistics that these decide, (0, 1).
    """

    batches: Sequence[Batch]
    features: FeatureCache | None = None
    reduce: Reduce = no_reduce
    storage: torch.device | str | None = None
    offload: Offload | None = None
    tick: Tick = silent
    beginning: Beginning = Beginning()
    compared: Sequence[int] = ()
    held: Sequence[int] = ()
    validated: Sequence[int] = ()
    written: Collection[int] = ()
    written_share: float = 0.5

    @property
    def compares(self) -> bool:
        """Whether there is an answer, be it another process's, that candidates can be compared on."""
        answers = (self.batches[batch]["labels"][:, 1:] != -100 for batch in self.compared)
        return any(gather(any(bool(each.any()) for each in answers)))

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the calibration records of this process, each once."""
        read = (batch for index, batch in enumerate(self.batches) if index not in self.written)
        return tuple(dict.fromkeys(record for batch in read for record in batch["ids"]))


@contextlib.contextmanager
def captured(*linears: nn.Module, stop: bool = False) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Note what linear layers read and write in their latest calls; with ``stop`` the block ends with the first one."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def note(linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[linear] = args[0], output
        if stop:
            raise Reached

    with contextlib.ExitStack() as hooks, contextlib.suppress(Reached):
        for linear in linears:
            hooks.enter_context(linear.register_forward_hook(note))
        yield seen


@contextlib.contextmanager
def forwarded(forward: Callable[..., Any], *modules: nn.Module) -> Iterator[None]:
    """Let modules compute something else for a while."""
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def narrowed(writer: nn.Linear, kept: Tensor, write: Write | None = None) -> AbstractContextManager[None]:
    """Let a writer read only its kept columns.

    Args:
        writer: The writer.
        kept: Indices of the columns.
        write: What it then computes from them; None: as it does now.
    """
    kept = kept.to(writer.weight.device)
    write = write or partial(nn.functional.linear, weight=writer.weight[:, kept], bias=writer.bias)
    return forwarded(lambda inputs: write(inputs[..., kept]), writer)


@contextlib.contextmanager
def recorded_calls(layers: Sequence[nn.Module]) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """Replace every layer by the identity and record what it is called with, which are keywords but for the states."""
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def record(hidden: Tensor, **keywords: Any) -> Tensor:
        calls.append((hidden, keywords))
        return hidden

    with forwarded(record, *layers):
        yield calls


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
        calibration: Batches and how to run them.
        tokens: Which positions count, see `counted_positions`.

    Attributes:
        counted: Positions that count, by batch.
        device: Where layers compute.
        storage: Where what is kept between layers lies.

    Raises:
        UserError: No position of any process counts.
    """

    def __init__(self, model: nn.Module, calibration: Calibration, tokens: str = "all") -> None:
        self.model, self.calibration, self.batches = model, calibration, calibration.batches
        self.reduce, self.tick, offload = calibration.reduce, calibration.tick, calibration.offload
        self.device = offload.device if offload else next(model.parameters()).device
        self._storage = "cpu" if offload else calibration.storage
        self.storage = self.device if self._storage is None else self._storage
        self.depth = len(decoder_of(model).layers)
        image: int = model.config.image_token_id  # pyright: ignore
        self.counted = [counted_positions(batch, tokens, image).to(self.device) for batch in self.batches]
        self._shares = self._weights(tokens)
        self._kwargs: list[list[dict[str, Any]]] = []
        self._added: list[list[Tensor | None]] = []
        self._features = calibration.features or FeatureCache(model)

    def _weights(self, tokens: str) -> list[Tensor]:
        """What every position counts for, by batch, ``(batch, seq)``: written text has its share of the whole."""
        weigh, written = self.calibration.beginning.weights, self.calibration.written
        weights = [weigh(batch, counted) for batch, counted in zip(self.batches, self.counted, strict=True)]
        sums = torch.zeros(2, dtype=torch.float64)
        for index, weight in enumerate(weights):
            sums[int(index in written)] += float(weight.sum())
        read, made = self.reduce(sums).tolist()
        if not read:
            raise UserError(f"prune.tokens={tokens}: the calibration records have no such token; use prune.tokens=all")
        factor = written_weight(self.calibration.written_share, read, made)
        return [weight * factor if index in written else weight for index, weight in enumerate(weights)]

    def on_device(self, *modules: Any, without: Sequence[nn.Module] = ()) -> AbstractContextManager[None]:
        """Have modules where they compute, see `efficientllava.models.offload.Offload.on_device`."""
        offload = self.calibration.offload
        return offload.on_device(*modules, without=without) if offload else contextlib.nullcontext()

    def over(self, batches: Sequence[Batch]) -> CalibrationStream:
        """A stream of the same model over other batches of this process; all of their positions count."""
        known = self.calibration
        return CalibrationStream(
            self.model, Calibration(batches, self._features, no_reduce, self._storage, known.offload)
        )

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
        return hidden.to(self.storage)

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

    def advance(self, layer: nn.Module, position: int, hidden: list[Tensor]) -> None:
        """Replace the layer's inputs by its outputs, for all batches."""
        for _ in self.run(layer, position, hidden):
            pass

    def end(self) -> list[Tensor]:
        """The whole model's outputs of the last layer, by batch."""
        hidden = self.start()
        for index, layer in enumerate(decoder_of(self.model).layers):
            self.advance(layer, index, hidden)
        return hidden

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

    def supervised(self, batch: int, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States that predict supervised tokens, these tokens, and where they are in the batch.

        Args:
            batch: Index of the batch.
            hidden: Outputs of the last layer, ``(batch, seq, hidden)``.
        """
        mask, targets = supervised_positions(self.batches[batch]["labels"].to(self.device))
        return self.load(hidden)[mask], targets, mask

    def logits(self, rows: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Go through outputs of the last layer, few at a time, so that few logits exist at once.

        Args:
            rows: ``(tokens, hidden)``.
            *beside: More tensors with one row per token.

        Yields:
            A part of the rows, which requires a gradient where gradients are taken, its logits in fp32, and the like
            parts of the other tensors.
        """
        norm, head = final_norm_of(self.model), self.model.lm_head
        with self.on_device(norm, head):
            for part, *others in zip(*(each.split(ANSWERS) for each in (rows, *beside)), strict=True):
                part = part.detach().requires_grad_(torch.is_grad_enabled())
                yield part, head(norm(part)).float(), *others  # pyright: ignore[reportCallIssue]

    @torch.no_grad()
    def answer_loss(self, hidden: Sequence[Tensor]) -> float:
        """Mean cross-entropy of the records' supervised tokens in nats, from the last layer's outputs by batch."""
        total = torch.zeros(2, dtype=torch.float64)
        for batch, state in enumerate(hidden):
            if batch in self.calibration.written:
                continue
            rows, targets, _ = self.supervised(batch, state)
            for _, logits, wanted in self.logits(rows, targets):
                loss = nn.functional.cross_entropy(logits, wanted, reduction="sum")
                total += torch.tensor([float(loss), float(len(wanted))], dtype=torch.float64)
        total = self.reduce(total)
        return float(total[0] / total[1].clamp(min=1))
