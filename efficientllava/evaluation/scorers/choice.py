"""Questions with given answers: the letters of ScienceQA, AI2D and MMMU, yes or no of POPE and MME."""

from __future__ import annotations

import random
import re
import string
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from ...runtime import UserError
from ..tasks import Outcome, Record, Scores, mean, means, per_record, predicted, sequence, value

LETTERS = string.ascii_uppercase
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
SEED = 42  # of MMMU's guesses
DOMAINS = {
    "Art_and_Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health_and_Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities_and_Social_Science": "History Literature Psychology Sociology",
    "Tech_and_Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
DOMAIN_OF = {subject: domain for domain, subjects in DOMAINS.items() for subject in subjects.split()}
KEY_PHRASES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
NUMBER_FORMS = (  # in text of lower case: with thousands separators, with exponent, plain
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?e[+-]?\d+",
    r"-?(?:\d*\.\d+|\d+\b)(?!e[+-]?\d|[,\d])",
)
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def reference_letter(record: Record) -> str:
    """The letter of the right choice; data sets give a letter or an index from 0, as number or text."""
    answer = str(value(record, "answer")).strip()
    letter = LETTERS[int(answer) : int(answer) + 1] if answer.isdecimal() else answer
    if len(letter) != 1 or letter not in LETTERS:
        raise UserError(f"record {record['id']!r}: 'answer' is {answer!r}; it must be a capital letter or an index")
    return letter


def scienceqa_letter(text: str, protocol: str) -> str | None:
    """The letter a ScienceQA answer names, None where it names none.

    ``llava``: a lone A to E, or one of these with ". " after it at the start, or the only sentence "The answer is X."
    (for whose full stop the official pattern takes any character). ``lmms_eval``: a lone letter of any case, or a
    capital and "." at the start.
    """
    if protocol == "lmms_eval":
        text = text.strip()
        if len(text) == 1:
            return text.upper()
        return text[0] if text[:1].isupper() and text[1:2] == "." else None
    named = re.findall(r"\A([A-E])(?:\Z|\. )", text) or re.findall(r"The answer is ([A-Z]).", text)
    return named[0] if len(named) == 1 else None


def _scienceqa_groups(record: Record) -> list[str]:
    image = any(record.get(key) for key in ("image", "has_image")) or "<image>" in str(record.get("prompt", ""))
    names = ["IMG"] if image else []
    if "hint" in record:
        names += ["TXT"] if record["hint"] else [] if image else ["NO"]
    names += [SUBJECTS[record["subject"]]] if record.get("subject") in SUBJECTS else []
    grade = re.search(r"\d+", str(record.get("grade", "")))
    return names + (["G1-6" if int(grade.group()) <= 6 else "G7-12"] if grade else [])


@per_record("accuracy", _scienceqa_groups)
def scienceqa(record: Record, protocol: str) -> tuple[str | None, float]:
    """Accuracy; ``accuracy/IMG`` is the papers' "SQA-I". For the protocols see `scienceqa_letter`.

    Keys: ``answer`` (index or letter); ``image`` or ``has_image`` (or ``<image>`` in ``prompt``), ``hint``,
    ``subject`` and ``grade`` make the groups IMG, TXT, NO, NAT, SOC, LAN, G1-6, G7-12. A letter beyond the choices is
    no answer, so it is wrong.
    """
    letter = scienceqa_letter(predicted(record), protocol)
    return letter, float(letter == reference_letter(record))


@per_record("accuracy")
def ai2d(record: Record, protocol: str) -> tuple[str, float]:
    """Accuracy of a leading letter with full stop, else of the whole text; ``lmms_eval`` ignores case and punctuation.

    Keys: ``answer`` (index or letter).
    """
    start = re.match(r"\s*([A-Z])\.", predicted(record))
    text = start.group(1) if start else predicted(record)
    if protocol == "lmms_eval":
        text = text.translate(str.maketrans("", "", string.punctuation)).upper()
    return text, float(text == reference_letter(record))


def mmmu_letter(text: str, options: Sequence[str]) -> str | None:
    """The letter an MMMU answer names: its last "(X)", else last " X ", else (over five words) last option text.

    None where no rule applies; the first choice wins among equal positions.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "

    def last(places: dict[str, int]) -> str | None:
        found = {letter: place for letter, place in places.items() if place >= 0}
        return max(found, key=found.__getitem__) if found else None

    letters = LETTERS[: len(options)]
    letter = last({x: text.rfind(f"({x})") for x in letters}) or last({x: text.rfind(f" {x} ") for x in letters})
    if letter is None and len(text.split()) > 5:
        letter = last({x: text.lower().rfind(o.lower()) for x, o in zip(letters, options, strict=False)})
    return letter


def _comparable(text: str) -> list[str | float]:
    """A number rounded to two places; else the text in lower case, a single character with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _key_phrase(line: str, phrases: Sequence[str]) -> str:
    """What follows the last occurrence of an indicator phrase: the shortest such tail, "" if there is none."""
    shortest = ""
    for phrase in phrases:
        tail = line.split(phrase)[-1].strip()
        if phrase in line and (not shortest or len(tail) < len(shortest)):
            shortest = tail
    return shortest


def mmmu_open(text: str) -> list[str | float]:
    """All that an open MMMU answer may mean: the tails of its key phrases, line by line, and the numbers in them.

    Only the last line may have its tail after "="; a text without a key phrase stands for itself.
    """
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    known = [KEY_PHRASES] * (len(lines) - 1) + [(*KEY_PHRASES, "=")]
    tails = [_key_phrase(line, phrases) for line, phrases in zip(lines, known, strict=True)]
    tails = [tail for tail in tails if tail and tail not in tuple(":,.!?;'")] or [text]
    numbers = [number for tail in tails for form in NUMBER_FORMS for number in re.findall(form, tail)]
    return [meaning for part in tails + numbers for meaning in _comparable(part)]


def mmmu_open_right(meanings: Sequence[str | float], answers: Sequence[str]) -> bool:
    """Whether a reference occurs inside one of the meanings (texts) or equals one (numbers)."""
    references = [reference for answer in answers for reference in _comparable(answer)]
    texts = [reference for reference in references if isinstance(reference, str)]
    return any(
        any(text in meaning for text in texts) if isinstance(meaning, str) else meaning in references
        for meaning in meanings
    )


def _natural(text: str) -> list[Any]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def _mmmu_groups(record: Record) -> list[str]:
    match = re.fullmatch(r"[^_]+_(.+)_\d+", str(record["id"]))
    subject = record.get("subject") or (match.group(1) if match else None)
    return [subject, DOMAIN_OF[subject]] if subject in DOMAIN_OF else []


def mmmu(records: Sequence[Record], protocol: str = "llava") -> Scores:
    """Accuracy of MMMU, by subject and domain, in two variants.

    ``accuracy`` is the official one: a multiple-choice answer that names no choice is replaced by a random one
    (seed 42, drawn in the natural order of the ids, which is the data set's). ``accuracy_strict`` counts it as wrong.
    Both protocols use the official parser: lmms-eval's finds letters inside words.

    Keys: ``answer`` (a letter; for open questions a text or a list), ``question_type`` (multiple-choice if not
    given, or open), ``options`` (texts); the subject is ``subject`` or stands in the id (``validation_Art_1``).
    """
    draw = random.Random(SEED)
    outcomes: dict[int, Outcome] = {}
    strict: dict[int, float] = {}
    for index in sorted(range(len(records)), key=lambda i: _natural(str(records[i]["id"]))):
        record = records[index]
        text = predicted(record)
        if record.get("question_type", "multiple-choice") == "multiple-choice":
            options = [str(option) for option in sequence(record, "options")]
            parsed = mmmu_letter(text, options)
            guess = draw.choice(LETTERS[: len(options)]) if parsed is None and options else parsed
            score, strict[index] = (float(letter == reference_letter(record)) for letter in (guess, parsed))
        else:
            parsed = mmmu_open(text)
            answer = str(value(record, "answer"))
            answers = sequence(record, "answer") if answer.startswith("[") else [answer]
            score = strict[index] = float(mmmu_open_right(parsed, [str(item) for item in answers]))
        outcomes[index] = Outcome(record["id"], parsed, score)
    groups = [_mmmu_groups(record) for record in records]
    ordered = [outcomes[index] for index in range(len(records))]
    metrics = means("accuracy_strict", [strict[index] for index in range(len(records))], groups)
    return Scores(metrics | means("accuracy", [outcome.score for outcome in ordered], groups), ordered)


def _yes_or_no(record: Record) -> str:
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
        said, reference = pope_answer(predicted(record), protocol), _yes_or_no(record)
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
        outcomes.append(Outcome(record["id"], said, float(said == _yes_or_no(record))))
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
