"""The command that scores a file of predictions."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from efficientllava.evaluation.score import as_record, main
from efficientllava.evaluation.tasks.published import BENCHMARKS
from efficientllava.runtime.errors import UserError


def _lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _run(capsys, *arguments):
    main(arguments)
    return json.loads(capsys.readouterr().out)


def _llava(question_id, text, prompt="Is it?\nAnswer the question using a single word or phrase.", **metadata):
    row = {"question_id": question_id, "prompt": prompt, "text": text, "answer_id": "x", "model_id": "llava"}
    return {**row, "metadata": metadata}


def test_our_format_holds_its_references(tmp_path, capsys):
    rows = [
        {"id": "1", "question": "?", "kind": "", "answer": "dog", "prediction": "Dog"},
        {"id": "2", "question": "?", "kind": "", "answer": "dog", "prediction": "Dog!"},
    ]
    file = _lines(tmp_path / "predictions.jsonl", *rows)
    expected = {"task": "gqa", "protocol": "llava", "metrics": {"accuracy": 0.5, "n": 2}}
    assert _run(capsys, file, "--task", "gqa") == expected
    assert _run(capsys, file, "--task=gqa", "--protocol=lmms_eval")["metrics"]["accuracy"] == 1
    file = _lines(tmp_path / "said.jsonl", *(row | {"protocol": "lmms_eval"} for row in rows))
    assert _run(capsys, file, "--task=gqa")["metrics"]["accuracy"] == 1


def test_llava_s_format_with_references_in_metadata(tmp_path, capsys):
    file = _lines(tmp_path / "answers.jsonl", _llava(7, "Yes", answer="yes", category="random"))
    assert _run(capsys, file, "--task", "pope")["metrics"]["f1/random"] == 1


def test_a_column_called_text_is_what_the_scorer_reads_and_not_what_the_model_said():
    metadata = {"text": "stop", "prompt": "column", "response": "column"}
    row = as_record({**_llava(7, "WRONG"), "metadata": metadata})
    assert (row["text"], row["prediction"], row["prompt"]) == ("stop", "WRONG", "column")


def test_a_column_may_not_be_called_as_what_a_line_says_itself():
    with pytest.raises(UserError, match="a column is called prediction, protocol"):
        replace(BENCHMARKS["pope"], columns=("answer", "protocol", "prediction"))


def test_outcomes_go_into_a_folder_that_is_made(tmp_path, capsys):
    file = _lines(tmp_path / "answers.jsonl", _llava(7, "Yes", answer="yes", category=["a", "b"], types="none"))
    assert _run(capsys, file, "--task=pope", f"--outcomes={tmp_path}/new/outcomes.jsonl")["metrics"]["n"] == 1
    assert json.loads((tmp_path / "new/outcomes.jsonl").read_text())["score"] == 1


def test_outcomes_take_no_place_of_the_predictions_nor_a_folder_s(tmp_path):
    file = _lines(tmp_path / "answers.jsonl", _llava(7, "Yes", answer="yes", category="a"))
    before = (tmp_path / "answers.jsonl").read_text()
    with pytest.raises(UserError, match=r"--outcomes: .*answers\.jsonl is what is read"):
        main([file, "--task=pope", f"--outcomes={file}"])
    with pytest.raises(UserError, match="is a folder; give the name of a file"):
        main([file, "--task=pope", f"--outcomes={tmp_path}"])
    assert (tmp_path / "answers.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        ("docvqa", {"answer": None}, "'answer' is None; it must be a list"),
        ("prose", {"answer": "a", "loss": 1.0, "tokens": 0}, "'tokens' above 0"),
        ("prose", {"answer": "a", "loss": None, "tokens": 3}, "needs a number as 'loss'"),
    ],
)
def test_what_is_no_number_and_no_reference_is_one_line(tmp_path, task, row, told):
    file = _lines(tmp_path / "answers.jsonl", {"id": "1", "question": "?", "kind": "", "prediction": "a", **row})
    with pytest.raises(UserError, match=told):
        main([file, "--task", task])


def test_references_may_be_numbers_and_lists_with_holes(tmp_path, capsys):
    row = {"id": "1", "question": "?", "kind": "colour_by_digit", "prediction": "3", "answer": 3}
    assert _run(capsys, _lines(tmp_path / "a.jsonl", row), "--task=digits_vqa")["metrics"]["accuracy"] == 1
    row |= {"answer": [None, "3"]}
    assert _run(capsys, _lines(tmp_path / "b.jsonl", row), "--task=docvqa")["metrics"]["anls"] == 1


def test_llava_s_format_with_references_in_another_file(tmp_path, capsys):
    file = _lines(tmp_path / "answers.jsonl", _llava(7, "Yes"), _llava(8, "Yes"))
    references = [
        {"question_id": 8, "text": "Is there a cat?", "label": "no", "category": "popular"},
        {"question_id": 7, "text": "Is there a dog?", "label": "yes", "category": "random"},
        {"question_id": 9, "text": "Is there a bird?", "label": "yes", "category": "random"},
    ]
    gold = _lines(tmp_path / "gold.jsonl", *references)
    result = _run(capsys, file, "--task", "pope", "--gold", gold)
    metrics = result["metrics"]
    assert (
        result["unanswered"] == 1
        and metrics["n"] == 2
        and metrics["accuracy/random"] == 1
        and metrics["accuracy/popular"] == 0
    )


def test_references_by_id_in_one_object(tmp_path, capsys):
    file = _lines(tmp_path / "answers.jsonl", _llava("5", "B", "<image>\nWhich?"), _llava("6", "B"))
    gold = tmp_path / "problems.json"
    gold.write_text(json.dumps({"5": {"answer": 1, "choices": ["x", "y"]}, "6": {"answer": 0, "choices": ["x", "y"]}}))
    metrics = _run(capsys, file, "--task", "scienceqa", "--gold", str(gold))["metrics"]
    assert metrics["accuracy"] == 0.5 and metrics["accuracy/IMG"] == 1


def test_questions_that_share_an_id_are_told_apart_by_their_text(tmp_path, capsys):
    questions = {"Is it 9 am?": "Yes", "Is it 10 am?": "No"}
    short = "\nAnswer the question using a single word or phrase."
    answers = [_llava("OCR/1.png", "No", f"{question}{short}") for question in reversed(questions)]
    file = _lines(tmp_path / "answers.jsonl", *answers)
    references = [
        {"question_id": "OCR/1.png", "question": f"{question}  Please answer yes or no.", "answer": answer}
        for question, answer in questions.items()
    ]
    gold = _lines(tmp_path / "gold.jsonl", *references)
    outcomes = tmp_path / "outcomes.jsonl"
    result = _run(capsys, file, "--task", "mme", "--gold", gold, "--outcomes", str(outcomes))
    assert result["metrics"]["perception"] == 50
    assert [json.loads(line)["score"] for line in outcomes.read_text().splitlines()] == [1, 0]


def test_the_prediction_is_not_taken_from_the_references(tmp_path, capsys):
    file = _lines(tmp_path / "answers.jsonl", {"id": "1", "prediction": "cat", "answer": "cat"})
    gold = _lines(tmp_path / "gold.jsonl", {"id": "1", "answer": "dog", "prediction": "dog"})
    assert _run(capsys, file, "--task", "gqa", "--gold", gold)["metrics"]["accuracy"] == 0


def test_judged_files_need_no_prediction(tmp_path, capsys):
    file = _lines(tmp_path / "review.jsonl", {"question_id": 1, "category": "llava_bench_conv", "content": "8 6\nwell"})
    assert _run(capsys, file, "--task", "llava_bench")["metrics"]["score/conv"] == 0.75


BAD = {
    "no JSON": ('{"id": "1"}\n{"id": ', "line 2 is no JSON"),
    "empty": ("", "holds no objects"),
    "no object": ("3", "holds no objects"),
    "list of numbers": ("[1]", "object 1 has no id"),
    "no id": ('{"text": "x"}', "object 1 has no id; it needs one of id, question_id"),
    "no prediction": ('{"id": "1", "answer": "x"}', "record '1': has no 'prediction'"),
    "no reference": ('{"id": "1", "text": "x"}', "record '1': has no 'answer'; .* --gold"),
    "twice": ('{"id": "1", "text": "x"}\n{"id": "1", "text": "y"}', "question '1' is answered more than once"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case):
    file = tmp_path / "bad.jsonl"
    file.write_text(BAD[case][0])
    with pytest.raises(UserError, match=BAD[case][1]):
        main([str(file), "--task", "gqa"])


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("pope", {"answer": "dog"}, "'answer' is 'dog'; it must be yes or no"),
        ("mme", {"answer": "yes"}, "'category' is '1'; it must be one of existence, "),
        ("scienceqa", {"answer": "yes"}, "'answer' is 'yes'; it must be a capital letter or an index"),
        ("ai2d", {"answer": 26}, "'answer' is '26'; it must be a capital letter"),
        ("gqa", {"answer": "yes", "benchmark": "pope"}, "--task=gqa: these are predictions on pope"),
    ],
)
def test_predictions_on_another_benchmark_are_refused(tmp_path, task, row, message):
    file = _lines(tmp_path / "answers.jsonl", _llava("1", "yes", **row))
    with pytest.raises(UserError, match=message):
        main([file, "--task", task])


def test_scienceqa_and_its_questions_with_images_share_a_scorer(tmp_path, capsys):
    file = _lines(tmp_path / "answers.jsonl", _llava("1", "B", answer=1, benchmark="scienceqa_img"))
    assert _run(capsys, file, "--task", "scienceqa")["metrics"]["accuracy"] == 1


def test_predictions_need_exactly_one_reference(tmp_path):
    file = _lines(tmp_path / "answers.jsonl", _llava("1", "Yes"))
    for references in (["2"], ["1", "1"]):
        gold = _lines(
            tmp_path / "gold.jsonl", *({"id": key, "question": "Is it?", "answer": "yes"} for key in references)
        )
        with pytest.raises(UserError, match=r"prediction '1': has [02] references in --gold; it must have one"):
            main([file, "--task", "gqa", "--gold", gold])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl", "--task", "gqa"], "missing.jsonl: cannot be read"),
        (["x.jsonl", "--task", "nonsense"], "invalid choice: 'nonsense'"),
        (["x.jsonl"], "--task"),
        (["x.jsonl", "--task", "gqa", "--protocol", "x"], "invalid choice: 'x'"),
    ],
)
def test_a_bad_command_line(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_faults_end_with_one_line_and_exit_code_2(tmp_path):
    command = [
        sys.executable,
        "-m",
        "efficientllava.evaluation.score",
        str(tmp_path / "missing.jsonl"),
        "--task",
        "gqa",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
