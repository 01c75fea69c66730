"""``python -m efficientllava.evaluation.score <predictions.jsonl> --task gqa``: score any file of predictions.

The file holds one JSON object per line (or one JSON list, or an object of objects by id), in LLaVA's answer format
(``question_id``, ``prompt``, ``text``, ``metadata``) or in ours (``id``, ``question``, ``prediction``, ``answer``).
References that are not in it, nor in its ``metadata``, come from a second file: ``--gold``; ``unanswered`` counts those
that no prediction belongs to, which the metrics leave out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from ..data.sources import DECODER, BadRecordError
from ..runtime import UserError, exit_code, json_lines, write_whole
from ..settings.schema import JUDGED, DataConfig, EvaluateConfig, JudgeConfig
from . import tasks
from .judge_prompts import requests, write_requests
from .scorers import text
from .tasks import PROTOCOLS, Benchmark, Record, Scorer

# What others call our keys; the first that is there counts.
ALIASES = {
    "id": ("id", "question_id", "questionId", "pid"),
    "question": ("question", "prompt"),
    "prediction": ("prediction", "text", "response"),
    "answer": ("answer", "answers", "ground_truth", "label"),
    "verdict": ("verdict", "content"),
}
GOLD_ALIASES = ALIASES | {"question": ("question", "text"), "prediction": ()}
# Scorers without a benchmark of their own.
EXTRA: dict[str, Scorer] = {"textvqa": text.vizwiz, "vqav2": text.vqav2}


def as_record(row: Mapping[str, Any], aliases: Mapping[str, Sequence[str]] = ALIASES) -> dict[str, Any]:
    """What scorers read: a line with its ``metadata`` spread out and our keys beside its own; the id is a text.

    What the model said is the line's own, even where a column of the benchmark is called so, too.

    Args:
        row: A line, with some kind of id.
        aliases: Our keys, and the names under which they may be found.
    """
    flat = _flat(row)
    said = {**flat, **row}
    places = {key: said if key == "prediction" else flat for key in aliases}
    found = {
        key: places[key][name] for key, names in aliases.items() for name in reversed(names) if name in places[key]
    }
    return flat | found | {"id": str(row.get("id", found["id"]))}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    metadata = row.get("metadata")
    return {**row, **metadata} if isinstance(metadata, dict) else dict(row)


def read(path: Path, aliases: Mapping[str, Sequence[str]] = ALIASES) -> list[dict[str, Any]]:
    """Read a file of predictions or references.

    Args:
        path: JSON lines, a JSON list of objects, or a JSON object of objects by id.
        aliases: Our keys, and the names under which they may be found.

    Returns:
        The objects as scorers read them, see `as_record`.

    Raises:
        UserError: If the file cannot be read, is no JSON, is empty, or holds something without an id.
    """
    try:
        content = _parse(path, path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}); give a JSON or JSON-lines file") from error
    if isinstance(content, dict):
        nested = all(isinstance(item, dict) for item in content.values())
        content = [{"id": key, **item} for key, item in content.items()] if nested else [content]
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: holds no objects; give one JSON object per line")
    for number, item in enumerate(content, 1):
        known = _flat(item) if isinstance(item, dict) else {}
        if not {*known} & {*aliases["id"]}:
            raise UserError(f"{path}: object {number} has no id; it needs one of {', '.join(aliases['id'])}")
    return [as_record(item, aliases) for item in content]


def _parse(path: Path, content: str) -> Any:
    try:
        return DECODER.decode(content)
    except BadRecordError as error:
        raise UserError(f"{path}: {error}; leave one of them out") from error
    except (ValueError, RecursionError):
        items = []
    for number, line in enumerate(content.split("\n"), 1):
        try:
            items += [DECODER.decode(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is no JSON ({error})") from error
    return items


def scorer(task: str) -> Scorer:
    """The scorer of a benchmark, by its name: one of `tasks.available` or of `EXTRA`."""
    if task in EXTRA:
        return EXTRA[task]
    found = tasks.declared(task)
    if isinstance(found, Benchmark):
        return found.scorer
    return lambda records, _: found(DataConfig(), EvaluateConfig()).score(records)


def _require_task(records: Sequence[Record], task: str) -> None:
    """Refuse predictions that say that they belong to another benchmark."""
    for name in {str(row.get("benchmark", task)) for row in records} & {*tasks.available()} - {task}:
        if scorer(name) is not scorer(task):
            raise UserError(f"--task={task}: these are predictions on {name}; set --task={name}, or give their file")


def _asked(row: Record) -> str:
    """The question on one line, without the sentence that MME's references end with and LLaVA's prompts replace."""
    return " ".join(str(row.get("question", "")).replace("Please answer yes or no.", "").split())


def join(predictions: Sequence[Record], gold: Sequence[Record]) -> list[dict[str, Any]]:
    """Give every prediction its reference, by id and, where several references share it, by the question.

    Args:
        predictions: From `read`.
        gold: From `read`; its keys win over those of the predictions. References without a prediction are left out.

    Raises:
        UserError: If a prediction has no reference, or several.
    """
    by_id = defaultdict(list)
    for reference in gold:
        by_id[reference["id"]].append(reference)
    records = []
    for row in predictions:
        found = by_id[row["id"]]
        if len(found) > 1:
            found = [reference for reference in found if _asked(reference) in _asked(row)]
        if len(found) != 1:
            raise UserError(f"prediction {row['id']!r}: has {len(found)} references in --gold; it must have one")
        records.append({**row, **found[0]} | {key: row[key] for key in ("id", "prediction") if key in row})
    return records


class Parser(argparse.ArgumentParser):
    """The command line of a module, whose faults are a `UserError`; ``arguments`` are those of ``add_argument``."""

    def __init__(self, module: str, description: str, arguments: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__(prog=f"python -m {module}", description=description)
        for name, options in arguments.items():
            self.add_argument(name, **options)

    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's two."""
        raise UserError(f"{message}; --help shows the options")


