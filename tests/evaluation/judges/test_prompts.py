"""What judges are asked."""

import json

import pytest

from efficientllava.evaluation.judge_prompts import JUDGES, again, load, requests
from efficientllava.evaluation.tasks import PROTOCOLS
from efficientllava.evaluation.tasks.published import BENCHMARKS
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import JUDGED, JudgeConfig

MMVET = {"id": "v1_0", "question": "What?", "answer": "a<AND>b<OR>c", "prediction": "d\ne", "capability": "ocr"}
BENCH = {
    "id": "3",
    "question": "<image>\nWho?",
    "caption": ["one", "two"],
    "gpt_answer": "She.",
    "prediction": "He.",
    "category": "llava_bench_conv",
}
MATH = {"id": "7", "question": "1+1?", "query": "Hint: an integer.\nQuestion: 1+1?", "prediction": " Two, or 3. \n"}
MATH |= {"question_type": "free_form", "answer_type": "text"}


def _body(task, record, folder=None, protocol="llava", run=0):
    return requests([record], task, JudgeConfig(prompts=folder, runs=5), protocol)[run].body


def _content(task, record, folder=None):
    return [m["content"] for m in _body(task, record, folder)["messages"]]


def test_every_judged_benchmark_has_its_parts():
    assert set(JUDGES) == set(JUDGED) <= set(BENCHMARKS)
    assert {tuple(judging.settings) for judging in JUDGES.values()} == {PROTOCOLS}


def test_the_row_of_mmvet():
    (content,) = _content("mmvet", MMVET)
    assert content.endswith("\nWhat? | a <AND> b <OR> c | d\ne | ")


def test_the_sections_of_llava_bench():
    system, content = _content("llava_bench", BENCH)
    head = "[Context]\none\ntwo\n\n[Question]\nWho?\n\n[Assistant 1]\nShe.\n\n[End of Assistant 1]\n\n"
    assert content.startswith(f"{head}[Assistant 2]\nHe.\n\n[End of Assistant 2]\n\n[System]\n")
    assert system and content.endswith("\n\n")


def test_the_reference_of_llava_bench_may_be_the_answer():
    record = {**{key: text for key, text in BENCH.items() if key != "gpt_answer"}, "answer": "She."}
    assert _content("llava_bench", record) == _content("llava_bench", BENCH)


def test_the_extraction_of_mathvista():
    (content,) = _content("mathvista", MATH)
    assert content.endswith("\n\nHint: an integer.\nQuestion: 1+1?\n\nTwo, or 3.\n\nExtracted answer: ")


def test_official_temperatures_and_lengths():
    found = {task: _body(task, record, run=4) for task, record in RECORDS.items()}
    assert {task: (body["temperature"], body["max_tokens"], body["seed"]) for task, body in found.items()} == {
        "mmvet": (0, 3, 4),
        "llava_bench": (0.2, 1024, 4),
        "mathvista": (0, 256, 4),
    }
    assert _body("mmvet", MMVET, protocol="lmms_eval")["max_tokens"] == 128
    official = {task: len(requests([RECORDS[task]], task, JudgeConfig())) for task in RECORDS}
    assert official == {"mmvet": 5, "llava_bench": 3, "mathvista": 1}


RECORDS = {"mmvet": MMVET, "llava_bench": BENCH, "mathvista": MATH}


@pytest.mark.parametrize("task", RECORDS)
def test_asking_again_reminds_and_warms(task):
    body = _body(task, RECORDS[task])
    before = json.dumps(body)
    warmer = [again(task, body, attempt) for attempt in range(7)]
    assert warmer[0] == body and json.dumps(body) == before
    start = body["temperature"]
    assert [w["temperature"] for w in warmer] == [min(2.0, start + attempt / 2) for attempt in range(7)]
    assert warmer[1]["messages"][-1]["content"].startswith(body["messages"][-1]["content"])
    assert len(warmer[1]["messages"][-1]["content"]) > len(body["messages"][-1]["content"])


def test_official_files_replace_our_wording_and_change_the_digest(tmp_path):
    rules = {
        f"llava_bench_{name}": {"role": "Assistant", "prompt": f"R {name}"} for name in ("conv", "detail", "complex")
    }
    (tmp_path / "rule.json").write_text(json.dumps({**rules, "coding": {"prompt": "x"}}))
    (tmp_path / "mmvet.txt").write_text("THE TABLE")
    (tmp_path / "mathvista.txt").write_text("\nTHE DEMO\n")
    folder = str(tmp_path)
    assert _content("mmvet", MMVET, folder)[0].startswith("THE TABLE\nWhat? | ")
    assert _content("mathvista", MATH, folder)[0].startswith("THE DEMO\n\nHint")
    assert _content("llava_bench", BENCH, folder)[1].endswith("[System]\nR conv\n\n")
    (tmp_path / "llava_bench_system.txt").write_text("Be fair.\n")
    assert _content("llava_bench", BENCH, folder)[0] == "Be fair."
    for task in JUDGES:
        official, own = load(task, folder)[1], load(task, None)[1]
        assert official.endswith(" (official files)") and own.endswith(" (own wording)")
        assert official.split()[0] != own.split()[0]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"llava_bench_conv": {"prompt": "x"}}'])
def test_a_missing_or_broken_official_file(tmp_path, content):
    if content is not None:
        (tmp_path / "rule.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluate.judge.prompts=.*rule.json cannot be read"):
        load("llava_bench", str(tmp_path))


@pytest.mark.parametrize(
    ("task", "missing"), [("mmvet", "answer"), ("llava_bench", "caption"), ("mmvet", "prediction")]
)
def test_a_record_that_lacks_something(task, missing):
    record = {key: text for key, text in RECORDS[task].items() if key != missing}
    with pytest.raises(UserError, match=f"has no '{missing}'"):
        _content(task, record)


def test_an_unknown_category():
    with pytest.raises(UserError, match="'category' is 'coding'"):
        _content("llava_bench", {**BENCH, "category": "coding"})
