"""From predictions to a judged score: cache, replay, export, faults."""

import json
import random
import threading

import pytest

from efficientllava.evaluation import judges as command
from efficientllava.evaluation import score as scoring
from efficientllava.evaluation.judge_prompts import requests
from efficientllava.evaluation.judges import prepare, score, score_requests
from efficientllava.runtime.errors import ConfigError, UserError
from efficientllava.settings.schema import JudgeConfig

from .conftest import KEY

pytest.importorskip("openai")
SKILLS = ("rec", "ocr", "rec,ocr")


def _records(n=6):
    return [
        {
            "id": f"v1_{i}",
            "question": f"What is {i}?",
            "answer": str(i),
            "prediction": f"it is {i}",
            "capability": SKILLS[i % 3],
        }
        for i in range(n)
    ]


def _number(body):
    """The number that a question of `_records` asks for."""
    return int(body["messages"][-1]["content"].rpartition("What is ")[2].partition("?")[0])


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Nobody waits for the client's pauses."""

    async def sleep(_seconds):
        pass

    monkeypatch.setattr("anyio.sleep", sleep)


@pytest.fixture
def config(server):
    server.reply = lambda body: f"{(_number(body) + body['seed']) % 11 / 10}"
    return JudgeConfig(base_url=server.url, model="judge", key_env="JUDGE_KEY", timeout=30, retries=2, concurrency=3)


def _score(config, path, records=None, task="mmvet", protocol="llava"):
    asked = requests(records or _records(), task, config, protocol)
    return score_requests(asked, task, config, path, protocol)


def test_mmvet_is_the_mean_of_five_runs(server, config, tmp_path):
    result = _score(config, tmp_path)
    runs = [sum((i + run) % 11 / 10 for i in range(6)) / 6 for run in range(5)]
    assert result.metrics["score"] == pytest.approx(sum(runs) / 5)
    mean = sum(runs) / 5
    assert result.metrics["score_std"] == pytest.approx((sum((run - mean) ** 2 for run in runs) / 5) ** 0.5)
    assert result.metrics["n"] == 6 and result.metrics["n_failed"] == 0 and len(result.outcomes) == 6
    assert result.info["model"] == "judge" and result.info["answered_as"] == ["judge-2026"]
    assert result.info["runs"] == 5 and result.info["sent"] == 30 and "own wording" in result.info["prompts"]
    assert {body["seed"] for body in server.bodies} == set(range(5))
    assert {(body["model"], body["temperature"], body["max_tokens"]) for body in server.bodies} == {("judge", 0, 3)}


def test_a_second_run_sends_nothing_and_says_the_same(server, config, tmp_path):
    first = _score(config, tmp_path)
    server.shutdown()
    replay = JudgeConfig(model="judge")
    for again in (_score(config, tmp_path), _score(replay, tmp_path), _score(config, tmp_path, _records()[::-1])):
        assert again.metrics == first.metrics and again.info["sent"] == 0
    assert len(server.bodies) == 30


def test_only_what_changed_is_asked(server, config, tmp_path):
    config.runs = 1
    _score(config, tmp_path)
    changed = [*_records()[:-1], {**_records()[-1], "prediction": "something else"}]
    assert _score(config, tmp_path, changed).info["sent"] == 1
    config.model = "another"
    assert _score(config, tmp_path).info["sent"] == 6


def test_the_run_s_random_numbers_are_left_alone(server, config, tmp_path):
    server.faults = [(500, (), "")]
    state = random.getstate()
    _score(config, tmp_path)
    assert random.getstate() == state


def test_not_more_requests_at_a_time_than_allowed(server, config, tmp_path):
    gate = threading.Barrier(3)

    def reply(body):
        gate.wait(5)  # is passed by three at a time only
        return "1.0"

    server.reply = reply
    config.timeout = 5
    _score(config, tmp_path)
    assert server.most == 3


def test_faults_between_answers_change_nothing(server, config, tmp_path):
    expected = _score(config, tmp_path / "calm").metrics
    config.retries, config.timeout = 16, 0.5  # one request may meet them all
    server.faults = [
        "drop",
        (429, [("Retry-After", "1")], ""),
        b"{}",
        (500, (), "x"),
        "hang",
        "cut",
        (503, (), ""),
        None,
    ] * 2
    assert _score(config, tmp_path / "storm").metrics == expected


