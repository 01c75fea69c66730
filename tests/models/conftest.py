"""What the tests of model families share."""

import pytest


@pytest.fixture
def without_num2words(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolVLM's processor wants a package that it needs for videos alone."""
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", str)
