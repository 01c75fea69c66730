"""Worked examples of GQA, DocVQA, MathVista and the judged benchmarks."""

import random

import pytest

from efficientllava.evaluation.scorers.text import (
    FAILED,
    anls,
    docvqa,
    edit_distance,
    gqa,
    llava_bench,
    llava_bench_pair,
    mathvista,
    mathvista_extract,
    mathvista_normalise,
    mmvet,
    mmvet_grade,
    over_runs,
)
from efficientllava.runtime.errors import UserError


@pytest.mark.parametrize(
    ("text", "answer", "llava", "lmms_eval"),
    [
        ("Yes.", "yes", 1, 1),
        ("yes...", "yes", 1, 1),
        ("Yes!", "yes", 0, 1),
        ("t-shirt", "t shirt", 0, 0),
        ("tshirt", "t-shirt", 0, 1),
        ("yes", "Yes", 0, 1),  # llava lower-cases the prediction only
        ("the dog", "dog", 0, 0),
    ],
)
def test_gqa(text, answer, llava, lmms_eval):
    records = [{"id": "1", "prediction": text, "answer": answer}]
    assert gqa(records).metrics["accuracy"] == llava
    assert gqa(records, "lmms_eval").metrics["accuracy"] == lmms_eval


def test_gqa_binary_questions_are_verify_and_logical():
    kinds = {"verify": "yes", "logical": "no", "query": "dog", "choose": "dog"}
    records = [
        {"id": kind, "prediction": "yes", "answer": answer, "types": {"structural": kind}}
        for kind, answer in kinds.items()
    ]
    metrics = gqa(records).metrics
    assert metrics["accuracy"] == 0.25
    assert (metrics["accuracy/binary"], metrics["accuracy/open"], metrics["n/open"]) == (0.5, 0, 2)


def test_edit_distance():
    examples = [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2)]
    for a, b, distance in examples:
        assert edit_distance(a, b) == edit_distance(b, a) == distance
    draw = random.Random(0)
    for _ in range(100):
        a, b, c = ("".join(draw.choices("ab", k=draw.randint(0, 6))) for _ in range(3))
        assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
        assert (edit_distance(a, b) == 0) is (a == b)


@pytest.mark.parametrize(
    ("text", "answers", "score"),
    [
        ("Hello", ["hello"], 1),
        ("a  b", ["A B"], 1),
        ("abcd", ["abcx"], 0.75),
        ("abcd", ["abxx"], 0.5),
        ("abcd", ["axxx"], 0),  # 0.25 is below one half
        ("abcd", ["axxx", "abcd"], 1),  # the nearest reference
        ("ab   ", ["ax"], 0.8),  # the raw length divides
        ("", ["abcd"], 0),
        ("", [""], 1),
    ],
)
def test_anls(text, answers, score):
    assert anls(text, answers) == pytest.approx(score)


def test_docvqa_takes_one_answer_or_a_list():
    records = [
        {"id": "1", "prediction": "abcd", "answer": ["abcx", "zz"]},
        {"id": "2", "prediction": "abcd", "answer": "abcd"},
    ]
    assert docvqa(records).metrics == {"anls": 0.875, "n": 2}


def _math(answer_type, answer="", choices=None, **more):
    question_type = "multi_choice" if choices else "free_form"
    meta = {"question_type": question_type, "answer_type": answer_type, "choices": choices}
    return {"id": "1", "answer": answer, **meta, **more}


@pytest.mark.parametrize(
    ("kind", "text", "extraction"),
    [
        ("integer", "", ""),
        ("integer", "14", "14"),
        ("integer", " 014 ", "14"),
        ("integer", 'The answer is "14".', "14"),
        ("integer", "The number missing is 14.", "14"),
        ("integer", "It costs 1,450 dollars", "1450"),
        ("integer", "2 + 3 = 5", None),
        ("integer", "fourteen", None),
        ("float", "1.50", "1.5"),
        ("float", "It is 0.6, six of ten", "0.6"),
        ("float", "between 1.2 and 1.3", None),
        ("list", "The years are [2007, 2008].", "[2007, 2008]"),
        ("list", "2007 and 2008", None),
    ],
)
def test_mathvista_extraction_of_numbers(kind, text, extraction):
    assert mathvista_extract(text, _math(kind)) == extraction


@pytest.mark.parametrize(
    ("text", "extraction"),
    [
        ("6/11", "6/11"),  # a choice verbatim
        ("B", "B"),
        ("(B)", "B"),
        ("B. 8/11", "B"),
        ("(B) 8/11", "B"),
        ('The answer is "6/11".', "6/11"),
        ("E", None),
        ("A dog", None),
        ("It must be the second", None),
    ],
)
def test_mathvista_extraction_of_choices(text, extraction):
    assert mathvista_extract(text, _math("text", choices=["3/11", "8/11", "6/11"])) == extraction


@pytest.mark.parametrize(
    ("extraction", "choice"),
    [
        ("B", "green"),
        ("(b) green", "green"),
        ("I say (A) or (B)", "yellow"),  # the first letter in brackets
        ("gren", "green"),  # the nearest text
        ("D", "red"),  # no such letter: the nearest text, here the shortest
        ("", "red"),
    ],
)
def test_mathvista_chooses_by_letter_else_by_edit_distance(extraction, choice):
    assert mathvista_normalise(extraction, _math("text", choices=["yellow", "green", "red"])) == choice


