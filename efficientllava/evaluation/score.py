"""``python -m efficientllava.evaluation.score <predictions.jsonl> --task gqa``: score any file of predictions.

The file holds one JSON object per line (or one JSON list, or an object of objects by id), in LLaVA's answer format
(``question_id``, ``prompt``, ``text``, ``metadata``) or in ours (``id``, ``question``, ``prediction``, ``answer``).
References that are not in it, nor in its ``metadata``, come from a second file: ``--gold``.
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

from ..errors import UserError
from .scorers import PROTOCOLS, Record, Scorer, choice, judged, text, vqa, yesno

SCORERS: dict[str, Scorer] = {
    "ai2d": choice.ai2d,
    "docvqa": text.docvqa,
    "gqa": text.gqa,
    "llava_bench": judged.llava_bench,
    "mathvista": text.mathvista,
    "mme": yesno.mme,
    "mmmu": choice.mmmu,
    "mmvet": judged.mmvet,
    "pope": yesno.pope,
    "scienceqa": choice.scienceqa,
    "textvqa": vqa.vizwiz,
    "vizwiz": vqa.vizwiz,
    "vqav2": vqa.vqav2,
}
# What others call our keys; the first that is there counts.
ALIASES = {
    "id": ("id", "question_id", "questionId", "pid"),
    "question": ("question", "prompt"),
    "prediction": ("prediction", "text", "response"),
    "answer": ("answer", "answers", "ground_truth", "label"),
    "verdict": ("verdict", "content"),
}
GOLD_ALIASES = ALIASES | {"question": ("question", "text"), "prediction": ()}


def read(path: Path, aliases: dict[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Read a file of predictions or references.

    Args:
        path: JSON lines, a JSON list of objects, or a JSON object of objects by id.
        aliases: Our keys, and the names under which they may be found.

    Returns:
        The objects, each with the content of its ``metadata`` and with our keys beside its own; ids are texts.

    Raises:
        UserError: If the file cannot be read, is no JSON, is empty, or holds something without an id.
    """
    try:
        content = _parse(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a JSON or JSON-lines file") from error
    if isinstance(content, dict):
        nested = all(isinstance(item, dict) for item in content.values())
        content = [{"id": key, **item} for key, item in content.items()] if nested else [content]
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: holds no objects; give one JSON object per line")
    rows = []
    for number, item in enumerate(content, 1):
        metadata = item.get("metadata") if isinstance(item, dict) else None
        row = {**metadata, **item} if isinstance(metadata, dict) else item
        if not isinstance(row, dict) or not any(name in row for name in aliases["id"]):
            raise UserError(f"{path}: object {number} has no id; it needs one of {', '.join(aliases['id'])}")
        row |= {key: row[name] for key, names in aliases.items() for name in reversed(names) if name in row}
        rows.append(row | {"id": str(row["id"])})
    return rows


def _parse(path: Path, content: str) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        items = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            items += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise UserError(f"{path}: line {number} is no JSON ({error})") from error
    return items


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
    from ..schema import JUDGED, JudgeConfig
    from .judges.request import requests, write_requests

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
    parser.add_argument("--task", required=True, choices=SCORERS)
    parser.add_argument("--protocol", default="llava", choices=PROTOCOLS)
    parser.add_argument("--gold", type=Path, help="file of references")
    parser.add_argument("--outcomes", type=Path, help="file to write with what became of every prediction (JSON lines)")
    parser.add_argument(
        "--requests", type=Path, help="do not score: write what a judge has to be asked (mmvet, llava_bench, mathvista)"
    )
    parser.add_argument("--prompts", help="with --requests: as evaluate.judge.prompts")
    options = parser.parse_args(arguments)
    records = read(options.predictions, ALIASES)
    twice = [key for key, count in Counter((row["id"], _asked(row)) for row in records).items() if count > 1]
    if twice:
        raise UserError(
            f"{options.predictions}: question {twice[0][0]!r} is answered more than once; remove the others"
        )
    if options.gold:
        records = join(records, read(options.gold, GOLD_ALIASES))
    if options.requests:
        return _export(records, options)
    scores = SCORERS[options.task](records, options.protocol)
    if options.outcomes:
        lines = (json.dumps(asdict(outcome)) + "\n" for outcome in scores.outcomes)
        options.outcomes.write_text("".join(lines), encoding="utf-8")
    print(json.dumps({"task": options.task, "protocol": options.protocol, "metrics": scores.metrics}, indent=2))


if __name__ == "__main__":
    from ..outcome import exit_code

    sys.exit(exit_code(lambda: main(sys.argv[1:])))
