"""Loggers of recovery training: CSV by default, W&B offline unless the user is logged in."""

from __future__ import annotations

import netrc
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from .config import instantiate
from .schema import RunConfig


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
