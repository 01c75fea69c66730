"""One request to an endpoint that misbehaves in every way the net knows."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from efficientllava.evaluation.judges.asking import Client, Fault, _retry_after
from efficientllava.runtime.errors import UserError
from efficientllava.settings.schema import JudgeConfig

from .conftest import KEY, Handler

BODY = {"model": "judge", "messages": [{"role": "user", "content": "?"}]}


@pytest.fixture
def pauses():
    return []


@pytest.fixture
def config(server):
    return JudgeConfig(base_url=server.url + "/", key_env="JUDGE_KEY", retries=3)


@pytest.fixture
def client(config, pauses):
    return Client(config, pauses.append)


def test_an_answer_comes_with_the_model_that_gave_it(server, client, pauses):
    assert client.ask(BODY) == ("1.0", "judge-2026")
    assert server.bodies == [BODY] and server.keys == [f"Bearer {KEY}"] and pauses == []
    assert server.paths == ["/v1/chat/completions"]


def test_an_endpoint_without_keys_gets_none(server):
    Client(JudgeConfig(base_url=server.url, key_env=None)).ask(BODY)
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
def test_transient_faults_are_outlasted(server, config, client, pauses, fault):
    config.timeout = 0.5 if TRANSIENT[fault] in ("hang", "trickle") else 60
    server.faults = [TRANSIENT[fault]] * 2
    assert client.ask(BODY)[0] == "1.0"
    assert len(server.bodies) == 3
    assert 0.5 <= pauses[0] <= 1 and 1 <= pauses[1] <= 2


def test_retries_end(server, client, pauses):
    server.faults = [(503, (), "no\nway")] * 9
    with pytest.raises(Fault, match="HTTP 503: no way") as caught:
        client.ask(BODY)
    assert len(server.bodies) == 4 and len(pauses) == 3 and not caught.value.everywhere


def test_back_off_doubles_with_jitter_up_to_a_minute(server, pauses):
    server.faults = [(500, (), "")] * 10
    Client(JudgeConfig(base_url=server.url, key_env=None, retries=10), pauses.append).ask(BODY)
    assert all(min(60, 2**n) / 2 <= pause <= min(60, 2**n) for n, pause in enumerate(pauses))
    assert len({pause / 2**n for n, pause in enumerate(pauses)}) == len(pauses) == 10


def test_retry_after_is_waited_for(server, client, pauses):
    server.faults = [(429, [("Retry-After", "7")], ""), (503, [("Retry-After", "nonsense")], "")]
    client.ask(BODY)
    assert pauses[0] == 7 and pauses[1] <= 2


def test_retry_after_as_a_date():
    later = datetime.now(UTC) + timedelta(seconds=30)
    assert 28 < _retry_after(format_datetime(later, usegmt=True)) <= 30
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert _retry_after(None) == _retry_after("-3") == _retry_after("soon") == 0


def test_nobody_waits_for_an_hour(server, client, pauses):
    server.faults = [(429, [("Retry-After", "3600")], "quota")]
    with pytest.raises(Fault, match="quota"):
        client.ask(BODY)
    assert pauses == []


@pytest.mark.parametrize(("code", "everywhere"), [(400, False), (401, True), (403, True), (404, True), (422, False)])
def test_what_would_fail_again_is_not_repeated(server, client, pauses, code, everywhere):
    server.faults = [(code, (), "no")]
    with pytest.raises(Fault, match=f"HTTP {code}: no") as caught:
        client.ask(BODY)
    assert pauses == [] and caught.value.everywhere is everywhere


def test_nobody_listens(server, pauses):
    server.server_close()
    with pytest.raises(Fault, match=r"URLError|refused|reset"):
        Client(JudgeConfig(base_url=server.url, key_env=None, retries=1, timeout=0.3), pauses.append).ask(BODY)
    assert len(pauses) == 1


def test_a_stopped_client_does_not_go_on(server):
    client = Client(JudgeConfig(base_url=server.url, key_env=None))
    client.stop.set()
    server.faults = [(500, (), "")] * 3
    with pytest.raises(Fault):
        client.ask(BODY)
    assert len(server.bodies) == 1


def test_an_endpoint_that_repeats_the_key_does_not_betray_it(server, client):
    server.faults = [(401, (), f"wrong key {KEY}")]
    with pytest.raises(Fault) as caught:
        client.ask(BODY)
    assert KEY not in str(caught.value) and "***" in str(caught.value)


def test_the_key_does_not_follow_a_redirection(server, client, monkeypatch):
    monkeypatch.setattr(
        Handler, "do_GET", lambda self: (server.keys.append(self.headers["Authorization"]), self.send(500, b""))
    )
    server.faults = [(302, [("Location", f"{server.url}/elsewhere")], "")]
    assert client.ask(BODY)[0] == "1.0"
    assert server.keys == [f"Bearer {KEY}", None, f"Bearer {KEY}"]


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel"])
def test_keys_that_cannot_be(server, monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(UserError, match=r"evaluate\.judge\.key_env: the environment variable") as caught:
        Client(JudgeConfig(base_url=server.url, key_env="JUDGE_KEY"))
    assert not key or key not in str(caught.value)
