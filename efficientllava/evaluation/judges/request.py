"""What a judge has to be asked about predictions, and the file that keeps it for later."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...runtime.files import whole_file
from ...schema import JudgeConfig
from ..scorers import Record
from ..scorers.text import mathvista_extract
from . import prompts


@dataclass(frozen=True)
class Request:
    """One record that is to be judged once.

    Attributes:
        run: Number of the evaluation, from 0.
        record: The record.
        body: Of a chat completion without a model; None where no judge is needed.
        prompts: Digest and source of the prompts.
    """

    run: int
    record: Record
    body: dict[str, Any] | None
    prompts: str


def requests(records: Sequence[Record], task: str, config: JudgeConfig, protocol: str = "llava") -> list[Request]:
    """What a judge has to be asked about predictions.

    Args:
        records: As the task's scorer wants them, but without verdicts; see also `prompts.request`.
        task: mmvet, llava_bench or mathvista.
        config: ``prompts`` and ``runs``.
        protocol: ``llava`` or ``lmms_eval``; decides about lengths and the number of evaluations.

    Returns:
        For every evaluation one per record.

    Raises:
        UserError: A record or a prompt file lacks something.
    """
    texts = prompts.load(task, config.prompts)
    label = f"{texts.digest} ({texts.source})"

    def body(record: Record, run: int) -> dict[str, Any] | None:
        if task == "mathvista" and mathvista_extract(str(record.get("prediction") or "").strip(), record) is not None:
            return None
        return prompts.request(task, record, texts, protocol, run)

    runs = config.runs or prompts.SETTINGS[protocol, task][2]
    return [Request(run, record, body(record, run), label) for run in range(runs) for record in records]


def write_requests(asked: Sequence[Request], task: str, protocol: str, path: Path) -> None:
    """Write requests for later, one line of JSON each; `read_requests` reads them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as handle:
        for request in asked:
            handle.write(json.dumps({"task": task, "protocol": protocol, **asdict(request)}) + "\n")


def read_requests(path: Path) -> tuple[list[Request], str, str]:
    """Read what `write_requests` has written.

    Returns:
        The requests, the task and the protocol.

    Raises:
        UserError: The file cannot be read, or is of another kind.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        heads = {(row.pop("task"), row.pop("protocol")) for row in rows}
        asked = [Request(**row) for row in rows]
        ((task, protocol),) = heads
        prompts.SETTINGS[protocol, task]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: holds no requests for a judge ({error!r}); give a file that was exported") from error
    return asked, task, protocol
