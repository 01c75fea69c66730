"""The runtime's server may fail in any way: the run ends with one line."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from efficientllava.deploy import runtime
from efficientllava.runtime import UserError
from efficientllava.runtime.console import exit_code

# Serves nothing at the address that it tells, and ends once nobody can ask it any more.
DEAF = """
import json, sys
print(json.dumps({"seconds": 0.0, "address": "http://127.0.0.1:9"}), flush=True)
print("error: out of luck", file=sys.stderr, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def without_tracebacks(monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")


@pytest.fixture
def server(monkeypatch):
    """How the server is started, in place of which another program is."""

    def start(code: str):
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=log, text=True)

    monkeypatch.setattr(runtime, "version", lambda: "a runtime")
    with tempfile.TemporaryFile() as log:
        yield lambda code: (start(code), log, Path("m.gguf"))


def test_a_server_that_lives_and_does_not_answer_is_ended(server):
    started = time.monotonic()
    with pytest.raises(UserError, match="a runtime does not take it: error: out of luck"):
        runtime.Runtime(*server(DEAF))
    assert time.monotonic() - started < runtime.PATIENCE / 2


def test_a_server_that_has_ended_is_a_failure_of_the_run_and_not_a_reader_that_has_seen_enough(server, monkeypatch):
    monkeypatch.setattr(runtime.Runtime, "ask", lambda *_, **__: {"media_marker": ""})
    process, log, path = server(DEAF.replace("sys.stdin.read()", ""))
    asked = runtime.Runtime(process, log, path)
    process.wait()
    assert exit_code(asked.cpu) == UserError.exit_code


def test_a_broken_pipe_of_any_other_program_is_no_success(capsys):
    def main():
        raise BrokenPipeError(32, "Broken pipe", "another")

    assert exit_code(main) == 1
    assert "another" in capsys.readouterr().err
