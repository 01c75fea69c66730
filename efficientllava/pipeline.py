"""The chain: open, then evaluate what is there, prune, evaluate, recover, evaluate, deploy, record.

Every stage goes through the store, so that a killed or repeated run continues where it can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from .launch.local import relaunch
from .record import lookup, read, read_curve
from .runtime import UserError, keeping, processes, quiet_libraries, say, sweeping
from .settings.compose import instantiate, typed
from .settings.schema import RunConfig
from .stages.request import check, finished, nothing_to_do, run_key, settings_key


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


def execute(settings: RunConfig, folder: Path, overrides: Sequence[str]) -> None:
    """Run all stages and write the record.

    Args:
        settings: The checked configuration.
        folder: The run's folder.
        overrides: What the user typed.

    Raises:
        UserError: A fault that the user can mend; ``exit_code`` is 2 as long as no stage has begun, 1 afterwards.
    """
    # Here, since they take torch with them: a run that is finished, and a sweep's own process, do without.
    from lightning.pytorch import seed_everything

    from .estimate import expected, forecast
    from .estimate.memory import require_memory
    from .stages import evaluate, opening, prune, record, recover
    from .stages.run import Made, clear, require_apart

    quiet_libraries()
    require_apart(settings, folder)
    processes.return_large_blocks()
    plan, device = forecast(settings), opening.device_of(settings)
    require_memory(plan, device)
    run = opening.open_run(settings, folder, expected(plan))
    if run.longest and settings.prune.method != "auto":
        require_memory(plan, device, run.longest, run.written)
    if settings.deploy.name != "none":
        opening.prepare(run)
    # As it is now: whoever replaces a file while the run is at work has another run.
    keys: dict[str, Any] = {}
    if processes.rank() == 0:
        keys = {"run_key": run_key(settings), "settings_key": settings_key(settings)}
    seed_everything(settings.seed, verbose=False)
    say(f"[bold]{settings.name}[/bold]  {run.base.path}  on {device}, seed {settings.seed}")
    with _stages(settings, folder) as tracking:
        processes.on_first(lambda: clear(settings, folder, keys["run_key"]))
        chain = [Made("base", run.base)]
        scored = evaluate.evaluate(run, chain[0])
        tracking.scores("base", scored[0].metrics)
        asked = {prune.prune: settings.prune.method, recover.recover: settings.recover.name}
        for stage in (stage for stage, name in asked.items() if name != "none"):
            chain.append(stage(run, chain[-1]))
            _track(tracking, folder, chain[-1])
            scored += (found := evaluate.evaluate(run, chain[-1], scored[0]))
            tracking.scores(chain[-1].stage, found[0].metrics)
        if settings.deploy.name != "none":
            keys |= {"deploy": record.deploy(run, chain[-1].checkpoint)}
        if processes.rank() == 0:
            record.write_record(run, chain, scored, overrides, keys)
            tracking.results(folder)
            _clean(settings, folder, chain[-1])
        processes.barrier()


@contextlib.contextmanager
def _stages(settings: RunConfig, folder: Path) -> Iterator[Any]:
    """While stages run: what is wrong is no longer found before the first one, and W&B is open."""
    from .report.dashboard import Tracking, track

    tracking, failed = Tracking(), True
    try:
        tracking = track(settings, folder)
        yield tracking
        failed = False
    except UserError as error:
        error.exit_code = 1
        raise
    finally:
        tracking.finish(failed)
        processes.finish()


def _track(tracking: Any, folder: Path, made: Any) -> None:
    """Send what a stage has left in the run's folder."""
    if made.stage == "pruned":
        tracking.plan(folder)
    elif made.entry.reused:
        tracking.curve(read_curve(folder))


def _clean(settings: RunConfig, folder: Path, last: Any) -> None:
    """Remove the checkpoints that are not to stay."""
    keeping.tidy(folder, settings.keep)
    if settings.keep == "none" and last.stage == "recovered":
        keeping.drop(last.entry.folder)


def _work(settings: RunConfig, folder: Path, overrides: Sequence[str]) -> Path:
    """Run all stages, alone in the folder; returns it, or that of the first of several processes."""
    from .stages.run import require_own

    processes.on_gpu(settings.trainer)  # refuses what is not there
    processes.require_nodes(settings.trainer)
    alone = contextlib.nullcontext()
    if not processes.launched():
        require_own(folder)
        alone = keeping.alone_in(folder, say)
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
    with processes.threads(settings.threads):
        execute(settings, folder, overrides)
    return folder


def _objective(settings: RunConfig, folder: Path) -> float | None:
    if settings.optimized_metric is None:
        return None
    try:
        return lookup(read(folder), settings.optimized_metric)
    except UserError as error:
        error.exit_code = 1
        raise
