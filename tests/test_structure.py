"""The design's promises that prose would let drift: one-way imports, light imports, stages and their dependencies."""

from __future__ import annotations

import ast
import functools
import operator
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from sunets.core.provenance import module_closure

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "sunets").rglob("*.py"), *(ROOT / "ablations").rglob("*.py")])

FLOORS = (
    ("sunets.core",),
    ("sunets.data", "sunets.models", "sunets.report"),
    ("sunets.training", "sunets.evaluation", "sunets.profiling", "sunets.tracking"),
    (
        "sunets.plan",
        "sunets.duration",
        "sunets.extras",
        "sunets.presets",
        "sunets.predict",
        "sunets.profile",
        "sunets.verify",
        "sunets.zoo_tables",
        "sunets.stages",
    ),
    ("sunets.__main__", "ablations"),
)
"""The floors of the house, from the ground up: a layer imports from lower floors, and on its floor from its left."""
LAYERS = [layer for floor in FLOORS for layer in floor]
MOST_LINES = 470
# The only modules that may import these packages.
CONFINED = {
    "mlflow": ("sunets/tracking/",),
    "optuna": ("ablations/search.py", "ablations/report/"),
    "distributed": ("sunets/core/executor.py",),
    "dvc": (),
    "pandas": ("sunets/report/", "ablations/"),
    "seaborn": ("sunets/report/", "ablations/report/"),
    "matplotlib": ("sunets/report/", "ablations/report/"),
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
    """Place of a module in the order of layers; None for what is no module of ours."""
    prefixes = [known for known in LAYERS if name == known or name.startswith(known + ".")]
    return LAYERS.index(max(prefixes, key=len)) if prefixes else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downward_only(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    own = _layer(module)
    internal = [(name, line) for name, line in _imports(path) if name.split(".")[0] in ("sunets", "ablations")]
    if module == "sunets":  # re-exports lazily and stands outside the layers
        assert own is None
        assert not [name for name, _ in internal if name.startswith("ablations")]
        return
    assert own is not None, f"{module} stands on no floor: add it to FLOORS"
    upward = [f"{name} (line {line})" for name, line in internal if (there := _layer(name)) is None or there > own]
    assert not upward, f"{module} imports {', '.join(upward)}"


def test_the_house_has_five_floors_at_most() -> None:
    assert len(FLOORS) <= 5


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "import sunets.evaluation.evaluate, sunets.profiling.cost, sunets.predict, sunets.stages.train",
            {"mlflow", "optuna", "dvc", "pandas", "matplotlib", "seaborn", "fvcore", "segmentation_models_pytorch"},
        ),
        ("import sunets.report.build, sunets.report.explain, ablations.report.page", {"torch", "mlflow", "dvc"}),
        ("import sunets, sunets.core.config, sunets.core.record", {"torch", "mlflow", "pandas"}),
        ("import sunets.core.executor", {"torch", "distributed"}),
        ("import sunets.core.process", {"typer", "pydantic", "yaml", "numpy"}),
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
    "tune": "ablations.tune",
    "train": "sunets.stages.train",
    "evaluate": "sunets.stages.evaluate",
    "cost": "sunets.stages.cost",
    "speed": "sunets.stages.cost",
    "ablate": "ablations.study",
    "report": "sunets.report.build",
    "ablation_report": "ablations.report.page",
}


def test_every_stage_has_its_module() -> None:
    assert set(_stages()) == {"watch", *STAGE_MODULES}


def test_watch_always_prepares() -> None:
    """It runs whatever has changed, so that dependencies and parameters of its own would say nothing."""
    stages = _stages()
    assert stages["watch"]["always_changed"]
    assert stages["watch"]["cmd"] == stages["prepare"]["cmd"]
    assert not {"deps", "params"} & stages["watch"].keys()
    assert ".watch" in stages["prepare"]["deps"]


def test_dvc_deletes_no_output() -> None:
    """Its path holds names of params.yaml, which only the command checks, after DVC would have deleted it."""
    for stage in _stages().values():
        outs = [*stage.get("outs", []), *stage.get("metrics", []), *stage.get("plots", [])]
        assert not [out for out in outs if isinstance(out, str) or not all(how.get("persist") for how in out.values())]


def test_keys_are_quoted_in_commands() -> None:
    """A shell gets them, and DVC reads the file before `load` can refuse a key."""
    commands = [stage["cmd"] for stage in _stages().values()]
    assert any("${key}" in command for command in commands)
    assert not [command for command in commands if "${" in command.replace("'${key}'", "")]


def test_pipeline_is_short_enough_to_read() -> None:
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 200


def code_units(module: str) -> set[str]:
    """What a stage of this module lists: folders that its imports reach, and files where the folder is no layer.

    A package's `__init__.py` that holds a docstring alone decides nothing and is left out.
    """
    units = set()
    for path in module_closure(module):
        body = ast.parse((ROOT / path).read_text()).body
        if path.name == "__init__.py" and all(
            isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in body
        ):
            continue
        alone = path.parent.as_posix() in ("sunets", "sunets/stages", "ablations")
        units.add(path.as_posix() if alone else path.parent.as_posix())
    return units


@pytest.mark.parametrize("stage", STAGE_MODULES)
def test_stage_lists_the_folders_that_its_imports_reach(stage: str) -> None:
    listed = {d for d in _stages()[stage]["deps"] if d.split("/")[0] in ("sunets", "ablations")}
    needed = code_units(STAGE_MODULES[stage])
    assert listed == needed, f"missing: {sorted(needed - listed)}; in vain: {sorted(listed - needed)}"


