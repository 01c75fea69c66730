"""One pass of the teacher over the drawn records, before training: afterwards its answers lie on disk.

What a teacher has said about the supervised tokens of records, kept on disk.

A store is a folder that belongs to one teacher and one data set. It holds *parts*: the states after the final norm, the
states of one layer, the most likely tokens at one temperature. Each part has shards of its own, safetensors files that
are written whole or not at all and name their records in the header; so a recovery that wants more than another one
adds what is missing, and one that draws fewer records finds all of them. A record is found by its id and by the stamp
of its image files; its tokens must be those that the teacher has seen.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..checkpoint.folder import (
    compute_dtype,
    load,
    read_config,
    resolve,
)
from ..checkpoint.hub import folder_digest
from ..data.checks import image_stamps
from ..data.records import column
from ..models.forward import FeatureCache, supervised_positions, to_device
from ..runtime.console import progress, say
from ..runtime.content import Memo
from ..runtime.errors import UserError
from ..runtime.files import whole_file
from ..runtime.keeping import require_space
from ..runtime.processes import (
    barrier,
    from_first,
    rank,
    world_size,
)
from ..runtime.store import growing
from ..settings.schema import RecoverConfig, TeacherConfig
from .losses import TopK, top_k
from .teacher import Taught, Teacher, check_teacher, record_keys

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
        stamps: See `efficientllava.data.checks.image_stamps`, by id of a record; what the teacher has said about other
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


SHARD_BYTES = 64 << 20  # a killed pass loses no more than this per part and process
CHUNK = 1024  # rows per call of the head
SAMPLED = 64  # records whose tokens are counted to estimate the size of all


@dataclass(frozen=True)
class TargetCache:
    """Where a teacher's answers lie, and how the teacher is had if some are missing.

    Attributes:
        folder: The store; its name stands for the content of teacher and data.
        config: The teacher's configuration.
        dtype: Type that the teacher computes in.
        load: Loads the teacher.
        memo: Digests of files.
    """

    folder: Path
    config: Any
    dtype: torch.dtype
    load: Callable[[], nn.Module]
    memo: Memo | None = None


def open_teacher(
    config: Any, base: Mapping[str, str], device: str, folder: Path, memo: Memo | None = None
) -> nn.Module | TargetCache:
    """The teacher that a configuration asks for.

    Args:
        config: A `efficientllava.settings.schema.TeacherConfig`.
        base: The original checkpoint, which teaches where none is named.
        device: Where it runs.
        folder: The store of its answers, where they are cached.
        memo: Digests of files.

    Raises:
        UserError: It cannot be loaded.
    """
    path, revision = _place(config, base)
    if config.source == "live":
        return load(path, config.dtype, device, revision, host=config.offload).model
    described, storage = read_config(resolve(path, revision), path)
    dtype = compute_dtype(config.dtype, storage, device)
    ask = lambda: load(path, config.dtype, device, revision).model  # noqa: E731
    return TargetCache(folder, described, dtype, ask, memo)


def require_teacher(config: RecoverConfig, base: Mapping[str, str], student: nn.Module) -> None:
    """Refuse a recovery whose teacher is not there or cannot teach, before anything is computed.

    Args:
        config: Losses and teacher.
        base: As for `open_teacher`.
        student: The model, pruned or not.

    Raises:
        UserError: Says what is wrong with the teacher.
    """
    if not (config.weights.logit or config.weights.hidden):
        return
    path, revision = _place(config.teacher, base)
    try:
        described, _ = read_config(resolve(path, revision), path)
    except UserError as error:
        raise UserError(str(error).replace("model.path=", "recover.teacher.path=", 1)) from error
    check_teacher(SimpleNamespace(config=described), student, config.weights.logit > 0, config.weights.hidden > 0)


def teacher_digest(config: TeacherConfig, base: Mapping[str, str], memo: Memo | None = None) -> str:
    """Digest of the checkpoint that teaches; arguments as for `open_teacher`."""
    return folder_digest(resolve(*_place(config, base)), memo)


def _place(config: TeacherConfig, base: Mapping[str, str]) -> tuple[str, str | None]:
    return (config.path, config.revision) if config.path else (base["path"], base.get("revision"))


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

    Runs that want the same store at the same time wait for the first. Processes share the work.

    Args:
        cache: Where the answers lie.
        wanted: What the recovery reads.
        student: The pruned model; gives vision features where its tower is the teacher's.
        loader: The training loader.
        used: Indices of the records that the recovery will see.
        batch_size: Records per forward pass.
        features: Kept vision features of the student.
        trainer: Knows device and precision.

    Raises:
        UserError: The answers do not fit on the disk.
    """
    started, folder = time.perf_counter(), cache.folder
    ids = column(loader.dataset, "id")  # pyright: ignore[reportArgumentType]
    names = {str(ids[index]): index for index in used}
    stamps: dict[str, str] = from_first(
        dict(zip(names, image_stamps(loader.dataset, list(names.values())), strict=True)) if rank() == 0 else None  # pyright: ignore[reportArgumentType]
    )
    with growing(folder, cache.memo or Memo()):
        lacks: dict[str, list[str]] = from_first(_lacking(folder, wanted, stamps) if rank() == 0 else None)
        todo = sorted({names[name] for lacking in lacks.values() for name in lacking})
        if todo:
            _announce(cache, wanted, loader, todo)
            teacher = Teacher(cache.load(), student).to(trainer.strategy.root_device)
            shards = _Shards(folder, {part: set(lacking) for part, lacking in lacks.items()}, stamps)
            with trainer.precision_plugin.forward_context():
                _ask(teacher, wanted, _batches(loader, todo, batch_size), features, shards, len(todo))
            barrier()
    store = TargetStore(folder, wanted.parts, stamps)
    stats = TargetStats(len(names), len(todo), *store.size(list(names)), time.perf_counter() - started)
    done = f"{stats.computed} asked in {stats.seconds:.1f} s" if todo else "(from cache)"
    say(f"teacher targets: {stats.records:,} records, {stats.tokens:,} tokens, {stats.bytes:,} bytes, {done}")
    return CachedTeacher(store, wanted), stats


