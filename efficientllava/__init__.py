"""efficientllava: prune large vision-language models, recover their skill, and prove it.

Importing the package makes checkpoints with per-layer sizes loadable by ``AutoModelForImageTextToText``. The
registration waits until transformers' auto classes are imported, so that ``import efficientllava`` stays cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .checkpoint import register_when_transformers_loads

if TYPE_CHECKING:
    from .api import (
        load,
        plan,
        prune,
        recover,
        save,
        to_gguf,
    )

__version__ = "0.1.0"
__all__ = ["load", "plan", "prune", "recover", "save", "to_gguf"]

register_when_transformers_loads()


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