def test_a_garbage_verdict_is_asked_for_again_warmer(server, config, tmp_path):
    config.runs = 1
    server.reply = lambda body: "1.0" if body["temperature"] >= 1 or _number(body) else "I think"
    result = _score(config, tmp_path)
    asked = [body["temperature"] for body in server.bodies if _number(body) == 0]
    assert asked == [0, 0.5, 1] and result.metrics["score"] == 1 and result.info["unreadable"] == []
    assert _score(config, tmp_path).info["sent"] == 0


def test_a_verdict_that_stays_garbage_is_named_and_counted(server, config, tmp_path, capsys):
    config.runs = 2
    server.reply = lambda body: "[/no]" if _number(body) == 3 else "1.0"
    result = score(_records(), "mmvet", config, tmp_path, "llava", tmp_path / "requests.jsonl")
    assert result.metrics["n_failed"] == 1 and result.metrics["score"] == pytest.approx(5 / 6)
    assert result.info["unreadable"] == ["v1_3"]
    assert "no score could be read from the judge's replies to v1_3" in capsys.readouterr().out
    assert sum(_number(body) == 3 for body in server.bodies) == 2 * config.attempts
    sent = len(server.bodies)
    assert _score(config, tmp_path).metrics == result.metrics and len(server.bodies) == sent


def test_requests_without_an_answer_fail_by_id_and_the_rest_is_kept(server, config, tmp_path):
    config.runs, config.concurrency, config.retries = 1, 1, 0
    server.faults = [None, (400, (), "filtered"), None, (500, (), "oops"), None, None]
    with pytest.raises(UserError, match=r"about v1_1, v1_3 \(HTTP 400: filtered; HTTP 500: oops\); run again"):
        _score(config, tmp_path)
    assert _score(config, tmp_path).info["sent"] == 2


def test_a_refused_key_ends_it_at_once(server, config, tmp_path):
    config.concurrency = 1
    server.faults = [(401, (), f"bad key {KEY}")] * 30
    with pytest.raises(UserError, match="HTTP 401") as caught:
        _score(config, tmp_path)
    assert KEY not in str(caught.value) and len(server.bodies) == 1


def test_a_dead_endpoint_is_not_asked_for_everything(server, config, tmp_path):
    config.concurrency, config.retries = 1, 0
    server.faults = [(500, (), "")] * 99
    with pytest.raises(UserError, match=r"v1_0, v1_1, v1_2, v1_3, v1_4 \("):
        _score(config, tmp_path)
    assert len(server.bodies) == 5


