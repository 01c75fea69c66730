"""Texts against references, and answers that a judge has graded.

Short texts: GQA, DocVQA, MathVista, and VizWiz, TextVQA, VQAv2 with ten human answers each. Source of their soft
accuracy: VQA (arXiv 1505.00468, section 5). Its normalisers follow the two official evaluators, "m4c" (EvalAI) and
GT-Vision-Lab "VQA v2", which differ.

Graded answers: MM-Vet (arXiv 2308.02490) and LLaVA-Bench-in-the-Wild (arXiv 2304.08485). Here verdicts are read and
aggregated; asking a judge is another module's work. Only the judges of the two protocols differ. Several evaluations
are scored one by one; see `over_runs`.
"""

from __future__ import annotations

import re
import statistics
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from ...runtime import UserError
from ..tasks import Outcome, Record, Scores, mean, per_record, predicted, sequence, value

ANLS_THRESHOLD = 0.5
LETTER = re.compile(r"\(?([A-Z])(?:[).:]+(?:\s.*)?)?", re.DOTALL)
MATH_FORMS = {  # what a text must hold exactly once to need no judge
    "integer": r"-?\d+(?:,\d{3})*(?:\.\d+)?",
    "float": r"-?\d+(?:,\d{3})*(?:\.\d+)?",
    "list": r"\[[^\[\]]*\]",
}
ANSWERS = 10
FAILED = (-1.0, -1.0)  # what LLaVA-Bench makes of a verdict without scores
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


def _plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def _gqa_groups(record: Record) -> list[str]:
    types = record.get("types")
    kind = types.get("structural") if isinstance(types, Mapping) else None
    return ["binary" if kind in ("verify", "logical") else "open"] if kind else []


@per_record("accuracy", _gqa_groups)
def gqa(record: Record, protocol: str) -> tuple[str, float]:
    """Accuracy of exact match, and of the binary and the open questions.

    ``llava`` drops final full stops and lower-cases the prediction; ``lmms_eval`` drops case and all ASCII punctuation
    on both sides. Keys: ``answer``; ``types`` with ``structural``, of which verify and logical are binary.
    """
    text, answer = predicted(record), str(value(record, "answer"))
    text, answer = (_plain(text), _plain(answer)) if protocol == "lmms_eval" else (text.rstrip(".").lower(), answer)
    return text, float(text == answer)


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


@per_record("anls")
def docvqa(record: Record, protocol: str) -> tuple[str, float]:
    """Mean ANLS; the protocols agree. Keys: ``answer`` (a text, or the list of accepted texts)."""
    answer = value(record, "answer")
    answers = [answer] if isinstance(answer, str) else sequence(record, "answer")
    return predicted(record), anls(predicted(record), [str(each) for each in answers if each is not None])


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
    with suppress(ValueError):
        if kind in ("integer", "float"):
            return str(int(text) if kind == "integer" else float(text))
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


@per_record("accuracy", lambda record: [record["question_type"], record["answer_type"]], unparsed="n_undecided")
def mathvista(record: Record, protocol: str) -> tuple[str | None, float]:
    """Accuracy, by question and answer type; the protocols agree.

    A response that needs a judge and has none counts as wrong; ``n_undecided`` says how many. Keys: ``answer``, those
    of `mathvista_extract` and `mathvista_normalise`, and ``extraction``, what a judge has found.
    """
    found = record.get("extraction")
    found = mathvista_extract(predicted(record).strip(), record) if found is None else str(found)
    parsed = None if found is None else mathvista_normalise(found, record)
    return found, float(parsed is not None and parsed.strip() == str(value(record, "answer")).strip())


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


def _vqa_v2(answers: Sequence[str]) -> Callable[[str], str]:
    """Human answers that all agree stay as they are, upper case included, and so does the prediction."""
    return normalise_vqa_v2 if len({_blanks(answer) for answer in answers}) > 1 else _blanks


def _kinds(record: Record) -> list[str]:
    return [str(record[kind]) for kind in ("answer_type", "question_type", "category") if record.get(kind)]


def _soft(record: Record, official: bool = False) -> tuple[str, float]:
    """What was said and its soft accuracy, normalised as by EvalAI or, ``official``, as by the script of VQA v2."""
    answers = [str(item["answer"] if isinstance(item, dict) else item) for item in sequence(record, "answer")]
    if len(answers) != ANSWERS:
        raise UserError(f"record {record['id']!r}: has {len(answers)} human answers; the metric needs {ANSWERS}")
    normalise = _vqa_v2(answers) if official else normalise_evalai
    prediction = normalise(predicted(record))
    return prediction, soft_accuracy(prediction, [normalise(answer) for answer in answers])


