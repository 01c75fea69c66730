"""A job as one W&B run (``logger=wandb``): curves by stage, final numbers, plan, plots and tables.

Metrics are named ``stage/name``, and every stage has an x-axis of its own (`AXES`). W&B's internal step is made from
stage and x-axis, so that a resumed job repeats steps, which W&B drops, and does not draw a second curve.

Lightning's progress bar, saying what is being answered.

The Trainers of a run and their loggers.
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger

from ..record import (
    STAGES,
    last_stage,
    read,
    scores,
)
from ..runtime import processes
from ..runtime.console import say
from ..runtime.errors import UserError
from ..runtime.files import whole_file
from ..settings.compose import instantiate
from ..settings.schema import RunConfig, WandbConfig
from .plots import shares


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


AXES = {"search": "generation", "prune": "layer", "recover": "step"}  # x-axis of every stage that has curves
SPAN = 10**7  # internal steps of a stage
ID_FILE = "wandb_id.txt"


class Tracking:
    """The W&B run of a job; nothing happens where none is open.

    Args:
        run: Output of `open_run`, or None.
        weights: Whether the last checkpoint becomes an artifact.
    """

    def __init__(self, run: Any = None, weights: bool = False) -> None:
        self.run, self._weights = run, weights
        for stage, axis in AXES.items() if run else ():
            run.define_metric(f"{stage}/{axis}", hidden=True, summary="none")
            run.define_metric(f"{stage}/*", step_metric=f"{stage}/{axis}")

    def scores(self, stage: str, metrics: Mapping[str, Any]) -> None:
        """Scores of a stage as soon as they are known: ``base/digits_vqa/accuracy``."""
        if self.run:
            self.run.summary.update(dict(flat(metrics, stage)))

    def plan(self, folder: Path) -> None:
        """What a pruning kept, layer by layer, and the search that led to it.

        Args:
            folder: The run's folder, with ``plan.json`` and perhaps ``search.json``.
        """
        if not self.run:
            return
        searched = folder / "search.json"
        if searched.exists():
            for generation, entry in enumerate(json.loads(searched.read_text("utf-8"))["history"]):
                log(
                    self.run,
                    "search",
                    generation,
                    {name: entry[name] for name in ("best", "mean") if entry[name] is not None},
                )
        kept = [shares(folder, kind) or [] for kind in ("groups", "channels")]
        for layer, (groups, channels) in enumerate(zip(*kept, strict=True)):
            log(self.run, "prune", layer, {"kept_groups": groups, "kept_channels": channels})
        self._artifact("plan", folder, "plan.json", "search.json")

    def curve(self, rows: Iterable[Mapping[str, float]]) -> None:
        """The curves of a recovery that comes from the cache.

        Args:
            rows: Output of `efficientllava.record.read_curve`.
        """
        for row in rows if self.run else ():
            log(self.run, "recover", int(row["step"]), {name: value for name, value in row.items() if name != "step"})

    def results(self, folder: Path) -> None:
        """The final numbers, a table of all stages, the pictures, and the weights on request.

        Args:
            folder: The run's folder, with ``results.json``.
        """
        if not self.run:
            return
        import wandb

        results = read(folder)
        numbers = {key: dict(flat(stage, key)) for key, stage in results["stages"].items()}
        last = last_stage(results)
        final = dict(flat(last, "final"))
        for score in scores([results])[:1]:
            names = {"score": score, "retained": f"retained/{score}"}
            final |= {f"final/{new}": final[f"final/{old}"] for new, old in names.items() if f"final/{old}" in final}
        for key in ("ratio", "seconds", "samples"):
            final |= flat(results[key], key)
        self.run.summary.update({name: value for stage in numbers.values() for name, value in stage.items()} | final)
        names = dict.fromkeys(name.partition("/")[2] for stage in numbers.values() for name in stage)
        rows: list[Any] = [[name, *(numbers[stage].get(f"{stage}/{name}") for stage in numbers)] for name in names]
        table = wandb.Table(columns=["number", *numbers], data=rows)
        pictures = {f"plots/{name}": wandb.Image(str(folder / f"{name}.png")) for name in self._pictures(folder)}
        self.run.log({"results/table": table, **pictures}, step=SPAN * len(AXES))
        self._artifact("results", folder, "results.json", "results.md")
        self._artifact("plots", folder, *(f"{name}.png" for name in self._pictures(folder)))
        if self._weights:
            self._artifact("model", folder / next(name for name in reversed(STAGES) if (folder / name).exists()))

    def _pictures(self, folder: Path) -> list[str]:
        return [name for name in ("samples", "search") if (folder / f"{name}.png").exists()]

    def _artifact(self, kind: str, folder: Path, *names: str) -> None:
        """Log files, or a whole folder where none are named; they stay where they are until they are uploaded."""
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self.run.id}", type=kind)
        files = [folder / name for name in names] or [path for path in folder.rglob("*") if path.is_file()]
        for file in filter(Path.exists, files):
            artifact.add_file(str(file), str(file.relative_to(folder)), policy="immutable", skip_cache=True)
        if artifact.manifest.entries:
            self.run.log_artifact(artifact)

    def finish(self, failed: bool) -> None:
        """Close whatever W&B run is open, so that the next job of a sweep gets one of its own."""
        if "wandb" in sys.modules:
            import wandb

            wandb.finish(exit_code=int(failed))


def log(run: Any, stage: str, x: int, values: Mapping[str, Any]) -> None:
    """One point of a stage's curves.

    Args:
        run: The open W&B run.
        stage: A key of `AXES`.
        x: Place on its x-axis, from 0.
        values: By name, with or without the stage in front.
    """
    named = {name if name.startswith(f"{stage}/") else f"{stage}/{name}": value for name, value in values.items()}
    run.log({f"{stage}/{AXES[stage]}": x, **named}, step=SPAN * [*AXES].index(stage) + x)


class RecoveryLogger(Logger):
    """Passes what a recovery logs on to the open W&B run.

    Args:
        run: That run.
    """

    def __init__(self, run: Any) -> None:
        super().__init__()
        self._run = run

    @property
    def name(self) -> str:
        """Of the project."""
        return str(self._run.project)

    @property
    def version(self) -> None:
        """None: a number in the progress bar would say nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """One point of every metric."""
        log(self._run, "recover", step or 0, metrics)

    def log_hyperparams(self, *_params: Any, **_more: Any) -> None:
        """Nothing: the run has the whole configuration already."""


