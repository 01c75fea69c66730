"""Where a benchmark's rows come from: the Hugging Face hub, or files of one's own in the published columns.

``evaluate.root`` is a file, or a folder like the one that ``hf download <id> --repo-type dataset --local-dir`` makes.
Looked at are ``<root>/<data set>``, else ``<root>/<benchmark>``, else ``<root>`` itself, with all folders below, for
``*.parquet``, else ``*.jsonl`` and ``*.json``. Of these, files count that belong to the configuration (a folder of that
name, or the beginning of the file's name) where there are such, and whose name begins with the split: ``test.jsonl``,
``data/test-00000-of-00003.parquet``, ``ScienceQA-IMG/test-00000-of-00001.parquet``. In JSON an image is a path that
starts from the file's folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..data.conversations import StoredImage
from ..data.table import image_paths, mapped
from ..errors import UserError

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


@dataclass(frozen=True)
class Source:
    """Rows of one split.

    Attributes:
        benchmark: Name of the benchmark, for messages and folders.
        dataset: Hub id, without its namespace where several keep copies.
        split: Name of the split.
        config: Name of the configuration, where the data set has several.
        namespace: Account of the hub that keeps the copy; of no effect with ``root`` or where ``dataset`` has its own.
        root: File or folder that holds the rows instead of the hub.
    """

    benchmark: str
    dataset: str
    split: str
    config: str | None
    namespace: str
    root: str | None

    @property
    def where(self) -> str:
        """What messages call this source."""
        return f"evaluate.root={self.root}" if self.root else f"data set {self.hub_id}"

    @property
    def hub_id(self) -> str:
        """``account/name``."""
        return self.dataset if "/" in self.dataset else f"{self.namespace}/{self.dataset}"

    def load(self, columns: Sequence[str]) -> Rows:
        """Open the rows.

        Args:
            columns: Those that there have to be.

        Raises:
            UserError: If there is no such data set, split or column, or nothing can be read.
        """
        files = self._files() if self.root else []
        rows = _read(files, self) if self.root else _download(self)
        missing = [name for name in columns if name not in rows.column_names]
        if missing:
            raise UserError(
                f"{self.where}: {self.benchmark} needs the columns {', '.join(missing)}; "
                f"there are {', '.join(rows.column_names)}"
            )
        return Rows(rows, files[0].parent if files else Path())

    def _files(self) -> list[Path]:
        root = Path(str(self.root)).expanduser()
        if root.is_file():
            return [root]
        folders = (root / name for name in (self.dataset.rpartition("/")[2], self.benchmark))
        folder = next((found for found in folders if found.is_dir()), root)
        found = [path for path in sorted(folder.rglob("*")) if path.suffix in FORMATS]
        own = [path for path in found if self.config and self._in_config(path.relative_to(folder))] or found
        files = [path for path in own if re.match(rf"{re.escape(self.split)}(?![a-zA-Z])", path.name)]
        if not files:
            there = ", ".join(dict.fromkeys(re.split(r"[-.]", path.name)[0] for path in own)) or "no such file at all"
            raise UserError(
                f"{self.where}: {folder} holds no rows of {self.benchmark}, whose split is {self.split!r} "
                f"({self.split}*.parquet, .jsonl or .json); there is: {there}"
            )
        return [path for path in files if path.suffix == files[0].suffix]

    def _in_config(self, path: Path) -> bool:
        return self.config in path.parts[:-1] or path.name.startswith(str(self.config))


class Rows:
    """The rows of a split; images stay encoded until they are opened.

    Args:
        table: A ``datasets.Dataset``.
        folder: What paths of images start from.
    """

    def __init__(self, table: Any, folder: Path) -> None:
        self._table, self._folder = table, folder

    @property
    def fingerprint(self) -> str:
        """Changes with the files or the hub's revision."""
        return self._table._fingerprint

    def iterate(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """All rows, with these columns only."""
        yield from self._table.select_columns(list(columns))

    def images(self, column: str) -> list[Path | StoredImage | None]:
        """One image per row, None where the row has none."""
        from datasets import Image, Value

        cells = self._table.select_columns([column])
        kind = cells.features[column]
        # Without the metadata of `datasets`, as other writers leave it, an image is what it is stored as.
        if isinstance(kind, Image) or (isinstance(kind, dict) and "bytes" in kind) or kind == Value("binary"):
            cells = cells.cast_column(column, Image(decode=False))
        present = cells.with_format("arrow")[:][column].is_valid().to_pylist()
        if not isinstance(cells.features[column], Image):
            return [self._folder / path if path else None for path in cells[column]]
        elsewhere = image_paths(cells.data.column(0))
        return [
            None
            if not there
            else self._folder / str(elsewhere[index][0])
            if index in elsewhere
            else StoredImage(partial(_content, cells, column, index))
            for index, there in enumerate(present)
        ]


def _content(cells: Any, column: str, index: int) -> bytes:
    return cells[index][column]["bytes"]


def _read(files: Sequence[Path], source: Source) -> Any:
    form = FORMATS.get(files[0].suffix)
    if form is None:
        raise UserError(f"evaluate.root={source.root}: is no {', '.join(FORMATS)} file")
    try:
        with _quiet():
            return mapped(form, files)
    except UserError:
        raise
    except Exception as error:  # pyarrow and datasets raise different kinds, for an empty file StopIteration
        reason = next(iter(str(error.__cause__ or error).splitlines()), "it holds no rows")
        raise UserError(f"{source.where}: {files[0]} cannot be read ({reason}); repair or replace it") from error


def _download(source: Source) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(source.hub_id, source.config, split=source.split)
    except Exception as error:  # as in `efficientllava.hub`: a dozen unrelated kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"data set {source.hub_id}: {source.benchmark} cannot be loaded ({reason}); give a local copy as "
            "evaluate.root=…, or the account that keeps one as evaluate.namespace=…"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar over local files."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
