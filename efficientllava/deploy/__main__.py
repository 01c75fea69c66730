"""``python -m efficientllava.deploy <checkpoint> [--types f16 q8_0] [--out folder]``: files for llama.cpp.

Writes them into ``gguf/`` of the checkpoint's folder, with a README.md that says how to run them, compares them with
transformers in the installed runtime, and measures them beside the checkpoint that this one was pruned from, if that is
a folder here or ships with this package.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ..runtime import UserError, exit_code, quiet_libraries, say
from ..settings.schema import DeployConfig


def main(arguments: Sequence[str]) -> None:
    """Export one checkpoint.

    Args:
        arguments: Of the command line.

    Raises:
        UserError: It cannot be exported; says why.
    """
    plain = DeployConfig()
    parser = argparse.ArgumentParser(prog="python -m efficientllava.deploy", description="Files for llama.cpp.")
    parser.add_argument("checkpoint", help="folder, hub id, or builtin:<name>")
    parser.add_argument("--types", nargs="+", default=plain.types, help="of the files: f32 f16 bf16 q8_0 q5_1 … q4_0")
    parser.add_argument("--out", type=Path, help="folder of the files; default: gguf/ in the checkpoint's folder")
    parser.add_argument("--dense", help="checkpoint to measure beside it; default: the folder that it was pruned from")
    parser.add_argument("--repeats", type=int, default=plain.repeats, help="rounds of measuring")
    for name in ("mmproj", "check", "measure"):
        parser.add_argument(f"--no-{name}", action="store_false", dest=name)
    told = vars(parser.parse_args(arguments))
    path, out, dense = (told.pop(name) for name in ("checkpoint", "out", "dense"))
    from ..checkpoint.folder import load, resolve
    from ..checkpoint.hub import origin_of
    from ..report import tabulate_deployed
    from ..settings.checks import require_valid
    from .export import deploy, remarks

    quiet_libraries()
    config = DeployConfig(name="gguf", **told)
    require_valid(config, "deploy.")
    resolve(path)  # whether it is there, before anything is made
    local = Path(path).expanduser()
    out = out or (local if local.is_dir() else Path()) / "gguf"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror}; give a folder of yours") from error
    if dense is None and config.measure and (origin := origin_of(local)):
        dense = origin[0]
    if dense:
        resolve(dense)
    made = deploy(load(path, "float32"), out, config, partial(load, dense, "float32") if dense else None)
    say(*tabulate_deployed({"deploy": made}), *remarks(made), f"everything lies in [bold]{out}[/bold]")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
