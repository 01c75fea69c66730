"""Peak memory of pruning in closed form, from sizes alone: the model may live on the meta device.

Pruning goes through phases that follow each other, and each holds the weights, the hidden states that are kept between
layers, and a working set of its own. The terms below are upper bounds of what the code allocates, with

    B    positions of a micro-batch (rows x padded tokens)      N    positions of all calibration records
    h    hidden size          a    attention width (inputs of its writer)          f    MLP width
    e    bytes per weight and activation          g    bytes per entry of a Gram matrix (`gram_dtype`)

``experiments/scale`` compares them with measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import nn

from ..models.anatomy import (
    Layer,
    decoder_of,
    final_norm_of,
    layers_of,
)
from ..models.forward import ANSWERS, Batch
from ..settings.schema import PruneConfig
from .importance import GRADIENTS, INPUTS, RECORDS, importance_of
from .obs import OBS_ROUNDS
from .statistics import POSITIONS, STRIP, gram_dtype

MARGIN = 1.26  # pruning on one device needs at most this many times the weights


@dataclass(frozen=True)
class CalibrationSize:
    """Calibration data, in the sizes that memory depends on.

    Args:
        records: Number of records of one process.
        tokens: Tokens of the longest record, image tokens included.
        batch_size: Records per micro-batch.
        tiles: Most images, or tiles of images, in a record.
    """

    records: int
    tokens: int
    batch_size: int
    tiles: int = 1

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> CalibrationSize:
        """The size of collated batches."""
        rows = [len(batch["input_ids"]) for batch in batches] or [0]
        tokens = [batch["input_ids"].shape[1] for batch in batches] or [0]
        tiles = [tiles for batch in batches for tiles in batch.get("image_tiles") or [1]] or [1]
        return cls(sum(rows), max(tokens), max(1, *rows), max(tiles))

    def joined(self, positions: int) -> CalibrationSize:
        """The size once so many positions of written text have joined."""
        return replace(self, records=self.records + -(-positions // max(1, self.tokens)))

    @property
    def micro(self) -> int:
        """Positions of a micro-batch."""
        return min(self.batch_size, self.records) * self.tokens

    @property
    def positions(self) -> int:
        """Positions of all records."""
        return self.records * self.tokens


@dataclass(frozen=True)
class PruningMemory:
    """Worst-case memory of pruning, in bytes.

    Args:
        model: All weights.
        phases: Phase to peak on the device, weights included.
        host: Peak in host memory where weights or hidden states are kept there, else 0.
    """

    model: int
    phases: dict[str, int]
    host: int

    @property
    def peak(self) -> int:
        """Largest phase."""
        return max(self.phases.values())

    @property
    def ratio(self) -> float:
        """Peak over weights."""
        return self.peak / self.model


def micro_batch(config: PruneConfig, batch_size: int) -> int:
    """Records that pass through a layer at once: with Taylor scores, whose samples are records, one."""
    return 1 if _sees(config) == GRADIENTS else batch_size


def _sees(config: PruneConfig) -> str | None:
    return importance_of(config.importance).sees if config.method == "widthwise" else None


def pruning_memory(
    model: nn.Module, config: PruneConfig, size: CalibrationSize, stored: bool | None = None
) -> PruningMemory:
    """Bound the memory of ``prune=layerwise`` or ``prune=widthwise``.

    Args:
        model: The model; only its sizes are looked at.
        config: Method, importance, refit, ``offload``.
        size: Calibration data.
        stored: Whether hidden states are kept in host memory; None: as `store_on_host` decides.

    Returns:
        Memory by phase; on a CPU device and host are the same memory.
    """
    if stored is None:
        stored = store_on_host(model, config, size)
    layers = layers_of(model)
    largest = max(layers, key=lambda layer: _bytes(layer.module))
    terms = _Terms(model, largest, size)
    whole, layer = _bytes(model), _bytes(largest.module)
    rest = whole - sum(_bytes(each.module) for each in layers)
    closing = _bytes(final_norm_of(model)) + _bytes(model.lm_head)  # pyright: ignore[reportArgumentType]
    frame, block, head = (rest, layer, closing) if config.offload else (whole, whole, whole)
    streams = _streams(terms, config)
    kept = {phase: 0 if stored else size for phase, size in streams.items()}
    phases = {
        "vision and embeddings": frame + terms.vision + kept["one"] + terms.calls * (1 if stored else terms.batches)
    }
    if _sees(config) == GRADIENTS:
        phases["scores"] = block + terms.taylor(config) + kept["taylor"]
    elif _sees(config) == RECORDS:
        phases["statistics"] = block + terms.activations + terms.records + kept["one"]
        phases["scores"] = block + terms.records + kept["one"]
    elif _sees(config) == INPUTS:
        phases["statistics"] = block + terms.activations + terms.grams + kept["one"]
        phases["scores"] = block + (terms.obs if config.importance == "obs" else 0) + kept["one"]
    else:
        phases["scores"] = block + terms.activations + kept["one"]
    phases["refit and cut" if config.refit else "cut"] = block + terms.cut(config, stored) + kept["cut"]
    phases["loss"] = head + terms.loss + kept["one"]
    host = (whole if config.offload is True else 0) + (
        max(streams.values()) + terms.calls * terms.batches if stored else 0
    )
    return PruningMemory(whole, phases, host)


def store_on_host(model: nn.Module, config: PruneConfig, size: CalibrationSize) -> bool:
    """Whether hidden states have to be kept in host memory for pruning to stay within `MARGIN` of the weights."""
    return config.offload is True or pruning_memory(model, config, size, stored=False).ratio > MARGIN


def _streams(terms: _Terms, config: PruneConfig) -> dict[str, int]:
    """Hidden states kept between layers: of one pass, of the cut (pruned, dense, and inputs of a writer), of Taylor."""
    residual = config.refit and config.refit_target != "layer"
    group = terms.positions if config.taylor_mean == "batch" else terms.micro
    return {
        "one": terms.hidden * (1 + (config.prefix == "pruned")) * terms.positions,
        "cut": (terms.hidden * (1 + residual + config.biased) + terms.attention) * terms.positions,
        "taylor": terms.hidden * (terms.positions + group * (terms.depth + 1)),
    }


class _Terms:
    """Working sets of one layer and one micro-batch, in bytes; widths are in bytes per position."""

    def __init__(self, model: nn.Module, layer: Layer, size: CalibrationSize) -> None:
        config, each = decoder_of(model).config, layer.mlp.writer.weight.element_size()
        self.micro, self.positions, self.depth = size.micro, size.positions, len(layers_of(model))
        self.batches = -(-size.records // size.batch_size)
        self._records, self._tokens = size.records, size.tokens
        self._layer, self._size, self._vocabulary = layer, each, int(config.vocab_size)
        self._out = layer.mlp.writer.out_features
        self._widths = [component.writer.in_features for component in layer.components]
        self.hidden, (self.attention, self._mlp) = each * self._out, [each * width for width in self._widths]
        # Mask (one byte or one number per pair of positions) and position embeddings of a micro-batch.
        rows = min(size.batch_size, size.records)
        self.calls = rows * size.tokens * (size.tokens + 2 * layer.head_dim) * each
        self.vision = vision_bytes(model, rows * size.tiles, each)

    @property
    def activations(self) -> int:
        """A layer's forward pass: norms in fp32, queries, keys, values and their rotated copies, or the gated MLP."""
        return self.micro * (4 * self.hidden + max(6 * self.hidden, 4 * self.attention, 4 * self._mlp)) + self.calls

    @property
    def grams(self) -> int:
        """Both Gram matrices, and the positions that are widened for a product."""
        wide = min(self.micro, POSITIONS) * self._widths[1] * 4
        return sum(n * n * gram_dtype(n).itemsize for n in self._widths) + wide + self.micro * self._mlp

    @property
    def records(self) -> int:
        """Two moments of each record, what a score is made of them, and positions and rows in float64."""
        return (64 * (self._records + self._tokens // 4) + 16 * STRIP) * max(self._widths)

    @property
    def obs(self) -> int:
        """A Gram matrix, its inverse before and after a round, the writer likewise; the other Gram matrix waits."""
        sizes = []
        for component, width in zip(self._layer.components, self._widths, strict=True):
            g = gram_dtype(width).itemsize
            gone = component.width if component.width > 1 else max(1, width // OBS_ROUNDS)
            blocks = 3 * self._out * width if component.width > 1 else 0
            sizes.append(g * (3 * width * width + 2 * self._out * width + max(3 * gone * width, blocks)))
        first = self._widths[1] ** 2 * gram_dtype(self._widths[1]).itemsize
        return max(sizes[0] + first, sizes[1])

    def cut(self, config: PruneConfig, stored: bool) -> int:
        """One component's moments, of what is fitted and of what is held back, with a forward pass or the solution.

        The solution takes another Gram matrix for its factor and some rows of the writer; and the largest matrix is
        there once more. What is held back lies on the host until then, if that is where hidden states are.
        """
        width = max(self._widths)
        again = max(p.nbytes for p in self._layer.module.parameters())
        if not config.refit:
            return self.activations + again + (self.records if config.biased else 0)
        crosses = 1 if config.refit_target == "layer" else 2
        square = gram_dtype(width).itemsize * width * width
        moments = 2 * (square + crosses * gram_dtype(width).itemsize * self._out * width)
        wide = min(self.micro, POSITIONS) * (width + self._out) * 4 + self.micro * self.hidden
        rows = 5 * 4 * STRIP * gram_dtype(width).itemsize * width
        summed = moments // 2 if stored else moments
        return max(summed + self.activations + wide + self.micro * self._mlp, moments + square + rows) + again

    def taylor(self, config: PruneConfig) -> int:
        """The graph of one layer, its gradients, and what is kept of them in fp32."""
        numbers = sum(p.numel() for p in self._layer.module.parameters())
        moments = 2 if config.importance == "param_mix" else 1
        graph = self.micro * (16 * self.hidden + 8 * self.attention + 8 * self._mlp) + self.calls
        return graph + numbers * (self._size + 4 * moments) + 8 * max(self._widths) * self._out

    @property
    def loss(self) -> int:
        """Logits of some answers in the model's type and, three times, in fp32; and one micro-batch's states."""
        return min(self.micro, ANSWERS) * self._vocabulary * (self._size + 12) + 2 * self.micro * self.hidden


def vision_bytes(model: nn.Module, images: int, size: int) -> int:
    """The tower's pass over the images of a micro-batch: all its hidden states, and one layer's working set.

    Args:
        model: The model; only its configuration is looked at.
        images: Images, or tiles of images.
        size: Bytes per activation.
    """
    patches = patches_of(model)
    if not patches:
        return 0
    config: Any = model.config.vision_config  # pyright: ignore[reportAttributeAccessIssue]
    depth, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    pixels = 3 * prod(_edges(config.image_size)) * 4
    return images * ((1 + patches) * size * ((depth + 8) * width + 2 * inner) + pixels)


def patches_of(model: nn.Module) -> int:
    """Patches that the vision tower cuts an image, or a tile, into; 0 where that depends on the image."""
    config = getattr(model.config, "vision_config", None)
    edge, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not edge or not patch:
        return 0
    return prod(side // part for side, part in zip(_edges(edge), _edges(patch), strict=True))


def _edges(size: int | Sequence[int]) -> Sequence[int]:
    return (size, size) if isinstance(size, int) else size


def _bytes(module: nn.Module) -> int:
    """Parameters and buffers, shared ones once."""
    tensors: Sequence = [*module.parameters(), *module.buffers()]
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
