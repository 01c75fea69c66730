from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from efficientllava.record import read_curve, read_logs, write_curve
from efficientllava.runtime import UserError
from efficientllava.settings.compose import typed
from efficientllava.settings.schema import RunConfig
from efficientllava.stages.run import make_logger, make_trainer

from ..runs import composed

CSV = {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "", "version": ""}


def test_no_logger(tmp_path: Path):
    assert make_logger(RunConfig(logger={"_target_": None}), tmp_path) is False


def test_csv_lies_in_the_run(tmp_path: Path):
    logger = make_logger(RunConfig(logger=CSV), tmp_path)
    assert isinstance(logger, CSVLogger)
    assert Path(logger.log_dir).resolve() == (tmp_path / "logs").resolve()


def test_a_training_that_goes_on_keeps_its_curve(tmp_path: Path):
    for steps in ((0, 1, 2, 3), (2, 3, 4), (4, 5)):  # killed after 3 and after 4, resumed at 2 and at 4
        logger = make_logger(RunConfig(logger=CSV), tmp_path)
        for step in steps:
            logger.log_metrics({"recover/loss": 10.0 * len(steps) + step}, step)
            logger.log_metrics({"recover/lr": 0.5}, step)
        logger.save()
    rows = read_curve(tmp_path)
    assert [(row["step"], row["recover/loss"]) for row in rows] == [
        (0, 40), (1, 41), (2, 32), (3, 33), (4, 24), (5, 25)
    ]  # fmt: skip
    assert all(row["recover/lr"] == 0.5 for row in rows)
    (tmp_path / "run").mkdir()
    write_curve(rows, tmp_path / "run" / "training.csv")
    assert read_curve(tmp_path / "run") == rows and read_curve(tmp_path / "nowhere") == []


def test_a_line_that_a_kill_has_cut_is_no_number_and_a_training_has_its_own_logs(tmp_path: Path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.csv").write_text("epoch,recover/loss,step\n0,0.5,9\n0,0.4")
    write_curve([{"step": 1.0, "recover/loss": 9.0}], tmp_path / "training.csv")
    assert read_logs(tmp_path) == [{"epoch": 0.0, "recover/loss": 0.5, "step": 9.0}]
    assert read_curve(tmp_path) == [{"step": 1.0, "recover/loss": 9.0}]


@pytest.mark.parametrize("damage", [b"step,recover/loss\n0,\xff\n", b"step,recover/loss\n0,x\n", b"loss\n1\n"])
def test_a_damaged_curve_is_an_error_with_its_file(tmp_path: Path, damage: bytes):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "metrics.csv").write_bytes(damage)
    with pytest.raises(UserError, match=r"metrics\.csv: is damaged"):
        read_curve(tmp_path)


def test_the_bar_names_what_is_answered(tmp_path: Path):
    settings = typed(composed("trainer=cpu"))
    for what, shown in (("pruned gqa", "pruned gqa"), (None, "Predicting")):
        trainer = make_trainer(settings, tmp_path, logger=False, what=what)
        assert trainer.progress_bar_callback.predict_description == shown
