"""Benchmarks: one file each. The file's name is the benchmark's name.

To add one, put ``<name>.py`` here with ``BENCHMARK = Benchmark(…)`` (see `efficientllava.evaluation.benchmark` and
``gqa.py``), or, for questions that are made rather than read, with ``def task(data: DataConfig) -> Task``. Then
``evaluate.tasks=[<name>]`` runs it, and ``python -m efficientllava.evaluation.score --task <name>`` scores its files.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, Protocol

from ...data.records import Record
from ...runtime.errors import UserError
from ...settings.schema import DataConfig, EvaluateConfig
from ..benchmark import BenchmarkTask
from ..scorers import Record as Answered
from ..scorers import Scores


class Task(Protocol):
    """Questions, how they are to be answered, and the score of the answers."""

    @property
    def name(self) -> str:
        """Key of its metrics in ``results.json``."""
        ...

    @property
    def headline(self) -> tuple[str, ...]:
        """Names of the metrics that a run shows."""
        ...

    @property
    def questions(self) -> int | None:
        """Their number, where it is known before they are read."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Longest answer, in tokens."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer, beside the model's own end token."""
        ...

    @property
    def answer_loss(self) -> bool:
        """Whether the loss of the reference answers is wanted beside the generated text."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What stands beside the result in ``results.json``: protocol, data set, split."""
        ...

    def records(self) -> Sequence[Record]:
        """The questions: records with exactly one turn and distinct ids."""
        ...

    def score(self, records: Sequence[Answered]) -> Scores:
        """Metrics of answers in any order, ``n`` among them; shares in [0, 1]."""
        ...


def available() -> tuple[str, ...]:
    """Names of all benchmarks, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str, data: DataConfig, evaluate: EvaluateConfig) -> Task:
    """Make a benchmark by its name.

    Args:
        name: One of `available`.
        data: Sizes of the embedded data.
        evaluate: ``protocol``, ``namespace``, ``root``.

    Returns:
        The benchmark; its questions are not read yet.

    Raises:
        UserError: If there is no such benchmark.
    """
    if name not in available():
        raise UserError(f"evaluate.tasks: {name!r} is not one of {', '.join(available())}")
    module = import_module(f"{__name__}.{name}")
    if hasattr(module, "BENCHMARK"):
        return BenchmarkTask(name, module.BENCHMARK, evaluate)
    return module.task(data)


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
