"""What libraries say: nothing about what this project does right, and everything else."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
from transformers import AutoConfig

from efficientllava.evaluation.efficiency import measure
from efficientllava.models.pruned import is_per_layer
from efficientllava.pruning.plan import LayerPlan, PruningPlan
from efficientllava.pruning.surgery import cut
from efficientllava.runtime.console import exit_code, quiet_libraries
from efficientllava.settings.compose import typed
from efficientllava.settings.schema import EvaluateConfig
from efficientllava.stages.run import make_trainer

from ..conftest import LAYERS, make_batch, make_model
from ..runs import ROOT, composed


@pytest.fixture
def told(caplog):
    """Everything that is said from now on: warnings, and records of all loggers."""
    quiet_libraries()
    loggers = [logging.getLogger(name) for name in ("transformers", "lightning.pytorch")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    # Messages that are said once per process may have been said.
    logging.Logger.warning_once.cache_clear()  # pyright: ignore[reportAttributeAccessIssue]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(each.message) for each in caught] + [record.getMessage() for record in caplog.records]
    for logger in loggers:
        logger.removeHandler(caplog.handler)


@pytest.fixture
def per_layer():
    """A model whose layers differ in size."""
    layers = [LayerPlan(i, (0, 1, 2) if i else (0, 1), tuple(range(20 + i))) for i in range(LAYERS)]
    plan = PruningPlan("widthwise", tuple(layers), LAYERS, 2, 0.3, 0.3)
    model = cut(make_model("llama_gqa"), plan)
    assert is_per_layer(model.config.get_text_config())
    return model


def test_saving_loading_and_measuring_a_model_of_unequal_layers_is_quiet(told, per_layer, tmp_path):
    per_layer.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    batch = {key: value for key, value in make_batch(1).items() if key in ("input_ids", "pixel_values")}
    measure({"a": per_layer}, batch, EvaluateConfig(repeats=1, new_tokens=3, speed_batches=[1]))
    per_layer.generate(batch["input_ids"][:, 6:], max_new_tokens=2)
    assert [line for line in told() if "past_key_values" in line or "heterogeneous" in line] == []
    # What the library warns of is still told.
    assert config.get_text_config().intermediate_size == 23
    assert any("Reading global config value" in line for line in told())


def interrupted():
    """What a Trainer makes of Ctrl-C."""
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def test_an_interrupt_is_told_as_one_even_where_a_trainer_has_made_an_exit_of_it(capsys):
    assert exit_code(interrupted) == 130
    assert capsys.readouterr().err == "stopped; run the same command again to go on\n"
    with pytest.raises(SystemExit, match="3"):
        exit_code(lambda: sys.exit(3))


def test_srun_is_not_recommended_to_who_does_not_ask_for_it(told, tmp_path, monkeypatch):
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("SLURM_NTASKS", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    make_trainer(typed(composed("trainer=cpu")), tmp_path, quiet=True)
    assert [line for line in told() if "srun" in line] == []


UNKNOWN = """
import logging, warnings
from efficientllava.runtime.console import quiet_libraries
quiet_libraries()
warnings.warn_explicit("nobody knows this", FutureWarning, "transformers/utils.py", 1, "transformers.utils")
warnings.warn_explicit("nor this", UserWarning, "lightning/trainer.py", 1, "lightning.pytorch.trainer")
from transformers.utils import logging as of_transformers
of_transformers.get_logger("transformers.models.llama").warning("nor that")
logging.getLogger("lightning.pytorch.trainer").warning("and not that either")
"""


def test_an_unknown_warning_still_appears():
    command = [sys.executable, "-c", UNKNOWN]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    for line in ("nobody knows this", "nor this", "nor that", "and not that either"):
        assert line in done.stderr, done.stderr
