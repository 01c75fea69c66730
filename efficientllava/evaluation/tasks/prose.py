"""Prose: how likely a model finds running text, and how far it has moved from the base model on it.

The loss of the second part of every piece is measured, see `efficientllava.data.embedded.prose`; nothing is generated.
The texts come with this package, two of documentation and a novel, or one is the user's own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from ...data.collator import Collator
from ...data.embedded.prose import GIVEN, of_text, shipped
from ...data.records import Record, missing_images
from ...data.table import read_conversations
from ...runtime import NotFiniteError, UserError, sha256
from ...settings.schema import DataConfig, EvaluateConfig
from . import Outcome, Scores, Task, value
from . import Record as Answered

KEY = "evaluate.prose.path"
PARTED = ("perplexity", "kl", "n")  # are told of every text, too
LARGEST = 700.0  # nats whose exponential is a number


def task(_data: DataConfig, evaluate: EvaluateConfig) -> Task:
    """The benchmark over the shipped texts, or over ``evaluate.prose.path``."""
    path = evaluate.prose.path and Path(evaluate.prose.path).expanduser()
    read = partial(own, path) if path else shipped
    count = None if path else len(shipped())

    @cache  # read once, and not anew for every stage
    def facts() -> dict[str, Any]:
        # Of a file also the content: a table holds its images in itself.
        text = {"dataset": path.name, "sha256": sha256(path)} if path else {"dataset": "prose"}
        return {**text, "given_words": GIVEN}

    return Task("prose", ("perplexity", "kl"), 0, read, score, facts, count, answer_loss=True, divergence=True)


def own(file: Path) -> Sequence[Record]:
    """The records of a user's file: a plain text, or LLaVA-style JSON.

    Raises:
        UserError: It is not there, cannot be read, holds no record, or an image of one is missing.
    """
    if not file.is_file():
        raise UserError(f"{KEY}={file}: no such file; give a text (.txt) or LLaVA-style JSON")
    if file.suffix == ".txt":
        return of_text(file, KEY)
    found = read_conversations(file, key=KEY)
    if lost := missing_images(found):
        raise UserError(
            f"{KEY}={file}: {len(lost)} of {len(found)} records lack an image, the first: {next(iter(lost.values()))}; "
            "images are looked for from the file's own folder"
        )
    return list(found)


def require_whole(records: Sequence[Record], processor: Any) -> None:
    """Refuse what a model would see a part of: its loss would be that of another text, or of none.

    Raises:
        UserError: Records are longer than the context, or an image cannot be read.
    """
    context, collate = int(processor.tokenizer.model_max_length), Collator(processor, sys.maxsize, pack=False)
    sizes = {record.id: max(collate.check(record)) for record in records}
    if long := {name: size for name, size in sizes.items() if size > context}:
        name, size = next(iter(long.items()))
        raise UserError(
            f"{KEY}: {len(long)} of {len(sizes)} records are longer than the {context} tokens of the context, such as "
            f"{name!r} with {size}; shorten or drop them"
        )


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
    """Sum of a key over the tokens of the records; a `UserError` where one has no number."""
    for record in records:
        if not (isinstance(value(record, key), int | float) and value(record, "tokens")):
            raise UserError(f"record {record['id']!r}: needs a number as {key!r}, and 'tokens' above 0")
    return math.fsum(record[key] for record in records) / sum(record["tokens"] for record in records)
