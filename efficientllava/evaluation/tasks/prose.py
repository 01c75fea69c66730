"""Prose: how likely a model finds running text, and how far it has moved from the base model on it.

A record gives the first `GIVEN` words of a piece and asks for the rest, whose loss is measured; nothing is generated.
Three texts come with this package, two of documentation and a novel, or one of the user's own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from ...data.records import Record, Turn
from ...data.table import read_conversations
from ...runtime.errors import NotFiniteError, UserError
from ...runtime.places import PACKAGE
from ...settings.schema import DataConfig, EvaluateConfig
from . import Outcome, Scores, Task, value
from . import Record as Answered

FOLDER = PACKAGE / "assets" / "prose"
# Two of a kind that people calibrate with, and one that is not; see the README beside them.
TEXTS = {
    "sqlite": "0bfc0b1377154ab9af6f597b112df50cd84efab806b8cbf925ae20f4f43dc2fe",
    "postgresql": "8d3497ec6dc145c7098d6eeb6e36ab75611dbaea63ecd1c33e0c7e7f657fe175",
    "moby_dick": "c70b7fce5f81f44a6b2e1fea6e4454bafe8ae71c4e9b91e348d63afe526b1c75",
}
KEY = "evaluate.prose.path"
MOST, LEAST, GIVEN = 150, 40, 16  # words of a piece; of them, those that are given
PARTED = ("perplexity", "kl", "n")  # are told of every text, too
LARGEST = 700.0  # nats whose exponential is a number


def task(_data: DataConfig, evaluate: EvaluateConfig) -> Task:
    """The benchmark over the shipped texts, or over ``evaluate.prose.path``."""
    path = evaluate.prose.path
    read = shipped if path is None else partial(own, Path(path).expanduser())
    facts: dict[str, Any] = {"dataset": "prose" if path is None else Path(path).name, "given_words": GIVEN}
    count = None if path else len(shipped())
    return Task("prose", ("perplexity", "kl"), 0, read, score, facts.copy, count, answer_loss=True, divergence=True)


@cache
def shipped() -> tuple[Record, ...]:
    """The records of the texts that come with this package, in turn, so that the first ones are of all texts."""
    return tuple(chain.from_iterable(zip(*(of_text(FOLDER / f"{name}.txt") for name in TEXTS), strict=True)))


def own(file: Path) -> Sequence[Record]:
    """The records of a user's file: a plain text, or LLaVA-style JSON.

    Raises:
        UserError: It is not there, cannot be read, or holds no record.
    """
    if not file.is_file():
        raise UserError(f"{KEY}={file}: no such file; give a text (.txt) or LLaVA-style JSON")
    return of_text(file) if file.suffix == ".txt" else list(read_conversations(file, key=KEY))


def of_text(file: Path) -> tuple[Record, ...]:
    """The records of a plain text.

    Raises:
        UserError: It cannot be read, or holds no piece.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{KEY}={file}: cannot be read ({reason}); give a text in UTF-8, or JSON") from error
    made = tuple(_record(file.stem, number, words) for number, words in enumerate(pieces(text)))
    if not made:
        raise UserError(f"{KEY}={file}: holds no {LEAST} words; give a longer text")
    return made


def pieces(text: str) -> list[list[str]]:
    """Cut a text into lists of words.

    Paragraphs, which empty lines part, are joined as long as they fit into `MOST` words together; longer ones are cut
    after every `MOST` words. What is shorter than `LEAST` is left out.
    """
    made: list[list[str]] = [[]]
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        if len(made[-1]) + len(words) > MOST:
            made += [words[start : start + MOST] for start in range(0, len(words), MOST)]
        else:
            made[-1] += words
    return [piece for piece in made if len(piece) >= LEAST]


def _record(text: str, number: int, words: Sequence[str]) -> Record:
    question = f"Continue this text: {' '.join(words[:GIVEN])}"
    turn = Turn(question, " ".join(words[GIVEN:]), text, sees_image=False)
    return Record(f"{text}/{number}", None, (turn,), False, "prose")


def score(records: Sequence[Answered]) -> Scores:
    """Perplexity, the loss behind it, and the divergence from the base, over all tokens and those of every text.

    Args:
        records: At least one, in any order; keys ``loss`` (sum over an answer, nats), ``tokens``, ``kind``, and ``kl``
            (a sum, too) where a base was compared with.

    Returns:
        ``perplexity``, ``answer_loss`` and ``kl`` (nats per token), ``n_tokens`` and ``n``; where there are several
        texts ``perplexity/<text>``, ``kl/<text>`` and ``n/<text>``.

    Raises:
        NotFiniteError: A number is infinite or NaN.
    """
    texts: dict[str, list[Answered]] = {}
    for record in records:
        texts.setdefault(value(record, "kind"), []).append(record)
    parts = {text: _means(some) for text, some in sorted(texts.items())} if len(texts) > 1 else {}
    metrics: dict[str, float] = {}
    for name, mean in _means(records).items():
        metrics |= {name: mean, **{f"{name}/{text}": part[name] for text, part in parts.items() if name in PARTED}}
    outcomes = [Outcome(record["id"], None, math.exp(-_ratio([record], "loss"))) for record in records]
    return Scores(metrics, outcomes)


def _means(records: Sequence[Answered]) -> dict[str, float]:
    loss = _ratio(records, "loss")
    found = {"perplexity": math.exp(min(loss, LARGEST)), "answer_loss": loss}
    if all("kl" in record for record in records):
        found["kl"] = _ratio(records, "kl")
    if not all(map(math.isfinite, found.values())) or loss > LARGEST:
        raise NotFiniteError(f"prose: {found} is not finite; look at the checkpoint, or set another model.dtype")
    return {**found, "n_tokens": sum(record["tokens"] for record in records), "n": len(records)}


def _ratio(records: Sequence[Answered], key: str) -> float:
    """Sum of a key over the tokens of the records."""
    return math.fsum(value(record, key) for record in records) / max(1, sum(value(r, "tokens") for r in records))
