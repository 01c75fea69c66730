"""What holds for every scorer under both protocols."""

import random

import pytest

from efficientllava.evaluation import tasks
from efficientllava.evaluation.score import EXTRA, scorer
from efficientllava.evaluation.tasks import PROTOCOLS, mean, means
from efficientllava.runtime.errors import UserError

MATH = {"question_type": "multi_choice", "answer_type": "text", "choices": ["red", "blue"]}
# Per task: records with a perfect prediction, and the metric that such predictions bring to its maximum.
PERFECT = {
    "ai2d": ([{"prediction": "ABCD"[i % 4], "answer": str(i % 4)} for i in range(8)], "accuracy", 1),
    "docvqa": ([{"prediction": f"page {i}", "answer": ["x", f"Page  {i}"]} for i in range(8)], "anls", 1),
    "gqa": (
        [{"prediction": "Dog.", "answer": "dog", "types": {"structural": "query"}} for _ in range(8)],
        "accuracy",
        1,
    ),
    "llava_bench": ([{"verdict": f"{i} {i}", "category": "conv"} for i in range(1, 9)], "score", 1),
    "mathvista": (
        [{"prediction": "(B)", "answer": "blue", **MATH}] * 4
        + [
            {"prediction": f"{i}", "answer": f"{i}", **MATH, "question_type": "free_form", "answer_type": "integer"}
            for i in range(4)
        ],
        "accuracy",
        1,
    ),
    "mme": (
        [
            {"prediction": said, "answer": said, "category": "OCR", "image": f"{i}"}
            for i in range(4)
            for said in ("Yes", "No")
        ],
        "perception",
        200,
    ),
    "mmmu": (
        [{"prediction": "(C)", "answer": "C", "options": "['1', '2', '3']"} for _ in range(4)]
        + [{"prediction": f"{i}.50", "answer": f"{i}.5", "question_type": "open"} for i in range(4)],
        "accuracy_strict",
        1,
    ),
    "mmvet": ([{"verdict": "1.0", "capability": "ocr"} for _ in range(8)], "score", 1),
    "pope": (
        [
            {"prediction": said, "answer": said.lower(), "category": kind}
            for kind in ("random", "popular", "adversarial")
            for said in ("Yes", "No")
        ],
        "f1",
        1,
    ),
    "scienceqa": ([{"prediction": "ABCD"[i % 4], "answer": i % 4, "image": i % 2} for i in range(8)], "accuracy", 1),
    "textvqa": ([{"prediction": "Two", "answer": ["2"] * 5 + ["two"] * 5} for _ in range(8)], "accuracy", 1),
    "vizwiz": ([{"prediction": "the cat", "answer": ["cat"] * 4 + [f"dog {i}" for i in range(6)]}], "accuracy", 1),
    "vqav2": (
        [{"prediction": "yes", "answer": ["yes"] * 10, "answer_type": "yes/no"} for _ in range(8)],
        "accuracy",
        1,
    ),
}
PERFECT["scienceqa_img"] = PERFECT["scienceqa"]
PERFECT["digits_vqa"] = [{"prediction": "7", "answer": "7", "kind": "count"}] * 8, "accuracy", 1
WRITTEN = [name for name in tasks.available() if name != "prose"]  # in which nothing is answered
SCORERS = {name: scorer(name) for name in (*WRITTEN, *EXTRA)}
TASKS = pytest.mark.parametrize("task", SCORERS)
BOTH = pytest.mark.parametrize("protocol", PROTOCOLS)


def _records(task):
    # Distinct rows, so that an order can matter
    return [{"id": f"validation_Art_{i}", **record} for i, record in enumerate(PERFECT[task][0])]


def test_every_benchmark_is_here():
    assert set(PERFECT) == set(SCORERS) and len(SCORERS) == 15


@TASKS
@BOTH
def test_a_perfect_prediction_scores_100_percent(task, protocol):
    scores = SCORERS[task](_records(task), protocol)
    assert scores.metrics[PERFECT[task][1]] == PERFECT[task][2]
    assert {outcome.score for outcome in scores.outcomes} == {1}


@TASKS
@BOTH
def test_the_order_of_the_records_does_not_matter(task, protocol):
    draw = random.Random(0)
    records = _records(task)
    texts = [record.get("prediction", record.get("verdict")) for record in records]
    draw.shuffle(texts)
    replaced = "verdict" if "verdict" in records[0] else "prediction"
    spoilt = ["9 3" if task == "llava_bench" else "0.1" if task == "mmvet" else "perhaps"]
    records = [{**record, replaced: text} for record, text in zip(records, texts, strict=True)]
    records += [{**records[0], "id": "validation_Art_100", replaced: spoilt[0]}]
    scores = SCORERS[task](records, protocol)
    by_id = {outcome.id: outcome for outcome in scores.outcomes}
    for _ in range(5):
        shuffled = draw.sample(records, len(records))
        again = SCORERS[task](shuffled, protocol)
        assert again.metrics == scores.metrics
        assert again.outcomes == [by_id[record["id"]] for record in shuffled]


@TASKS
@BOTH
@pytest.mark.parametrize("empty", ["", " ", None, "\n", "."])
def test_an_empty_prediction_never_raises(task, protocol, empty):
    records = [{**record, "prediction": empty} for record in _records(task)]
    records = [{**record, "verdict": empty or ""} if "verdict" in record else record for record in records]
    scores = SCORERS[task](records, protocol)
    assert len(scores.outcomes) == len(records) == scores.metrics["n"]
    assert all(0 <= outcome.score <= 1 for outcome in scores.outcomes)


def test_means_are_exact_in_any_order():
    values = [1e16, 1.0, -1e16, 0.3, 0.3, 0.3]
    assert {mean(random.Random(seed).sample(values, 6)) for seed in range(20)} == {1.9 / 6}


def test_means_by_group():
    metrics = means("accuracy", [1, 0, 1], [["a"], ["a", "b"], []])
    assert metrics == {"accuracy": 2 / 3, "n": 3, "accuracy/a": 0.5, "n/a": 2, "accuracy/b": 0, "n/b": 1}


@TASKS
@BOTH
def test_no_records_is_a_clear_error(task, protocol):
    with pytest.raises(UserError, match="nothing to score"):
        SCORERS[task]([], protocol)


@TASKS
@BOTH
def test_a_missing_reference_is_a_clear_error(task, protocol):
    wanted = "verdict" if task in ("mmvet", "llava_bench") else "answer"
    records = [{key: item for key, item in record.items() if key != wanted} for record in _records(task)]
    with pytest.raises(UserError, match=f"record 'validation_Art_0': has no '{wanted}'"):
        SCORERS[task](records, protocol)
