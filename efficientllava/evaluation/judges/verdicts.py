"""What judges have said, on disk: one line of JSON per request, which several processes may add to."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from ...errors import UserError

Verdict = Mapping[str, Any]


class VerdictCache:
    """Verdicts by the content of their request; the first one for a request counts, whoever asked.

    A line that a kill has left unfinished is passed over.

    Args:
        path: JSON-lines file; it and its folder are made when the first verdict comes.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._known, self._offset = path, dict[str, Verdict](), 0
        self._lock = threading.Lock()
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
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, FileLock(self._path.with_name(f".{self._path.name}.lock")):
                self._read_new()
                if key not in self._known:
                    self._append(json.dumps({"key": key, **verdict}).encode())
                    self._read_new()
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror}); free the disk") from error
        return self._known[key]

    def _append(self, line: bytes) -> None:
        with self._path.open("ab+") as handle:
            end = handle.seek(0, 2)
            handle.seek(max(0, end - 1))
            torn = handle.read(1) not in (b"", b"\n")
            handle.write((b"\n" if torn else b"") + line + b"\n")

    def _read_new(self) -> None:
        """Take over the whole lines that were added since the last look."""
        if not self._path.exists():
            return
        with self._path.open("rb") as handle:
            handle.seek(self._offset)
            added = handle.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            with suppress(ValueError, TypeError, KeyError):
                verdict = json.loads(line)
                self._known.setdefault(verdict["key"], verdict)
