"""Scorers: pure functions from predictions and references to metrics; no model, no data set, no network.

A *record* is a mapping with ``id``, ``prediction`` (generated text, may be empty), ``answer``, and whatever else its
benchmark wants; every scorer names these keys. A scorer is called with records in any order and a protocol: ``llava``
(the papers' scripts) or ``lmms_eval`` (the leaderboard's); it says where they differ. Metrics are shares in [0, 1],
except MME's points; ``n``, ``n/<group>`` and ``n_<what>`` are counts. A record that lacks a key raises a `UserError`.
"""

from __future__ import annotations

import ast
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any

from ...runtime.errors import UserError

PROTOCOLS = ("llava", "lmms_eval")
Record = Mapping[str, Any]


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