def _lacking(folder: Path, wanted: Wanted, stamps: Mapping[str, str]) -> dict[str, list[str]]:
    store = TargetStore(folder, wanted.parts, stamps)
    return {part: store.missing(part, list(stamps)) for part in wanted.parts}


def _announce(cache: TargetCache, wanted: Wanted, loader: DataLoader, todo: Sequence[int]) -> None:
    """Say what the pass will need on disk, and refuse it where that is not there."""
    sample = [loader.dataset[todo[i * len(todo) // SAMPLED]] for i in range(SAMPLED)] if len(todo) > SAMPLED else None
    batch: Any = loader.collate_fn(sample or [loader.dataset[index] for index in todo])
    tokens = int(supervised_positions(batch["labels"])[0].sum()) * len(todo) / len(sample or todo)
    text = cache.config.get_text_config()
    need = int(tokens * wanted.bytes_per_token(text.hidden_size, cache.dtype.itemsize))
    fix = "free the disk, set paths.cache_dir elsewhere, lower data_frac, or choose recover.teacher.source=live"
    free = require_space(cache.folder, need, "recover.teacher.source=cached", fix)
    say(
        f"the teacher is asked about {len(todo)} records: about {need / 1e6:.1f} MB for {', '.join(wanted.parts)} "
        f"in {cache.folder}, {free / 1e9:.1f} GB are free"
    )


def _batches(loader: DataLoader, todo: list[int], size: int) -> DataLoader:
    """This process's share of the records."""
    mine = todo[rank() :: world_size()]
    chunks = [mine[i : i + size] for i in range(0, len(mine), size)]
    return DataLoader(
        loader.dataset, batch_sampler=chunks, collate_fn=loader.collate_fn, num_workers=loader.num_workers
    )


class _Shards:
    """Collects answers and writes a shard of a part when enough of it is there.

    Args:
        folder: The store.
        lacks: For each part, the records that it lacks; other answers are dropped.
        stamps: As for `TargetStore`.
    """

    def __init__(self, folder: Path, lacks: Mapping[str, set[str]], stamps: Mapping[str, str]) -> None:
        self._folder, self._lacks, self._stamps = folder, lacks, stamps
        self._rows: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
        self._tensors: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        self._bytes: dict[str, int] = defaultdict(int)

    def add(self, part: str, rows: Sequence[tuple[str, str, int]], tensors: Mapping[str, Tensor]) -> None:
        """Take the answers to a batch, one tensor per field with the rows of all records."""
        chosen = [index for index, row in enumerate(rows) if row[0] in self._lacks[part]]
        self._rows[part] += [rows[index] for index in chosen]
        for field, tensor in tensors.items():
            records = tensor.cpu().split([count for _, _, count in rows])
            self._tensors[part][field] += [records[index] for index in chosen]
            self._bytes[part] += sum(records[index].nbytes for index in chosen)
        if self._bytes[part] >= SHARD_BYTES:
            self.write(part)

    def write(self, part: str) -> None:
        """Write what is there of a part."""
        if rows := self._rows.pop(part, []):
            write_shard(self._folder, part, rows, self._tensors.pop(part), self._stamps)
            self._bytes[part] = 0


@torch.no_grad()
def _ask(
    teacher: Teacher, wanted: Wanted, batches: DataLoader, features: FeatureCache, shards: _Shards, total: int
) -> None:
    device = next(teacher.model.lm_head.parameters()).device  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    done = 0
    with progress() as tick:
        for collated in batches:
            batch = to_device(collated, device)
            mask = supervised_positions(batch["labels"])[0]
            final, states, logits = teacher(batch, features(batch), wanted.layers, mask)
            rows = rows_of(batch, mask)
            answers = {layer_part(layer): {"states": state} for layer, state in states.items()}
            if wanted.final and final is not None:
                answers[FINAL] = {"states": final}
            if wanted.top_k:
                answers[wanted.likely] = _likely(logits, int(mask.sum()), wanted)
            for part, tensors in answers.items():
                shards.add(part, rows, tensors)
            done += len(rows)
            tick("teacher targets", min(done * world_size(), total), total)
    for part in wanted.parts:
        shards.write(part)


def _likely(logits: Callable[[slice], Any], rows: int, wanted: Wanted) -> dict[str, Tensor]:
    """The most likely tokens of all rows, with the logits of few rows alive at a time."""
    parts = [
        top_k(logits(slice(i, i + CHUNK)), wanted.top_k or 1, wanted.temperature) for i in range(0, max(rows, 1), CHUNK)
    ]
    log_probs, tokens, tail = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return {"log_probs": log_probs, "tokens": tokens.int(), "tail": tail}