def main(arguments: Sequence[str]) -> None:
    """Score a file and print its metrics as JSON.

    Args:
        arguments: The command line without the program's name.

    Raises:
        UserError: If the command line, the predictions or the references are faulty.
    """
    parser = Parser(
        "efficientllava.evaluation.score",
        "Score a file of predictions.",
        {
            "predictions": {"type": Path},
            "--task": {"required": True, "choices": sorted({*tasks.available(), *EXTRA})},
            "--protocol": {"choices": PROTOCOLS, "help": "default: the one that the file names, or llava"},
            "--gold": {"type": Path, "help": "file of references"},
            "--outcomes": {"type": Path, "help": "file to write with what became of every prediction (JSON lines)"},
            "--requests": {
                "type": Path,
                "help": f"do not score: write what a judge has to be asked ({', '.join(sorted(JUDGED))})",
            },
            "--prompts": {"help": "with --requests: as evaluate.judge.prompts"},
        },
    )
    options = parser.parse_args(arguments)
    read_from = [file.resolve() for file in (options.predictions, options.gold) if file]
    for name in ("outcomes", "requests"):
        if (written := getattr(options, name)) and written.resolve() in read_from:
            raise UserError(f"--{name}: {written} is what is read; give it another name")
    records = read(options.predictions)
    _require_task(records, options.task)
    keys = ((row["id"], _asked(row), str(row.get("category"))) for row in records)
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise UserError(
            f"{options.predictions}: question {twice[0][0]!r} is answered more than once; remove the others"
        )
    unanswered: dict[str, int] = {}
    if options.gold:
        gold = read(options.gold, GOLD_ALIASES)
        records = join(records, gold)
        unanswered = {"unanswered": len(gold) - len(records)}
    named = {str(row.get("protocol")) for row in records} & {*PROTOCOLS}
    protocol = options.protocol or (named.pop() if len(named) == 1 else "llava")
    if options.requests:
        if options.task not in JUDGED:
            raise UserError(f"--requests: {options.task} has no judge; only {', '.join(JUDGED)} have")
        asked = requests(records, options.task, JudgeConfig(prompts=options.prompts), protocol)
        return write_requests(asked, options.task, protocol, options.requests)
    scores = scorer(options.task)(records, protocol)
    head = {"task": options.task, "protocol": protocol, **unanswered}
    print(json.dumps({**head, "metrics": scores.metrics}, indent=2))
    if options.outcomes:
        options.outcomes.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.outcomes, json_lines(map(asdict, scores.outcomes)))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
