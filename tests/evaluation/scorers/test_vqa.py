"""The official vectors, and one example for each rule that they rest on."""

import json
from pathlib import Path

import pytest

from efficientllava.evaluation.scorers.text import (
    CONTRACTIONS,
    normalise_evalai,
    normalise_vqa_v2,
    soft_accuracy,
    vizwiz,
    vqav2,
)
from efficientllava.runtime.errors import UserError

VECTORS = Path(__file__).parents[2] / "vectors"


def _vectors(name):
    return [json.loads(line) for line in (VECTORS / name).read_text(encoding="utf-8").splitlines()]


def _accuracy(scorer, prediction, answers, protocol="llava"):
    return scorer([{"id": "1", "prediction": prediction, "answer": answers}], protocol).metrics["accuracy"]


def test_both_normalisers_equal_the_official_ones_on_every_vector():
    vectors = _vectors("vqa_normalise.jsonl")
    assert len(vectors) == 750
    for vector in vectors:
        assert (normalise_evalai(vector["raw"]), normalise_vqa_v2(vector["raw"])) == (
            vector["evalai"],
            vector["vqa_v2"],
        )


def test_both_soft_accuracies_equal_the_official_ones_on_every_vector():
    vectors = _vectors("vqa_soft_accuracy.jsonl")
    assert len(vectors) == 1000
    for vector in vectors:
        expected = vector["m4c_textvqa"], vector["vqa_v2_official"]
        answered = vector["pred"], vector["answers"]
        assert (_accuracy(vizwiz, *answered), _accuracy(vqav2, *answered)) == expected, vector


@pytest.mark.parametrize(
    ("raw", "evalai", "vqa_v2"),
    [
        ("The Cat", "cat", "cat"),
        ("ten none eleven", "10 0 eleven", "10 0 eleven"),
        ("left/right", "left right", "left right"),  # no blank beside the mark: it becomes one
        ("left/ right/up", "left rightup", "left rightup"),  # a blank beside one: all of its kind are deleted
        ("1,000/2", "1000 2", "10002"),  # a comma between digits deletes all marks; EvalAI has no comma by then
        ("cat's", "cat 's", "cat's"),
        ("8?9", "89", "8 9"),
        ("3.5 p.m.", "3.5 pm", "3.5 pm"),
        ("." * 40, "." * 8, "." * 8),  # at most 32 full stops
        ("a: $5%", "a: $5%", "a: $5%"),
        ("dont", "don't", "don't"),
        ("Im", "im", "im"),
        ("somebody'd", "somebodyd", "somebodyd"),
    ],
)
def test_rules(raw, evalai, vqa_v2):
    assert (normalise_evalai(raw), normalise_vqa_v2(raw)) == (evalai, vqa_v2)


def test_contractions_are_words_with_one_apostrophe_missing():
    # 120 official entries, of which two map to themselves and four have a capital
    assert len(CONTRACTIONS) == 114
    for wrong, right in CONTRACTIONS.items():
        assert wrong.replace("'", "") == right.replace("'", "")
        assert right.count("'") - wrong.count("'") == (-1 if right == "somebodyd" else 1)
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'alld've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert not {"lets", "shes", "its", "ill", "ive", "im"} & set(CONTRACTIONS)


@pytest.mark.parametrize("matches", range(11))
def test_soft_accuracy_is_the_mean_over_the_annotators(matches):
    answers = ["a"] * matches + ["b"] * (10 - matches)
    others = [sum(answer == "a" for j, answer in enumerate(answers) if j != i) for i in range(10)]
    assert soft_accuracy("a", answers) == pytest.approx(sum(min(1, count / 3) for count in others) / 10, abs=1e-12)


def test_vqa_v2_leaves_unanimous_answers_alone_and_lmms_eval_does_not():
    assert _accuracy(vqav2, "Yes", ["yes"] * 10) == 0
    assert _accuracy(vqav2, "Yes", ["yes"] * 10, "lmms_eval") == 1
    assert _accuracy(vqav2, "Yes", ["yes"] * 9 + ["no"]) == 1
    blanks = [" yes"] * 5 + ["yes\t"] * 5  # outer blanks do not make them differ
    assert _accuracy(vqav2, "yes\n", blanks) == 1 and _accuracy(vqav2, "Yes", blanks) == 0


def test_answers_may_be_mappings_and_types_have_their_own_accuracy():
    answers = [{"answer": "two", "answer_id": i} for i in range(10)]
    records = [
        {"id": "1", "prediction": "2", "answer": answers, "answer_type": "number"},
        {"id": "2", "prediction": "3", "answer": answers, "answer_type": "other"},
    ]
    metrics = vizwiz(records).metrics
    assert metrics["accuracy"] == 0.5 and metrics["n"] == 2
    assert metrics["accuracy/number"] == 1 and metrics["accuracy/other"] == 0 and metrics["n/number"] == 1


@pytest.mark.parametrize("answers", [[], ["a"] * 9, ["a"] * 11])
def test_ten_answers_are_required(answers):
    with pytest.raises(UserError, match=f"record '1': has {len(answers)} human answers; the metric needs 10"):
        _accuracy(vizwiz, "a", answers)
