"""Open questions with ten human answers: VizWiz, TextVQA, VQAv2.

Source: VQA (arXiv 1505.00468, section 5) for the soft accuracy; the normalisers follow the two official evaluators,
"m4c" (EvalAI) and GT-Vision-Lab "VQA v2", which differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ...runtime.errors import UserError
from . import (
    Record,
    Scores,
    predicted,
    sequence,
    tally,
)

ANSWERS = 10
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COUNTING = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(COUNTING)}
ARTICLES = ("a", "an", "the")
# The official table of 120 contractions maps a word that lacks one of its apostrophes to the whole word, so the words
# say it all. Entries that never fire are left out: two map to themselves, four have a capital, lost by then. The choice
# of words is GT-Vision-Lab's: assets/licenses/GT-Vision-Lab-VQA.txt.
STEMS_BY_ENDING = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'d've": "he it she somebody someone something there they we who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "": "ma'am o'clock 'ow's'at 'twas y'all y'all'll y'all'd've",
}
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for ending, stems in STEMS_BY_ENDING.items()
    for word in (stem + ending for stem in stems.split())
    for place, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}  # the one that loses an apostrophe


def _drop_punctuation(text: str) -> str:
    """Delete or blank punctuation; whether a mark is deleted is decided on the text as it came."""
    comma_in_number = re.search(r"\d,\d", text) is not None
    result = text
    for mark in PUNCTUATION:
        deleted = comma_in_number or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if deleted else " ")
    # The official code hands a flag of value 32 to the argument that is the number of replacements.
    return re.sub(r"\.(?!\d)", "", result, count=32)


def _words(text: str) -> str:
    """Lower-case, write small numbers as digits, drop articles, repair contractions."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _blanks(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_evalai(text: str) -> str:
    """The m4c / EvalAI normaliser, used by TextVQA and VizWiz and for uploads of VQAv2."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_drop_punctuation(_blanks(text)))


def normalise_vqa_v2(text: str) -> str:
    """The normaliser of the VQA v2 script, which applies it only where the human answers disagree."""
    return _words(_drop_punctuation(_blanks(text)))


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, matches among the other nine / 3), for normalised texts and ten answers.

    It depends on the number of matches alone: 0, 0.3, 0.6, 0.9, and 1 from four on.
    """
    return min(ANSWERS, 3 * list(answers).count(prediction)) / ANSWERS


def _evalai(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    return normalise_evalai(prediction), [normalise_evalai(answer) for answer in answers]


def _vqa_v2(prediction: str, answers: list[str]) -> tuple[str, list[str]]:
    """Human answers that all agree stay as they are, upper case included, and so does the prediction."""
    normalise = normalise_vqa_v2 if len({_blanks(answer) for answer in answers}) > 1 else _blanks
    return normalise(prediction), [normalise(answer) for answer in answers]


def _groups(record: Record) -> list[str]:
    return [str(record[kind]) for kind in ("answer_type", "question_type", "category") if record.get(kind)]


def _score(records: Sequence[Record], prepare: Callable[[str, list[str]], tuple[str, list[str]]]) -> Scores:
    def judge(record: Record) -> tuple[str, float]:
        answers = [str(item["answer"] if isinstance(item, dict) else item) for item in sequence(record, "answer")]
        if len(answers) != ANSWERS:
            raise UserError(f"record {record['id']!r}: has {len(answers)} human answers; the metric needs {ANSWERS}")
        prediction, answers = prepare(predicted(record), answers)
        return prediction, soft_accuracy(prediction, answers)

    return tally("accuracy", records, judge, _groups)


def vizwiz(records: Sequence[Record], protocol: str = "llava") -> Scores:
    """Soft accuracy after EvalAI normalisation, also for TextVQA; the protocols agree.

    Keys: ``answer`` (ten texts, or mappings with ``answer``); ``category``, ``answer_type``, ``question_type`` group.
    """
    return _score(records, _evalai)


def vqav2(records: Sequence[Record], protocol: str = "llava") -> Scores:
    """Soft accuracy of VQAv2: the official script under ``llava``, EvalAI normalisation under ``lmms_eval``.

    Keys: as for `vizwiz`.
    """
    return _score(records, _vqa_v2 if protocol == "llava" else _evalai)
