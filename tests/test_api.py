"""The Python interface refuses what the command line refuses."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import efficientllava as ev
from efficientllava.api import KD_HIDDEN, WIDTHWISE, _places
from efficientllava.checkpoint.export import round_weights
from efficientllava.data.collator import Collator
from efficientllava.data.datamodule import RecoveryData
from efficientllava.data.splits import calibration_records
from efficientllava.pruning.module import PruningModule
from efficientllava.pruning.self_text import write_text
from efficientllava.recovery.module import RecoveryModule
from efficientllava.runtime import Store, UserError
from efficientllava.settings.schema import CalibrationConfig, DataConfig, RunConfig, TeacherConfig, WeightsConfig
from experiments.speed.rows import quiet_trainer

from .runs import save_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return ev.load(save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 1.5}, r"prune\.ratio=1\.5: must be in \[0, 1\)"),
        ({"ratio": float("nan")}, r"prune\.ratio=nan: must be in"),
        ({"ratio": "half"}, r"plan: ratio='half': must be a number in"),
        ({"ratio": None}, r"prune\.ratio=null: set it"),
        ({"importance": "best"}, r"prune\.importance=best: must be one of obs"),
        ({"selection": "greedy"}, r"prune\.selection=greedy: must be one of shape"),
        ({"tokens": "some"}, r"prune\.tokens=some: must be one of all"),
        ({"method": "auto"}, r"prune\.method=auto: must be layerwise or widthwise"),
        ({"method": "none"}, r"prune\.method=none: must be layerwise or widthwise"),
        ({"round_to": 0}, r"prune\.round_to=0: must be in \[1"),
        ({"samples": 0}, r"calibration\.samples=0: must be in \[1"),
        ({"seed": -1}, r"seed=-1: must be in \[0"),
        ({"nonsense": 1}, r"plan: unknown option 'nonsense'"),
    ],
)
def test_a_plan_is_not_made_of_values_that_mean_nothing(checkpoint, options, told):
    with pytest.raises(UserError, match=told):
        ev.plan(checkpoint, **{"samples": 2, **options})


def test_a_plan_is_made_and_another_model_s_is_refused(checkpoint, tmp_path):
    plan = ev.plan(checkpoint, samples=2, ratio=0.3, selection="local", refit=False)
    assert plan.requested == 0.3 and abs(plan.achieved - 0.3) < 0.01
    other = ev.load(save_tiny(tmp_path / "other", layers=3))
    with pytest.raises(ValueError, match="plan is for 2 layers, the model has 3"):
        ev.prune(other, plan, samples=2)


@pytest.mark.parametrize("generate", [0, 8])
def test_records_serve_as_in_a_run(tmp_path, generate):
    folder, digits = save_tiny(tmp_path / "model", layers=2), DataConfig("digits_vqa")
    one, other = ev.load(folder), ev.load(folder)
    records = calibration_records(CalibrationConfig(samples=24), digits)
    config = replace(WIDTHWISE, ratio=0.3)
    write = partial(write_text, processor=one.processor, count=generate, length=128, seed=0) if generate else None
    module = PruningModule(
        one.model, records, Collator(one.processor), config, write=write and (lambda model, _: write(model))
    )
    quiet_trainer(devices=1, inference_mode=False).predict(module, return_predictions=False)
    plan = ev.plan(other, samples=24, ratio=0.3, generate=generate)
    assert {*plan.calibration_ids} == {record.id for record in records}
    assert plan.layers == module.plan.layers and len(module.report.candidates) > 1
    smaller = ev.prune(other, plan, samples=24, ratio=0.3, generate=generate)
    round_weights(module.pruned, one.storage)
    assert all(
        torch.equal(value, smaller.model.state_dict()[name]) for name, value in module.pruned.state_dict().items()
    )


def test_groups_of_options_are_dicts_or_their_class(checkpoint):
    data = DataConfig("digits_vqa", images=4, batch_size=2)
    how = {"train": "projector", "steps": 1}
    stats = ev.recover(checkpoint, data, weights={"sft": 1.0, "hidden": 0.0}, **how)
    assert stats.loss == "1 x CE"
    with pytest.raises(UserError, match="recover: weights must be a WeightsConfig, or a dict"):
        ev.recover(checkpoint, data, weights=1.0, **how)
    for wrong in ("a.json", [{"id": "1"}]):
        with pytest.raises(UserError, match="records: give records, such as"):
            ev.plan(checkpoint, records=wrong)
    with pytest.raises(UserError, match="records: there are none"):
        ev.plan(checkpoint, records=[])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": -1}, "seed=-1: must be in"),
        ({"data_frac": 0}, "data_frac=0: must be in"),
        ({"lr": -1}, "recover.lr=-1"),
        ({"lr": "fast"}, "recover: lr='fast': must be a number in"),
        ({"lora": {"r": 1.5}}, "recover.lora: r=1.5: must be a whole number in"),
        ({"data": "a.json"}, "recover: data='a.json': give a DataConfig"),
    ],
)
def test_a_recovery_is_not_made_of_values_that_mean_nothing(checkpoint, options, told):
    with pytest.raises(UserError, match=told):
        ev.recover(checkpoint, **{"data": DataConfig("digits_vqa", images=4), "steps": 1, **options})


def test_epochs_take_the_place_of_the_default_steps(checkpoint):
    data = DataConfig("digits_vqa", images=8, batch_size=2)
    assert ev.recover(checkpoint, data, epochs=0.5, train="projector", weights=WeightsConfig(sft=1)).steps == 2
    with pytest.raises(UserError, match=r"recover\.steps=1, recover\.epochs=1\.0: exactly one"):
        ev.recover(checkpoint, data, epochs=1, steps=1)


DATA = DataConfig("digits_vqa", images=8, batch_size=2)
HIDDEN = {"weights": WeightsConfig(sft=1, hidden=1), "train": "projector", "save_every": 1}


def weights(checkpoint):
    return {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}


@pytest.mark.parametrize("damage", [None, "empty", "truncated", "flipped"])
def test_a_killed_recovery_goes_on_from_what_is_whole(tmp_path, monkeypatch, caplog, damage):
    folder = save_tiny(tmp_path / "model", layers=2)
    whole = ev.load(folder)
    ev.recover(whole, DATA, steps=3, **HIDDEN)
    steps, train = [], RecoveryModule.training_step

    def step(module, *rest):
        steps.append(module.global_step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return train(module, *rest)

    monkeypatch.setattr(RecoveryModule, "training_step", step)
    with pytest.raises(BaseException):  # noqa: B017 - Lightning makes a SystemExit of it
        ev.recover(ev.load(folder), DATA, workdir=tmp_path / "work", steps=3, **HIDDEN)
    (point,) = (tmp_path / "work").glob("recover/*/last.ckpt")
    content = bytearray(point.read_bytes())
    content[len(content) // 2] ^= 1
    if damage:
        point.write_bytes({"empty": b"", "truncated": content[:-9], "flipped": bytes(content)}[damage])
    again = ev.load(folder)
    assert ev.recover(again, DATA, workdir=tmp_path / "work", steps=3, **HIDDEN).steps == 3
    assert steps == [0, 1, 2, *((0, 1, 2) if damage else (2,))]
    assert sum("last.ckpt is damaged; set aside" in text for text in caplog.messages) == bool(damage)
    assert all(torch.equal(tensor, weights(whole)[name]) for name, tensor in weights(again).items())
    assert not list((tmp_path / "work").glob("recover/*/last.ckpt"))


def test_a_folder_of_work_serves_recoveries_of_any_kind(tmp_path):
    """What another recovery has left there is not gone on from, nor are another teacher's answers taken."""
    models = [save_tiny(tmp_path / str(seed), layers=1, seed=seed) for seed in (0, 1)]
    for model, lr, source in [(0, 1e-3, "live"), (0, 1e-2, "cached"), (1, 1e-3, "cached")]:
        options = {**HIDDEN, "lr": lr, "teacher": TeacherConfig(source=source), "steps": 2}
        found = []
        for workdir in (None, tmp_path / "work"):
            checkpoint = ev.load(models[model])
            ev.recover(checkpoint, DATA, workdir=workdir, **options)
            found.append(weights(checkpoint))
        assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_of_a_training_that_fails_nothing_is_taken_for_a_checkpoint(tmp_path):
    broken = ev.load(save_tiny(tmp_path / "model", layers=1))
    with pytest.raises(UserError, match="is nan at step"):
        ev.recover(broken, DATA, steps=3, train="lora", lr=1e20, warmup=0.0, weights=WeightsConfig(sft=1))
    for use in (
        partial(ev.save, broken, tmp_path / "out"),
        partial(ev.recover, broken, DATA),
        partial(ev.plan, broken),
    ):
        with pytest.raises(UserError, match="no weights any more"):
            use()
    assert not (tmp_path / "out").exists()


def test_what_a_processor_says_and_what_computes_decide_what_a_recovery_goes_on_from(tmp_path):
    folder, settings = save_tiny(tmp_path / "model", layers=1), RunConfig(data=DATA, recover=KD_HIDDEN)
    store, found = Store(tmp_path / "work", together=False), []
    for known in ({}, {}, {"system": "Say yes."}, {"dtype": "bfloat16"}):
        opened = ev.load(folder, **known)
        found.append(_places(store, opened, RecoveryData(DATA, opened.processor, 1.0, 0), settings))
    assert found[0] == found[1]
    assert len({place for places in found[1:] for place in places}) == 6


def test_a_checkpoint_is_not_saved_over_a_file(checkpoint, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file; give a folder"):
        ev.save(checkpoint, file)
    assert file.read_text() == "mine"
