"""Worked examples of the rules for lettered choices."""

import random

import pytest

from efficientllava.evaluation.scorers.choice import (
    ai2d,
    mmmu,
    mmmu_letter,
    mmmu_open,
    mmmu_open_right,
    scienceqa,
    scienceqa_letter,
)
from efficientllava.runtime.errors import UserError

OPTIONS = ["red cat", "cat", "blue dog", "fish"]


@pytest.mark.parametrize(
    ("text", "llava", "lmms_eval"),
    [
        ("B", "B", "B"),
        ("b", None, "B"),
        ("F", None, "F"),
        ("B. a cat", "B", "B"),
        ("B.", None, "B"),
        ("B.cat", None, "B"),
        ("B) cat", None, None),
        ("a. cat", None, None),
        ("It is so. The answer is C.", "C", None),
        ("The answer is C", None, None),  # nothing stands where the official pattern wants a character
        ("The answer is C, I think", "C", None),  # ... and any will do
        ("The answer is c.", None, None),
        ("The answer is A. The answer is A.", None, None),
        ("The answer is Z.", "Z", None),
        ("", None, None),
    ],
)
def test_scienceqa_letters(text, llava, lmms_eval):
    assert (scienceqa_letter(text, "llava"), scienceqa_letter(text, "lmms_eval")) == (llava, lmms_eval)


def test_scienceqa_groups():
    def record(answer, **meta):
        return {"id": "1", "prediction": "B", "answer": answer} | meta

    records = [
        record(1, image="a.png", hint="", subject="natural science", grade="grade6"),
        record("B", image=None, hint="a hint", subject="social science", grade="grade7"),
        record(0, image=None, hint="", subject="language science", grade="grade12"),
        record(3, prompt="<image>\nWhat?", choices=["x", "y"]),
    ]
    metrics = scienceqa(records).metrics
    assert metrics["accuracy"] == 0.5 and metrics["n"] == 4
    assert metrics["accuracy/IMG"] == 0.5 and metrics["n/IMG"] == 2
    right = {name.split("/")[1]: share for name, share in metrics.items() if name.startswith("accuracy/")}
    assert right == {"IMG": 0.5, "NAT": 1, "G1-6": 1, "TXT": 1, "SOC": 1, "G7-12": 0.5, "NO": 0, "LAN": 0}


def test_a_letter_beyond_the_choices_is_wrong():
    records = [{"id": "1", "prediction": "E", "answer": 1, "choices": ["x", "y"]}]
    assert scienceqa(records).metrics["accuracy"] == 0


@pytest.mark.parametrize(
    ("text", "llava", "lmms_eval"),
    [("C", 1, 1), ("C. a leaf", 1, 1), (" C.", 1, 1), ("c", 0, 1), ("(C)", 0, 1), ("c)", 0, 1), ("C a leaf", 0, 0)],
)
def test_ai2d(text, llava, lmms_eval):
    for answer in ("2", 2, "C"):
        records = [{"id": "1", "prediction": text, "answer": answer}]
        assert ai2d(records, "llava").metrics["accuracy"] == llava
        assert ai2d(records, "lmms_eval").metrics["accuracy"] == lmms_eval


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("'(B)'", "B"),
        ("(A) or (B)", "B"),
        ("(B), not A", "B"),  # brackets come first
        ("A is wrong, so I say B", "B"),
        ("A, then", None),  # the comma is not a blank
        ("B. cat", None),  # nor is the full stop inside; lmms-eval's parser would take it
        ("CAB driver", None),
        ("E", None),  # beyond the choices
        ("blue dog", None),  # option texts only in more than five words
        ("I can see a blue dog there", "C"),
        ("first a blue dog and then a fish", "D"),
        ("what I see is a red cat", "B"),  # the last occurrence: "cat" starts after "red cat"
        ("", None),
    ],
)
def test_mmmu_letters(text, letter):
    assert mmmu_letter(text, OPTIONS) == letter


def test_the_first_of_two_choices_at_the_same_place_wins():
    assert mmmu_letter("the sum of all of these is 50", ["50", "5", "7"]) == "A"
    assert mmmu_letter("the sum of all of these is 50", ["5", "50", "7"]) == "A"


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("12", "12.0", True),
        ("The answer is 1,200.", "1200", True),
        ("It is 3.14159", "3.14", True),  # two places
        ("so it is -2", "2", False),
        ("1.5e3", "1500", True),
        ("x = 7", "7", True),
        ("x = 7\nthat was 12", "7", True),  # no key phrase in the last line: the whole text stands, with its numbers
        ("so 5\nx = 7", "7", True),
        ("x = 7\nso 5", "7", False),  # "=" counts in the last line only
        ("answer \nblue", "blue", True),
        ("The answer is blue whale.", "whale", True),
        ("is ?", "is ?", True),  # a lone mark is no key phrase: the text stands for itself
        ("a", "a", True),
        ("cat", "a", False),
        ("", "12", False),
    ],
)
def test_mmmu_open(text, answer, right):
    assert mmmu_open_right(mmmu_open(text), [answer]) is right


def _mmmu(count, text="?", **meta):
    options = "['w', 'x', 'y', 'z']"
    return [
        {"id": f"validation_Art_{i}", "prediction": text, "answer": "A", "options": options} | meta
        for i in range(1, count + 1)
    ]


def test_mmmu_guesses_with_the_official_seed_in_the_order_of_the_data_set():
    draw = random.Random(42)
    expected = [float(draw.choice(["A", "B", "C", "D"]) == "A") for _ in range(30)]
    records = _mmmu(30)
    scores = mmmu(records)
    assert [outcome.score for outcome in scores.outcomes] == expected and 0 < sum(expected) < 30
    backwards = mmmu(records[::-1])
    assert [outcome.score for outcome in backwards.outcomes] == expected[::-1]
    assert scores.metrics == backwards.metrics
    assert scores.metrics["accuracy"] == sum(expected) / 30 and scores.metrics["accuracy_strict"] == 0


def test_mmmu_by_subject_and_domain():
    records = [
        *_mmmu(2, "A"),
        *_mmmu(1, "(B)", id="validation_Basic_Medical_Science_3"),
        *_mmmu(1, "it is 24/7", id="validation_Math_9", question_type="open", answer="['24/7', '3.429']"),
    ]
    metrics = mmmu(records).metrics
    assert metrics["accuracy"] == metrics["accuracy_strict"] == 0.75
    assert metrics["accuracy/Art"] == metrics["accuracy/Art_and_Design"] == metrics["accuracy/Math"] == 1
    assert metrics["accuracy/Basic_Medical_Science"] == metrics["accuracy/Health_and_Medicine"] == 0
    assert metrics["n/Art_and_Design"] == 2


def test_mmmu_options_must_be_a_list():
    with pytest.raises(UserError, match="'options' is 'w, x'; it must be a list"):
        mmmu(_mmmu(1, options="w, x"))
