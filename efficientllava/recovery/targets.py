"""What a teacher has said about the supervised tokens of records, kept on disk.

A store is a folder that belongs to one teacher and one data set. It holds *parts*: the states after the final norm, the
states of one layer, the most likely tokens at one temperature. Each part has shards of its own, safetensors files that
are written whole or not at all and name their records in the header; so a recovery that wants more than another one
adds what is missing, and one that draws fewer records finds all of them. A record is found by its id and by the stamp
of its image files; its tokens must be those that the teacher has seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..runtime.files import whole_file
from .losses import TopK
from .teacher import Taught, record_keys

SUFFIX = ".safetensors"
FINAL = "final"


@dataclass(frozen=True)
class Wanted:
    """What a recovery reads of a teacher.

    Attributes:
        layers: Layers whose raw outputs are compared.
        final: States after the final norm are compared.
        top_k: Tokens per row whose log-probabilities are kept, already cut to the vocabulary; None: no logits.
        temperature: Temperature of these log-probabilities.
    """

    layers: tuple[int, ...] = ()
    final: bool = False
    top_k: int | None = None
    temperature: float = 1.0

    @property
    def likely(self) -> str:
        """Name of the part with log-probabilities."""
        return f"top_{self.top_k}_at_{self.temperature:g}"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all parts."""
        states = [*map(layer_part, self.layers), *([FINAL] if self.final else [])]
        return (*states, *([self.likely] if self.top_k else []))

    def bytes_per_token(self, hidden: int, itemsize: int) -> int:
        """Size of the answer to one supervised token.

        Args:
            hidden: Width of the residual stream.
            itemsize: Bytes per number of a hidden state.
        """
        likely = 8 * self.top_k + 4 if self.top_k else 0  # log-probability and token; the rest
        return (len(self.layers) + self.final) * hidden * itemsize + likely


def layer_part(layer: int) -> str:
    """Name of the part with the raw outputs of a layer."""
    return f"layer_{layer}"


class Place(NamedTuple):
    """Where the rows of a record lie."""

    file: Path
    start: int
    count: int
    key: str


class TargetStore:
    """The shards of some parts, opened for reading.

    Args:
        folder: The store; may not exist yet.
        parts: Which parts to open.
        stamps: See `efficientllava.data.stamps.image_stamps`, by id of a record; what the teacher has said about other
            images is passed over.

    Attributes:
        folder: As given.
    """

    def __init__(self, folder: Path, parts: Sequence[str], stamps: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        self._places: dict[str, dict[str, Place]] = {part: {} for part in parts}
        for part, places in self._places.items():
            for file in sorted(folder.glob(f"{part}-*{SUFFIX}")):
                start = 0
                for name, key, count, stamp in json.loads(self._shard(file).metadata()["records"]):
                    if (stamps or {}).get(name, "") == stamp:
                        places[name] = Place(file, start, count, key)
                    start += count

    def missing(self, part: str, names: Sequence[str]) -> list[str]:
        """The records, by id, that a part does not hold."""
        return [name for name in names if name not in self._places[part]]

    def size(self, names: Sequence[str]) -> tuple[int, int]:
        """Supervised tokens of records, and the bytes of the files that hold their answers."""
        places = [[held[name] for name in names] for held in self._places.values()]
        tokens = sum(place.count for place in places[0])
        return tokens, sum(file.stat().st_size for file in {place.file for part in places for place in part})

    def read(self, part: str, rows: Sequence[tuple[str, str, int]]) -> dict[str, Tensor]:
        """The tensors of a part for the rows of a batch, one after the other.

        Args:
            part: One of the opened parts.
            rows: Id, key and number of supervised tokens of each record.

        Raises:
            UserError: A record is not there, or the teacher has seen other tokens of it.
        """
        found: list[dict[str, Tensor]] = []
        for name, key, count in rows:
            place = self._places[part].get(name)
            if place is None or (place.key, place.count) != (key, count):
                known = f"saw {place.count} supervised tokens, other ones," if place else "was not asked"
                raise UserError(
                    f"recover.teacher.source=cached: of record {name!r}, which has {count} supervised tokens, the "
                    f"teacher {known} when {self.folder} was made; delete that folder, it is made anew"
                )
            shard = self._shard(place.file)
            ends = slice(place.start, place.start + place.count)
            found.append({field: shard.get_slice(field)[ends] for field in shard.keys()})  # noqa: SIM118
        return {field: torch.cat([one[field] for one in found]) for field in found[0]}

    def _shard(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(file, "pt")
        return self._open[file]


def write_shard(
    folder: Path,
    part: str,
    rows: Sequence[tuple[str, str, int]],
    tensors: Mapping[str, Sequence[Tensor]],
    stamps: Mapping[str, str] | None = None,
) -> None:
    """Add records to a part of a store.

    Args:
        folder: The store.
        part: Name of the part.
        rows: Id, key and number of supervised tokens of each record.
        tensors: For each field, the rows of each record.
        stamps: As for `TargetStore`.

    Raises:
        UserError: The disk is full.
    """
    records = json.dumps([(*row, (stamps or {}).get(row[0], "")) for row in rows])
    name = blake2b(records.encode(), digest_size=8).hexdigest()
    whole = {field: torch.cat(list(values)).cpu().contiguous() for field, values in tensors.items()}
    with whole_file(folder / f"{part}-{name}{SUFFIX}") as partial:
        save_file(whole, partial, {"records": records})


def rows_of(batch: Mapping[str, Any], mask: Tensor) -> list[tuple[str, str, int]]:
    """Id, key and number of wanted positions of each record in a collated batch."""
    keys = [key.hex()[:16] for key in record_keys(batch)]
    return list(zip(batch["ids"], keys, mask.sum(1).tolist(), strict=True))


class CachedTeacher:
    """Answers from a store; the model that gave them is not in memory.

    Args:
        store: The store, with the wanted parts open.
        wanted: What the recovery reads.
    """

    def __init__(self, store: TargetStore, wanted: Wanted) -> None:
        self._store, self._wanted = store, wanted
        self._device = torch.device("cpu")

    def to(self, device: torch.device | str) -> CachedTeacher:
        """Give answers on a device from now on."""
        self._device = torch.device(device)
        return self

    def __call__(
        self, batch: Mapping[str, Any], features: Tensor | None, layers: Sequence[int], mask: Tensor
    ) -> Taught:
        """Answer for a batch; see `efficientllava.recovery.teacher.Teacher`. Images are not looked at."""
        rows = rows_of(batch, mask)

        def read(part: str) -> dict[str, Tensor]:
            return {field: tensor.to(self._device) for field, tensor in self._store.read(part, rows).items()}

        likely = read(self._wanted.likely) if self._wanted.top_k else {}

        def logits(part: slice) -> TopK:
            return TopK(likely["log_probs"][part], likely["tokens"][part].long(), likely["tail"][part])

        final = read(FINAL)["states"] if self._wanted.final else None
        return Taught(final, {layer: read(layer_part(layer))["states"] for layer in layers}, logits)
