"""Chat completions of an OpenAI-compatible endpoint: one request at a time, repeated until it is answered.

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
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any

from ...errors import UserError
from ...schema import JudgeConfig

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
