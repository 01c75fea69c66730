"""Checkpoints: folders and hub ids, strict loading and saving, published layouts.

Importing this package registers nothing yet: the per-layer classes are registered once transformers' auto classes
exist, without importing transformers ourselves.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from typing import Any

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
    importlib.import_module("efficientllava.models.pruned")


def register_when_transformers_loads() -> None:
    """Register now where the auto classes are already imported, else when they are."""
    if TRIGGER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _RegisterAfterImport())