@pytest.mark.parametrize(
    ("kind", "precision", "extraction", "normal"),
    [
        ("integer", None, "14.9", "14"),
        ("integer", None, "1,450", None),
        ("integer", None, "inf", None),
        ("integer", None, "", None),
        ("float", 1.0, "1.25", "1.2"),
        ("float", 2, "1.2", "1.2"),
        ("float", 2, "x", None),
        ("list", None, "[1, 2]", "[1, 2]"),
    ],
)
def test_mathvista_normalises_numbers(kind, precision, extraction, normal):
    assert mathvista_normalise(extraction, _math(kind, precision=precision)) == normal


def test_mathvista_counts_what_a_judge_would_have_to_read():
    records = [
        _math("integer", "5", prediction="2 + 3 = 5"),
        _math("integer", "5", prediction="2 + 3 = 5", extraction="5"),
        _math("text", "red", ["blue", "red"], prediction="(B)"),
        _math("float", "1.5", prediction="", precision=1.0),
    ]
    metrics = mathvista(records).metrics
    assert metrics["accuracy"] == 0.5 and metrics["n_undecided"] == 1
    assert metrics["accuracy/multi_choice"] == 1 and metrics["accuracy/integer"] == 0.5


# ---- what judges say ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdict", "grade"),
    [
        ("0.5", 0.5),
        ("1.0 because", 1),
        ("0", 0),
        ("0.5\n", 0.5),
        ("1.1", None),
        ("-0.1", None),
        ("nan", None),
        ("", None),
        ("good", None),
        ("0.5.", None),
    ],
)
def test_mmvet_grades(verdict, grade):
    assert mmvet_grade(verdict) == grade


def test_mmvet_by_capability_and_by_exact_set():
    rows = [("1.0", "rec"), ("0.5", "ocr,rec"), ("0.1", "rec,ocr"), ("nothing", "math")]
    records = [{"id": str(i), "verdict": verdict, "capability": names} for i, (verdict, names) in enumerate(rows)]
    scores = mmvet(records)
    assert scores.metrics["score"] == pytest.approx(1.6 / 4) and scores.metrics["n_failed"] == 1
    assert scores.metrics["score/rec"] == pytest.approx(1.6 / 3) and scores.metrics["score/=rec"] == 1
    assert scores.metrics["score/ocr"] == scores.metrics["score/=ocr+rec"] == pytest.approx(0.3)
    assert scores.metrics["n/=ocr+rec"] == 2 and scores.metrics["score/math"] == 0
    assert [outcome.parsed for outcome in scores.outcomes] == [1, 0.5, 0.1, None]


@pytest.mark.parametrize(
    ("verdict", "pair"),
    [
        ("8 9", (8, 9)),
        ("8.5 9\nAssistant 2 is better", (8.5, 9)),
        ("8,9", (8, 9)),
        ("8, 9", FAILED),  # the comma and the blank are two blanks
        ("8 9 ", FAILED),
        ("8 9 10", FAILED),
        ("8", FAILED),
        ("\n8 9", FAILED),
        ("eight nine", FAILED),
        ("", FAILED),
    ],
)
def test_llava_bench_pairs(verdict, pair):
    assert llava_bench_pair(verdict) == pair


def _reviews(*rows):
    return [{"id": str(i), "verdict": verdict, "category": category} for i, (verdict, category) in enumerate(rows)]


def test_llava_bench_is_a_ratio_of_rounded_means():
    metrics = llava_bench(_reviews(("8 7", "conv"), ("9 6", "llava_bench_conv"), ("8 6", "detail"))).metrics
    # 19/3 and 25/3 become 6.333 and 8.333
    assert metrics["score"] == metrics["score_parsed"] == round(6.333 / 8.333 * 100, 1) / 100 == 0.76
    assert metrics["score/conv"] == 0.765 and metrics["score/detail"] == 0.75 and metrics["n/conv"] == 2


def test_llava_bench_keeps_failures_as_the_official_script_does_and_shows_them():
    metrics = llava_bench(_reviews(("8 4", "conv"), ("sorry", "conv"))).metrics
    assert metrics["score"] == round(1.5 / 3.5 * 100, 1) / 100
    assert (metrics["score_parsed"], metrics["n_failed"]) == (0.5, 1)
    failed = llava_bench(_reviews(("sorry", "conv"))).metrics
    assert failed["n_failed"] == 1 and "score_parsed" not in failed


@pytest.mark.parametrize("scorer", [mmvet, llava_bench])
def test_verdicts_are_required_and_are_texts(scorer):
    with pytest.raises(UserError, match="record '1': has no 'verdict'"):
        scorer([{"id": "1", "prediction": "x"}])
    with pytest.raises(UserError, match=r"'verdict' is .* it must be the text of one evaluation"):
        scorer([{"id": "1", "verdict": ["8 9", "9 8"]}])


def test_several_evaluations():
    runs = [{"score": 0.2, "score_parsed": 0.2, "n": 2}, {"score": 0.4, "n": 2}]
    assert over_runs(runs) == pytest.approx({"score": 0.3, "n": 2, "score_std": 0.1})
