"""One request to an endpoint that misbehaves in every way the net knows."""

import asyncio
import builtins
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from efficientllava.evaluation.judges import Fault, endpoint, prepare
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import JudgeConfig

from .conftest import KEY, Server

pytest.importorskip("openai")
BODY = {"model": "judge", "messages": [{"role": "user", "content": "?"}]}


@pytest.fixture
def pauses(monkeypatch):
    """The client's pauses, which nobody waits for."""
    taken = []

    async def sleep(seconds):
        taken.append(seconds)

    monkeypatch.setattr("anyio.sleep", sleep)
    return taken


@pytest.fixture
def config(server):
    return JudgeConfig(base_url=server.url + "/", key_env="JUDGE_KEY", retries=3)


def ask(config, body=BODY):
    async def once():
        async with endpoint(config) as asks:
            return await asks(body)

    return asyncio.run(once())


def test_an_answer_comes_with_the_model_that_gave_it(server, config, pauses):
    assert ask(config) == ("1.0", "judge-2026")
    assert server.bodies == [BODY] and server.keys == [f"Bearer {KEY}"] and pauses == []
    assert server.paths == ["/v1/chat/completions"]


def test_an_endpoint_without_keys_gets_none(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another")
    ask(JudgeConfig(base_url=server.url, key_env=None))
    assert server.keys == [None]


TRANSIENT = {
    "too many requests": (429, (), "slow down"),
    "server error": (500, (), "oops"),
    "overloaded": (529, (), ""),
    "dropped connection": "drop",
    "half an answer": "cut",
    "no answer in time": "hang",
    "an answer that never ends": "trickle",
    "no JSON": b"<html>try later</html>",
    "no chat completion": b'{"error": {"message": "busy"}}',
    "no choice": b'{"choices": []}',
    "a list": b"[]",
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("fault", TRANSIENT)
def test_transient_faults_are_outlasted(server, config, pauses, fault):
    config.timeout = 0.5 if TRANSIENT[fault] in ("hang", "trickle") else 60
    server.faults = [TRANSIENT[fault]] * 2
    assert ask(config)[0] == "1.0"
    assert len(server.bodies) == 3 and len(pauses) == 2
    assert 0 < pauses[0] < pauses[1] <= 2


def test_retries_end(server, config, pauses):
    server.faults = [(503, (), "no\nway")] * 9
    with pytest.raises(Fault, match="HTTP 503: no way") as caught:
        ask(config)
    assert len(server.bodies) == 4 and len(pauses) == 3 and not caught.value.everywhere


def test_pauses_grow_with_jitter_but_not_without_end(server, config, pauses):
    config.retries = 10
    server.faults = [(500, (), "")] * 10
    ask(config)
    assert len(pauses) == len({*pauses}) == 10 and pauses[:4] == sorted(pauses[:4]) and max(pauses) <= 60


def test_retry_after_is_waited_for(server, config, pauses):
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    server.faults = [
        (code, [("Retry-After", when)], "") for code, when in ((429, "7"), (503, "nonsense"), (429, later))
    ]
    ask(config)
    assert pauses[0] == 7 and pauses[1] <= 2 and 20 < pauses[2] <= 30


def test_nobody_waits_for_an_hour(server, config, pauses):
    server.faults = [(429, [("Retry-After", "3600")], "quota")]
    with pytest.raises(Fault, match="quota"):
        ask(config)
    assert pauses == []


@pytest.mark.parametrize(("code", "everywhere"), [(400, False), (401, True), (403, True), (404, True), (422, False)])
def test_what_would_fail_again_is_not_repeated(server, config, pauses, code, everywhere):
    server.faults = [(code, (), "no")]
    with pytest.raises(Fault, match=f"HTTP {code}: no") as caught:
        ask(config)
    assert pauses == [] and caught.value.everywhere is everywhere


def test_what_is_no_answer_is_shown_in_the_end(server, config, pauses):
    server.faults = [b'{"error": {"message": "busy"}}'] * 4
    with pytest.raises(Fault, match=r'^no chat completion: \{"error": \{"message": "busy"\}\}$'):
        ask(config)


def test_nobody_listens(server, config, pauses):
    server.server_close()
    config.retries, config.timeout = 1, 0.3
    with pytest.raises(Fault, match=r"connection|refused|reset|timed out|Timeout"):
        ask(config)
    assert len(pauses) == 1


def test_an_endpoint_that_repeats_the_key_does_not_betray_it(server, config):
    server.faults = [(401, (), f"wrong key {KEY}")]
    with pytest.raises(Fault) as caught:
        ask(config)
    assert KEY not in str(caught.value) and "***" in str(caught.value)


def test_the_key_does_not_follow_a_redirection(server, config):
    with Server() as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        server.faults = [(307, [("Location", f"{elsewhere.url}/chat/completions")], "")]
        assert ask(config)[0] == "1.0"
        elsewhere.shutdown()
    assert server.keys == [f"Bearer {KEY}"] and elsewhere.keys == [None] and elsewhere.bodies == [BODY]


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel"])
def test_keys_that_cannot_be(server, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(UserError, match=r"evaluate\.judge\.key_env: the environment variable") as caught:
        prepare("mmvet", JudgeConfig(base_url=server.url, key_env="JUDGE_KEY"))
    assert not key or key not in str(caught.value)


def test_a_missing_client_is_told_in_one_line(config, monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **options):
        if name == "openai":
            raise ModuleNotFoundError("No module named 'openai'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt -e '\.\[judges\]'") as caught:
        prepare("mmvet", config)
    assert "\n" not in str(caught.value)
    prepare("mmvet", JudgeConfig())
    prepare("gqa", config)
