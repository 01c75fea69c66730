"""The embedded benchmark: visual questions over handwritten digits, scored by exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial

from ...data.embedded.digits import IMAGE_KINDS, KINDS, TEXT_KINDS, Digits
from ...data.records import Record
from ...settings.schema import DataConfig, EvaluateConfig
from . import Outcome, Scores, Task, mean, predicted, value
from . import Record as Answered

FACTS = {"dataset": "digits_vqa", "split": "test"}
GROUPS = {
    "": KINDS,
    "_image": IMAGE_KINDS,
    **{f"/{kind}": (kind,) for kind in IMAGE_KINDS},
    "_text": TEXT_KINDS,
    **{f"/{kind}": (kind,) for kind in TEXT_KINDS},
}


def task(data: DataConfig, _evaluate: EvaluateConfig) -> Task:
    """The benchmark at the size that ``data.test_questions`` asks for."""
    return digits_vqa(data.test_questions)


def digits_vqa(questions: int) -> Task:
    """The first questions (>= 1) of the test split, which does not depend on the run's seed: runs can be compared."""
    records, facts = partial(_questions, questions), FACTS.copy
    return Task("digits_vqa", ("accuracy",), 8, records, score, facts, answer_loss=True)


@lru_cache(maxsize=2)
def _questions(size: int) -> tuple[Record, ...]:
    """Made once for the base, the pruned and the recovered model."""
    return tuple(single_questions(list(Digits("test", size)))[:size])


def single_questions(records: Sequence[Record]) -> list[Record]:
    """Split records of independent questions into records of one question each.

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


def score(records: Sequence[Answered]) -> Scores:
    """Accuracies in [0, 1], the mean answer loss in nats per token, and the counts behind them.

    Args:
        records: At least one, in any order; keys ``prediction``, ``answer``, ``kind``, and ``loss`` and ``tokens``
            where the loss is known.

    Returns:
        ``accuracy``, ``accuracy_image``, ``accuracy_text``, ``accuracy/<kind>``, ``answer_loss``, and ``n``,
        ``n_image``, ``n_text``, ``n/<kind>``; groups without a question are left out.
    """
    outcomes = [
        Outcome(item["id"], predicted(item), float(predicted(item).strip() == str(value(item, "answer"))))
        for item in records
    ]
    kinds = [value(item, "kind") for item in records]
    hits = {
        name: [outcome.score for outcome, kind in zip(outcomes, kinds, strict=True) if kind in group]
        for name, group in GROUPS.items()
    }
    metrics = {f"accuracy{name}": mean(found) for name, found in hits.items() if found or not name}
    if tokens := sum(item.get("tokens", 0) for item in records):
        metrics["answer_loss"] = sum(item.get("loss", 0.0) for item in records) / tokens
    return Scores(metrics | {f"n{name}": len(found) for name, found in hits.items() if found}, outcomes)
