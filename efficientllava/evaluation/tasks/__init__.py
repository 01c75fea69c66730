"""Benchmarks: a row of the table in `published`, or a file of one's own here, whose name is the benchmark's name.

A file says ``BENCHMARK = Benchmark(…)`` for rows of the hub or of files, or, for questions that are made rather than
read, ``def task(data: DataConfig, evaluate: EvaluateConfig) -> Task``. Either way ``evaluate=<name>`` runs it, and
``python -m efficientllava.evaluation.score --task <name>`` scores its files. Importing this is cheap: ``--help`` does.

Scorers are pure functions from predictions and references to metrics; no model, no data set, no network. A *record* is
a mapping with ``id``, ``prediction`` (generated text, may be empty), ``answer``, and whatever else its benchmark wants;
every scorer names these keys. A scorer is called with records in any order and a protocol: ``llava`` (the papers'
scripts) or ``lmms_eval`` (the leaderboard's); it says where they differ. Metrics are shares in [0, 1], except MME's
points; ``n``, ``n/<group>`` and ``n_<what>`` are counts. A record that lacks a key raises a `UserError`.
"""

from __future__ import annotations

import ast
import math
import pkgutil
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from hydra.core.config_store import ConfigStore

from ...runtime import UserError
from ...settings.schema import DataConfig, EvaluateConfig

if TYPE_CHECKING:
    from ...data.records import Record as Asked

PROTOCOLS = ("llava", "lmms_eval")

# LLaVA-1.5's sentences (arXiv 2310.03744, table 7).
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

Row = Mapping[str, Any]
Record = Mapping[str, Any]  # what scorers read
Value = TypeVar("Value")
# Keys of a line of predictions that no column may have, see `efficientllava.evaluation.answers.line`.
TAKEN = {"prediction", "verdict", "protocol", "benchmark", "has_image", "skipped"}
PerProtocol = Value | Mapping[str, Value]  # one value, or one for each of `PROTOCOLS`


@dataclass(frozen=True)
class Outcome:
    """What became of one record.

    Attributes:
        id: The record's id.
        parsed: What was read out of the prediction; None where the parser found nothing.
        score: Its contribution, in [0, 1] (a relative score may be above).
    """

    id: str
    parsed: Any
    score: float


@dataclass(frozen=True)
class Scores:
    """Metrics by name, and one outcome per record in the order of the records."""

    metrics: dict[str, float]
    outcomes: list[Outcome]


Scorer = Callable[[Sequence[Record], str], Scores]


def value(record: Record, key: str) -> Any:
    """What a record has under a key; a `UserError` if it has nothing."""
    if key not in record:
        raise UserError(f"record {record.get('id')!r}: has no {key!r}; add it to the file or give --gold=<references>")
    return record[key]


def predicted(record: Record) -> str:
    """The generated text; None is an empty one."""
    text = value(record, "prediction")
    return "" if text is None else str(text)


