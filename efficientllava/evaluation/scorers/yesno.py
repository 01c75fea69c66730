"""Yes-or-no questions: POPE (arXiv 2305.10355) and MME (arXiv 2306.13394)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from ...runtime.errors import UserError
from . import (
    Outcome,
    Record,
    Scores,
    mean,
    predicted,
    value,
)

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def _reference(record: Record) -> str:
    answer = str(value(record, "answer")).strip().rstrip(".").lower()
    if answer not in ("yes", "no"):
        raise UserError(f"record {record['id']!r}: 'answer' is {record['answer']!r}; it must be yes or no")
    return answer


def pope_answer(text: str, protocol: str) -> str:
    """What a POPE answer says.

    ``llava``: "no" if No, not or no is a word before the first full stop, else "yes", whatever the text.
    ``lmms_eval``: the text itself in lower case, which counts only if it is yes or no.
    """
    if protocol == "lmms_eval":
        return text.lower().strip()
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _rates(pairs: Sequence[tuple[str, str]], suffix: str = "") -> dict[str, float]:
    """Rates and counts from (prediction, reference) pairs; a rate without a denominator is 0."""
    counts = Counter(pairs)
    tp, fp, fn, tn = (counts[pair] for pair in (("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no")))
    precision, recall = tp / max(tp + fp, 1), tp / max(tp + fn, 1)
    rates = {
        "accuracy": mean(said == reference for said, reference in pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if tp else 0.0,
        "yes_ratio": mean(said == "yes" for said, _ in pairs),
        **{"n_tp": tp, "n_fp": fp, "n_fn": fn, "n_tn": tn, "n": len(pairs)},
    }
    return {f"{name}{suffix}": rate for name, rate in rates.items()}


def pope(records: Sequence[Record], protocol: str = "llava") -> Scores:
    """Accuracy, precision, recall, F1 and the share of "yes", pooled and per category.

    ``f1`` is the mean of the categories' F1 under ``llava`` (the papers' number) and pooled under ``lmms_eval``. The
    share of "yes" is that of the predictions under both; lmms-eval's own number is that of the references.

    Keys: ``answer`` (yes or no), ``category`` (adversarial, popular, random). For the protocols see `pope_answer`.
    """
    outcomes = []
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for record in records:
        said, reference = pope_answer(predicted(record), protocol), _reference(record)
        pairs[str(record.get("category", "all"))].append((said, reference))
        outcomes.append(Outcome(record["id"], said, float(said == reference)))
    metrics = _rates([pair for category in pairs.values() for pair in category])
    for category in sorted(pairs):
        metrics |= _rates(pairs[category], f"/{category}")
    if protocol == "llava":
        metrics["f1"] = mean(metrics[f"f1/{category}"] for category in pairs)
    return Scores(metrics, outcomes)


def mme_answer(text: str, protocol: str) -> str:
    """What an MME answer says: "yes", then "no", is looked for in its first four characters; "other" is neither.

    ``lmms_eval`` first removes outer blanks and all full stops, and knows a lone y or n.
    """
    text = text.lower()
    if protocol == "lmms_eval":
        text = text.strip().replace(".", "")
        text = {"y": "yes", "n": "no"}.get(text, text)
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def mme(records: Sequence[Record], protocol: str = "llava") -> Scores:
    """Points of MME: ``perception`` (at most 2000), ``cognition`` (at most 800) and ``score/<category>`` (200).

    A category scores 100 x the share of right questions + 100 x the share of images of which both questions are right.
    An image without exactly two questions cannot be such; ``n_unpaired`` counts them.

    Keys: ``answer`` (yes or no); ``category`` and ``image`` (its name) form the pairs, where they are not given the id
    does (``code_reasoning/0020.png``). For the protocols see `mme_answer`.
    """
    outcomes = []
    images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        said = mme_answer(predicted(record), protocol)
        outcomes.append(Outcome(record["id"], said, float(said == _reference(record))))
        category = str(record.get("category") or str(record["id"]).split("/")[0])
        if category not in PERCEPTION + COGNITION:
            known = ", ".join(PERCEPTION + COGNITION)
            raise UserError(f"record {record['id']!r}: 'category' is {category!r}; it must be one of {known}")
        images[category][str(record.get("image", record["id"]))].append(outcomes[-1].score)
    metrics = {"accuracy": mean(outcome.score for outcome in outcomes), "n": len(outcomes)}
    metrics["n_unpaired"] = sum(len(scores) != 2 for pairs in images.values() for scores in pairs.values())
    for category in sorted(images):
        scores = list(images[category].values())
        metrics[f"accuracy/{category}"] = mean(score for pair in scores for score in pair)
        metrics[f"accuracy_plus/{category}"] = mean(float(pair == [1, 1]) for pair in scores)
        metrics[f"score/{category}"] = 100 * (metrics[f"accuracy/{category}"] + metrics[f"accuracy_plus/{category}"])
        metrics[f"n/{category}"] = sum(map(len, scores))
    for total, categories in (("perception", PERCEPTION), ("cognition", COGNITION)):
        if present := [metrics[f"score/{category}"] for category in categories if category in images]:
            metrics[total] = sum(present)
    return Scores(metrics, outcomes)
