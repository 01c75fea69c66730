"""The command: ``efficientllava [group=option] [key=value]``; in a clone ``python run.py`` does the same."""

from __future__ import annotations

import os
import sys
import tempfile

if sys.getfilesystemencoding() != "utf-8" and not sys.flags.utf8_mode:
    # Python would read the names of folders in the terminal's encoding, and no file of ours could hold them.
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from .runtime import CONF, exit_code
from .runtime.processes import adopt_srun
from .stages.request import register

register()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(cfg: DictConfig) -> float | None:
    """Run all stages and return the value that a sweeper optimises."""
    from .pipeline import run

    choices = HydraConfig.get()
    in_sweep = not OmegaConf.is_missing(choices.job, "num")
    return run(cfg, choices.runtime.output_dir, list(choices.overrides.task), in_sweep)


def main() -> int:
    """Run what is typed; returns the exit code."""
    adopt_srun()
    if int(os.environ.get("RANK", "0")) > 0:
        # Only the first process owns the run's folder and its log.
        quiet = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
        sys.argv += [*quiet, f"hydra.run.dir={tempfile.mkdtemp(prefix='efficientllava-')}"]
    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
