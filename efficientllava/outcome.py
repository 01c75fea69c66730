"""From exceptions to exit codes: the only place that does so."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable

from .errors import UserError

DEBUG = "HYDRA_FULL_ERROR"


def exit_code(main: Callable[[], object]) -> int:
    """Run a program and report its failure in one line per problem.

    Args:
        main: The decorated Hydra application.

    Returns:
        0 on success; 2 for a fault that was found before the first stage; 1 for what happened later. With
        ``HYDRA_FULL_ERROR=1`` the traceback is shown.
    """
    debug = os.environ.get(DEBUG) == "1"
    # Hydra would print its own shortened traceback and exit with 1.
    os.environ[DEBUG] = "1"
    try:
        main()
    except UserError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        if type(error).__module__.startswith(("hydra", "omegaconf")):
            print(f"error: {_one_line(error)}", file=sys.stderr)
            return 2
        print(f"error: {type(error).__name__}: {_one_line(error)} (details: {_keep(error)})", file=sys.stderr)
        return 1
    return 0


def _one_line(error: BaseException) -> str:
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or "no message"


def _keep(error: BaseException) -> str:
    with tempfile.NamedTemporaryFile("w", prefix="efficientllava-", suffix=".log", delete=False) as handle:
        handle.write("".join(traceback.format_exception(error)))
    return handle.name
