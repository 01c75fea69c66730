"""Benchmarks: one file each. The file's name is the benchmark's name, its function ``task`` makes it.

To add one, put ``<name>.py`` here with ``def task(data: DataConfig) -> Task``; ``evaluate.tasks=[<name>]`` runs it.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import NotRequired, Protocol, TypedDict

from ...data.conversations import Record
from ...errors import UserError
from ...schema import DataConfig


class Prediction(TypedDict):
    """What a model said to one question.

    Attributes:
        id: Id of the question's record.
        question: Its text.
        kind: Question type; may be empty.
        answer: The reference.
        prediction: Generated text, without special tokens, stripped.
        loss: Cross-entropy of the reference, summed over its tokens, in nats; where the task asks for it.
        tokens: Supervised tokens of the reference, with ``loss``.
    """

    id: str
    question: str
    kind: str
    answer: str
    prediction: str
    loss: NotRequired[float]
    tokens: NotRequired[int]


class Task(Protocol):
    """A benchmark.

    Attributes:
        name: Key of its metrics in ``results.json``.
        answer_loss: Whether the loss of the reference answers is wanted beside the generated text.
    """

    name: str
    answer_loss: bool

    def records(self, split: str = "test") -> Sequence[Record]:
        """The questions of a split: records with exactly one turn and distinct ids."""
        ...

    def score(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Metrics of predictions in any order, ``n`` among them; accuracies in [0, 1]."""
        ...


def available() -> tuple[str, ...]:
    """Names of all benchmarks, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str, data: DataConfig) -> Task:
    """Make a benchmark by its name.

    Args:
        name: One of `available`.
        data: Sizes and paths of the run's data.

    Returns:
        The benchmark.

    Raises:
        UserError: If there is no such benchmark.
    """
    if name not in available():
        raise UserError(f"evaluate.tasks: {name!r} is not one of {', '.join(available())}")
    return import_module(f"{__name__}.{name}").task(data)


def single_questions(records: Sequence[Record]) -> list[Record]:
    """Split records of independent questions into records of one question each.

    Args:
        records: Records whose turns are independent.

    Returns:
        One record per turn; ids get ``/<turn>`` where a record has several, text-only questions lose the image.
    """
    return [
        replace(
            record,
            id=record.id if len(record.turns) == 1 else f"{record.id}/{index}",
            image=record.image if turn.sees_image else None,
            turns=(turn,),
        )
        for record in records
        for index, turn in enumerate(record.turns)
    ]
