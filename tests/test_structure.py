"""The design's promises that prose would let drift: one-way imports, light imports, stages and their dependencies."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sunets.config import Suite
from sunets.record import module_closure

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "sunets").rglob("*.py"), *(ROOT / "ablations").rglob("*.py")])

# Lower layers never import upper ones; equal layers may import each other.
LAYERS = {
    "sunets.cli": 0,
    "sunets.config": 0,
    "sunets.sunet": 0,
    "sunets.record": 1,
    "sunets.metrics": 1,
    "sunets.distributed": 1,
    "sunets.reference": 1,
    "sunets.baselines": 1,
    "sunets.zoo": 1,
    "sunets.data": 2,
    "sunets.inference": 2,
    "sunets.profile": 3,
    "sunets.train": 3,
    "sunets.evaluate": 3,
    "sunets.predict": 4,
    "sunets.report": 4,
    "sunets.tracking": 4,
    "sunets.stages": 5,
    "sunets.plan": 6,
    "ablations": 6,
    "sunets.__main__": 7,
}
# The only modules that may import these packages.
CONFINED = {
    "mlflow": ("sunets/tracking.py",),
    "optuna": ("ablations/",),
    "dvc": (),
    "pandas": ("sunets/report/", "ablations/"),
    "seaborn": ("sunets/report/", "ablations/report.py"),
    "matplotlib": ("sunets/report/", "ablations/report.py"),
}


def _imports(path: Path) -> list[tuple[str, int]]:
    """Absolute names of all imports of a file, function-level ones included, with their lines."""
    found = []
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, [base, node.module or ""]))
            found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def _layer(name: str) -> int | None:
    prefixes = [known for known in LAYERS if name == known or name.startswith(known + ".")]
    return LAYERS[max(prefixes, key=len)] if prefixes else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward_only(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    own = _layer(module)
    if own is None:  # sunets/__init__.py re-exports lazily and stands outside the layers
        assert module == "sunets"
        return
    upward = [f"{name} (line {line})" for name, line in _imports(path) if (_layer(name) or 0) > own]
    assert not upward, f"{module} imports {', '.join(upward)}"


@pytest.mark.parametrize("package", CONFINED)
def test_package_is_imported_only_where_it_belongs(package: str) -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for name, line in _imports(path)
        if name.split(".")[0] == package
        and not any(str(path.relative_to(ROOT)).startswith(home) for home in CONFINED[package])
    ]
    assert not offenders


def _loaded(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import sunets.train, sunets.evaluate, sunets.profile, sunets.predict, sunets.stages.train",
            {"mlflow", "optuna", "dvc", "pandas", "matplotlib", "seaborn", "fvcore", "segmentation_models_pytorch"},
        ),
        ("import sunets.report.build, sunets.report.explain, ablations.report", {"torch", "mlflow", "dvc"}),
        ("import sunets, sunets.config, sunets.record", {"torch", "mlflow", "pandas"}),
    ],
)
def test_imports_are_light(statement: str, absent: set[str]) -> None:
    assert not _loaded(statement) & absent


def _stages() -> dict:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    return {name: body.get("do", body) for name, body in stages.items()}


# The module that does a stage's work; its closure is what the stage depends on.
STAGE_MODULES = {
    "prepare": "sunets.stages.prepare",
    "train": "sunets.stages.train",
    "evaluate": "sunets.stages.evaluate",
    "cost": "sunets.stages.cost",
    "speed": "sunets.stages.cost",
    "ablate": "ablations.study",
    "report": "sunets.report.build",
    "ablation_report": "ablations.report",
}


def test_every_stage_has_its_module() -> None:
    assert set(_stages()) == set(STAGE_MODULES)


@pytest.mark.parametrize("stage", STAGE_MODULES)
def test_stage_depends_on_exactly_the_code_it_runs(stage: str) -> None:
    listed = {d for d in _stages()[stage]["deps"] if d.endswith(".py")}
    needed = {p.as_posix() for p in module_closure(STAGE_MODULES[stage])}
    assert listed == needed, f"missing: {sorted(needed - listed)}; not needed: {sorted(listed - needed)}"


@pytest.mark.parametrize("stage", STAGE_MODULES)
def test_stage_tracks_parameters_that_exist(stage: str) -> None:
    for name in _stages()[stage].get("params", []):
        assert name.split(".")[0] in Suite.model_fields


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_are_valid(path: Path) -> None:
    from sunets.config import load

    assert path.read_text().startswith("# "), "the first line says what the preset is"
    suite = load(path)
    assert suite.benchmark == ("synthetic" if path.stem == "default" else path.stem)
    used = {name.split(".")[0].strip("${}") for body in _stages().values() for name in body["params"]} | {"ablations"}
    assert used <= yaml.safe_load(path.read_text()).keys(), "DVC reads sections from the file, not from the defaults"


def test_default_preset_is_the_committed_parameter_file() -> None:
    assert (ROOT / "presets" / "default.yaml").read_text() == (ROOT / "params.yaml").read_text()


def test_readme_shows_the_committed_cost_tables() -> None:
    readme = (ROOT / "README.md").read_text()
    for task in ("segmentation", "classification"):
        assert (ROOT / "results" / "zoo" / f"cost_{task}.md").read_text() in readme


def test_readme_links_to_files_that_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
