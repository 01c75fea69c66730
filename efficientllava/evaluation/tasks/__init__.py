"""Benchmarks: a row of the table in `published`, or a file of one's own here, whose name is the benchmark's name.

A file says ``BENCHMARK = Benchmark(…)`` for rows of the hub or of files, or, for questions that are made rather than
read, ``def task(data: DataConfig) -> Task``. Either way ``evaluate=<name>`` runs it, and
``python -m efficientllava.evaluation.score --task <name>`` scores its files. Importing this is cheap: ``--help`` does.
"""

from __future__ import annotations

import pkgutil
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from hydra.core.config_store import ConfigStore

from ...runtime.errors import UserError
from ...settings.schema import DataConfig, EvaluateConfig
from ..scorers import Record as Answered
from ..scorers import Scorer, Scores

if TYPE_CHECKING:
    from ...data.records import Record

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


@dataclass(frozen=True)
class Task:
    """What a run asks: questions, how they are to be answered, and the score of the answers.

    Attributes:
        name: Key of its metrics in ``results.json``.
        headline: Names of the metrics that a run shows.
        max_new_tokens: Longest answer, in tokens.
        records: Gives the questions: records with exactly one turn and distinct ids.
        score: Metrics of answers in any order, ``n`` among them; shares in [0, 1].
        facts: Gives what stands beside the result in ``results.json``: protocol, data set, split.
        questions: Their number, where it is known before they are read.
        stop: Texts that end an answer, beside the model's own end token.
        answer_loss: Whether the loss of the reference answers is wanted beside the generated text.
    """

    name: str
    headline: tuple[str, ...]
    max_new_tokens: int
    records: Callable[[], Sequence[Record]]
    score: Callable[[Sequence[Answered]], Scores]
    facts: Callable[[], Mapping[str, Any]]
    questions: int | None = None
    stop: tuple[str, ...] = ()
    answer_loss: bool = False


def available() -> tuple[str, ...]:
    """Names of all benchmarks, sorted."""
    from .published import BENCHMARKS

    files = {module.name for module in pkgutil.iter_modules(__path__)} - {"published"}
    return tuple(sorted({*BENCHMARKS, *files}))


def declared(name: str) -> Benchmark | Callable[[DataConfig], Task]:
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
        evaluate: ``protocol``, ``namespace``, ``root``.

    Raises:
        UserError: If there is no such benchmark.
    """
    found = declared(name)
    if not isinstance(found, Benchmark):
        return found(data)
    from ..rows import task

    return task(name, found, evaluate)


def register_benchmarks() -> None:
    """Make every benchmark an option of the group ``evaluate``, beside the files in ``conf/evaluate``."""
    for name in available():
        ConfigStore.instance().store(group="evaluate", name=name, node={"tasks": [name]})
