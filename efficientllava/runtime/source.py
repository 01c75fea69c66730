"""Our own source as an input of what it makes, so that changed code does not reuse what the old one made."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
SHOWN = ("report", "launch", "runtime.console")  # what shows or starts, and decides no number
IMPORT = re.compile(r"^\s*from\s+([.\w]+)\s+import\s+(\([^)]*\)|.*)", re.MULTILINE)  # in a function, too


@functools.cache
def source_digest(*modules: str) -> str:
    """Digest of modules of this package and of everything inside it that they import, late imports included.

    Args:
        *modules: Their names inside the package, such as ``stages.prune``.
    """
    total = hashlib.blake2b(digest_size=8)
    for name, file in sorted(closure(*modules).items()):
        total.update(name.encode() + file.read_bytes())
    return total.hexdigest()


def closure(*modules: str) -> dict[str, Path]:
    """The files behind modules and all that they import inside the package, by module; without `SHOWN`."""
    found: dict[str, Path] = {}
    todo = [f"{PACKAGE.name}.{name}" for name in modules]
    while todo:
        module = todo.pop()
        name, file = module.partition(".")[2], _file(module)
        if name and file and name not in found and not name.startswith(SHOWN):
            found[name] = file
            todo += [module.rpartition(".")[0], *_imports(module, file)]
    return found


def _file(module: str) -> Path | None:
    place = PACKAGE.parent.joinpath(*module.split("."))
    return next((file for file in (place / "__init__.py", place.with_suffix(".py")) if file.is_file()), None)


def _imports(module: str, file: Path) -> Iterator[str]:
    """What a module may import of the package; names that are no modules lead to no file."""
    around = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for source, names in IMPORT.findall(file.read_text("utf-8")):
        if source.startswith((".", PACKAGE.name)):
            source = resolve_name(source, around)
            yield source
            yield from (f"{source}.{name}" for name in re.findall(r"\w+", names))
