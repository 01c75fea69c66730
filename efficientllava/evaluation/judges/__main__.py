"""``python -m efficientllava.evaluation.judges <requests.jsonl> --base-url … --model …``: ask later, then score."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...runtime.exit_codes import exit_code
from ...settings.checks import require_valid
from ...settings.schema import JudgeConfig
from ..score import Parser
from . import api_key, score_requests
from .prompts import read_requests


def main(arguments: Sequence[str]) -> None:
    """Send exported requests, print the metrics and what belongs beside them as JSON.

    Args:
        arguments: The command line without the program's name.

    Raises:
        UserError: The command line or the file is faulty, or the endpoint does not answer.
    """
    default = JudgeConfig()
    parser = Parser(prog="python -m efficientllava.evaluation.judges", description="Ask a judge, then score.")
    parser.add_argument("requests", type=Path, help="exported by a run without a judge")
    parser.add_argument("--base-url", required=True, help="of an OpenAI-compatible endpoint, up to /v1")
    parser.add_argument("--model", required=True, help="name of the judge there")
    parser.add_argument("--key-env", default=default.key_env, help="variable that holds the key; '' if there is none")
    parser.add_argument("--cache", type=Path, default=Path("outputs/cache/verdicts"), help="folder of verdicts")
    for name, kind in (("attempts", int), ("concurrency", int), ("timeout", float), ("retries", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(default, name), help="as evaluate.judge." + name)
    parser.add_argument("--body", type=json.loads, default={}, help="JSON merged into every request; null removes")
    options: dict[str, Any] = vars(parser.parse_args(arguments))
    path, cache = options.pop("requests"), options.pop("cache")
    options["key_env"] = options["key_env"] or None
    config = JudgeConfig(**options)
    require_valid(config, "evaluate.judge.")
    api_key(config)
    asked, task, protocol = read_requests(path)
    result = score_requests(asked, task, config, cache, protocol)
    print(json.dumps({"task": task, "protocol": protocol, "judge": result.info, "metrics": result.metrics}, indent=2))


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
