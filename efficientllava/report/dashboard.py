"""W&B (``logger=wandb``): every job as one run, with curves by stage, final numbers, plan, plots and tables.

Metrics are named ``stage/name``, and every stage has an x-axis of its own (`AXES`). W&B's internal step is made from
stage and x-axis, so that a resumed job repeats steps, which W&B drops, and does not draw a second curve. (Lightning's
own logger lets W&B count the steps.)

``python -m efficientllava.report.dashboard <entity>/<project>``: a workspace that shows such runs. What it shows
stands in ``dashboard.yaml`` beside this file. Needs the extra ``[dashboard]``.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from omegaconf import OmegaConf

from ..record import STAGES, read, scores
from ..runtime import RESULTS, UserError, exit_code, processes, say, state, write_whole
from ..settings.schema import RunConfig, WandbConfig
from . import kept_shares, numbers, numbers_of

AXES = {"search": "generation", "prune": "layer", "recover": "step"}  # x-axis of every stage that has curves
SPAN = 10**7  # internal steps of a stage
ID_FILE = "wandb_id.txt"
DEFINITION = Path(__file__).with_name("dashboard.yaml")


class Tracking:
    """The W&B run of a job; nothing happens where none is open.

    Args:
        run: That of `track`, or None.
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
            self.run.summary.update(numbers_of({stage: metrics}))

    def plan(self, folder: Path) -> None:
        """What a pruning kept, layer by layer, and the search that led to it.

        Args:
            folder: The run's folder, with ``plan.json`` and perhaps ``search.json``.
        """
        if not self.run:
            return
        for generation, entry in enumerate(state.read(folder, "search.json").get("history", [])):
            found = {name: entry[name] for name in ("best", "mean") if entry[name] is not None}
            log(self.run, "search", generation, found)
        kept = [kept_shares(folder, kind) or [] for kind in ("groups", "channels")]
        for layer, (groups, channels) in enumerate(zip(*kept, strict=True)):
            log(self.run, "prune", layer, {"kept_groups": groups, "kept_channels": channels})
        self._artifact("plan", folder, "plan.json", "search.json")

    def curve(self, rows: Iterable[Mapping[str, float]]) -> None:
        """The curves of a recovery that comes from the cache, as `efficientllava.record.read_curve` reads them."""
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
        found, stages = numbers(results), list(results["stages"])
        for score in scores([results])[:1]:
            names = {"final/score": f"final/{score}", "final/retained": f"final/retained/{score}"}
            found |= {new: found[old] for new, old in names.items() if old in found}
        self.run.summary.update(found)
        names = dict.fromkeys(name.partition("/")[2] for name in found if name.partition("/")[0] in stages)
        rows: list[Any] = [[name, *(found.get(f"{stage}/{name}") for stage in stages)] for name in names]
        pictures = [name for name in ("samples", "search") if (folder / f"{name}.png").exists()]
        shown = {f"plots/{name}": wandb.Image(str(folder / f"{name}.png")) for name in pictures}
        table = wandb.Table(columns=["number", *stages], data=rows)
        self.run.log({"results/table": table, **shown}, step=SPAN * len(AXES))
        self._artifact("results", folder, RESULTS)
        self._artifact("plots", folder, *(f"{name}.png" for name in pictures))
        if self._weights:
            last = folder / next(name for name in reversed(STAGES) if (folder / name).exists())
            self._artifact("model", last, *(str(path.relative_to(last)) for path in last.rglob("*") if path.is_file()))

    def _artifact(self, kind: str, folder: Path, *names: str) -> None:
        """Log those files that there are; they stay where they are until they are uploaded."""
        import wandb

        artifact = wandb.Artifact(f"{kind}-{self.run.id}", type=kind)
        for name in names:
            if (folder / name).exists():
                artifact.add_file(str(folder / name), name, policy="immutable", skip_cache=True)
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


class TrackedCSVLogger(CSVLogger):
    """Passes what a recovery logs on to the open W&B run, if there is one."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One point of every metric."""
        import wandb

        super().log_metrics(metrics, step)
        if wandb.run:
            log(wandb.run, "recover", step or 0, metrics)


