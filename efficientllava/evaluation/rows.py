"""From the rows of a published data set to the questions of a benchmark: of the Hugging Face hub, or of own files.

``evaluate.root`` is a file, or a folder like the one that ``hf download <id> --repo-type dataset --local-dir`` makes.
Looked at are ``<root>/<data set>``, else ``<root>/<benchmark>``, else ``<root>`` itself, with all folders below, for
``*.parquet``, else ``*.jsonl`` and ``*.json``. Of these, files count that belong to the configuration (a folder of that
name, or the beginning of the file's name) where there are such, and whose name begins with the split: ``test.jsonl``,
``data/test-00000-of-00003.parquet``, ``ScienceQA-IMG/test-00000-of-00001.parquet``. In JSON an image is a path that
starts from the file's folder.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets

from ..data.records import Record, StoredImage, Turn, missing_images
from ..data.table import table_store
from ..runtime import UserError, first_line, library_versions
from ..settings.schema import EvaluateConfig
from .tasks import Benchmark, Join, Row, Scores, Task, lettered
from .tasks import Record as Answered

STORED = [datasets.Value(name) for name in ("binary", "large_binary")]  # columns of encoded images
FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
Image = Path | StoredImage | None


def task(name: str, benchmark: Benchmark, cfg: EvaluateConfig) -> Task:
    """A benchmark as a run asks for it; its rows are opened once, when they are needed."""
    opened = cache(partial(_open, name, benchmark, cfg))

    def facts() -> dict[str, Any]:
        """With ``data``, the fingerprint of the rows."""
        origin = {"root": cfg.root} if cfg.root else {"dataset": Source(name, benchmark, cfg, None).hub_id}
        known = {"protocol": cfg.protocol, **origin, "config": benchmark.config, "split": benchmark.split}
        return {**known, "max_new_tokens": cfg.max_new_tokens or longest, "data": opened()[1]}

    def score(records: Sequence[Answered]) -> Scores:
        """Where a judge's verdicts are needed and missing, their number ``n_unjudged`` alone."""
        missing = sum("verdict" not in record for record in records) if benchmark.verdicts else 0
        if missing:
            return Scores({"n": len(records), "n_unjudged": missing}, [])
        return benchmark.scorer(records, cfg.protocol)

    longest, stop = _under(cfg.protocol, benchmark.tokens), _under(cfg.protocol, benchmark.stop)
    return Task(name, benchmark.headline, longest, lambda: opened()[0], score, facts, benchmark.questions, stop)


def _under(protocol: str, value: Any) -> Any:
    return value[protocol] if isinstance(value, Mapping) else value


def _open(name: str, benchmark: Benchmark, cfg: EvaluateConfig) -> tuple[list[Record], str]:
    """The questions, images still closed, and what changes with the files or the hub's revision.

    Raises:
        UserError: If the data are not there, or not as they should be; see `Source.load`.
    """
    join, official = benchmark.join, benchmark.id
    own = list(dict.fromkeys(filter(None, (*benchmark.columns, official, join and join.key))))
    shown = () if join else (benchmark.image, *_under(cfg.protocol, benchmark.more_images))
    source = Source(name, benchmark, cfg, benchmark.config)
    rows, folder = source.load([*own, *shown])
    images: Any = zip(*(images_of(rows, column, folder) for column in shown), strict=True)
    prints = [rows._fingerprint]
    if join:
        images, other = _joined(rows, join, Source(name, benchmark, cfg, join.config))
        prints.append(other)
    counts: Counter[str] = Counter()
    records = []
    for number, (row, cells) in enumerate(zip(rows.select_columns(own), images, strict=True)):
        id = str(row[official] if official else number)
        counts[id] += 1
        # MME has two questions under one id, POPE one per category.
        unique = id if counts[id] == 1 else f"{id}#{counts[id]}"
        details = {"id": id, **{name: row[name] for name in benchmark.columns}}
        details |= {"skipped": True} if benchmark.skip(row, cfg.protocol) else {}
        image, *more = [cell for cell in cells if cell] or [None]
        try:
            question = benchmark.prompt(row, cfg.protocol)
        except (TypeError, AttributeError, ValueError, KeyError, IndexError) as error:
            raise UserError(
                f"{source.where}: row {id!r} of {name} has no such question ({first_line(error)})"
            ) from error
        turn = Turn(question, _shown(row), sees_image=image is not None)
        records.append(Record(unique, image, (turn,), True, name, tuple(more), details))
    if lost := missing_images(records[: cfg.limit]):
        raise UserError(f"{source.where}: {lost[min(lost)]}; complete the data")
    return records, "+".join(prints)


