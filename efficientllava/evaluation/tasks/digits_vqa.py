"""The embedded benchmark: visual questions over handwritten digits, scored by exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...data.conversations import Record
from ...data.digits import IMAGE_KINDS, KINDS, TEXT_KINDS, Digits
from ...schema import DataConfig
from . import Prediction, single_questions


@lru_cache(maxsize=2)
def _questions(split: str, size: int) -> tuple[Record, ...]:
    """Made once for the base, the pruned and the recovered model."""
    return tuple(single_questions(list(Digits(split, size)))[:size])


@dataclass(frozen=True)
class DigitsVQA:
    """Exact match of the generated text, over all questions, over those with an image, without, and per type.

    The questions do not depend on the run's seed, so that runs can be compared.

    Args:
        size: Number of questions, >= 1.
    """

    size: int
    name: str = "digits_vqa"
    answer_loss: bool = True

    def records(self, split: str = "test") -> Sequence[Record]:
        """The first ``size`` questions of a split of `efficientllava.data.digits`."""
        return _questions(split, self.size)

    def score(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """Accuracies in [0, 1], the mean answer loss in nats per token, and the counts behind them.

        Args:
            predictions: At least one, in any order.

        Returns:
            ``accuracy``, ``accuracy_image``, ``accuracy_text``, ``accuracy/<kind>``, ``answer_loss``, and ``n``,
            ``n_image``, ``n_text``, ``n/<kind>``; groups without a question are left out.
        """
        groups = {"": set(KINDS), "_image": set(IMAGE_KINDS), **{f"/{kind}": {kind} for kind in IMAGE_KINDS}}
        groups |= {"_text": set(TEXT_KINDS), **{f"/{kind}": {kind} for kind in TEXT_KINDS}}
        hits = {
            name: [item["prediction"].strip() == item["answer"] for item in predictions if item["kind"] in kinds]
            for name, kinds in groups.items()
        }
        metrics = {f"accuracy{name}": sum(found) / len(found) for name, found in hits.items() if found}
        tokens = sum(item.get("tokens", 0) for item in predictions)
        if tokens:
            metrics["answer_loss"] = sum(item.get("loss", 0.0) for item in predictions) / tokens
        return metrics | {f"n{name}": len(found) for name, found in hits.items() if found}


def task(data: DataConfig) -> DigitsVQA:
    """The benchmark at the size that ``data.test_questions`` asks for."""
    return DigitsVQA(data.test_questions)
