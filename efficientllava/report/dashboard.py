"""``python -m efficientllava.report.dashboard <entity>/<project>``: a W&B workspace for the runs of ``logger=wandb``.

What it shows stands in ``dashboard.yaml`` beside this file. Needs the extra ``[dashboard]``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import resources
from typing import Any

from omegaconf import OmegaConf

from ..runtime.errors import UserError


def definition() -> dict[str, Any]:
    """Content of ``dashboard.yaml``."""
    text = resources.files("efficientllava.report").joinpath("dashboard.yaml").read_text("utf-8")
    told = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(told, dict)
    return {str(key): value for key, value in told.items()}


def keys(panel: dict[str, Any]) -> Iterator[str]:
    """The metric keys that a panel shows."""
    for value in (panel.get("x"), panel["y"]):
        yield from [value] if isinstance(value, str) else value or ()


def workspace(entity: str, project: str) -> Any:
    """Build the workspace, without a request.

    Args:
        entity: Account or team.
        project: Name of the project.

    Raises:
        UserError: The extra is not installed.
    """
    try:
        import wandb_workspaces.reports.v2 as reports  # pyright: ignore[reportMissingImports]
        import wandb_workspaces.workspaces as workspaces  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("dashboard: needs wandb-workspaces; pip install -e '.[dashboard]'") from error

    def panel(kind: str, title: str, y: Any, x: str | None = None, log: bool = False) -> Any:
        if kind == "line":
            return reports.LinePlot(title=title, x=x, y=y, log_y=log)
        if kind == "scatter":
            return reports.ScatterPlot(title=title, x=reports.SummaryMetric(x), y=reports.SummaryMetric(y))
        if kind == "bar":
            return reports.BarPlot(title=title, metrics=y)
        return reports.MediaBrowser(title=title, media_keys=y)

    told = definition()
    sections = [
        workspaces.Section(name=node["name"], panels=[panel(**each) for each in node["panels"]], is_open=True)
        for node in told["sections"]
    ]
    groups = [workspaces.Metric(key) if key == "Group" else workspaces.Config(key) for key in told["group"]]
    runs = workspaces.RunsetSettings(groupby=groups)
    return workspaces.Workspace(
        entity=entity, project=project, name=told["name"], sections=sections, runset_settings=runs
    )


def main(arguments: list[str]) -> None:
    """Create the workspace and print its address.

    Args:
        arguments: ``<entity>/<project>``.

    Raises:
        UserError: A wrong argument, no login, or W&B refuses.
    """
    entity, slash, project = "".join(arguments[:1]).partition("/")
    if len(arguments) != 1 or not (slash and entity and project) or "/" in project:
        raise UserError("usage: python -m efficientllava.report.dashboard <entity>/<project>")
    from .tracking import logged_in

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
    from ..runtime.exit_codes import exit_code

    sys.exit(exit_code(lambda: main(sys.argv[1:])))
