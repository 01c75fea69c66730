"""Lightning's progress bar, saying what is being answered."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import RichProgressBar


class StageProgressBar(RichProgressBar):
    """A bar that carries the name of stage and benchmark where Lightning says "Predicting".

    Args:
        what: The name.
        **options: Those of Lightning's bar.
    """

    def __init__(self, what: str = "Predicting", **options: Any) -> None:
        super().__init__(**options)
        self.what = what

    @property
    def predict_description(self) -> str:
        """The name."""
        return self.what