def track(settings: RunConfig, folder: Path) -> Tracking:
    """Open the W&B run of a folder, which keeps the run's id, or go on with it.

    Only the first process does, if the configuration asks for it.

    Raises:
        UserError: W&B refuses or cannot be reached.
    """
    options = settings.logger
    if not isinstance(options, WandbConfig) or processes.rank():
        return Tracking()
    import wandb

    file, sweep = folder / ID_FILE, folder.resolve().parent
    if not file.exists():
        write_whole(file, secrets.token_hex(4) + "\n")
    asked = {"recover": settings.recover.name != "none", "prune": settings.prune.method != "none", "evaluate": True}
    names = [name for name in (settings.model.name, settings.prune.name, settings.recover.name) if name != "none"]
    try:
        run = wandb.init(
            project=options.project,
            entity=options.entity,
            name=options.name,
            notes=options.notes,
            group=options.group or (sweep.name if (sweep / "multirun.yaml").exists() else None),
            job_type=options.job_type or next(stage for stage, is_asked in asked.items() if is_asked),
            tags=[*dict.fromkeys([*names, *options.tags])],
            config={**asdict(settings), "logger": None},
            dir=str(folder),
            id=file.read_text("utf-8").strip(),
            resume="allow",
            reinit="finish_previous",
            mode=options.mode or ("online" if logged_in() else "offline"),  # pyright: ignore[reportArgumentType]
            settings=wandb.Settings(silent=True, console="off"),
        )
    except (wandb.Error, OSError) as error:
        raise UserError(f"logger=wandb: {' '.join(str(error).split())}; set logger.mode=offline") from error
    say(f"W&B run {run.id}: {run.url or f'offline, `wandb sync {run.sync_dir}` uploads it'}")
    return Tracking(run, options.weights)


def logged_in() -> bool:
    """Whether ``wandb login`` has left a key; asking wandb itself would prompt, or fail without one."""
    from requests.utils import get_netrc_auth  # comes with wandb

    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return bool(os.environ.get("WANDB_API_KEY") or get_netrc_auth(host))


def workspace(entity: str, project: str) -> Any:
    """Build the workspace of an account's or a team's project, without a request.

    Raises:
        UserError: The extra is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports  # pyright: ignore[reportMissingImports]
        import wandb_workspaces.workspaces as workspaces  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("dashboard: needs wandb-workspaces; pip install -e '.[dashboard]'") from error

    def panel(kind: str, **told: Any) -> Any:
        if kind == "ScatterPlot":
            told |= {axis: reports.SummaryMetric(told[axis]) for axis in ("x", "y")}
        return getattr(reports, kind)(**told)

    told: Any = OmegaConf.to_container(OmegaConf.load(DEFINITION))
    sections = [
        workspaces.Section(name=node["name"], panels=[panel(**each) for each in node["panels"]], is_open=True)
        for node in told["sections"]
    ]
    groups = [workspaces.Metric(key) if key == "Group" else workspaces.Config(key) for key in told["group"]]
    runs = workspaces.RunsetSettings(groupby=groups)
    return workspaces.Workspace(
        entity=entity, project=project, name=told["name"], sections=sections, runset_settings=runs
    )


def main(arguments: Sequence[str]) -> None:
    """Create the workspace of ``<entity>/<project>`` and print its address.

    Raises:
        UserError: A wrong argument, no login, or W&B refuses.
    """
    entity, slash, project = "".join(arguments[:1]).partition("/")
    if len(arguments) != 1 or not (slash and entity and project) or "/" in project:
        raise UserError("usage: python -m efficientllava.report.dashboard <entity>/<project>")
    made = workspace(entity, project)
    if not logged_in():
        raise UserError("dashboard: you are not logged in to W&B; run `wandb login` first")
    import wandb

    try:
        made.save()
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"dashboard: W&B refuses: {' '.join(str(error).split())}") from error
    print(made.url)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
