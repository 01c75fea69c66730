"""What a published benchmark is: a declaration, from which questions, generation settings and scores follow."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ..data.conversations import Record, StoredImage, Turn
from ..errors import UserError
from ..schema import EvaluateConfig
from .scorers import Record as Answered
from .scorers import Scorer, Scores
from .sources import Rows, Source

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
            records: As `efficientllava.evaluation.predictions.as_record` makes them, in any order.

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
