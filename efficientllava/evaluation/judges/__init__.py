"""Judges: MM-Vet, LLaVA-Bench and MathVista's extraction, by any OpenAI-compatible endpoint.

`score` does it all for a task: it asks for what the cache does not know, and scores. Every verdict is kept under the
content of its request, so that a second run sends nothing. Without an endpoint (``evaluate.judge.base_url=null``) the
cache is all there is: what it lacks is written to a file, which ``python -m efficientllava.evaluation.judges`` sends
later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from ...runtime.console import say
from ...settings.schema import JudgeConfig
from ..scorers import Outcome, Record, Scorer
from ..scorers.averages import over_runs
from ..scorers.judged import llava_bench, mmvet
from ..scorers.text import mathvista
from . import prompts
from .asking import api_key, judge
from .prompts import Request, requests, write_requests

SCORERS: dict[str, Scorer] = {"mmvet": mmvet, "llava_bench": llava_bench, "mathvista": mathvista}


@dataclass(frozen=True)
class Judgement:
    """What a judge makes of the predictions on one task.

    Attributes:
        metrics: Those of the task's scorer; with several evaluations their mean and deviation, see `over_runs`. Empty
            while verdicts are missing.
        outcomes: Per record, of the first evaluation.
        info: What belongs beside the score: ``model``, ``answered_as`` (the names that the endpoint gave), ``prompts``
            (digest and source), ``runs``, ``sent`` (verdicts that were not in the cache) and ``unreadable`` (ids of
            replies that no attempt made readable: the scorers' ``n_failed``).
        missing: Requests that nobody has answered; empty where there is an endpoint.
    """

    metrics: dict[str, float]
    outcomes: list[Outcome]
    info: dict[str, Any]
    missing: list[Request]


def prepare(task: str, config: JudgeConfig) -> None:
    """See that a judge can be asked, before anything is generated; a task without a judge passes.

    Raises:
        UserError: A prompt file or the endpoint's key is not there.
    """
    if task in SCORERS:
        prompts.load(task, config.prompts)
        if config.base_url:
            api_key(config)


def score(
    records: Sequence[Record],
    task: str,
    config: JudgeConfig,
    cache: Path,
    protocol: str = "llava",
    export: Path | None = None,
) -> Judgement:
    """Have predictions judged, score them, and say who judged. Call it on one process only.

    Args:
        records: See `request.requests`.
        task: mmvet, llava_bench or mathvista.
        config: The judge.
        cache: Folder of verdicts, shared by runs and processes.
        protocol: ``llava`` or ``lmms_eval``.
        export: File for the requests, written when verdicts are missing and there is no endpoint to ask.

    Raises:
        UserError: A record lacks something, or requests stay without an answer; what was answered is in the cache.
    """
    asked = requests(records, task, config, protocol)
    result = score_requests(asked, task, config, cache, protocol)
    info = result.info
    if result.missing:
        later = ""
        if export:
            write_requests(asked, task, protocol, export)
            later = f"; later: python -m efficientllava.evaluation.judges {export} --base-url … --model …"
        count, what = (
            len(result.missing),
            "counts as wrong what no rule reads" if task == "mathvista" else "no score yet",
        )
        say(escape(f"{task}: {what}, {count} requests wait for a judge (evaluate.judge.base_url){later}"))
        return result
    names = ", ".join(info["answered_as"]) or "nobody"
    say(
        escape(f"{task}: judged by {names}, prompts {info['prompts']}, {info['runs']} evaluations, {info['sent']} sent")
    )
    if info["unreadable"]:
        shown = ", ".join(info["unreadable"])
        say(escape(f"{task}: warning: no score could be read from the judge's replies to {shown}; see n_failed"))
    return result


def score_requests(
    asked: Sequence[Request],
    task: str,
    config: JudgeConfig,
    cache: Path,
    protocol: str = "llava",
    wait: Callable[[float], bool] | None = None,
) -> Judgement:
    """`score` for requests that are already made, without a word; ``wait`` is for `Client`."""
    verdicts, info, missing = judge(asked, task, config, cache, wait)
    judged: dict[int, list[Record]] = {}
    for request, verdict in zip(asked, verdicts, strict=True):
        added = {} if verdict is None else {"verdict": verdict["verdict"], "extraction": verdict["verdict"].strip()}
        judged.setdefault(request.run, []).append({**request.record, **added})
    info |= {"runs": len(judged), "prompts": asked[0].prompts if asked else None}
    if missing:
        return Judgement({}, [], info, missing)
    scores = [SCORERS[task](judged[run], protocol) for run in sorted(judged)]
    metrics = scores[0].metrics if len(scores) == 1 else over_runs([run.metrics for run in scores])
    return Judgement(metrics, scores[0].outcomes, info, [])
