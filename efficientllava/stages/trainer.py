"""The Trainers of a run, their loggers, and a progress bar that says what is being answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import RichProgressBar

from ..runtime import processes
from ..settings.compose import instantiate
from ..settings.schema import RunConfig, WandbConfig

# The report reads the CSV file; the curves of W&B's run are drawn beside it.
TRACKED = {"_target_": "efficientllava.report.dashboard.TrackedCSVLogger", "name": "", "version": ""}


class StageProgressBar(RichProgressBar):
    """A bar that carries the name of stage and benchmark where Lightning says "Predicting".

    Args:
        what: The name.
        **options: Those of Lightning's bar.
    """

    def __init__(self, what: str = "Predicting", **options: Any) -> None:
        super().__init__(**options)
        self.what = what

    @property
    def predict_description(self) -> str:
        """The name."""
        return self.what


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
    options = {"default_root_dir": str(folder), "enable_checkpointing": False, "use_distributed_sampler": False}
    if not node.get("plugins"):
        options["plugins"] = processes.environment()
    if quiet:
        options |= {"logger": False, "enable_progress_bar": False, **overrides}
        return instantiate(node, callbacks=[*callbacks], **options)
    options |= overrides
    if "logger" not in options:
        options["logger"] = make_logger(settings, folder)
    configured = [dict(callback) for callback in (settings.callbacks or {}).values() if callback.get("_target_")]
    if not options["logger"]:
        configured = [callback for callback in configured if not callback["_target_"].endswith("LearningRateMonitor")]
    for callback in configured if what else ():
        if callback["_target_"].endswith("StageProgressBar"):
            callback["what"] = what
    return instantiate(node, callbacks=[*map(instantiate, configured), *callbacks], **options)


def make_logger(settings: RunConfig, folder: Path) -> Any:
    """Make the configured logger, writing below ``logs/`` in the run's folder.

    Returns:
        A Lightning logger, or False for none. A CSV file of an earlier process stays, since a killed training goes on.
    """
    node = dict(TRACKED if isinstance(settings.logger, WandbConfig) else settings.logger or {})
    if not node.get("_target_"):
        return False
    logs = folder / "logs"
    if node["_target_"].endswith("CSVLogger") and (logs / "metrics.csv").exists():
        node["version"] = f"part{len([*logs.glob('part*')]) + 1}"
    return instantiate(node, save_dir=str(logs))