def sequence(record: Record, key: str) -> list[Any]:
    """A list, which some data sets keep as its Python source; a `UserError` if it is neither."""
    found = value(record, key)
    if isinstance(found, str):
        with suppress(SyntaxError, ValueError):
            found = ast.literal_eval(found)
    if not isinstance(found, list | tuple):
        raise UserError(f"record {record.get('id')!r}: {key!r} is {found!r}; it must be a list")
    return list(found)


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean, the same to the last bit in any order; a `UserError` if there is nothing to average."""
    values = list(values)
    if not values:
        raise UserError("nothing to score: there is no record")
    return math.fsum(values) / len(values)


def means(name: str, values: Sequence[float], groups: Sequence[Iterable[str]]) -> dict[str, float]:
    """``<name>`` and ``n`` over all records, ``<name>/<group>`` and ``n/<group>`` over each group.

    Args:
        name: Of the metric.
        values: One per record.
        groups: Per record, the groups that it belongs to.
    """
    members: dict[str, list[float]] = defaultdict(list)
    for number, names in zip(values, groups, strict=True):
        for group in names:
            members[group].append(number)
    metrics = {name: mean(values), "n": len(values)}
    for group in sorted(members):
        metrics |= {f"{name}/{group}": mean(members[group]), f"n/{group}": len(members[group])}
    return metrics


Judge = Callable[[Record, str], tuple[Any, float]]
Groups = Callable[[Record], Iterable[str]]


def per_record(name: str, groups: Groups = lambda _: (), unparsed: str | None = None) -> Callable[[Judge], Scorer]:
    """Make a scorer of what judges one record under a protocol and gives what it parsed, and the score.

    Args:
        name: Of the metric; for those beside it see `means`.
        groups: That a record belongs to.
        unparsed: Name for the number of records in which nothing was found.
    """

    def scorer(judge: Judge) -> Scorer:
        @wraps(judge)
        def score(records: Sequence[Record], protocol: str = "llava") -> Scores:
            outcomes = [Outcome(record["id"], *judge(record, protocol)) for record in records]
            scores = [outcome.score for outcome in outcomes]
            metrics = means(name, scores, [tuple(groups(record)) for record in records])
            if unparsed:
                metrics[unparsed] = sum(outcome.parsed is None for outcome in outcomes)
            return Scores(metrics, outcomes)

        return score

    return scorer


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
    """A declaration, from which questions, generation settings and scores follow.

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

    def __post_init__(self) -> None:
        if taken := TAKEN & {*self.columns}:
            raise UserError(
                f"benchmark of {self.dataset}: a column is called {', '.join(sorted(taken))}, as what a line of "
                "predictions says itself; rename it in the data"
            )


@dataclass(frozen=True)
class Task:
    """What a run asks: questions, how they are to be answered, and the score of the answers.

    Attributes:
        name: Key of its metrics in ``results.json``.
        headline: Names of the metrics that a run shows.
        max_new_tokens: Longest answer, in tokens; 0: nothing is generated, only reference answers are looked at.
        records: Gives the questions: records with distinct ids and, where answers are generated, exactly one turn.
        score: Metrics of answers in any order, ``n`` among them; shares in [0, 1].
        facts: Gives what stands beside the result in ``results.json``: protocol, data set, split.
        questions: Their number, where it is known before they are read.
        stop: Texts that end an answer, beside the model's own end token.
        answer_loss: Whether the loss of the reference answers is wanted beside the generated text.
        divergence: Whether that of their distributions from the base model's is, too.
    """

    name: str
    headline: tuple[str, ...]
    max_new_tokens: int
    records: Callable[[], Sequence[Asked]]
    score: Callable[[Sequence[Record]], Scores]
    facts: Callable[[], Mapping[str, Any]]
    questions: int | None = None
    stop: tuple[str, ...] = ()
    answer_loss: bool = False
    divergence: bool = False


def available() -> tuple[str, ...]:
    """Names of all benchmarks, sorted."""
    from .published import BENCHMARKS

    files = {module.name for module in pkgutil.iter_modules(__path__)} - {"published"}
    return tuple(sorted({*BENCHMARKS, *files}))


def declared(name: str) -> Benchmark | Callable[[DataConfig, EvaluateConfig], Task]:
    """What a benchmark's row or file says; a `UserError` if there is no such benchmark."""
    from .published import BENCHMARKS

    if name not in available():
        raise UserError(f"evaluate.tasks: {name!r} is not one of {', '.join(available())}")
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    module = import_module(f"{__name__}.{name}")
    return module.BENCHMARK if hasattr(module, "BENCHMARK") else module.task


def load(name: str, data: DataConfig, evaluate: EvaluateConfig) -> Task:
    """Make a benchmark by its name; its questions are not read yet.

    Args:
        name: One of `available`.
        data: Sizes of the embedded data.
        evaluate: ``protocol``, ``namespace``, ``root``, ``prose``.

    Raises:
        UserError: If there is no such benchmark.
    """
    found = declared(name)
    if not isinstance(found, Benchmark):
        return found(data, evaluate)
    from ..rows import task

    return task(name, found, evaluate)


def register_benchmarks() -> None:
    """Make every benchmark an option of the group ``evaluate``, beside the files in ``conf/evaluate``."""
    for name in available():
        ConfigStore.instance().store(group="evaluate", name=name, node={"tasks": [name]})
