"""Judges: MM-Vet, LLaVA-Bench and MathVista's extraction, by any OpenAI-compatible endpoint (extra ``[judges]``).

`score` does it all for a task: it asks for what the cache does not know, and scores. Every verdict is kept under the
content of its request, so that a second run sends nothing. Without an endpoint (``evaluate.judge.base_url=null``) the
cache is all there is: what it lacks is written to a file, and
``python -m efficientllava.evaluation.judges <requests.jsonl> --base-url … --model …`` sends it later.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from ..runtime import Lines, UserError, digest, exit_code, say
from ..settings.checks import require_valid
from ..settings.schema import JudgeConfig
from . import judge_prompts
from .judge_prompts import JUDGES, Request, requests
from .score import Parser
from .scorers.text import over_runs
from .tasks import Record, Scores
from .tasks.published import BENCHMARKS

EVERYWHERE = {401, 403, 404}  # no other request would fare better
FAULTS_IN_A_ROW = 5  # requests without an answer, one after the other, after which the rest is not tried
Verdict = Mapping[str, Any]
Ask = Callable[[dict[str, Any]], Coroutine[Any, Any, tuple[str, str]]]


@dataclass(frozen=True)
class Judgement(Scores):
    """What a judge makes of the predictions on one task.

    Of several evaluations the metrics are mean and deviation, see `over_runs`, the outcomes those of the first. Both
    are empty while verdicts are missing.

    Attributes:
        info: What belongs beside the score: ``model``, ``answered_as`` (the names that the endpoint gave), ``prompts``
            (digest and source), ``runs``, ``sent`` (verdicts that were not in the cache) and ``unreadable`` (ids of
            replies that no attempt made readable: the scorers' ``n_failed``).
        missing: Requests that nobody has answered; empty where there is an endpoint.
    """

    info: dict[str, Any]
    missing: list[Request]


def prepare(task: str, config: JudgeConfig) -> None:
    """A `UserError` if a task has a judge that cannot be asked: without prompt file, key or client."""
    if task in JUDGES:
        judge_prompts.load(task, config.prompts)
        if config.base_url:
            api_key(config)
            _installed()


def score(
    records: Sequence[Record], task: str, config: JudgeConfig, cache: Path, protocol: str, export: Path
) -> Judgement:
    """Have predictions judged, score them, and say who judged. Call it on one process only.

    Args:
        records: See `efficientllava.evaluation.judge_prompts.requests`, also for ``task``.
        cache: Folder of verdicts, shared by runs and processes.
        protocol: ``llava`` or ``lmms_eval``.
        export: File for the requests, written when verdicts are missing and there is no endpoint to ask.

    Raises:
        UserError: A record lacks something, or requests stay without an answer; what was answered is in the cache.
    """

    def tell(text: str) -> None:
        say(escape(f"{task}: {text}"))

    asked = requests(records, task, config, protocol)
    result = score_requests(asked, task, config, cache, protocol)
    if result.missing:
        judge_prompts.write_requests(asked, task, protocol, export)
        what = "counts as wrong what no rule reads" if task == "mathvista" else "no score yet"
        later = f"python -m efficientllava.evaluation.judges {export} --base-url … --model …"
        tell(f"{what}, {len(result.missing)} requests wait for a judge (evaluate.judge.base_url); later: {later}")
        return result
    info = result.info
    names = ", ".join(info["answered_as"]) or "nobody"
    tell(f"judged by {names}, prompts {info['prompts']}, {info['runs']} evaluations, {info['sent']} sent")
    if info["unreadable"]:
        shown = ", ".join(info["unreadable"])
        tell(f"warning: no score could be read from the judge's replies to {shown}; see n_failed")
    return result


def score_requests(
    asked: Sequence[Request], task: str, config: JudgeConfig, cache: Path, protocol: str = "llava"
) -> Judgement:
    """`score` for requests that are already made, without a word."""
    asking = Asking(task, config, Verdicts(cache / f"{task}.jsonl"))
    state = random.getstate()
    try:
        asyncio.run(asking.all(asked))
    finally:
        random.setstate(state)  # the client draws its pauses from the run's generator
    if asking.faults:
        raise _unanswered(task, {str(asked[index].record["id"]): str(f) for index, f in asking.faults.items()})
    judged: dict[int, list[Record]] = {}
    for index, request in enumerate(asked):
        verdict = asking.found.get(index)
        added = {} if verdict is None else {"verdict": verdict["verdict"], "extraction": verdict["verdict"].strip()}
        judged.setdefault(request.run, []).append({**request.record, **added})
    verdicts, readable = asking.found.values(), JUDGES[task].readable
    info = {
        "model": config.model,
        "answered_as": sorted({verdict["model"] for verdict in verdicts}),
        "sent": asking.sent,
        "unreadable": sorted({verdict["id"] for verdict in verdicts if not readable(verdict["verdict"])}),
        "runs": len(judged),
        "prompts": asked[0].prompts if asked else None,
    }
    if missing := [request for index, request in enumerate(asked) if request.body and index not in asking.found]:
        return Judgement({}, [], info, missing)
    scores = [BENCHMARKS[task].scorer(judged[run], protocol) for run in sorted(judged)]
    metrics = scores[0].metrics if len(scores) == 1 else over_runs([run.metrics for run in scores])
    return Judgement(metrics, scores[0].outcomes, info, [])


def _unanswered(task: str, faults: Mapping[str, str]) -> UserError:
    shown = ", ".join(sorted(faults)[:10]) + (", …" if len(faults) > 10 else "")
    reasons = "; ".join(sorted({*faults.values()})[:3])
    return UserError(f"{task}: the judge has not answered about {shown} ({reasons}); run again, nothing is asked twice")


class Asking:
    """Gets verdicts: from the cache, else from the endpoint, several at a time.

    Attributes:
        found: Verdicts by the number of their request.
        faults: Requests to the endpoint without an answer; those that were not tried after them are in neither.
        sent: Number of answers that came.
    """

    def __init__(self, task: str, config: JudgeConfig, cache: Verdicts) -> None:
        self.found: dict[int, Verdict] = {}
        self.faults: dict[int, Fault] = {}
        self.sent = self._row = 0
        self._task, self._config, self._cache = task, config, cache

    async def all(self, asked: Sequence[Request]) -> None:
        """Find or fetch the verdicts on all requests that need one."""
        gate = asyncio.Semaphore(self._config.concurrency)

        async def one(number: int, request: Request, ask: Ask | None) -> None:
            async with gate:
                try:
                    verdict = await self._verdict(request, ask)
                except Fault as fault:
                    self.faults[number], self._row = fault, self._row + 1
                    if fault.everywhere or self._row >= FAULTS_IN_A_ROW:
                        raise  # which ends all others
                else:
                    self.found |= {number: verdict} if verdict else {}

        try:
            async with endpoint(self._config) as ask, asyncio.TaskGroup() as group:
                for number, request in enumerate(asked):
                    if request.body:
                        group.create_task(one(number, request, ask))
        except ExceptionGroup as group:
            if others := group.split(Fault)[1]:  # such as a full disk
                raise others.exceptions[0] from None

    async def _verdict(self, request: Request, ask: Ask | None) -> Verdict | None:
        """The first readable verdict, or the last one; None where the cache has none and nobody can be asked."""
        verdict: Verdict | None = None
        for attempt in range(self._config.attempts):
            again = judge_prompts.again(self._task, request.body or {}, attempt)
            body = {"model": self._config.model, **again, **self._config.body}
            body = {name: content for name, content in body.items() if content is not None}
            key = digest([body, request.run, attempt])
            verdict = self._cache.get(key)
            if verdict is None and ask:
                text, model = await ask(body)
                self.sent, self._row = self.sent + 1, 0
                about = {"id": request.record["id"], "run": request.run, "attempt": attempt}
                verdict = self._cache.add(key, {**about, "model": model, "verdict": text, "request": body})
            if verdict is None or JUDGES[self._task].readable(verdict["verdict"]):
                break
        return verdict


class Verdicts(dict[str, Verdict]):
    """Verdicts by the content of their request, in a file; the first one for a request counts, whoever asked."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(path)
        self._read_new()

    def add(self, key: str, verdict: Verdict) -> Verdict:
        """Keep a verdict, and get the one that counts: another process's, if that was earlier.

        Raises:
            UserError: The file cannot be written.
        """
        with self._lines:
            self._read_new()
            if key not in self:
                self._lines.append([{"key": key, **verdict}])
                self._read_new()
        return self[key]

    def _read_new(self) -> None:
        for verdict in self._lines.new():
            self.setdefault(verdict["key"], verdict)


class Fault(Exception):
    """A request without an answer; ``everywhere``: all requests to this endpoint would fail."""

    def __init__(self, reason: str, everywhere: bool = False) -> None:
        super().__init__(reason)
        self.everywhere = everywhere


def api_key(config: JudgeConfig) -> str | None:
    """The key that ``key_env`` names, kept out of every message; a `UserError` if it is not there or no key."""
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


def _installed() -> tuple[Any, Any]:
    """The client and what it speaks HTTP with, both silent about single requests."""
    try:
        import httpx2
        import openai
    except ImportError as error:
        raise UserError(
            f"evaluate.judge.base_url: the client openai cannot be imported ({error}); pip install -c constraints.txt "
            "-e '.[judges]', or leave it out: the requests are written to a file"
        ) from error
    for library in ("httpx2", "openai"):
        logging.getLogger(library).setLevel(logging.WARNING)
    return openai, httpx2


@asynccontextmanager
async def endpoint(config: JudgeConfig) -> AsyncIterator[Ask | None]:
    """What asks the judge: the body of a chat completion in, the answer's text and the name of its model out.

    The client repeats a request after transient faults, with growing pauses and not before Retry-After. The text may be
    empty; a `Fault` says that there is no answer after the last retry, or that there never will be one.

    Yields:
        None where there is no endpoint.
    """
    if config.base_url is None:
        yield None
        return
    (openai, httpx), key = _installed(), api_key(config)

    def shown(text: str) -> str:
        return " ".join((text.replace(key, "***") if key else text).split())[:200] or "no text"

    async def check(response: Any) -> None:
        """Read the whole answer within the time-out, which the client applies to every packet only."""
        try:
            async with asyncio.timeout(config.timeout):
                content = await response.aread()
        except TimeoutError:
            raise httpx.ReadTimeout(f"no complete answer within {config.timeout:g} s") from None
        try:
            if response.is_success:
                json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            raise httpx.DecodingError(f"no chat completion: {content.decode(errors='replace')}") from None

    async def ask(body: dict[str, Any]) -> tuple[str, str]:
        try:
            answer = json.loads(await client.post("/chat/completions", cast_to=str, body=body, options=headers))
        except openai.APIStatusError as error:
            code = error.status_code
            raise Fault(f"HTTP {code}: {shown(error.response.text)}", code in EVERYWHERE) from None
        except openai.APIConnectionError as error:
            raise Fault(shown(str(error.__cause__) or type(error.__cause__).__name__)) from None
        return str(answer["choices"][0]["message"]["content"] or ""), str(answer.get("model") or body.get("model"))

    http = openai.DefaultAsyncHttpxClient(event_hooks={"response": [check]})
    headers = {} if key else {"headers": {"Authorization": openai.omit}}
    options = {"base_url": config.base_url, "timeout": config.timeout, "max_retries": config.retries}
    async with openai.AsyncOpenAI(api_key=key or "none", http_client=http, **options) as client:
        yield ask


def main(arguments: Sequence[str]) -> None:
    """Send exported requests, print the metrics and what belongs beside them as JSON.

    Raises:
        UserError: The command line or the file is faulty, or the endpoint does not answer.
    """
    default = JudgeConfig()
    numbers = {"attempts": int, "concurrency": int, "timeout": float, "retries": int}
    parser = Parser(
        "efficientllava.evaluation.judges",
        "Ask a judge, then score.",
        {
            "requests": {"type": Path, "help": "exported by a run without a judge"},
            "--base-url": {"required": True, "help": "of an OpenAI-compatible endpoint, up to /v1"},
            "--model": {"required": True, "help": "name of the judge there"},
            "--key-env": {"default": default.key_env, "help": "variable that holds the key; '' if there is none"},
            "--cache": {"type": Path, "default": Path("outputs/cache/verdicts"), "help": "folder of verdicts"},
            **{
                f"--{name}": {"type": kind, "default": getattr(default, name), "help": f"as evaluate.judge.{name}"}
                for name, kind in numbers.items()
            },
            "--body": {"type": json.loads, "default": {}, "help": "JSON merged into every request; null removes"},
        },
    )
    options: dict[str, Any] = vars(parser.parse_args(arguments))
    path, cache = options.pop("requests"), options.pop("cache")
    options["key_env"] = options["key_env"] or None
    config = JudgeConfig(**options)
    require_valid(config, "evaluate.judge.")
    api_key(config)
    asked, task, protocol = judge_prompts.read_requests(path)
    result = score_requests(asked, task, config, cache, protocol)
    print(json.dumps({"task": task, "protocol": protocol, "judge": result.info, "metrics": result.metrics}, indent=2))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
