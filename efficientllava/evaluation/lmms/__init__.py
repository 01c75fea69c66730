"""The bridge to lmms-eval (extra ``[lmms]``): our models in its tasks, its tasks in our runs.

lmms-eval finds `manifest` by its entry point. Being imported, this package also makes per-layer checkpoints loadable,
so that lmms-eval's own wrappers (``lmms_eval --model llava_hf``) take our folders too. These score an empty answer
where a model fails; ``--model efficientllava`` stops instead.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from torch import nn

from ...models.forward import FeatureCache
from ...runtime import UserError, one_line, sources_below
from ...settings.schema import EvaluateConfig

Results = tuple[dict[str, dict[str, float]], dict[str, list[Any]]]


def manifest() -> Any:
    """What lmms-eval has to know about ``--model efficientllava``."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest("efficientllava", simple_class_path=f"{__name__}.adapter.EfficientLLaVA")


@lru_cache(maxsize=1)
def _task_manager(include_path: str | None) -> Any:
    """lmms-eval's index of tasks, made once for base, pruned and recovered model."""
    from loguru import logger  # pyright: ignore[reportMissingImports]

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    try:
        from lmms_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"evaluate=lmms_eval: lmms-eval cannot be imported ({one_line(error)}); pip install -c constraints.txt "
            "-e '.[lmms]', with a torchvision built for this torch, or with none"
        ) from error
    return TaskManager("WARNING", include_path=include_path)


def prepare(config: EvaluateConfig) -> None:
    """See that lmms-eval works and knows the tasks.

    Raises:
        UserError: It does not.
    """
    wanted = config.lmms_eval
    unknown = sorted({*wanted.tasks} - {*_task_manager(wanted.include_path).all_tasks}) if wanted.tasks else []
    if unknown:
        raise UserError(
            f"evaluate.lmms_eval.tasks: lmms-eval {version('lmms-eval')} has no {', '.join(unknown)}; "
            "lmms_eval --tasks list shows what there is, evaluate.lmms_eval.include_path adds a folder"
        )


def facts(config: EvaluateConfig) -> list[str]:
    """What a score depends on beside the model: lmms-eval's version, the tasks, and the files of one's own tasks."""
    files = sources_below(config.lmms_eval.include_path)
    return [version("lmms-eval"), *config.lmms_eval.tasks, *(file.read_text(encoding="utf-8") for file in files)]


def evaluate(model: nn.Module, processor: Any, config: EvaluateConfig, cache: FeatureCache | None = None) -> Results:
    """Run lmms-eval's tasks on a model in memory.

    Args:
        model: An image-text-to-text model in eval mode.
        processor: Its processor.
        config: ``lmms_eval``, ``limit``, ``batch_size``.
        cache: From `efficientllava.models.forward.FeatureCache`, shared by the models of a run.

    Returns:
        The metrics by task, and the samples by task; empty except on the first process.

    Raises:
        UserError: A task asks for what the model cannot do.
    """
    from lmms_eval.evaluator import simple_evaluate  # pyright: ignore[reportMissingImports]

    from .adapter import EfficientLLaVA

    wanted = config.lmms_eval
    found = simple_evaluate(
        EfficientLLaVA(model, processor, config.batch_size, cache),
        tasks=list(wanted.tasks),
        task_manager=_task_manager(wanted.include_path),
        limit=config.limit,
        batch_size=config.batch_size,
        bootstrap_iters=0,
        verbosity="WARNING",
        distributed_executor_backend="torchrun",
        # The random numbers of a run are its own.
        random_seed=None,  # pyright: ignore[reportArgumentType]
        numpy_random_seed=None,  # pyright: ignore[reportArgumentType]
        torch_random_seed=None,  # pyright: ignore[reportArgumentType]
    )
    if not found:
        return {}, {}
    counts = {task: number["effective"] for task, number in found["n-samples"].items()}
    metrics = {task: _metrics(values, counts.get(task)) for task, values in found["results"].items()}
    return metrics, {task: list(samples) for task, samples in found["samples"].items()}


def _metrics(values: Mapping[str, Any], count: int | None) -> dict[str, float]:
    """Numbers under plain names: ``accuracy`` for ``accuracy,none``, ``accuracy/<filter>`` for another filter."""
    metrics: dict[str, float] = {}
    for key, value in values.items():
        name, _, part = key.partition(",")
        if isinstance(value, int | float) and not name.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
            metrics[name if part in ("", "none") else f"{name}/{part}"] = float(value)
    return metrics | ({} if count is None else {"n": count})