@per_record("accuracy", _kinds)
def vizwiz(record: Record, protocol: str) -> tuple[str, float]:
    """Soft accuracy after EvalAI normalisation, also for TextVQA; the protocols agree.

    Keys: ``answer`` (ten texts, or mappings with ``answer``); ``category``, ``answer_type``, ``question_type`` group.
    """
    return _soft(record)


@per_record("accuracy", _kinds)
def vqav2(record: Record, protocol: str) -> tuple[str, float]:
    """Soft accuracy of VQAv2: the official script under ``llava``, EvalAI normalisation under ``lmms_eval``.

    Keys: as for `vizwiz`.
    """
    return _soft(record, official=protocol == "llava")


# ---- what judges say ------------------------------------------------------------------------------------------------


def _verdict(record: Record) -> str:
    text = value(record, "verdict")
    if not isinstance(text, str):
        raise UserError(f"record {record['id']!r}: 'verdict' is {text!r}; it must be the text of one evaluation")
    return text


def mmvet_grade(verdict: str) -> float | None:
    """The grade in [0, 1] that a verdict starts with; None if there is none and the judge has to be asked again."""
    try:
        grade = float(verdict.split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def _capabilities(record: Record) -> list[str]:
    names = sorted(name.strip() for name in str(record.get("capability") or "").split(",") if name.strip())
    return [*names, f"={'+'.join(names)}"] if names else []


@per_record("score", _capabilities, unparsed="n_failed")
def mmvet(record: Record, protocol: str) -> tuple[float | None, float]:
    """Mean grade, by capability and by exact set of capabilities (``score/=ocr+rec``, names sorted).

    A verdict without a grade counts 0, as in the official script after its last attempt; ``n_failed`` counts these.
    Keys: ``verdict`` (the judge's text), ``capability`` (names with commas between them).
    """
    grade = mmvet_grade(_verdict(record))
    return grade, grade or 0.0


def llava_bench_pair(verdict: str) -> tuple[float, float]:
    """The scores of the reference and of the model, from the first line of a verdict; `FAILED` if they are not there.

    As in the official script a comma is a blank and the line must split into two at single blanks: "8, 9" fails.
    """
    parts = verdict.split("\n")[0].replace(",", " ").split(" ")
    try:
        return (float(parts[0]), float(parts[1])) if len(parts) == 2 else FAILED
    except ValueError:
        return FAILED


def _relative(pairs: Sequence[tuple[float, float]]) -> float:
    """The model's mean over the reference's, with the official roundings (3 places each, then 1 of the percentage)."""
    reference, model = (round(mean(pair[side] for pair in pairs), 3) for side in (0, 1))
    return round(model / reference * 100, 1) / 100 if reference else 0.0


def llava_bench(records: Sequence[Record], protocol: str = "llava") -> Scores:
    """Score relative to the reference answers, by category; it may exceed 1.

    The official scripts keep a failed verdict in both means as -1, which pulls the score towards 1: ``score_parsed`` is
    the score without them and ``n_failed`` their number; it is left out if all have failed.
    Keys: ``verdict`` (the judge's text), ``category`` (conv, detail, complex; also after ``llava_bench_``).
    """
    groups: dict[str, list[tuple[float, float]]] = {"": []}
    outcomes = []
    for record in records:
        pair = llava_bench_pair(_verdict(record))
        outcomes.append(Outcome(record["id"], pair, pair[1] / pair[0] if pair[0] > 0 else 0.0))
        category = str(record.get("category") or "").removeprefix("llava_bench_")
        for group in ("", f"/{category}") if category else ("",):
            groups.setdefault(group, []).append(pair)
    metrics = {f"score{group}": _relative(groups[group]) for group in sorted(groups)}
    metrics |= {f"n{group}": len(groups[group]) for group in sorted(groups)}
    parsed = [pair for pair in groups[""] if pair != FAILED]
    metrics |= {"score_parsed": _relative(parsed)} if parsed else {}
    return Scores(metrics | {"n_failed": len(records) - len(parsed)}, outcomes)


def over_runs(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of every metric that all runs have, and ``score_std`` or ``accuracy_std``, of the population of runs."""
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    main = "score" if "score" in shared else "accuracy"
    spread = statistics.pstdev(run[main] for run in runs)
    return {name: mean(run[name] for run in runs) for name in shared} | {f"{main}_std": spread}
