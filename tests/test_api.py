"""The Python interface refuses what the command line refuses."""

import pytest

import efficientllava as ev
from efficientllava.errors import UserError
from efficientllava.schema import DataConfig, WeightsConfig

from .runs import save_tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return ev.load(save_tiny(tmp_path_factory.mktemp("tiny") / "model", layers=2))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ratio": 1.5}, r"prune\.ratio=1\.5: must be in \[0, 1\)"),
        ({"ratio": float("nan")}, r"prune\.ratio=nan: must be in"),
        ({"ratio": "half"}, r"prune\.ratio=half: must be in"),
        ({"ratio": None}, r"prune\.ratio=None: set it"),
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


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seed": -1}, "seed=-1: must be in"),
        ({"data_frac": 0}, "data_frac=0: must be in"),
        ({"lr": -1}, "recover.lr=-1"),
    ],
)
def test_a_recovery_is_not_made_of_values_that_mean_nothing(checkpoint, options, told):
    with pytest.raises(UserError, match=told):
        ev.recover(checkpoint, **{"data": DataConfig("digits_vqa", images=4), "steps": 1, **options})


def test_epochs_take_the_place_of_the_default_steps(checkpoint):
    data = DataConfig("digits_vqa", images=8, batch_size=2)
    assert ev.recover(checkpoint, data, epochs=0.5, train="projector", weights=WeightsConfig(sft=1)).steps == 2
    with pytest.raises(UserError, match=r"recover\.steps=1, recover\.epochs=1: exactly one"):
        ev.recover(checkpoint, data, epochs=1, steps=1)


def test_a_checkpoint_is_not_saved_over_a_file(checkpoint, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(UserError, match="is a file; give a folder"):
        ev.save(checkpoint, file)
    assert file.read_text() == "mine"
