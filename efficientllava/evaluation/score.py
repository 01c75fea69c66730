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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from ..runtime.errors import UserError
from ..settings.schema import DataConfig, EvaluateConfig
from . import tasks
from .answers import GOLD_ALIASES, read
from .benchmark import BenchmarkTask
from .scorers import PROTOCOLS, Record, Scorer, vqa

# Scorers without a benchmark of their own.
EXTRA: dict[str, Scorer] = {"textvqa": vqa.vizwiz, "vqav2": vqa.vqav2}


def scorer(task: str) -> Scorer:
    """The scorer of a benchmark, by its name: one of `tasks.available` or of `EXTRA`."""
    if task in EXTRA:
        return EXTRA[task]
    found = tasks.load(task, DataConfig(), EvaluateConfig())
    if isinstance(found, BenchmarkTask):
        return found.benchmark.scorer
    return lambda records, protocol: found.score(records)


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
    """A command line whose faults are a `UserError`."""

    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's two."""
        raise UserError(f"{message}; --help shows the options")


def _export(records: Sequence[Record], options: argparse.Namespace) -> None:
    from ..settings.schema import JUDGED, JudgeConfig
    from .judges.prompts import requests, write_requests

    if options.task not in JUDGED:
        raise UserError(f"--requests: {options.task} has no judge; only {', '.join(JUDGED)} have")
    asked = requests(records, options.task, JudgeConfig(prompts=options.prompts), options.protocol)
    write_requests(asked, options.task, options.protocol, options.requests)


def main(arguments: Sequence[str]) -> None:
    """Score a file and print its metrics as JSON.

    Args:
        arguments: The command line without the program's name.

    Raises:
        UserError: If the command line, the predictions or the references are faulty.
    """
    parser = Parser(prog="python -m efficientllava.evaluation.score", description="Score a file of predictions.")
    parser.add_argument("predictions", type=Path)
    parser.add_argument("--task", required=True, choices=sorted({*tasks.available(), *EXTRA}))
    parser.add_argument("--protocol", default="llava", choices=PROTOCOLS)
    parser.add_argument("--gold", type=Path, help="file of references")
    parser.add_argument("--outcomes", type=Path, help="file to write with what became of every prediction (JSON lines)")
    parser.add_argument(
        "--requests", type=Path, help="do not score: write what a judge has to be asked (mmvet, llava_bench, mathvista)"
    )
    parser.add_argument("--prompts", help="with --requests: as evaluate.judge.prompts")
    options = parser.parse_args(arguments)
    records = read(options.predictions)
    _require_task(records, options.task)
    keys = ((row["id"], _asked(row), row.get("category")) for row in records)
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
    if options.requests:
        return _export(records, options)
    scores = scorer(options.task)(records, options.protocol)
    if options.outcomes:
        lines = (json.dumps(asdict(outcome)) + "\n" for outcome in scores.outcomes)
        options.outcomes.write_text("".join(lines), encoding="utf-8")
    head = {"task": options.task, "protocol": options.protocol, **unanswered}
    print(json.dumps({**head, "metrics": scores.metrics}, indent=2))


if __name__ == "__main__":
    from ..runtime.exit_codes import exit_code

    sys.exit(exit_code(lambda: main(sys.argv[1:])))
