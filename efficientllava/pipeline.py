"""The stages in order; the only module that knows them all.

A run loads a checkpoint, prunes it, recovers it, evaluates base, pruned and recovered alike, and writes
``results.json``. Every stage goes through the store, so a killed or repeated run continues where it can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from .launch.ranks import relaunch
from .record import read_curve
from .runtime import keeping, processes
from .runtime.console import say
from .runtime.errors import UserError
from .runtime.exit_codes import sweeping
from .settings.checks import check
from .settings.compose import instantiate, typed
from .settings.schema import RunConfig
from .stages.context import Context
from .stages.deploy import deploy
from .stages.evaluate import Evaluation
from .stages.identity import (
    finished,
    nothing_to_do,
    run_key,
    settings_key,
)
from .stages.prune import prune
from .stages.record import write_record
from .stages.recover import recover


def run(config: DictConfig, output_dir: str, overrides: Sequence[str] = (), in_sweep: bool = False) -> float | None:
    """Run everything that a configuration asks for.

    Args:
        config: The composed configuration.
        output_dir: The run's folder.
        overrides: What the user typed.
        in_sweep: What was typed has an effect in this job of a sweep or in another, see `checks.check_sweep`.

    Returns:
        The value of ``optimized_metric``, or None.

    Raises:
        UserError: A fault that the user can mend.
    """
    settings = typed(config, overrides)
    check(settings, () if in_sweep else overrides)
    folder = Path(output_dir)
    if settings.pretrain:
        return instantiate(settings.pretrain, _partial_=True)(folder=folder)
    if settings.dry_run:
        from .estimate.dry_run import dry_run, plan_job

        (plan_job if sweeping() else dry_run)(settings, folder)
        return None
    if processes.launched() or not nothing_to_do(settings, folder):
        folder = _work(settings, folder, overrides)
    else:
        _tell_finished(folder)
    return _objective(settings, folder)


def _work(settings: RunConfig, folder: Path, overrides: Sequence[str]) -> Path:
    """Run all stages, alone in the folder; returns it, or that of the first of several processes."""
    processes.on_gpu(settings.trainer)  # refuses what is not there
    processes.require_nodes(settings.trainer)
    alone = contextlib.nullcontext() if processes.launched() else keeping.alone_in(folder, say)
    with alone, keeping.at_work(Path(settings.paths.cache_dir), clean=settings.keep != "all"):
        # Another process may have been at work until now.
        if settings.reuse and not processes.launched() and finished(settings, folder):
            _tell_finished(folder)
            keeping.tidy(folder, settings.keep)
            return folder
        return _launch(settings, folder, overrides)


def _tell_finished(folder: Path) -> None:
    say(f"{folder} is finished: nothing to do (reuse=false does it again)")


def _launch(settings: RunConfig, folder: Path, overrides: Sequence[str]) -> Path:
    """Run all stages in as many processes as the trainer asks for; returns the folder, which is the first one's."""
    count = processes.wanted(settings.trainer)
    if count > 1 and not processes.launched():
        code = relaunch(count, overrides, str(folder))
        if code:
            error = UserError(f"trainer.devices={count}: the run failed in its processes; see the messages above")
            error.exit_code = 2 if code == 2 else 1
            raise error
        return folder
    processes.connect(settings.trainer)
    folder = Path(processes.from_first(str(folder)))
    folder.mkdir(parents=True, exist_ok=True)
    execute(settings, folder, overrides)
    return folder


def _objective(settings: RunConfig, folder: Path) -> float | None:
    from .record import lookup, read

    if settings.optimized_metric is None:
        return None
    try:
        return lookup(read(folder / "results.json"), settings.optimized_metric)
    except UserError as error:
        error.exit_code = 1
        raise


def execute(settings: RunConfig, folder: Path, overrides: Sequence[str]) -> None:
    """Run all stages and write the record.

    Args:
        settings: The checked configuration.
        folder: The run's folder.
        overrides: What the user typed.

    Raises:
        UserError: A fault that the user can mend; ``exit_code`` is 2 as long as no stage has begun, 1 afterwards.
    """
    from lightning.pytorch import seed_everything

    from .report.tracking import Tracking, track

    context = Context(settings, folder)
    # As it is now: whoever replaces a file while the run is at work has another run.
    keys = {"run_key": run_key(settings), "settings_key": settings_key(settings)} if processes.rank() == 0 else {}
    evaluate = Evaluation(context)
    seed_everything(settings.seed, verbose=False)
    say(f"[bold]{settings.name}[/bold]  {context.base.path}  on {context.device}, seed {settings.seed}")
    tracking, failed = Tracking(), True
    try:
        tracking, current = track(settings, folder), context.base
        evaluate("base", current)
        tracking.scores("base", evaluate.metrics["base"])
        if settings.prune.method != "none":
            current = prune(context)
            tracking.plan(folder)
            evaluate("pruned", current)
            tracking.scores("pruned", evaluate.metrics["pruned"])
        if settings.recover.name != "none":
            current = recover(context, current)
            if context.entries["recover"].reused:
                tracking.curve(read_curve(folder))
            evaluate("recovered", current)
        if settings.deploy.name != "none":
            keys |= {"deploy": deploy(context, current)}
        if processes.rank() == 0:
            write_record(context, evaluate, overrides, keys)
            tracking.results(folder)
            keeping.tidy(folder, settings.keep)
            if settings.keep == "none" and "recover" in context.entries:
                keeping.drop(context.entries["recover"].folder)
        processes.barrier()
        failed = False
    except UserError as error:
        error.exit_code = 1
        raise
    finally:
        tracking.finish(failed)
        processes.finish()
