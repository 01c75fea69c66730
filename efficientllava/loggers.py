"""The Trainers of a run and their loggers: CSV by default, W&B offline unless the user is logged in."""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from . import processes
from .config import instantiate
from .schema import RunConfig


def make_trainer(
    settings: RunConfig,
    folder: Path,
    quiet: bool = False,
    callbacks: Sequence[Any] = (),
    training: bool = False,
    **overrides: Any,
) -> Any:
    """Make a Trainer from the configuration's node.

    Args:
        settings: The run's configuration.
        folder: The run's folder.
        quiet: No progress bar, no logger and no configured callbacks.
        callbacks: Added to the configured ones.
        training: Whether weights train; only then is a model shared out over processes.
        **overrides: Arguments that the stage decides.
    """
    node = dict(settings.trainer)
    if processes.sharded(node) and not training:
        node["strategy"] = "ddp"
    if processes.launched():
        node["devices"] = processes.world_size() // int(node.get("num_nodes", 1))
    options = {"default_root_dir": str(folder), "enable_checkpointing": False}
    options |= {"use_distributed_sampler": False, **overrides}
    configured = [c for c in (settings.callbacks or {}).values() if c.get("_target_")]
    if quiet:
        configured, options = [], {"logger": False, "enable_progress_bar": False, **options}
    elif "logger" not in options:
        options["logger"] = make_logger(settings, folder)
    if not options["logger"]:
        configured = [c for c in configured if not c["_target_"].endswith("LearningRateMonitor")]
    return instantiate(node, callbacks=[*map(instantiate, configured), *callbacks], **options)


def make_logger(settings: RunConfig, folder: Path) -> Any:
    """Make the configured logger, writing into the run's folder.

    Args:
        settings: The run's configuration.
        folder: The run's folder.

    Returns:
        A Lightning logger, or False for none.
    """
    node = dict(settings.logger or {})
    target = node.get("_target_")
    if not target:
        return False
    if target.endswith("WandbLogger"):
        node.setdefault("offline", not _logged_in())
        # Weights are only uploaded on request; offline runs cannot.
        logger = instantiate(node, save_dir=str(folder))
        logger.log_hyperparams(asdict(settings))
        return logger
    return instantiate(node, save_dir=str(folder / "logs"))


def finish_loggers() -> None:
    """Close a W&B run, so that the next job of a sweep gets one of its own."""
    if "wandb" in sys.modules:
        import wandb

        wandb.finish()


def _logged_in() -> bool:
    """Whether ``wandb login`` has left a key; asking wandb itself would prompt, or fail without one."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
