import random
import subprocess
import sys

import pytest

from efficientllava.data.embedded.digits import IMAGE_KINDS, TEXT_KINDS
from efficientllava.data.records import Record, Turn
from efficientllava.evaluation import tasks
from efficientllava.evaluation.tasks.digits_vqa import digits_vqa, single_questions
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import DataConfig, EvaluateConfig

from ..runs import composed


def _predictions(records, wrong=lambda record: False):
    return [
        {
            "id": record.id,
            "question": record.turns[0].question,
            "kind": record.turns[0].kind,
            "answer": record.turns[0].answer,
            "prediction": "" if wrong(record) else record.turns[0].answer,
        }
        for record in records
    ]


def test_registry_finds_the_benchmark_by_its_file():
    assert "digits_vqa" in tasks.available()
    task = tasks.load("digits_vqa", DataConfig(test_questions=7), EvaluateConfig())
    assert list(task.records()) == list(digits_vqa(7).records()) and task.name == "digits_vqa" and task.answer_loss
    with pytest.raises(UserError, match=r"evaluate\.tasks: 'nonsense' is not one of .*digits_vqa"):
        tasks.load("nonsense", DataConfig(), EvaluateConfig())


def test_records_are_single_questions_with_distinct_ids():
    records = digits_vqa(200).records()
    assert len(records) == 200 == len({record.id for record in records})
    assert all(len(record.turns) == 1 for record in records)
    text_only = [record for record in records if record.image is None]
    assert len(text_only) >= 0.15 * 200
    assert {record.turns[0].kind for record in text_only} == set(TEXT_KINDS)


def test_perfect_and_empty_answers():
    records = digits_vqa(200).records()
    perfect = digits_vqa(200).score(_predictions(records)).metrics
    assert {value for name, value in perfect.items() if name.startswith("accuracy")} == {1.0}
    assert perfect["n"] == 200 == perfect["n_image"] + perfect["n_text"]
    assert {name.removeprefix("accuracy/") for name in perfect if "accuracy/" in name} == {*IMAGE_KINDS, *TEXT_KINDS}
    nothing = digits_vqa(200).score(_predictions(records, wrong=lambda record: True)).metrics
    assert {value for name, value in nothing.items() if name.startswith("accuracy")} == {0.0}


def test_text_only_questions_are_scored_separately():
    records = digits_vqa(200).records()
    metrics = digits_vqa(200).score(_predictions(records, wrong=lambda record: record.image is None)).metrics
    assert metrics["accuracy_image"] == 1 and metrics["accuracy_text"] == 0
    assert metrics["accuracy"] == metrics["n_image"] / 200
    assert metrics["accuracy/count"] == 1 and metrics["accuracy/text_copying"] == 0


def test_the_order_of_predictions_does_not_matter():
    predictions = _predictions(digits_vqa(60).records(), wrong=lambda record: record.id.endswith("3"))
    shuffled = random.Random(0).sample(predictions, len(predictions))
    assert digits_vqa(60).score(shuffled).metrics == digits_vqa(60).score(predictions).metrics


def test_answer_loss_is_a_mean_over_tokens():
    first, second = _predictions(digits_vqa(2).records())
    metrics = digits_vqa(2).score([first | {"loss": 3.0, "tokens": 1}, second | {"loss": 1.0, "tokens": 3}]).metrics
    assert metrics["answer_loss"] == 1.0
    assert "answer_loss" not in digits_vqa(2).score([first, second]).metrics


def test_almost_right_is_wrong_and_spaces_do_not_count():
    (item,) = _predictions(digits_vqa(1).records())
    score = digits_vqa(1).score
    assert score([item | {"prediction": f" {item['answer']}\n"}]).metrics["accuracy"] == 1
    assert score([item | {"prediction": f"{item['answer']} red"}]).metrics["accuracy"] == 0


def test_independent_turns_become_questions():
    turns = (Turn("what?", "red"), Turn("what is 1 plus 1?", "2", sees_image=False))
    questions = single_questions([Record("a", "image.png", turns, True, "x"), Record("b", None, turns[1:], True, "x")])
    assert [record.id for record in questions] == ["a/0", "a/1", "b"]
    assert [record.image for record in questions] == ["image.png", None, None]
    assert [record.turns for record in questions] == [turns[:1], turns[1:], turns[1:]]


def test_a_file_of_the_user_is_an_option_beside_ours(tmp_path):
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate/mine.yaml").write_text("tasks: [gqa, mme]\nlimit: 3\n")
    place = f"hydra.searchpath=[file://{tmp_path}]"
    mine, pope = composed(place, "evaluate=mine").evaluate, composed(place, "evaluate=pope").evaluate
    assert (mine.tasks, mine.limit) == (["gqa", "mme"], 3)
    assert (pope.tasks, pope.limit) == (["pope"], None)


def test_the_names_of_benchmarks_cost_no_heavy_import():
    """``--help`` asks for them."""
    program = (
        "import sys; from efficientllava.evaluation.tasks import register_benchmarks; register_benchmarks();"
        "print([name for name in ('torch', 'datasets', 'numpy', 'PIL', 'openai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
