"""A command that lacks an extra names it in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sunets.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
WITHOUT = """
import sys
sys.modules[sys.argv.pop(1)] = None
from sunets.__main__ import main
main()
"""


def test_every_package_of_an_extra_has_its_module() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = packages_distributions()
    for extra, modules in EXTRAS.items():
        expected = {canonicalize_name(Requirement(text).name) for text in declared[extra]}
        named = {module: {canonicalize_name(name) for name in installed[module]} & expected for module in modules}
        assert all(named.values()), named
        assert set().union(*named.values()) == expected
    assert declared.keys() - EXTRAS.keys() == {"dev"}


@pytest.mark.parametrize(
    ("module", "command"),
    [("matplotlib", ["report"]), ("pandas", ["explain", "accuracy", "x", "y"]), ("pandas", ["ablate", "report"])],
)
def test_one_line_names_the_extra(module: str, command: list[str]) -> None:
    done = _run(module, command)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == f"error: {module} is not installed; run `make env`, or `pip install '.[suite]'` in the checkout"


@pytest.mark.slow
def test_another_module_is_a_bug() -> None:
    assert "Traceback" in _run("sunets.plan", ["plan"]).stderr
    assert "Traceback" in _run("matplotlib", ["report"], SUNETS_DEBUG="1").stderr


def _run(module: str, command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT, module, *command],
        cwd=ROOT,
        env=os.environ | variables | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
