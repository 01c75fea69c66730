from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from efficientllava import loggers
from efficientllava.schema import RunConfig


@pytest.fixture(autouse=True)
def without_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))


def settings(target: str | None, **options: str) -> RunConfig:
    return RunConfig(name="a-run", logger={"_target_": target, **options})


def test_no_logger(tmp_path: Path):
    assert loggers.make_logger(settings(None), tmp_path) is False


def test_csv_lies_in_the_run(tmp_path: Path):
    logger = loggers.make_logger(settings("lightning.pytorch.loggers.CSVLogger", name="", version=""), tmp_path)
    assert isinstance(logger, CSVLogger)
    assert Path(logger.log_dir).resolve() == (tmp_path / "logs").resolve()


@pytest.mark.parametrize("key, mode, online", [(None, None, False), ("k", None, True), ("k", "offline", False)])
def test_wandb_is_online_only_with_a_key(monkeypatch: pytest.MonkeyPatch, key, mode, online):
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", mode)):
        if value:
            monkeypatch.setenv(name, value)
    assert loggers._logged_in() is online


def test_a_netrc_entry_is_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / ".netrc"
    file.write_text("machine api.wandb.ai login user password key\n")
    file.chmod(0o600)
    assert loggers._logged_in()


def test_an_offline_run_is_written_and_finished(tmp_path: Path):
    run = settings("lightning.pytorch.loggers.WandbLogger", project="test", name="a-run")
    logger = loggers.make_logger(run, tmp_path)
    assert isinstance(logger, WandbLogger)
    logger.log_metrics({"recover/loss": 1.0}, step=0)
    loggers.finish_loggers()
    assert list(tmp_path.rglob("*.wandb"))
    import wandb

    assert wandb.run is None
