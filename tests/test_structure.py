"""Imports point down: scripts -> report, study -> other rooms -> the flat core; the package itself is light."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

PACKAGE = ROOT / "expert_parallel"
ROOMS = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
ASKED_BY_THE_CORE = {"placement.py": {"formats"}, "experts.py": {"ranks", "device"}}  # inside functions that seldom run
FROM_ABOVE = {"report": {"report"}, "command": {"command"}, "study": {"report", "study"}}  # room: who may import it


def rooms_imported(path):
    """Rooms that a module of the package imports from, anywhere in it."""
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = (*here[: len(here) - node.level + 1], *(node.module or "").split("."))
            yield from {names[0]} & ROOMS if names[0] else {alias.name for alias in node.names} & ROOMS


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path.name == "__main__.py":  # a script
        return
    room = path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else None
    imported = set(rooms_imported(path)) - {room}
    assert room or imported <= ASKED_BY_THE_CORE.get(path.name, set()), f"the core imports {imported}"
    assert not [name for name in imported if room and room not in FROM_ABOVE.get(name, ROOMS)]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


def test_no_circle_between_rooms():
    order = {room: {name for path in (PACKAGE / room).glob("*.py") for name in rooms_imported(path)} for room in ROOMS}
    while order:
        free = [room for room, imported in order.items() if not (imported - {room}) & order.keys()]
        assert free, f"these import each other: {order}"
        for room in free:
            del order[room]


HEAVY = "import sys; sys.argv = ['x', '--help']; import {}; print(*sys.modules)"


@pytest.mark.parametrize("name", ["expert_parallel", "qwen3_expert_parallel", "model_analysis", "expert_parallel_poc"])
def test_nothing_heavy_is_imported_before_it_is_needed(name):
    """--help answers in a tenth of a second; transformers alone takes two."""
    done = subprocess.run(
        [sys.executable, "-c", HEAVY.format(name)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"mlx", "mlx.core", "mlx_lm", "transformers", "torch", "matplotlib", "rich"}
