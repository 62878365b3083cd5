"""requirements.lock holds for every supported platform: markers are evaluated, nothing is downloaded."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PLATFORMS = {
    "Linux x86-64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    "Linux aarch64": {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    "macOS arm64": {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
}
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
CUDA = re.compile(r"^(nvidia|cuda|triton)(-|$)")
ENVIRONMENTS = [pytest.param(system, python, id=f"{system}, {python}") for system in PLATFORMS for python in PYTHONS]


def environment(system: str, python: str) -> dict[str, str]:
    """Marker variables of CPython `python` on that platform."""
    versions = {"python_version": python, "python_full_version": f"{python}.0", "implementation_version": f"{python}.0"}
    cpython = {"implementation_name": "cpython", "platform_python_implementation": "CPython", "os_name": "posix"}
    unknown = {"platform_release": "", "platform_version": "", "extra": ""}
    values = PLATFORMS[system] | versions | cpython | unknown
    assert set(default_environment()) <= set(values), "a marker variable would be this machine's"
    return values


def applies(requirement: Requirement, values: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(values)


def locked() -> list[Requirement]:
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def direct(requirements: list[str], project: dict[str, Any]) -> list[Requirement]:
    """Requirements of `project`, with its own extras put in place of their names."""
    result: list[Requirement] = []
    for requirement in map(Requirement, requirements):
        if requirement.name == project["name"]:
            for extra in sorted(requirement.extras):
                result += direct(project["optional-dependencies"][extra], project)
        else:
            result.append(requirement)
    return result


DIRECT = direct([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]], PROJECT)


def test_every_line_is_one_exact_version_and_no_address():
    text = LOCK.read_text(encoding="utf-8")
    for sign in ("://", " @ ", "--", "\\"):
        assert sign not in text, f"{sign!r} in requirements.lock"
    for requirement in locked():  # a line that does not parse raises
        assert re.fullmatch(r"==[0-9][0-9a-z.+]*", str(requirement.specifier)), requirement
        assert requirement.url is None
        assert canonicalize_name(requirement.name) == requirement.name


def test_dev_holds_every_extra():
    extras = PROJECT["optional-dependencies"]
    for name, requirements in extras.items():
        missing = {str(r) for r in direct(requirements, PROJECT)} - {str(r) for r in DIRECT}
        assert not missing, f"{name}: {missing} not in dev, so that requirements.lock has no version of it"


@pytest.mark.parametrize(("system", "python"), ENVIRONMENTS)
def test_each_direct_dependency_is_selected_once_within_its_range(system, python):
    values = environment(system, python)
    selected = [r for r in locked() if applies(r, values)]
    twice = [name for name, count in Counter(r.name for r in selected).items() if count > 1]
    assert not twice
    versions = {r.name: next(iter(r.specifier)).version for r in selected}
    wanted = [r for r in DIRECT if applies(r, values)]
    assert len(wanted) > 30
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        assert name in versions, f"{name}: not selected on {system}; run `make lock`"
        assert requirement.specifier.contains(versions[name], prereleases=True), f"{requirement}: {versions[name]}"


@pytest.mark.parametrize(("system", "python"), ENVIRONMENTS)
def test_cuda_packages_are_selected_where_they_can_be_installed(system, python):
    values = environment(system, python)
    cuda = {r.name for r in locked() if CUDA.match(r.name) and applies(r, values)}
    if system == "macOS arm64":
        assert not cuda
    else:
        assert {"triton", "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"} <= cuda


def test_torch_and_torchvision_are_of_one_build():
    """torchvision 0.29.2 was built for another CUDA than torch 2.14.1 and does not load beside it."""
    versions = {r.name: str(r.specifier) for r in locked()}
    assert (versions["torch"], versions["torchvision"]) == ("==2.14.1", "==0.29.1")
