"""From requests to verdicts: from the cache, else from the endpoint, several at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...runtime.content import digest
from ...runtime.lines import Lines
from ...schema import JudgeConfig
from ..scorers.judged import FAILED, llava_bench_pair, mmvet_grade
from . import prompts
from .client import Client, Fault
from .request import Request

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
