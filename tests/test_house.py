"""The map of docs/design.md, held to what the modules import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DESIGN = (ROOT / "docs/design.md").read_text(encoding="utf-8")
# Rooms of a floor know those of the floors above their line in this table, and nothing of each other.
FLOORS = (
    ("runtime",),
    ("settings", "models", "record"),
    ("data", "checkpoint"),
    ("pruning", "recovery", "evaluation"),
    ("search", "deploy"),
    ("report",),
    ("stages",),
    ("estimate", "launch"),
    ("pipeline",),
    ("api", "__main__", "hydra_plugins"),
    ("__init__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FLAT = {"api", "pipeline", "record"}
ENTRIES = {"__init__", "__main__"}


class Import(NamedTuple):
    """A module that another one imports; ``late``: in a function; ``typing``: for types only."""

    module: str
    late: bool
    typing: bool


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(file): file for top in ("efficientllava", "hydra_plugins") for file in (ROOT / top).rglob("*.py")}


def room_of(module: str) -> str:
    """The room of a module; a command is a door wherever it lies, and nobody imports it."""
    if module.endswith(".__main__"):
        return "__main__"
    top, _, inside = module.partition(".")
    return inside.partition(".")[0] or "__init__" if top == "efficientllava" else top


@cache
def imports(module: str) -> tuple[Import, ...]:
    file = MODULES[module]
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = walk(ast.parse(file.read_text(encoding="utf-8")), package, late=False, typing=False)
    return tuple(each for each in found if each.module in MODULES)


def walk(node: ast.AST, package: str, late: bool, typing: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, late, typing) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            source = resolve_name("." * child.level + (child.module or ""), package) if child.level else child.module
            for alias in child.names:
                inside = f"{source}.{alias.name}"
                yield Import(inside if inside in MODULES else str(source), late, typing)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checked = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, package, late or function, typing or checked)


def upwards() -> set[tuple[str, str]]:
    """Imports of the same floor or of a higher one."""
    pairs = ((module, each.module) for module in MODULES for each in imports(module))
    pairs = ((ours, theirs) for ours, theirs in pairs if room_of(ours) != room_of(theirs))
    return {(ours, theirs) for ours, theirs in pairs if FLOOR[room_of(theirs)] >= FLOOR[room_of(ours)]}


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} | {"__main__"} == {*FLOOR}


def test_imports_go_down():
    assert not upwards(), "imports of the same floor or of a higher one"


def test_no_circle_of_modules():
    """None when they are imported; late imports, and those for types, are not there then."""
    graph = {module: {each.module for each in imports(module) if not (each.late or each.typing)} for module in MODULES}
    graph = {module: seen - {module} for module, seen in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_the_reader_of_imports_sees_all_kinds(tmp_path, monkeypatch):
    source = (
        "import efficientllava.record\n"
        "from . import plan\n"
        "from ..models import anatomy, forward as f\n"
        "if TYPE_CHECKING:\n    from ..data.records import Record\n"
        "def late():\n    from ..runtime.errors import UserError\n"
    )
    tree = ast.parse(source)
    found = {each.module: each for each in walk(tree, "efficientllava.pruning", late=False, typing=False)}
    names = ("record", "pruning.plan", "models.anatomy", "models.forward", "data.records", "runtime.errors")
    assert [*found] == [f"efficientllava.{name}" for name in names]
    assert [name for name, each in found.items() if each.late] == ["efficientllava.runtime.errors"]
    assert [name for name, each in found.items() if each.typing] == ["efficientllava.data.records"]


def test_what_lies_flat():
    flat = {file.stem for file in (ROOT / "efficientllava").glob("*.py")}
    assert flat - ENTRIES == FLAT


def test_nothing_outside_is_needed():
    """experiments/ and tests/ know the package, never the other way round."""
    roots = {ast.unparse(node) for module in MODULES for node in outside(module)}
    assert not [line for line in roots if re.match(r"(from|import) (experiments|tests|run)\b", line)]


def outside(module: str) -> Iterator[ast.stmt]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def test_readme_is_a_welcome():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_design_has_every_room_on_its_floor():
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", DESIGN, re.MULTILINE)
    shown = {int(floor): {*re.findall(r"`(\w+)", rooms)} for floor, rooms in rows}
    assert shown == {floor: {*rooms} for floor, rooms in enumerate(FLOORS)}


def test_the_workflow_is_ci_and_hooks_are_local():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step] == [".ci/run"]
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert {(repo["repo"], hook["language"]) for repo in repos for hook in repo["hooks"]} == {("local", "system")}
