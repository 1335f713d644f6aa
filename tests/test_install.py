"""What `pip install .` takes with it: all packages, their data, the shipped model, the scripts."""

import re
import sys
from importlib import import_module

import pytest
from conftest import ROOT, SHIPPED

import expert_parallel

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOOLS = PROJECT["tool"]["setuptools"]


def test_every_package_and_script_is_named():
    rooms = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for path in ROOT.glob("expert_parallel/**/__init__.py")
    }
    assert set(TOOLS["packages"]) - {"expert_parallel.shipped"} == rooms
    assert set(TOOLS["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    assert TOOLS["package-dir"] == {"expert_parallel.shipped": SHIPPED.parent.relative_to(ROOT).as_posix()}


def test_every_file_of_data_is_named():
    listed = {
        path
        for package, patterns in TOOLS["package-data"].items()
        for pattern in patterns
        for path in (ROOT / TOOLS["package-dir"].get(package, package.replace(".", "/"))).glob(pattern)
    }
    for folder in (ROOT / "expert_parallel", SHIPPED.parent):
        files = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
        there = {path for path in files if path.suffix != ".py"}
        assert there <= listed and there


def test_one_version_and_one_list_of_requirements():
    assert re.fullmatch(r"\d+\.\d+\.\d+", expert_parallel.__version__)
    assert TOOLS["dynamic"] == {
        "version": {"attr": "expert_parallel.__version__"}, "dependencies": {"file": "requirements.txt"},
    }  # fmt: skip
    module, function = PROJECT["project"]["scripts"]["expert-parallel"].split(":")
    assert callable(getattr(import_module(module), function))
    assert (ROOT / "LICENSE").read_text().startswith("MIT License") and PROJECT["project"]["license"] == "MIT"
