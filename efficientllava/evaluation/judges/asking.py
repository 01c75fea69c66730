"""From requests to verdicts: from the cache, else from the endpoint, several at a time.

Chat completions of an OpenAI-compatible endpoint: one request at a time, repeated until it is answered.

The standard library's HTTP client, since which other one comes with `huggingface_hub` depends on its version.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ...runtime.content import digest
from ...runtime.errors import UserError
from ...runtime.lines import Lines
from ...settings.schema import JudgeConfig
from ..scorers.judged import FAILED, llava_bench_pair, mmvet_grade
from . import prompts
from .prompts import Request

TRANSIENT = {408, 409, 425, 429}  # and all from 500
EVERYWHERE = {401, 403, 404}  # no other request would fare better
LONGEST_PAUSE = 60.0  # seconds of back-off, unless the endpoint asks for more
LONGEST_WISH = 600.0  # seconds that an endpoint may ask to wait
# Not the global generator, whose state belongs to the run's seed.
_jitter = random.Random()


class Fault(Exception):
    """A request without an answer.

    Attributes:
        final: Whether the same request would fail again.
        everywhere: Whether all requests to this endpoint would.
        after: Seconds that the endpoint asks to wait.
    """

    def __init__(self, reason: str, *, final: bool = False, everywhere: bool = False, after: float = 0.0) -> None:
        super().__init__(reason)
        self.final, self.everywhere, self.after = final or after > LONGEST_WISH, everywhere, after


def api_key(config: JudgeConfig) -> str | None:
    """The key that ``key_env`` names, which is kept out of every message.

    Raises:
        UserError: There is no such variable, or it holds what no header can.
    """
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        state = "holds characters that no key has" if key else "is not set"
        raise UserError(
            f"evaluate.judge.key_env: the environment variable {state}; export it, or evaluate.judge.key_env=null for "
            "an endpoint without keys"
        )
    return key


def _retry_after(value: str | None) -> float:
    """Seconds from a Retry-After header, which holds seconds or a date; 0 if it holds neither."""
    try:
        return max(0.0, float(value or 0))
    except ValueError:
        pass
    try:
        moment = parsedate_to_datetime(str(value))
    except ValueError:
        return 0.0
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())


class Client:
    """Asks a judge; safe to use from several threads.

    Args:
        config: ``base_url``, ``key_env``, ``timeout``, ``retries``.
        wait: Pauses for a number of seconds and says whether to give up; None: until `stop` is set.
    """

    def __init__(self, config: JudgeConfig, wait: Callable[[float], bool] | None = None) -> None:
        self.stop = threading.Event()
        self._config, self._key, self._wait = config, api_key(config), wait or self.stop.wait

    def ask(self, body: dict[str, Any]) -> tuple[str, str]:
        """Send one request, again after transient faults: exponential back-off with jitter, Retry-After at least.

        Args:
            body: Of a chat completion.

        Returns:
            The text of the answer, which may be empty, and the model that the endpoint says it came from.

        Raises:
            Fault: There is no answer after the last retry, or there never will be one.
        """
        attempt = 0
        while True:
            try:
                return self._post(body)
            except Fault as fault:
                if fault.final or attempt == self._config.retries:
                    raise
                pause = min(LONGEST_PAUSE, 2.0**attempt) * _jitter.uniform(0.5, 1)
                if self._wait(max(pause, fault.after)):
                    raise
            attempt += 1

    def _post(self, body: dict[str, Any]) -> tuple[str, str]:
        url = f"{str(self._config.base_url).rstrip('/')}/chat/completions"
        headers = {"Content-Type": "application/json", "User-Agent": "efficientllava"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        if self._key:
            # A redirection must not carry the key elsewhere.
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            content = self._read(request)
        except urllib.error.HTTPError as error:
            with error:
                code, text = error.code, self._readable(error)
            after = _retry_after(error.headers.get("Retry-After"))
            final = code < 500 and code not in TRANSIENT
            raise Fault(f"HTTP {code}: {text}", final=final, everywhere=code in EVERYWHERE, after=after) from None
        except (OSError, HTTPException) as error:
            raise Fault(self._shown(f"{type(error).__name__}: {error}")) from None
        try:
            answer = json.loads(content)
            text = answer["choices"][0]["message"]["content"] or ""
            return str(text), str(answer.get("model") or body.get("model"))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Fault(f"no chat completion: {self._shown(content.decode(errors='replace'))}") from None

    def _read(self, request: urllib.request.Request) -> bytes:
        """The whole answer within the time-out, which the library applies to every packet only."""
        deadline, parts = time.monotonic() + self._config.timeout, []
        with urllib.request.urlopen(request, timeout=self._config.timeout) as response:
            while part := response.read1(1 << 16):
                parts.append(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no complete answer within {self._config.timeout:g} s")
        return b"".join(parts)

    def _readable(self, error: urllib.error.HTTPError) -> str:
        try:
            return self._shown(error.read(4096).decode(errors="replace"))
        except (OSError, HTTPException):
            return "no text"

    def _shown(self, text: str) -> str:
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:200] or "no text"


Verdict = Mapping[str, Any]
FAULTS_IN_A_ROW = 5  # requests without an answer, one after the other, after which the rest is not tried


class Stopped(Fault):
    """A request that was not sent, since others had shown that it would have been in vain."""


_READABLE: dict[str, Callable[[str], bool]] = {
    "mmvet": lambda text: mmvet_grade(text) is not None,
    "llava_bench": lambda text: llava_bench_pair(text) != FAILED,
    "mathvista": lambda text: bool(text.strip()),
}


def judge(
    asked: Sequence[Request], task: str, config: JudgeConfig, cache: Path, wait: Callable[[float], bool] | None = None
) -> tuple[list[Verdict | None], dict[str, Any], list[Request]]:
    """Find or fetch the verdicts.

    Returns:
        Per request its verdict (None where none is needed or there is none), what is said about them in
        `Judgement.info`, and the requests that have none.

    Raises:
        UserError: With an endpoint: requests without an answer, named by their records' ids.
    """
    worker = _Worker(task, config, Verdicts(cache / f"{task}.jsonl"), wait)
    found: list[Verdict | None] = [None] * len(asked)
    failed: dict[int, Fault] = {}
    with ThreadPoolExecutor(config.concurrency) as pool:
        futures = {pool.submit(worker, r.body, r.record["id"], r.run): i for i, r in enumerate(asked) if r.body}
        try:
            for future in as_completed(futures):
                try:
                    found[futures[future]] = future.result()
                except Stopped:
                    pass  # the faults that led to it are reported
                except Fault as fault:
                    failed[futures[future]] = fault
        except BaseException:
            worker.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed and config.base_url:
        raise _unanswered(task, asked, failed)
    verdicts = [verdict for verdict in found if verdict]
    info = {
        "model": config.model,
        "answered_as": sorted({verdict["model"] for verdict in verdicts}),
        "sent": worker.sent,
        "unreadable": sorted({v["id"] for v in verdicts if not _READABLE[task](v["verdict"])}),
    }
    return found, info, [asked[index] for index in sorted(failed)]


def _unanswered(task: str, asked: Sequence[Request], failed: dict[int, Fault]) -> UserError:
    ids = sorted({str(asked[index].record["id"]) for index in failed})
    shown = ", ".join(ids[:10]) + (", …" if len(ids) > 10 else "")
    reasons = "; ".join(sorted({str(fault) for fault in failed.values()})[:3])
    return UserError(f"{task}: the judge has not answered about {shown} ({reasons}); run again, nothing is asked twice")


class Verdicts:
    """Verdicts by the content of their request, on disk; the first one for a request counts, whoever asked.

    Args:
        path: The file; made when the first verdict comes.
    """

    def __init__(self, path: Path) -> None:
        self._lines, self._known = Lines(path), dict[str, Verdict]()
        self._read_new()

    def get(self, key: str) -> Verdict | None:
        """The verdict on a request, if there is one."""
        return self._known.get(key)

    def add(self, key: str, verdict: Verdict) -> Verdict:
        """Keep a verdict.

        Args:
            key: Digest of the request.
            verdict: Plain data.

        Returns:
            The verdict that counts: another process's, if that was earlier.

        Raises:
            UserError: The file cannot be written.
        """
        with self._lines:
            self._read_new()
            if key not in self._known:
                self._lines.append([{"key": key, **verdict}])
                self._read_new()
        return self._known[key]

    def _read_new(self) -> None:
        for verdict in self._lines.new():
            self._known.setdefault(verdict["key"], verdict)


class _Worker:
    """Gets one verdict: from the cache, else from the endpoint, asking again while it cannot be read."""

    def __init__(self, task: str, config: JudgeConfig, cache: Verdicts, wait: Callable[[float], bool] | None) -> None:
        self._task, self._config, self._cache = task, config, cache
        self._client = Client(config, wait) if config.base_url else None
        self._lock, self.sent, self._row = threading.Lock(), 0, 0

    def stop(self) -> None:
        if self._client:
            self._client.stop.set()

    def __call__(self, body: dict[str, Any], record: str, run: int) -> Verdict:
        """The first readable verdict, or the last one."""
        verdict: Verdict = {}
        for attempt in range(self._config.attempts):
            changed = {"model": self._config.model, **prompts.again(self._task, body, attempt), **self._config.body}
            sent = {name: content for name, content in changed.items() if content is not None}
            key = digest([sent, run, attempt])
            verdict = self._cache.get(key) or self._ask(key, sent, {"id": record, "run": run, "attempt": attempt})
            if _READABLE[self._task](verdict["verdict"]):
                break
        return verdict

    def _ask(self, key: str, body: dict[str, Any], about: dict[str, Any]) -> Verdict:
        if self._client is None:
            raise Fault("no endpoint", final=True)
        if self._client.stop.is_set():
            raise Stopped("not tried")
        try:
            text, model = self._client.ask(body)
        except Fault as fault:
            with self._lock:
                self._row += 1
                if fault.everywhere or self._row >= FAULTS_IN_A_ROW:
                    self.stop()
            raise
        with self._lock:
            self.sent, self._row = self.sent + 1, 0
        return self._cache.add(key, {**about, "model": model, "verdict": text, "request": body})
