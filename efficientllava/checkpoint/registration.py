"""Register the per-layer classes once transformers' auto classes exist, without importing transformers ourselves."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

TRIGGER = "transformers.models.auto.modeling_auto"


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    """Finder that lets the import of `TRIGGER` happen as usual and registers our classes right after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _register()

        spec.loader.exec_module = exec_module  # pyright: ignore[reportAttributeAccessIssue]
        return spec


def _register() -> None:
    # The module registers when it is imported. It may be the one that imports transformers: then it is under way.
    importlib.import_module("efficientllava.models.pruned")


def register_when_transformers_loads() -> None:
    """Register now where the auto classes are already imported, else when they are."""
    if TRIGGER in sys.modules:
        _register()
    elif not any(isinstance(finder, _RegisterAfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