def _joined(rows: Any, join: Join, source: Source) -> tuple[list[tuple[Image, ...]], str]:
    """The image of every row, and the fingerprint of the rows that hold them."""
    column = source.benchmark.image
    shown, folder = source.load([join.id, column])
    by_name = dict(zip(shown[join.id], images_of(shown, column, folder), strict=True))
    if lost := sorted({*rows[join.key]} - {*by_name}):
        raise UserError(f"{source.where}: {source.name} has no image {lost[0]!r}; complete the data")
    return [(by_name[name],) for name in rows[join.key]], shown._fingerprint


def _shown(row: Row) -> str:
    """The reference as a reader sees it: of several answers the first, of a choice's number its text."""
    answer = next((row[name] for name in ("answer", "answers", "gpt_answer") if name in row), "")
    answer = str(answer[0] if isinstance(answer, list) and answer else answer)
    choices = row.get("choices") or row.get("options")
    if isinstance(choices, list) and answer.isdecimal() and int(answer) < len(choices):
        return lettered(choices).split("\n")[int(answer)]
    return answer


@dataclass(frozen=True)
class Source:
    """Rows of one split.

    Attributes:
        name: Name of the benchmark, for messages and folders.
        benchmark: Its declaration.
        cfg: ``root``, which holds the rows instead of the hub, and ``namespace``, the account that keeps the copy
            where the hub id names none.
        config: Name of the configuration, where the data set has several.
    """

    name: str
    benchmark: Benchmark
    cfg: EvaluateConfig
    config: str | None

    @property
    def where(self) -> str:
        """What messages call this source."""
        return f"evaluate.root={self.cfg.root}" if self.cfg.root else f"data set {self.hub_id}"

    @property
    def hub_id(self) -> str:
        """``account/name``."""
        dataset = self.benchmark.dataset
        return dataset if "/" in dataset else f"{self.cfg.namespace}/{dataset}"

    def load(self, columns: Sequence[str]) -> tuple[Any, Path]:
        """Open the rows, a ``datasets.Dataset``, and say what paths of images start from.

        Args:
            columns: Those that there have to be.

        Raises:
            UserError: If there is no such data set, split or column, or nothing can be read.
        """
        files = self._files(Path(self.cfg.root).expanduser()) if self.cfg.root else []
        rows = self._read(files) if files else self._download()
        missing = [name for name in columns if name not in rows.column_names]
        if missing:
            raise UserError(
                f"{self.where}: {self.name} needs the columns {', '.join(missing)}; "
                f"there are {', '.join(rows.column_names)}"
            )
        return rows, files[0].parent if files else Path()

    def _files(self, root: Path) -> list[Path]:
        if root.is_file():
            return [root]
        split = self.benchmark.split
        folders = (root / name for name in (self.benchmark.dataset.rpartition("/")[2], self.name))
        folder = next((found for found in folders if found.is_dir()), root)
        found = [path for path in sorted(folder.rglob("*")) if path.suffix in FORMATS]
        own = found
        if self.config:  # files that name no configuration may be of this one, those of another one are not
            bare = [path for path in found if path.parent in (folder, folder / "data")]
            own = [path for path in found if self._in_config(path.relative_to(folder))] or bare
        files = [path for path in own if re.match(rf"{re.escape(split)}(?![a-zA-Z])", path.name)]
        if not files:
            of = f" of {self.config}" if self.config else ""
            named = (path.relative_to(folder).with_name(re.split(r"[-.]", path.name)[0]) for path in own or found)
            there = ", ".join(dict.fromkeys(map(str, named))) or "no such file at all"
            raise UserError(
                f"{self.where}: {folder} holds no rows of {self.name}, whose split is {split!r}{of} "
                f"({split}*.parquet, .jsonl or .json); there is: {there}"
            )
        kind = min((path.suffix for path in files), key=[*FORMATS].index)
        return [path for path in files if path.suffix == kind]

    def _in_config(self, path: Path) -> bool:
        return self.config in path.parts[:-1] or path.name.startswith(str(self.config))

    def _read(self, files: Sequence[Path]) -> datasets.Dataset:
        form = FORMATS.get(files[0].suffix)
        if form is None:
            raise UserError(f"{self.where}: is no {', '.join(FORMATS)} file")
        try:
            with _quiet():
                return _mapped(form, files)
        except UserError:
            raise
        except Exception as error:  # pyarrow and datasets raise different kinds, for an empty file StopIteration
            reason = next(iter(str(error.__cause__ or error).splitlines()), "it holds no rows")
            raise UserError(f"{self.where}: {files[0]} cannot be read ({reason}); repair or replace it") from error

    def _download(self) -> Any:
        try:
            return datasets.load_dataset(self.hub_id, self.config, split=self.benchmark.split)
        except Exception as error:  # as in `efficientllava.checkpoint.hub`: a dozen unrelated kinds
            raise UserError(
                f"{self.where}: {self.name} cannot be loaded ({first_line(error)}); give a local copy as "
                "evaluate.root=…, or the account that keeps one as evaluate.namespace=…"
            ) from error


