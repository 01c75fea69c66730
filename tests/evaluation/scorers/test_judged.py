"""Reading verdicts, and the aggregation of MM-Vet and LLaVA-Bench."""

import pytest

from efficientllava.evaluation.scorers.judged import (
    FAILED,
    llava_bench,
    llava_bench_pair,
    mmvet,
    mmvet_grade,
    over_runs,
)
from efficientllava.runtime.errors import UserError


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