def test_verdicts_that_cannot_be_kept_end_it_with_one_message(server, config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        _score(config, tmp_path / "file")
    assert len(server.bodies) <= config.concurrency


def test_the_key_is_in_no_file(server, config, tmp_path):
    _score(config, tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert files and all(KEY not in path.read_text() for path in files)
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_a_body_of_one_s_own(server, config, tmp_path):
    config.body, config.runs = {"max_tokens": None, "max_completion_tokens": 99, "temperature": 1}, 1
    _score(config, tmp_path)
    assert {(body["max_completion_tokens"], body["temperature"]) for body in server.bodies} == {(99, 1)}
    assert all("max_tokens" not in body for body in server.bodies)


def test_llava_bench(server, config, tmp_path):
    server.reply = lambda body: f"8 {6 + body['seed']}\nBecause."
    rows = [
        {"id": str(i), "question": f"Q{i}", "caption": "c", "gpt_answer": "a", "prediction": "p", "category": name}
        for i, name in enumerate(("conv", "detail", "complex"))
    ]
    result = _score(config, tmp_path, rows, "llava_bench")
    assert result.info["sent"] == 9 and result.metrics["score"] == pytest.approx((0.75 + 0.875 + 1) / 3)
    assert {body["temperature"] for body in server.bodies} == {0.2}


def test_mathvista_asks_only_where_no_rule_decides(server, config, tmp_path):
    server.reply = lambda body: " 3\n"
    kinds = {"question_type": "free_form", "answer_type": "integer", "choices": None}
    rows = [
        {"id": "1", "question": "?", "prediction": "2", "answer": "2", **kinds},
        {"id": "2", "question": "?", "prediction": "Of 2 and 3, it is the latter.", "answer": "3", **kinds},
        {"id": "3", "question": "?", "prediction": "", "answer": "1", **kinds},
    ]
    result = _score(config, tmp_path, rows, "mathvista")
    assert len(server.bodies) == 1 and result.metrics["accuracy"] == pytest.approx(2 / 3)
    assert result.metrics["n_undecided"] == 0
    config.runs = 2
    assert _score(config, tmp_path, rows, "mathvista").metrics["accuracy_std"] == 0


def test_without_a_judge_the_requests_are_written_and_sent_later(server, config, tmp_path, capsys):
    expected = _score(config, tmp_path / "direct").metrics
    file = tmp_path / "run" / "requests.jsonl"
    result = score(_records(), "mmvet", JudgeConfig(), tmp_path / "none", "llava", file)
    assert result.metrics == {} and len(result.missing) == 30 and "30 requests wait" in capsys.readouterr().out
    options = [
        "--base-url",
        server.url,
        "--model",
        "judge",
        "--key-env",
        "JUDGE_KEY",
        "--cache",
        str(tmp_path / "later"),
    ]
    command.main([str(file), *options])
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"] == expected and printed["task"] == "mmvet" and printed["judge"]["sent"] == 30
    # What the later judge said serves the run that had none.
    replay = score(_records(), "mmvet", JudgeConfig(model="judge"), tmp_path / "later", "llava", file)
    assert replay.metrics == expected and replay.missing == []


def test_the_command_that_scores_files_writes_requests_too(server, config, tmp_path, capsys):
    predictions, file = tmp_path / "predictions.jsonl", tmp_path / "requests.jsonl"
    predictions.write_text("".join(json.dumps(row) + "\n" for row in _records()))
    scoring.main([str(predictions), "--task", "mmvet", "--protocol", "lmms_eval", "--requests", str(file)])
    assert capsys.readouterr().out == "" and len(file.read_text().splitlines()) == 6
    options = ["--base-url", server.url, "--model", "judge", "--key-env", "", "--cache", str(tmp_path)]
    command.main([str(file), *options])
    assert json.loads(capsys.readouterr().out)["protocol"] == "lmms_eval"
    assert {body["max_tokens"] for body in server.bodies} == {128} and set(server.keys) == {None}
    with pytest.raises(UserError, match="gqa has no judge"):
        scoring.main([str(predictions), "--task", "gqa", "--requests", str(file)])


@pytest.mark.parametrize("content", [None, "", "{", '{"id": 1}', "[]", '{"task": "gqa", "protocol": "llava"}'])
def test_files_that_hold_no_requests(tmp_path, monkeypatch, content):
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    file = tmp_path / "requests.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match="holds no requests for a judge"):
        command.main([str(file), "--base-url", "http://localhost:1/v1", "--model", "m"])


@pytest.mark.parametrize(
    "options",
    [["--base-url", "localhost:1", "--model", "m"], ["--base-url", "http://x/v1", "--model", "m", "--attempts=0"]],
)
def test_a_bad_command_line(tmp_path, options):
    with pytest.raises(ConfigError, match=r"evaluate\.judge"):
        command.main([str(tmp_path / "x.jsonl"), *options])


def test_what_is_missing_is_found_before_anything_is_generated(server, monkeypatch, tmp_path):
    prepare("gqa", JudgeConfig(base_url=server.url, key_env="NOT_SET", prompts=str(tmp_path)))
    with pytest.raises(UserError, match="key_env"):
        prepare("mmvet", JudgeConfig(base_url=server.url, key_env="NOT_SET"))
    with pytest.raises(UserError, match=r"mmvet.txt"):
        prepare("mmvet", JudgeConfig(prompts=str(tmp_path)))
    prepare("mmvet", JudgeConfig())