def images_of(rows: datasets.Dataset, column: str, folder: Path) -> list[Image]:
    """One image per row, still encoded, None where the row has none; a path starts from the folder."""
    cells = rows.select_columns([column])
    kind = cells.features[column]
    # Without the metadata of `datasets`, as other writers leave it, an image is what it is stored as.
    bare = (isinstance(kind, dict) and "bytes" in kind) or kind in STORED
    if not bare and not isinstance(kind, datasets.Image):
        if (odd := next((cell for cell in cells[column] if cell and not isinstance(cell, str)), None)) is not None:
            raise UserError(f"column {column!r}: holds a {type(odd).__name__} where an image or its path should be")
        return [folder / path if path else None for path in cells[column]]
    cells = cells.cast_column(column, datasets.Image(decode=False))
    present = cells.with_format("arrow")[:][column].is_valid().to_pylist()
    # Of images of which nothing but the path is there, that path.
    elsewhere = [
        path if bare else None
        for chunk in cells.data.column(0).chunks
        for path, bare in zip(chunk.field("path").to_pylist(), chunk.field("bytes").is_null().to_pylist(), strict=True)
    ]

    def image(index: int) -> Path | StoredImage:
        path = elsewhere[index]
        return partial(_content, cells, column, index) if path is None else folder / path

    return [image(index) if there else None for index, there in enumerate(present)]


def _content(cells: Any, column: str, index: int) -> bytes:
    return cells[index][column]["bytes"]


def _mapped(form: str, files: Sequence[Path]) -> datasets.Dataset:
    """Rows of files as `datasets` reads them, mapped from an entry of our own: its cache trusts paths and times.

    Args:
        form: ``parquet`` or ``json``.
        files: Files with the same columns.

    Raises:
        Exception: Whatever `datasets` raises for files that it cannot read.
    """
    store = table_store()
    inputs = [form, store.memo.digests(files), library_versions(), datasets.__version__]

    def compute(folder: Path, _work: Path) -> dict[str, Any]:
        names = [str(file) for file in files]
        with TemporaryDirectory(dir=folder) as scratch:
            rows: Any = datasets.load_dataset(form, data_files=names, split="train", cache_dir=scratch)
            for column in rows.data.columns:
                if "binary" not in str(column.type):  # encoded images, which may be many GB
                    column.validate(full=True)  # such as texts that are no UTF-8
            for made in Path(scratch).rglob("*.arrow"):
                made.rename(folder / made.name)
        return {"of": names}

    entry = store.entry("tables", inputs, compute)
    parts = [datasets.Dataset.from_file(str(file)) for file in sorted(entry.folder.glob("*.arrow"))]
    rows = datasets.concatenate_datasets(parts)
    rows._fingerprint = entry.folder.name  # `datasets` makes it of times
    return rows


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar over local files."""
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