@pytest.mark.parametrize("stage", STAGE_MODULES)
def test_stage_tracks_parameters_that_exist(stage: str) -> None:
    """Each name, written out for every key of a foreach, leads to a value of params.yaml, whose keys `load` checks."""
    body = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    items = params[body["foreach"].strip("${}")] if "foreach" in body else {"": {}}
    names = body.get("do", body)["params"]
    assert "benchmark" in names, "outputs lie under the benchmark's name"
    assert items
    for key, item in items.items():
        for name in names:
            model = item.get("model", "") if isinstance(item, dict) else ""
            path = name.replace("${key}", key).replace("${item.model}", model)
            functools.reduce(operator.getitem, path.split("."), params)  # KeyError: no such parameter


@pytest.mark.parametrize(("stage", "package"), [("report", "sunets/report"), ("ablation_report", "ablations/report")])
def test_a_page_is_made_again_for_every_section_that_it_reads(stage: str, package: str) -> None:
    from sunets.core.config import Suite

    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / package).glob("*.py"))
    read = set(re.findall(r"\bsuite\.(\w+)", code)) & set(Suite.model_fields)
    assert len(read) > 2, "or this test reads nothing"
    assert read <= set(_stages()[stage]["params"])


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_are_valid(path: Path) -> None:
    from sunets.core.config import load

    assert path.read_text().startswith("# "), "the first line says what the preset is"
    suite = load(path)
    assert suite.benchmark == ("synthetic" if path.stem == "default" else path.stem)
    used = {name.split(".")[0].strip("${}") for body in _stages().values() for name in body.get("params", ())} | {
        "ablations"
    }
    assert used <= yaml.safe_load(path.read_text()).keys(), "DVC reads sections from the file, not from the defaults"


def test_default_preset_is_the_committed_parameter_file() -> None:
    """That DVC can read these bytes is held in test_presets.py: two equal files may have the same fault."""
    assert (ROOT / "presets" / "default.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_page_shows_the_committed_cost_tables() -> None:
    page = (ROOT / "docs" / "cost.md").read_text()
    for task in ("segmentation", "classification"):
        assert (ROOT / "results" / "zoo" / f"cost_{task}.md").read_text() in page


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))])
def test_links_lead_to_files_that_exist(name: str) -> None:
    """Files of the repository, not of this machine's working tree alone, and headings of the page."""
    page, folder = (ROOT / name).read_text(), (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)]+)\)", page) if "://" not in link]
    assert len(links) > (10 if name == "README.md" else 0)
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    paths = {parent.as_posix() for path in files.stdout.splitlines() for parent in (Path(path), *Path(path).parents)}
    headings = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"(?m)^#+ (.+)$", page)}
    for link in links:
        path, _, heading = link.partition("#")
        target = (folder / path).resolve()
        assert target.exists(), link
        assert target.relative_to(ROOT).as_posix() in paths, f"{link}: not in the repository"
        if not path:
            assert heading in headings, link


def test_core_needs_no_torch() -> None:
    modules = [f"sunets.core.{path.stem}" for path in sorted((ROOT / "sunets" / "core").glob("[!_]*.py"))]
    assert not _loaded(f"import {', '.join(modules)}") & {"torch", "torchvision", "mlflow", "pandas"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_text_is_utf8_whatever_the_locale(path: Path) -> None:
    assert not locale_lines(path.read_text(encoding="utf-8"))


def locale_lines(code: str) -> list[int]:
    """Lines that read or write text in the encoding of the locale."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        of = getattr(getattr(node.func, "value", None), "id", "")
        arguments = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        modes = [a for a in arguments if isinstance(a, str) and re.fullmatch("[rwaxbt+]{1,3}", a)]
        is_file = of not in ("Image", "os", "tarfile") and (not method or bool(modes) or not node.args)
        opened = name == "open" and is_file and not any("b" in mode for mode in modes)
        piped = any(k.arg in ("text", "universal_newlines") for k in node.keywords) and name in ("run", "Popen")
        if opened or piped or (method and name in ("read_text", "write_text")):
            found.append(node.lineno)
    return found


def test_each_way_to_depend_on_the_locale_is_seen() -> None:
    lines = [
        "p.read_text()", "p.write_text(x)", "open(p)", "open(p, 'w')", "p.open()", "p.open('w', newline='')",
        "p.open(newline='')", "subprocess.run(c, text=True)", "subprocess.Popen(c, universal_newlines=True)",
    ]  # fmt: skip
    assert locale_lines("\n".join(lines)) == list(range(1, len(lines) + 1))
    fine = ["p.read_text(encoding='utf-8')", "open(p, 'rb')", "p.open('rb+')", "Image.open(p)", "os.open(p, f)"]
    assert not locale_lines("\n".join(fine))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_enough_to_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_one_version_and_one_licence() -> None:
    import sunets

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert citation["version"] == sunets.__version__
    assert pyproject["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "sunets.core.version.__version__"
    assert citation["license"] == pyproject["project"]["license"] == "MIT"
    assert (ROOT / "LICENSE").read_text().startswith("MIT License")


@pytest.mark.parametrize("program", ["sunets", "ablations"])
def test_version_is_printed(program: str) -> None:
    import sunets

    command = [sys.executable, "-m", program, "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"sunets {sunets.__version__}\n"
