"""One pass of the teacher over the drawn records, before training: afterwards its answers lie on disk.

The folder of these answers, an entry of the store that grows, belongs to one teacher and one data set. It holds
*parts*: the states after the final norm, the states of one layer, the most likely tokens at one temperature. Each part
has shards of its own, safetensors files that are written whole or not at all and name their records in the header; so a
recovery that wants more than another one adds what is missing, and one that draws fewer records finds all of them. A
record is found by its id and by the stamp of its image files; its tokens must be those that the teacher has seen.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.records import column, image_stamps
from ..models.anatomy import decoder_of
from ..models.forward import FeatureCache, supervised_positions, to_device
from ..models.offload import make_room
from ..models.outcomes import TopK, top_k
from ..runtime.console import progress, say
from ..runtime.errors import UserError
from ..runtime.files import whole_file
from ..runtime.keeping import require_space
from ..runtime.processes import barrier, from_first, rank, release_memory, world_size
from ..runtime.store import growing
from .losses import TeacherLogits
from .teacher import FINAL, Answer, TargetCache, Teacher, record_keys

SUFFIX = ".safetensors"
SHARD_BYTES = 64 << 20  # a killed pass loses no more than this per part and process
CHUNK = 1024  # rows per call of the head
SAMPLED = 64  # records whose tokens are counted to estimate the size of all


@dataclass(frozen=True)
class Wanted:
    """What a recovery reads of a teacher.

    Attributes:
        layers: Layers whose states are compared, see `efficientllava.recovery.teacher.hidden_states`.
        top_k: Tokens per row whose log-probabilities are kept, already cut to the vocabulary; 0: no logits.
        temperature: Temperature of these log-probabilities.
    """

    layers: tuple[int, ...] = ()
    top_k: int = 0
    temperature: float = 1.0

    @property
    def likely(self) -> str:
        """Name of the part with log-probabilities."""
        return f"top_{self.top_k}_at_{self.temperature:g}"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all parts."""
        return (*map(layer_part, self.layers), *([self.likely] if self.top_k else []))

    def bytes_per_token(self, hidden: int, itemsize: int) -> int:
        """Size of the answer to one supervised token.

        Args:
            hidden: Width of the residual stream.
            itemsize: Bytes per number of a hidden state.
        """
        likely = 8 * self.top_k + 4 if self.top_k else 0  # log-probability and token; the rest
        return len(self.layers) * hidden * itemsize + likely


def layer_part(layer: int) -> str:
    """Name of the part with the states of a layer."""
    return "final" if layer == FINAL else f"layer_{layer}"


class Row(NamedTuple):
    """A record in a collated batch: its id, a key of its tokens, and how many of them are supervised."""

    name: str
    key: str
    count: int


def rows_of(batch: Mapping[str, Any], mask: Tensor) -> list[Row]:
    """The records of a collated batch, of which some positions are wanted."""
    keys = [key.hex()[:16] for key in record_keys(batch)]
    return [Row(*row) for row in zip(batch["ids"], keys, mask.sum(1).tolist(), strict=True)]


class Place(NamedTuple):
    """Where the answer to a record lies."""

    file: Path
    start: int
    row: Row


