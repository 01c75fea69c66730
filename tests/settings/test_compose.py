import dataclasses

import pytest

from efficientllava.runtime.content import digest
from efficientllava.runtime.errors import UserError
from efficientllava.settings.compose import instantiate, typed
from efficientllava.settings.schema import RunConfig

from ..runs import composed


def test_a_typed_value_wins_over_the_defaults_of_the_model():
    assert composed().prune.ratio == 0.5
    assert composed("model=checkpoint").prune.ratio == 0.3
    assert composed("model=checkpoint", "prune.ratio=0.1").prune.ratio == 0.1


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
