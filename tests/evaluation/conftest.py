from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch

from efficientllava.evaluation.answers import answer
from efficientllava.evaluation.score import as_record
from efficientllava.evaluation.tasks.digits_vqa import digits_vqa
from experiments.tiny_models.tiny import BUILDERS

from .published import publish

torch.set_num_threads(1)


def evaluate(model, processor, task, *arguments):
    """Answers of a model, and what they score."""
    lines = answer(model, processor, task, *arguments)
    return SimpleNamespace(lines=lines, scores=task.score([as_record(item) for item in lines]))


@lru_cache
def build(name):
    torch.manual_seed(0)
    model, processor = BUILDERS[name]()
    # Double precision: equal answers must not hang on the rounding of a padded batch.
    return model.double().eval(), processor


@pytest.fixture(params=list(BUILDERS))
def family(request):
    return build(request.param)


@pytest.fixture
def tiny():
    return build("tiny_llava")


@pytest.fixture(scope="session")
def questions():
    return list(digits_vqa(24).records())


@pytest.fixture(autouse=True)
def data_cache(tmp_path_factory, monkeypatch):
    """What `datasets` makes of files stays with the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """All benchmarks as a user who has downloaded them has them; made-up content."""
    return publish(tmp_path_factory.mktemp("published"))
