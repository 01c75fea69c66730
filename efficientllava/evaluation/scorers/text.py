"""Short texts against references: GQA, DocVQA, MathVista."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from . import (
    Record,
    Scores,
    predicted,
    sequence,
    tally,
    value,
)

ANLS_THRESHOLD = 0.5
LETTER = re.compile(r"\(?([A-Z])(?:[).:]+(?:\s.*)?)?", re.DOTALL)
MATH_FORMS = {  # what a text must hold exactly once to need no judge
    "integer": r"-?\d+(?:,\d{3})*(?:\.\d+)?",
    "float": r"-?\d+(?:,\d{3})*(?:\.\d+)?",
    "list": r"\[[^\[\]]*\]",
}


def _plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def _gqa_groups(record: Record) -> list[str]:
    kind = (record.get("types") or {}).get("structural")
    return ["binary" if kind in ("verify", "logical") else "open"] if kind else []


def gqa(records: Sequence[Record], protocol: str = "llava") -> Scores:
    """Accuracy of exact match, and of the binary and the open questions.

    ``llava`` drops final full stops and lower-cases the prediction; ``lmms_eval`` drops case and all ASCII punctuation
    on both sides. Keys: ``answer``; ``types`` with ``structural``, of which verify and logical are binary.
    """

    def judge(record: Record) -> tuple[str, float]:
        text, answer = predicted(record), str(value(record, "answer"))
        text, answer = (_plain(text), _plain(answer)) if protocol == "lmms_eval" else (text.rstrip(".").lower(), answer)
        return text, float(text == answer)

    return tally("accuracy", records, judge, _gqa_groups)


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements of one character, at cost 1 each."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Normalised Levenshtein similarity to the nearest reference, 0 below one half (arXiv 1907.00490, equation 1).

    Case and the amount of white space do not count as edits; the normalising length is that of the raw texts.
    """

    def distance(answer: str) -> float:
        a, b = (" ".join(text.lower().split()) for text in (prediction, answer))
        return edit_distance(a, b) / max(len(prediction), len(answer), 1)

    similarity = 1 - min(map(distance, answers), default=1.0)
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def docvqa(records: Sequence[Record], protocol: str = "llava") -> Scores:
    """Mean ANLS; the protocols agree. Keys: ``answer`` (a text, or the list of accepted texts)."""

    def judge(record: Record) -> tuple[str, float]:
        answer = value(record, "answer")
        return predicted(record), anls(predicted(record), [answer] if isinstance(answer, str) else answer)

    return tally("anls", records, judge)


def mathvista_extract(text: str, record: Record) -> str | None:
    """Find the answer in a MathVista response where that takes no judge.

    The official rules (nothing for nothing, a choice verbatim, a bare number, ``The answer is "...".``) come first,
    then ours, for what leaves a judge no choice either: a leading option letter, or the only number or list there is.
    Keys: ``question_type`` (multi_choice, free_form), ``answer_type`` (text, integer, float, list), ``choices``.

    Returns:
        The extraction; None if a judge has to read the response.
    """
    choices = [str(choice) for choice in record.get("choices") or ()]
    kind = value(record, "answer_type")
    multiple = value(record, "question_type") == "multi_choice"
    if not text or (multiple and text in choices):
        return text
    try:
        if kind in ("integer", "float"):
            return str(int(text) if kind == "integer" else float(text))
    except ValueError:
        pass
    if quoted := re.search(r'The answer is "(.*)"\.', text):
        return quoted.group(1)
    if multiple:
        letter = LETTER.fullmatch(text.strip())
        return letter.group(1) if letter and ord(letter.group(1)) - ord("A") < len(choices) else None
    found = re.findall(MATH_FORMS[kind], text) if kind in MATH_FORMS else []
    if len(found) != 1:
        return None
    return found[0] if kind == "list" else found[0].replace(",", "")


def mathvista_normalise(extraction: str, record: Record) -> str | None:
    """Bring an extraction into the form of the references. Keys: as above, and ``precision`` (places of a float).

    For multiple choice that is the text of a choice: of the "(X)" or letter found, else the nearest one by edit
    distance, so that even an empty extraction chooses; for numbers the number as text, None if it is none.
    """
    if value(record, "question_type") == "multi_choice":
        choices = [str(choice) for choice in sequence(record, "choices")]
        extraction = extraction.strip()
        letter = re.search(r"\(([a-zA-Z])\)", extraction)
        extraction = letter.group(1).upper() if letter else extraction
        named = dict(zip(string.ascii_uppercase, choices, strict=False)).get(extraction)
        return named or min(choices, key=lambda choice: edit_distance(extraction, choice), default=None)
    kind = record["answer_type"]
    try:
        if kind == "integer":
            return str(int(float(extraction)))
        return str(round(float(extraction), int(record.get("precision") or 0))) if kind == "float" else extraction
    except (ValueError, OverflowError):
        return None


def mathvista(records: Sequence[Record], protocol: str = "llava") -> Scores:
    """Accuracy, by question and answer type; the protocols agree.

    A response that needs a judge and has none counts as wrong; ``n_undecided`` says how many. Keys: ``answer``, those
    of `mathvista_extract` and `mathvista_normalise`, and ``extraction``, what a judge has found.
    """

    def judge(record: Record) -> tuple[str | None, float]:
        found = record.get("extraction")
        found = mathvista_extract(predicted(record).strip(), record) if found is None else str(found)
        parsed = None if found is None else mathvista_normalise(found, record)
        return found, float(parsed is not None and parsed.strip() == str(value(record, "answer")).strip())

    scores = tally("accuracy", records, judge, lambda record: [record["question_type"], record["answer_type"]])
    undecided = sum(outcome.parsed is None for outcome in scores.outcomes)
    return Scores(scores.metrics | {"n_undecided": undecided}, scores.outcomes)
