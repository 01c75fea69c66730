"""Every configuration file composes, and what has a ``_target_`` can be built."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from efficientllava.runtime.content import digest
from efficientllava.runtime.errors import UserError
from efficientllava.settings.compose import instantiate, typed
from efficientllava.settings.schema import RunConfig
from efficientllava.stages.request import check
from experiments.tiny_models.pretraining import PretrainConfig
from experiments.tiny_models.tiny import BUILDERS

from ..runs import ROOT, composed

GROUPS = sorted(p for p in (ROOT / "conf").iterdir() if p.is_dir())
OPTIONS = [f"{group.name}={file.stem}" for group in GROUPS for file in sorted(group.glob("*.yaml"))]
FILLED = {
    "model=checkpoint": ["model.path=org/name"],
    "experiment=efficientllava_scienceqa": ["dry_run=true"],
}


def test_no_group_is_empty():
    assert all(any(group.glob("*.yaml")) for group in GROUPS)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(option, tmp_path):
    records = tmp_path / "records.json"
    records.write_text("[]")
    typed_keys = [option, *FILLED.get(option, [])]
    if option == "evaluate=lmms_eval":
        pytest.importorskip("lmms_eval")
    if option.startswith("search="):
        typed_keys.append("prune=auto")
    if (option.startswith("data=") and "digits" not in option) or (
        option.startswith("model=") and "tiny" not in option and "smol" not in option
    ):
        typed_keys.append(f"data.path={records}")
    settings = typed(composed(*typed_keys))
    assert isinstance(settings, RunConfig)
    check(settings, typed_keys)
    OmegaConf.to_yaml(composed(*typed_keys), resolve=True)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.startswith(("callbacks=", "logger=", "trainer="))])
def test_every_target_can_be_built(option, tmp_path):
    settings = typed(composed(option))
    if option.startswith("callbacks="):
        built = [instantiate(node) for node in (settings.callbacks or {}).values()]
        assert all(hasattr(callback, "on_train_start") for callback in built)
    elif option.startswith("trainer="):
        # The accelerator of the option may be absent here.
        trainer = instantiate({**settings.trainer, "accelerator": "cpu", "devices": 1, "logger": False})
        assert trainer.log_every_n_steps == settings.trainer["log_every_n_steps"]
    else:
        from efficientllava.stages.run import make_logger

        logger = make_logger(settings, tmp_path)
        assert logger is False if option == "logger=none" else hasattr(logger, "log_metrics")


@pytest.mark.parametrize("model", BUILDERS)
def test_training_recipes_fit_their_dataclass(model):
    option = f"experiment=train_{model}"
    settings = typed(composed(option))
    check(settings, [option])
    recipe = {key: value for key, value in settings.pretrain.items() if key != "_target_"}
    assert PretrainConfig(**recipe).name == settings.model.name == model
    assert composed(option, "seed=7").pretrain.seed == 7


def test_a_typed_value_wins_over_the_defaults_of_the_model():
    assert composed().prune.ratio == 0.5
    assert composed("model=checkpoint").prune.ratio == 0.3
    assert composed("model=checkpoint", "prune.ratio=0.1").prune.ratio == 0.1


@pytest.mark.parametrize(
    ("option", "typed_too", "rate"),
    [
        ("tiny_llava", (), 1e-3),
        ("checkpoint", ("model.path=x",), 2e-4),
        ("checkpoint", ("model.path=x", "recover.train=full"), 2e-5),
        ("checkpoint", ("model.path=x", "recover=projector"), 2e-5),
        ("checkpoint", ("model.path=x", "recover.train=full", "recover.lr=0.5"), 0.5),
        ("smol_llava", ("model.lr.lora=0.5",), 0.5),
    ],
)
def test_the_learning_rate_is_that_of_what_trains(option, typed_too, rate):
    recovery = () if "recover=projector" in typed_too else ("recover=sft",)
    assert typed(composed(f"model={option}", *recovery, *typed_too)).recover.lr == rate


def test_digest_depends_on_content_alone():
    one, other = typed(composed()), typed(composed("seed=1"))
    assert digest(one) == digest(typed(composed())) == digest(dataclasses.asdict(one))
    assert digest(one) != digest(other)
    assert len(digest(one)) == 16


def test_instantiate_reports_a_bad_target():
    with pytest.raises(UserError, match=r"no\.such\.Thing"):
        instantiate({"_target_": "no.such.Thing"})
    assert instantiate({"_target_": "builtins.dict"}, a=1) == {"a": 1}


def test_typed_gives_dataclasses():
    config = typed(composed())
    assert isinstance(config, RunConfig)
    assert dataclasses.is_dataclass(config.recover.lora)


@pytest.mark.parametrize(
    ("more", "prose"),
    [
        ((), 32),
        (("calibration.samples=16",), 8),
        (("calibration.samples=100",), 32),
        (("debug=default",), 0),
        (("calibration.prose=60",), 60),
        (("calibration={samples: 32, prose: 30}",), 30),
    ],
)
def test_an_option_s_prose_is_at_most_half_of_the_samples(more, prose):
    command = ("model=smol_llava", *more)
    assert typed(composed(*command), command).calibration.prose == prose
