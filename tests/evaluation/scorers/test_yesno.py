"""Worked examples of POPE and MME."""

import pytest

from efficientllava.evaluation.scorers.choice import (
    mme,
    mme_answer,
    pope,
    pope_answer,
)


@pytest.mark.parametrize(
    ("text", "llava", "lmms_eval"),
    [
        ("Yes", "yes", "yes"),
        ("no", "no", "no"),
        ("No.", "no", "no."),
        ("No, there is none", "no", "no, there is none"),
        ("There is not", "no", "there is not"),
        ("NO", "yes", "no"),  # only No, not, no
        ("Nothing", "yes", "nothing"),
        ("Yes. There is no dog", "yes", "yes. there is no dog"),  # only the first sentence
        ("no\n", "yes", "no"),  # words end at blanks only
        ("", "yes", ""),
        ("a dog", "yes", "a dog"),
    ],
)
def test_pope_answers(text, llava, lmms_eval):
    assert (pope_answer(text, "llava"), pope_answer(text, "lmms_eval")) == (llava, lmms_eval)


def _pope(category, said, references):
    return [
        {"id": f"{category}{i}", "prediction": text, "answer": answer, "category": category}
        for i, (text, answer) in enumerate(zip(said, references, strict=True))
    ]


def test_pope_f1_is_the_mean_of_the_categories():
    records = [
        *_pope("random", ["Yes", "Yes", "No", "No"], ["yes", "yes", "no", "no"]),  # F1 1
        *_pope("popular", ["Yes", "No", "Yes", "No"], ["yes", "yes", "no", "no"]),  # P = R = 1/2
        *_pope("adversarial", ["Yes", "Yes", "Yes", "No"], ["yes", "no", "no", "no"]),  # P = 1/3, R = 1
    ]
    metrics = pope(records).metrics
    assert (metrics["f1/random"], metrics["f1/popular"], metrics["f1/adversarial"]) == (1, 0.5, 0.5)
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["accuracy"] == pytest.approx(8 / 12) and metrics["accuracy/random"] == 1
    assert metrics["yes_ratio"] == pytest.approx(7 / 12) and metrics["yes_ratio/adversarial"] == 0.75
    assert [metrics[f"n_{cell}/adversarial"] for cell in ("tp", "fp", "tn", "fn")] == [1, 2, 1, 0]
    pooled = pope(records, "lmms_eval").metrics["f1"]
    assert pooled == pytest.approx(2 * (4 / 7) * (4 / 5) / (4 / 7 + 4 / 5))


def test_pope_takes_anything_else_for_yes_and_lmms_eval_for_nothing():
    records = _pope("random", ["a dog", "a dog", "No"], ["yes", "no", "yes"])
    metrics = pope(records).metrics
    assert (metrics["precision"], metrics["recall"], metrics["yes_ratio"]) == (0.5, 0.5, pytest.approx(2 / 3))
    metrics = pope(records, "lmms_eval").metrics
    assert (metrics["accuracy"], metrics["recall"], metrics["yes_ratio"], metrics["f1"]) == (0, 0, 0, 0)


def test_published_pope_counts_give_the_published_f1():
    counts = {"random": (1182, 31, 1379, 318), "popular": (1182, 59, 1441, 318), "adversarial": (1182, 117, 1383, 318)}
    records = []
    for category, (tp, fp, tn, fn) in counts.items():
        said = ["Yes"] * (tp + fp) + ["No"] * (tn + fn)
        records += _pope(category, said, ["yes"] * tp + ["no"] * fp + ["no"] * tn + ["yes"] * fn)
    assert pope(records).metrics["f1"] == pytest.approx(0.8594688, abs=5e-8)


@pytest.mark.parametrize(
    ("text", "llava", "lmms_eval"),
    [
        ("Yes", "yes", "yes"),
        ("No.", "no", "no"),
        ("NO", "no", "no"),
        ("y", "other", "yes"),
        ("N.", "other", "no"),
        ("..no", "no", "no"),
        ("....no", "other", "no"),
        ("  no", "no", "no"),
        ("   no", "other", "no"),
        ("yes no", "yes", "yes"),
        ("It is not", "other", "other"),
        ("not at all", "no", "no"),
        ("", "other", "other"),
    ],
)
def test_mme_answers(text, llava, lmms_eval):
    assert (mme_answer(text, "llava"), mme_answer(text, "lmms_eval")) == (llava, lmms_eval)


def _pair(category, image, first, second):
    said = zip((first, second), ("Yes", "No"), strict=True)
    return [
        {"id": f"{category}/{image}", "prediction": text, "answer": answer, "category": category}
        for text, answer in said
    ]


def test_mme_adds_accuracy_and_the_share_of_images_with_both_right():
    records = [
        *_pair("count", "1.png", "Yes", "No"),
        *_pair("count", "2.png", "Yes", "Yes"),
        *_pair("OCR", "1.png", "Yes", "No"),
        *_pair("code_reasoning", "1.png", "other", "No"),
    ]
    metrics = mme(records).metrics
    assert metrics["score/count"] == 75 + 50 and metrics["accuracy/count"] == 0.75 and metrics["n/count"] == 4
    assert metrics["score/OCR"] == 200 and metrics["perception"] == 325
    assert metrics["score/code_reasoning"] == metrics["cognition"] == 50
    assert metrics["n_unpaired"] == 0
    without_category = [{key: item for key, item in record.items() if key != "category"} for record in records]
    assert mme(without_category).metrics == metrics


def test_mme_pairs_by_image_and_category_and_reports_halves():
    pair = _pair("count", "1.png", "Yes", "No")
    apart = [{**record, "id": f"q{i}", "image": "1.png"} for i, record in enumerate(pair)]
    other = [{**record, "category": "color"} for record in apart]
    metrics = mme([apart[0], other[1], other[0], apart[1]]).metrics
    assert metrics["perception"] == 400 and metrics["n_unpaired"] == 0
    metrics = mme(pair[:1]).metrics
    assert metrics["score/count"] == 100 and metrics["n_unpaired"] == 1
