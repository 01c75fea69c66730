"""The embedded benchmark: visual questions over handwritten digits, scored by exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...data.embedded.digits import (
    IMAGE_KINDS,
    KINDS,
    TEXT_KINDS,
    Digits,
)
from ...data.records import Record
from ...settings.schema import DataConfig
from ..scorers import (
    Outcome,
    Scores,
    mean,
    predicted,
    value,
)
from ..scorers import Record as Answered
from . import single_questions


@lru_cache(maxsize=2)
def _questions(size: int) -> tuple[Record, ...]:
    """Made once for the base, the pruned and the recovered model."""
    return tuple(single_questions(list(Digits("test", size)))[:size])


@dataclass(frozen=True)
class DigitsVQA:
    """Exact match of the generated text, over all questions, over those with an image, without, and per type.

    The questions do not depend on the run's seed, so that runs can be compared.

    Args:
        questions: Their number, >= 1.
    """

    questions: int
    name: str = "digits_vqa"
    headline: tuple[str, ...] = ("accuracy",)
    max_new_tokens: int = 8
    stop: tuple[str, ...] = ()
    answer_loss: bool = True

    @property
    def facts(self) -> dict[str, str]:
        """Where the questions come from."""
        return {"dataset": "digits_vqa", "split": "test"}

    def records(self) -> Sequence[Record]:
        """The first ones of the test split of `efficientllava.data.embedded.digits`."""
        return _questions(self.questions)

    def score(self, records: Sequence[Answered]) -> Scores:
        """Accuracies in [0, 1], the mean answer loss in nats per token, and the counts behind them.

        Args:
            records: At least one, in any order; keys ``prediction``, ``answer``, ``kind``, and ``loss`` and ``tokens``
                where the loss is known.

        Returns:
            ``accuracy``, ``accuracy_image``, ``accuracy_text``, ``accuracy/<kind>``, ``answer_loss``, and ``n``,
            ``n_image``, ``n_text``, ``n/<kind>``; groups without a question are left out.
        """
        groups = {"": set(KINDS), "_image": set(IMAGE_KINDS), **{f"/{kind}": {kind} for kind in IMAGE_KINDS}}
        groups |= {"_text": set(TEXT_KINDS), **{f"/{kind}": {kind} for kind in TEXT_KINDS}}
        right = [predicted(item).strip() == value(item, "answer") for item in records]
        asked = [value(item, "kind") for item in records]
        hits = {
            name: [hit for hit, kind in zip(right, asked, strict=True) if kind in kinds]
            for name, kinds in groups.items()
        }
        metrics = {f"accuracy{name}": mean(found) for name, found in hits.items() if found or not name}
        tokens = sum(item.get("tokens", 0) for item in records)
        if tokens:
            metrics["answer_loss"] = sum(item.get("loss", 0.0) for item in records) / tokens
        metrics |= {f"n{name}": len(found) for name, found in hits.items() if found}
        outcomes = [Outcome(item["id"], predicted(item), float(hit)) for item, hit in zip(records, right, strict=True)]
        return Scores(metrics, outcomes)


def task(data: DataConfig) -> DigitsVQA:
    """The benchmark at the size that ``data.test_questions`` asks for."""
    return DigitsVQA(data.test_questions)
