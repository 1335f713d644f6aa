"""Imports point down: scripts -> report, study -> other rooms -> the flat core; the package itself is light."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SHIPPED

from expert_parallel.command.entry import without_torch

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


@pytest.mark.parametrize("line", [["model_analysis.py"], ["-m", "expert_parallel", "generate", "--max-tokens", "1"]])
def test_scripts_leave_torch_alone_where_it_is_installed(line, tmp_path):
    """transformers imports it where it finds it, 2 to 3 s of a start; mlx-lm uses nothing of it."""
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    alone = [sys.executable, "-c", "import mlx_lm"]
    assert subprocess.run(alone, env=environment, capture_output=True, check=False).returncode, "it would be imported"
    if line[0] == "-m":
        line = [*line, "--model", str(SHIPPED)]
    done = subprocess.run([sys.executable, *line], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_code_that_a_checkpoint_brings_may_want_torch(monkeypatch):
    for option, hidden in ({"--max-tokens": True, "--trust-remote-code": False, "--trust": False}).items():
        modules = {}
        monkeypatch.setattr(sys, "argv", ["x", option])
        monkeypatch.setattr(sys, "modules", modules)
        without_torch()
        monkeypatch.undo()
        assert ("torch" in modules) is hidden
