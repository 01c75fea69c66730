"""The Trainers of a run and their loggers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import processes
from .config import instantiate
from .schema import RunConfig, WandbConfig


def make_trainer(
    settings: RunConfig,
    folder: Path,
    quiet: bool = False,
    callbacks: Sequence[Any] = (),
    training: bool = False,
    what: str | None = None,
    **overrides: Any,
) -> Any:
    """Make a Trainer from the configuration's node.

    Args:
        settings: The run's configuration.
        folder: The run's folder.
        quiet: No progress bar, no logger and no configured callbacks.
        callbacks: Added to the configured ones.
        training: Whether weights train; only then is a model shared out over processes.
        what: What the progress bar calls a pass without training.
        **overrides: Arguments that the stage decides.
    """
    node = dict(settings.trainer)
    if processes.sharded(node) and not training:
        node["strategy"] = "ddp"
    if processes.launched():
        node["num_nodes"] = processes.nodes(node)
        node["devices"] = processes.world_size() // node["num_nodes"]
    options = {"default_root_dir": str(folder), "enable_checkpointing": False}
    options |= {"use_distributed_sampler": False, **overrides}
    if not node.get("plugins"):
        options["plugins"] = processes.environment()
    configured = [dict(c) for c in (settings.callbacks or {}).values() if c.get("_target_")]
    if quiet:
        configured, options = [], {"logger": False, "enable_progress_bar": False, **options}
    elif "logger" not in options:
        options["logger"] = make_logger(settings, folder)
    if not options["logger"]:
        configured = [c for c in configured if not c["_target_"].endswith("LearningRateMonitor")]
    for callback in configured if what else ():
        if callback["_target_"].endswith("StageProgressBar"):
            callback["what"] = what
    return instantiate(node, callbacks=[*map(instantiate, configured), *callbacks], **options)


def make_logger(settings: RunConfig, folder: Path) -> Any:
    """Make the configured logger, writing into the run's folder.

    Args:
        settings: The run's configuration.
        folder: The run's folder.

    Returns:
        One or more Lightning loggers, or False for none.
    """
    if isinstance(settings.logger, WandbConfig):
        import wandb

        from .tracking import RecoveryLogger

        # The report reads the CSV file.
        csv = {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "", "version": ""}
        return [_csv(csv, folder), *([RecoveryLogger(wandb.run)] if wandb.run else [])]
    node = dict(settings.logger or {})
    if not node.get("_target_"):
        return False
    return _csv(node, folder)


def _csv(node: dict[str, Any], folder: Path) -> Any:
    """A logger that writes below ``logs/``; a CSV file of an earlier process stays, since a killed training goes on."""
    if node["_target_"].endswith("CSVLogger") and (folder / "logs" / "metrics.csv").exists():
        node["version"] = f"part{len([*(folder / 'logs').glob('part*')]) + 1}"
    return instantiate(node, save_dir=str(folder / "logs"))