class CachedTeacher:
    """Answers from a folder; the model that gave them is not in memory. A `TeacherSource`.

    Args:
        folder: The folder; may not exist yet.
        wanted: What the recovery reads.
        stamps: See `efficientllava.data.records.image_stamps`, by the ids of the records that it reads of; what the
            teacher has said about other images is passed over.
    """

    def __init__(self, folder: Path, wanted: Wanted, stamps: Mapping[str, str]) -> None:
        self._folder, self._wanted, self._names = folder, wanted, list(stamps)
        self._shard = functools.cache(lambda file: safe_open(file, "pt"))
        # By id and key: where questions are not packed, a record has a row for each.
        self._places: dict[str, dict[tuple[str, str], Place]] = {part: {} for part in wanted.parts}
        for part, places in self._places.items():
            for file in sorted(folder.glob(f"{part}-*{SUFFIX}")):
                start = 0
                for *row, stamp in json.loads(self._shard(file).metadata()["records"]):
                    place = Place(file, start, Row(*row))
                    if stamps.get(place.row.name) == stamp:
                        places[place.row.name, place.row.key] = place
                    start += place.row.count

    def lacking(self) -> dict[str, list[str]]:
        """The records, by id, that each part does not hold."""
        known = {part: {name for name, _ in held} for part, held in self._places.items()}
        return {part: [name for name in self._names if name not in held] for part, held in known.items()}

    def size(self) -> tuple[int, int]:
        """Supervised tokens of the records, and the bytes of the files that hold the answers."""
        places = [list(held.values()) for held in self._places.values()]
        tokens = sum(place.row.count for place in places[0])
        return tokens, sum(file.stat().st_size for file in {place.file for part in places for place in part})

    def __call__(
        self, batch: Mapping[str, Any], features: Tensor | None, layers: Collection[int], mask: Tensor
    ) -> Answer:
        """Answer for a batch; images are not looked at."""
        rows = rows_of(batch, mask)

        def read(part: str) -> dict[str, Tensor]:
            return {field: tensor.to(mask.device) for field, tensor in self.read(part, rows).items()}

        likely = read(self._wanted.likely) if self._wanted.top_k else {}

        def logits(part: slice) -> TopK:
            return TopK(likely["log_probs"][part], likely["tokens"][part].long(), likely["tail"][part])

        return Answer({layer: read(layer_part(layer))["states"] for layer in layers}, logits)

    def read(self, part: str, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The tensors of a part for the rows of a batch, one after the other.

        Raises:
            UserError: A record is not there, or the teacher has seen other tokens of it.
        """
        found: list[dict[str, Tensor]] = []
        for row in rows:
            place = self._places[part].get((row.name, row.key))
            if place is None or place.row != row:
                asked = any(name == row.name for name, _ in self._places[part])
                known = "saw other ones" if asked else "was not asked"
                raise UserError(
                    f"recover.teacher.source=cached: of record {row.name!r}, which has {row.count} supervised tokens, "
                    f"the teacher {known} when {self._folder} was made; delete that folder, it is made anew"
                )
            shard, ends = self._shard(place.file), slice(place.start, place.start + row.count)
            found.append({field: shard.get_slice(field)[ends] for field in shard.keys()})  # noqa: SIM118
        return {field: torch.cat([one[field] for one in found]) for field in found[0]}


# ---- the pass -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetStats:
    """What the answers of a teacher took.

    Attributes:
        records: Records that the recovery uses.
        computed: Those of them that the teacher was asked about now; the others were there.
        tokens: Their supervised tokens.
        bytes: Size of the files that hold them.
        seconds: Duration of the pass, loading included.
    """

    records: int
    computed: int
    tokens: int
    bytes: int
    seconds: float


def cached_teacher(
    cache: TargetCache,
    wanted: Wanted,
    student: nn.Module,
    loader: DataLoader,
    used: Sequence[int],
    batch_size: int,
    features: FeatureCache,
    trainer: L.Trainer,
) -> tuple[CachedTeacher, TargetStats]:
    """Ask the teacher about the records that nobody has asked it about yet, and open the answers.

    Runs that want the same answers at the same time wait for the first. Processes share the work.

    Args:
        cache: Where the answers lie.
        wanted: What the recovery reads.
        student: The pruned model; gives vision features where its tower is the teacher's, and its layers make room.
        loader: The training loader.
        used: Indices of the records that the recovery will see.
        batch_size: Records per forward pass.
        features: Kept vision features of the student.
        trainer: Knows device and precision.

    Raises:
        UserError: The answers do not fit on the disk.
    """
    started, folder = time.perf_counter(), cache.folder
    records: Any = loader.dataset
    ids = column(records, "id")
    names = {str(ids[index]): index for index in used}
    found = dict(zip(names, image_stamps(records, list(names.values())), strict=True)) if rank() == 0 else None
    stamps: dict[str, str] = from_first(found)
    with growing(folder, cache.memo):
        lacking = from_first(CachedTeacher(folder, wanted, stamps).lacking() if rank() == 0 else None)
        todo = sorted({names[name] for part in lacking.values() for name in part})
        if todo:
            layers, device = decoder_of(student).layers, trainer.strategy.root_device
            beside = sum(p.nbytes for p in layers.parameters()) if device.type == "cpu" else 0
            _announce(cache, wanted, loader, todo, beside * world_size())
            shards = {part: _Shard(folder, part, set(names), stamps) for part, names in lacking.items()}
            mine: Any = todo[rank() :: world_size()]
            batches = DataLoader(
                records, batch_size, sampler=mine, collate_fn=loader.collate_fn, num_workers=loader.num_workers
            )
            with make_room(layers, device, folder), trainer.precision_plugin.forward_context():
                release_memory()
                _ask(Teacher(cache.load(), student).to(device), wanted, batches, features, shards, len(todo))
                release_memory()
            barrier()
    source = CachedTeacher(folder, wanted, stamps)
    stats = TargetStats(len(names), len(todo), *source.size(), time.perf_counter() - started)
    done = f"{stats.computed} asked in {stats.seconds:.1f} s" if todo else "(from cache)"
    say(f"teacher targets: {stats.records:,} records, {stats.tokens:,} tokens, {stats.bytes:,} bytes, {done}")
    return source, stats


def _announce(cache: TargetCache, wanted: Wanted, loader: DataLoader, todo: Sequence[int], beside: int) -> None:
    """Say what the pass will need on disk, some bytes beside the answers included, and refuse it where that is not."""
    sample = [todo[i * len(todo) // SAMPLED] for i in range(SAMPLED)] if len(todo) > SAMPLED else todo
    batch: Any = loader.collate_fn([loader.dataset[index] for index in sample])
    tokens = int(supervised_positions(batch["labels"])[0].sum()) * len(todo) / len(sample)
    need = int(tokens * wanted.bytes_per_token(cache.config.get_text_config().hidden_size, cache.dtype.itemsize))
    fix = "free the disk, set paths.cache_dir elsewhere, lower data_frac, or choose recover.teacher.source=live"
    free = require_space(cache.folder, need + beside, "recover.teacher.source=cached", fix)
    say(
        f"the teacher is asked about {len(todo)} records: about {need / 1e6:.1f} MB for {', '.join(wanted.parts)} "
        f"in {cache.folder}, {free / 1e9:.1f} GB are free"
    )


@torch.no_grad()
def _ask(
    teacher: Teacher, wanted: Wanted, batches: DataLoader, features: FeatureCache, shards: dict[str, _Shard], total: int
) -> None:
    device, done = teacher.model.lm_head.weight.device, 0
    with progress() as tick:
        for collated in batches:
            batch = to_device(collated, device)
            mask = supervised_positions(batch["labels"])[0]
            states, logits = teacher(batch, features(batch), wanted.layers, mask)
            rows = rows_of(batch, mask)
            for layer in wanted.layers:
                shards[layer_part(layer)].add(rows, {"states": states[layer]})
            if wanted.top_k:
                shards[wanted.likely].add(rows, _likely(logits, int(mask.sum()), wanted))
            done += len(rows)
            tick("teacher targets", min(done * world_size(), total), total)
    for shard in shards.values():
        shard.write()


def _likely(logits: TeacherLogits, rows: int, wanted: Wanted) -> dict[str, Tensor]:
    """The most likely tokens of all rows, with the logits of few rows alive at a time."""
    starts = range(0, max(rows, 1), CHUNK)
    parts: Any = [top_k(logits(slice(i, i + CHUNK)), wanted.top_k, wanted.temperature) for i in starts]  # pyright: ignore
    log_probs, tokens, tail = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return {"log_probs": log_probs, "tokens": tokens.int(), "tail": tail}


class _Shard:
    """Answers of a part that are not on disk yet.

    Args:
        folder: Where they belong.
        part: The part.
        lacking: The records that it lacks; answers about others are dropped.
        stamps: As for `CachedTeacher`.
    """

    def __init__(self, folder: Path, part: str, lacking: set[str], stamps: Mapping[str, str]) -> None:
        self._folder, self._part, self._lacking, self._stamps = folder, part, lacking, stamps
        self._answers: list[tuple[Row, dict[str, Tensor]]] = []
        self._bytes = 0

    def add(self, rows: Sequence[Row], tensors: Mapping[str, Tensor]) -> None:
        """Take the answers to a batch, one tensor per field with the rows of all records; write if they are enough."""
        fields = {field: tensor.cpu().split([row.count for row in rows]) for field, tensor in tensors.items()}
        for index, row in enumerate(rows):
            if row.name in self._lacking:
                answer = {field: records[index] for field, records in fields.items()}
                self._answers.append((row, answer))
                self._bytes += sum(tensor.nbytes for tensor in answer.values())
        if self._bytes >= SHARD_BYTES:
            self.write()

    def write(self) -> None:
        """Write what is there, whole or not at all.

        Raises:
            UserError: The disk is full.
        """
        if not self._answers:
            return
        records = json.dumps([(*row, self._stamps[row.name]) for row, _ in self._answers])
        name = blake2b(records.encode(), digest_size=8).hexdigest()
        whole = {field: torch.cat([answer[field] for _, answer in self._answers]) for field in self._answers[0][1]}
        with whole_file(self._folder / f"{self._part}-{name}{SUFFIX}") as partial:
            save_file(whole, partial, {"records": records})
        self._answers, self._bytes = [], 0
