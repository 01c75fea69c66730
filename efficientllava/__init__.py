"""efficientllava: prune large vision-language models, recover their skill, and prove it.

Importing the package makes checkpoints with per-layer sizes loadable by ``AutoModelForImageTextToText``. The
registration waits until transformers' auto classes are imported, so that ``import efficientllava`` stays cheap.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import TYPE_CHECKING, Any

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

TRIGGER = "transformers.models.auto.modeling_auto"


class _RegisterAfterImport(MetaPathFinder):
    """Finder that lets the import of `TRIGGER` happen as usual and registers our classes right after it."""

    def find_spec(self, fullname: str, *_: Any) -> Any:
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(fullname)
        load = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (load(module), _register())
        return spec


def _register() -> None:
    # The module registers when it is imported. It may be the one that imports transformers: then it is under way.
    importlib.import_module(f"{__name__}.models.pruned")


if TRIGGER in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterAfterImport())


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