def open_run(options: WandbConfig, folder: Path, **told: Any) -> Any:
    """Open the W&B run of a folder, or go on with it.

    Args:
        options: The node ``logger``.
        folder: Keeps the run's id.
        **told: Further arguments of ``wandb.init``.

    Returns:
        The run.

    Raises:
        UserError: W&B refuses or cannot be reached.
    """
    import wandb

    file = folder / ID_FILE
    if not file.exists():
        with whole_file(file) as new:
            new.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    try:
        return wandb.init(
            project=options.project,
            entity=options.entity,
            name=options.name,
            notes=options.notes,
            dir=str(folder),
            id=file.read_text("utf-8").strip(),
            resume="allow",
            reinit="finish_previous",
            mode=options.mode or ("online" if logged_in() else "offline"),  # pyright: ignore[reportArgumentType]
            settings=wandb.Settings(silent=True, console="off"),
            **told,
        )
    except (wandb.Error, OSError) as error:
        raise UserError(f"logger=wandb: {' '.join(str(error).split())}; set logger.mode=offline") from error


def track(settings: RunConfig, folder: Path) -> Tracking:
    """Open the W&B run of a job, on its first process, if the configuration asks for one.

    Args:
        settings: The run's configuration.
        folder: The run's folder.

    Raises:
        UserError: W&B refuses or cannot be reached.
    """
    config = settings.logger
    if not isinstance(config, WandbConfig) or processes.rank():
        return Tracking()
    asked = {"recover": settings.recover.name != "none", "prune": settings.prune.method != "none"}
    names = (settings.model.name, settings.prune.name, settings.recover.name)
    run = open_run(
        config,
        folder,
        group=config.group or sweep_of(folder),
        job_type=config.job_type or next((stage for stage, is_asked in asked.items() if is_asked), "evaluate"),
        tags=[*dict.fromkeys([*(name for name in names if name != "none"), *config.tags])],
        config={**asdict(settings), "logger": None},
    )
    say(f"W&B run {run.id}: {run.url or f'offline, `wandb sync {run.sync_dir}` uploads it'}")
    return Tracking(run, config.weights)


def sweep_of(folder: Path) -> str | None:
    """Name of the sweep that a run's folder belongs to; None for a single run."""
    parent = folder.resolve().parent
    return parent.name if (parent / "multirun.yaml").exists() else None


def flat(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """All numbers of nested mappings by ``prefix/key/key``; ``metrics`` is left out of the names."""
    for key, value in node.items():
        name = prefix if key == "metrics" else f"{prefix}/{key}"
        if isinstance(value, Mapping):
            yield from flat(value, name)
        elif isinstance(value, int | float):
            yield name, value


def logged_in() -> bool:
    """Whether ``wandb login`` has left a key; asking wandb itself would prompt, or fail without one."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
