"""What a published benchmark is: a declaration, from which questions, generation settings and scores follow.

Where a benchmark's rows come from: the Hugging Face hub, or files of one's own in the published columns.

``evaluate.root`` is a file, or a folder like the one that ``hf download <id> --repo-type dataset --local-dir`` makes.
Looked at are ``<root>/<data set>``, else ``<root>/<benchmark>``, else ``<root>`` itself, with all folders below, for
``*.parquet``, else ``*.jsonl`` and ``*.json``. Of these, files count that belong to the configuration (a folder of that
name, or the beginning of the file's name) where there are such, and whose name begins with the split: ``test.jsonl``,
``data/test-00000-of-00003.parquet``, ``ScienceQA-IMG/test-00000-of-00001.parquet``. In JSON an image is a path that
starts from the file's folder.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from ..data.records import Record, StoredImage, Turn
from ..data.table import image_paths, mapped
from ..runtime.errors import UserError
from ..settings.schema import EvaluateConfig
from .scorers import Record as Answered
from .scorers import Scorer, Scores

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
            else StoredImage(partial(_content, cells, column, index))
            if path is None
            else self._folder / path
            for index, (there, path) in enumerate(zip(present, elsewhere, strict=True))
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
    except Exception as error:  # as in `efficientllava.checkpoint.hub`: a dozen unrelated kinds
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


# LLaVA-1.5's sentences (arXiv 2310.03744, table 7).
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

Row = Mapping[str, Any]
Value = TypeVar("Value")
PerProtocol = Value | Mapping[str, Value]  # one value, or one for each of `scorers.PROTOCOLS`


def lettered(choices: Sequence[Any], form: str = "{}. {}") -> str:
    """Choices on a line each, named A, B and so on."""
    named = zip(string.ascii_uppercase, choices, strict=False)
    return "\n".join(form.format(letter, choice) for letter, choice in named)


@dataclass(frozen=True)
class Join:
    """Images that another configuration of the data set holds.

    Attributes:
        config: That configuration.
        key: Column of the questions that names the image.
        id: Column of the images with that name.
    """

    config: str
    key: str
    id: str


@dataclass(frozen=True)
class Benchmark:
    """A declaration; see the files in `efficientllava.evaluation.tasks`.

    Attributes:
        dataset: Hub id; without an account ``evaluate.namespace`` goes before it.
        split: Split of the questions.
        columns: What prompt and scorer read; it becomes the metadata of a prediction.
        prompt: Makes the question's text from a row, under a protocol.
        scorer: Scores the answers.
        headline: Names of the metrics that a run shows.
        tokens: Longest answer, in tokens.
        questions: Number of questions; None: it is not known before they are read.
        config: Configuration of the data set.
        id: Column with the official id; None: the row's number, from 0.
        image: Column with the image.
        more_images: Columns with further images.
        join: Where the images lie in a configuration of their own.
        stop: Texts that end an answer, beside the model's own end token.
        verdicts: Whether the scorer needs a judge's verdict on every answer.
        skip: Rows that the model is not asked; their answer is empty.
    """

    dataset: str
    split: str
    columns: tuple[str, ...]
    prompt: Callable[[Row, str], str]
    scorer: Scorer
    headline: tuple[str, ...]
    tokens: PerProtocol[int]
    questions: int | None = None
    config: str | None = None
    id: str | None = "question_id"
    image: str = "image"
    more_images: PerProtocol[tuple[str, ...]] = ()
    join: Join | None = None
    stop: PerProtocol[tuple[str, ...]] = ()
    verdicts: bool = False
    skip: Callable[[Row, str], bool] = lambda row, protocol: False


def _under(protocol: str, value: Any) -> Any:
    return value[protocol] if isinstance(value, Mapping) else value


@dataclass(frozen=True)
class BenchmarkTask:
    """A benchmark as a run asks for it; a `efficientllava.evaluation.tasks.Task`.

    Args:
        name: Its name.
        benchmark: Its declaration.
        cfg: ``protocol``, ``namespace``, ``root``.
    """

    name: str
    benchmark: Benchmark
    cfg: EvaluateConfig
    answer_loss: bool = False

    @property
    def headline(self) -> tuple[str, ...]:
        """Names of the metrics that a run shows."""
        return self.benchmark.headline

    @property
    def questions(self) -> int | None:
        """Their number, where it is known before they are read."""
        return self.benchmark.questions

    @property
    def max_new_tokens(self) -> int:
        """Longest answer under this protocol."""
        return _under(self.cfg.protocol, self.benchmark.tokens)

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return _under(self.cfg.protocol, self.benchmark.stop)

    @property
    def facts(self) -> dict[str, Any]:
        """What stands beside the result in ``results.json``; ``data`` is the fingerprint of the rows."""
        source = self._source(self.benchmark.config)
        origin = {"root": source.root} if source.root else {"dataset": source.hub_id}
        facts = {"protocol": self.cfg.protocol, **origin, "config": source.config, "split": source.split}
        return {**facts, "max_new_tokens": self.cfg.max_new_tokens or self.max_new_tokens, "data": self._opened[1]}

    def _source(self, config: str | None) -> Source:
        plan = self.benchmark
        return Source(self.name, plan.dataset, plan.split, config, self.cfg.namespace, self.cfg.root)

    def records(self) -> Sequence[Record]:
        """The questions, images still closed; opened once.

        Raises:
            UserError: If the data are not there, or not as they should be; see `Source.load`.
        """
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[list[Record], str]:
        plan, join = self.benchmark, self.benchmark.join
        columns = list(dict.fromkeys((*plan.columns, *((plan.id,) if plan.id else ()))))
        own = [*columns, join.key] if join else columns
        shown = () if join else (plan.image, *_under(self.cfg.protocol, plan.more_images))
        rows = self._source(plan.config).load([*own, *shown])
        images = self._joined(rows, join) if join else zip(*map(rows.images, shown), strict=True)
        counts: Counter[str] = Counter()
        records = []
        for number, (row, cells) in enumerate(zip(rows.iterate(own), images, strict=True)):
            official = str(row[plan.id] if plan.id else number)
            counts[official] += 1
            # MME has two questions under one id, POPE one per category.
            unique = official if counts[official] == 1 else f"{official}#{counts[official]}"
            question = plan.prompt(row, self.cfg.protocol)
            details = {"id": official, **{name: row[name] for name in plan.columns}}
            details |= {"skipped": True} if plan.skip(row, self.cfg.protocol) else {}
            image, *more = [cell for cell in cells if cell] or [None]
            turn = Turn(question, _shown(row), sees_image=image is not None)
            records.append(Record(unique, image, (turn,), True, self.name, tuple(filter(None, more)), details))
        return records, rows.fingerprint

    def _joined(self, rows: Rows, join: Join) -> list[tuple[Path | StoredImage | None, ...]]:
        shown = self._source(join.config).load([join.id, self.benchmark.image])
        names = [row[join.id] for row in shown.iterate([join.id])]
        by_name = dict(zip(names, shown.images(self.benchmark.image), strict=True))
        asked = [row[join.key] for row in rows.iterate([join.key])]
        if lost := sorted({*asked} - {*names}):
            raise UserError(
                f"{self._source(join.config).where}: {self.name} has no image {lost[0]!r}; complete the data"
            )
        return [(by_name[name],) for name in asked]

    def score(self, records: Sequence[Answered]) -> Scores:
        """Score answers.

        Args:
            records: As `efficientllava.evaluation.answers.as_record` makes them, in any order.

        Returns:
            The scorer's metrics; where a judge's verdicts are needed and missing, their number ``n_unjudged`` alone.
        """
        missing = sum("verdict" not in record for record in records) if self.benchmark.verdicts else 0
        if missing:
            return Scores({"n": len(records), "n_unjudged": missing}, [])
        return self.benchmark.scorer(records, self.cfg.protocol)


def _shown(row: Row) -> str:
    """The reference as a reader sees it: of several answers the first, of a choice's number its text."""
    answer = next((row[name] for name in ("answer", "answers", "gpt_answer") if name in row), "")
    answer = str(answer[0] if isinstance(answer, list) and answer else answer)
    choices = row.get("choices") or row.get("options")
    if isinstance(choices, list) and answer.isdecimal() and int(answer) < len(choices):
        return lettered(choices).split("\n")[int(answer)]
    return answer
