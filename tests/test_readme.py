"""Commands of the README and of pages in docs/: run in a fresh clone at smoke size, or listed with a reason."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ENV, ROOT, edit, ran, shell
from cluster import NO_SERVER
from standins import make_camvid, make_folder

PAGES = ("README.md", "docs/benchmark.md", "docs/cost.md", "docs/paper.md")
"""Pages whose commands are run; no two have a section of the same name."""
README = "\n".join((ROOT / page).read_text() for page in PAGES)
MOST_WORDS = 1500
"""In README.md, code and tables included."""

NOT_RUN = {
    ("MLflow", "createdb -h HOST mlflow && createdb -h HOST optuna"): "needs servers",
    (
        "MLflow",
        "mlflow server --host 0.0.0.0 --port 5000 --backend-store-uri postgresql+psycopg://USER@HOST/mlflow "
        "--artifacts-destination /shared/mlflow --allowed-hosts HOST:5000 --cors-allowed-origins http://HOST:5000",
    ): "starts a server; test_tracking.py does so",
    ("MLflow", "export MLFLOW_TRACKING_URI=http://HOST:5000"): "for the command below",
    ("MLflow", "export OPTUNA_STORAGE=postgresql+psycopg://USER@HOST/optuna"): "for the command below",
    ("MLflow", "python -m ablations run unet_depth"): "needs servers; test_ablations_search.py has them",
    ("The default benchmark", "dvc exp run -S train.lr=0.001"): "runs everything again; test_pipeline.py does so",
    ("CamVid", "make repro"): "hours, or a GPU; `make repro` runs above on other data",
    (
        "What each model costs",
        "python -m sunets profile sunet64 sunet128 sunet7128 dilated_resnet18 dilated_resnet101 deeplabv3_resnet50 "
        "deeplabv3_resnet101 fcn_resnet50 --size 512 512 --output-stride 8 --batch-size 8 "
        "--speed-json results/zoo/speed.json",
    ): "minutes of computing; the same command runs above with fewer networks",
    ("Reproduce the paper", "make paper"): "needs ImageNet, COCO and VOC; test_chains.py runs it on stand-ins",
}
"""Section and command -> why it is not run here."""
SMALLER = {"--size 512 512": "--size 32 32"}
"""What is asked for in the README -> the same at smoke size."""
PLACES = ("/path/to/data", "/path/to/camvid", "/path/or/s3/or/ssh/address")
"""What stands for a directory of the reader's."""


def _commands(block: str) -> list[str]:
    """Split a block into commands, without comments."""
    lines = [re.sub(r"\s+#.*", "", line) for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _sections() -> dict[str, list[str]]:
    """Heading -> commands of the shell blocks below it."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"(?m)^## ", README)[1:]:
        heading = part.splitlines()[0]
        for block in re.findall(r"(?ms)^```sh\n(.*?)^```$", part):
            found.setdefault(heading, []).extend(_commands(block))
    return found


SECTIONS = _sections()


@pytest.fixture(scope="module")
def committed(finished: Path) -> Path:
    """A clone in which the smoke preset has run, its results committed as the README's are."""
    author = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    for command in (["add", "-A"], [*author, "commit", "-qm", "results"]):
        subprocess.run(["git", *command], cwd=finished, env=ENV, check=True)
    return finished


@pytest.fixture
def checkout(committed: Path) -> Iterator[Path]:
    """The finished clone, put back as it was committed afterwards."""
    yield committed
    for command in ("git checkout --quiet .", "git clean --quiet --force -d", "dvc checkout --quiet"):
        _run(committed, command)


def _run(root: Path, command: str) -> str:
    options = {"PYTEST_ADDOPTS": "tests/test_report_statistics.py"}  # `make test` in earnest, in seconds
    return shell(root, command, options | NO_SERVER)


def _run_section(heading: str, root: Path, places: dict[str, Path] | None = None) -> dict[str, str]:
    """Run the commands of a section in turn, those of NOT_RUN aside; command -> what it printed."""
    outputs = {}
    for command in SECTIONS[heading]:
        if (heading, command) in NOT_RUN:
            continue
        smaller = command
        for text, replacement in {**SMALLER, **{k: str(v) for k, v in (places or {}).items()}}.items():
            smaller = smaller.replace(text, replacement)
        outputs[command] = _run(root, smaller)
        if command.startswith("python -m sunets preset folder"):
            edit(root / "params.yaml", FOLDER)
    return outputs


FOLDER = {
    r"^seeds: .*": "seeds: [0]",
    r"^  size: .*": "  size: [32, 32]",
    r"^  epochs: .*": "  epochs: 1",
    r"^  warmup_epochs: .*": "  warmup_epochs: 0",
    r"^  threads: .*": "  threads: 1",
    r"crop: \[.*?\]": "crop: [32, 32]",
    r"^cost:\n  size: .*": (
        "cost:\n  size: [32, 32]\n  repeats: 3\n  receptive_field_seeds: 1\n  receptive_field_images: 1"
    ),
}
"""The preset for a user's own data at smoke size."""


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= MOST_WORDS


def test_the_versions_that_docs_call_tested_are_those_of_the_lock() -> None:
    pins = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", (ROOT / "requirements.lock").read_text()))
    stated = re.search(r"requirements\.lock`: (.*)\. Useful", (ROOT / "docs/benchmark.md").read_text())
    assert stated
    assert {name: pins[name.lower()] for name in ("DVC", "MLflow", "Optuna")} == dict(
        entry.split(" ") for entry in stated[1].split(", ")
    )


def _rows(page: str) -> dict[str, list[str]]:
    """First cell -> the other cells of each row of the tables of a page."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (ROOT / page).read_text().splitlines()
            if line.startswith("|")]  # fmt: skip
    return {name: cells for name, *cells in rows}


@pytest.mark.parametrize(
    ("page", "benchmark"),
    [("README.md", "synthetic"), ("docs/benchmark.md", "camvid_small"), ("docs/benchmark.md", "camvid")],
)
def test_scores_of_a_page_are_those_of_the_results(page: str, benchmark: str) -> None:
    accuracy, cost = (_rows(f"results/{benchmark}/tables/{name}.md") for name in ("accuracy", "cost"))
    score, verdict = accuracy["Model"].index("mIoU (%)"), accuracy["Model"].index("Verdict")
    params, macs = cost["Model"].index("Parameters (M)"), cost["Model"].index("Multiply-adds (G)")
    rows = _rows(page)
    for model in accuracy.keys() - {"Model", next(name for name in accuracy if name.startswith(":"))}:
        scored, judged = accuracy[model][score], accuracy[model][verdict].partition(" (")[0]
        costs = [cost[model][params], cost[model][macs]] if page == "README.md" else []
        assert rows[model] == [scored, *costs, judged]


def test_camvid_of_the_readme_is_that_of_the_results() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## CamVid\n")[2].partition("\n## ")[0]
    recorded = set()
    for benchmark in ("camvid_small", "camvid"):
        for row in csv.DictReader((ROOT / f"results/{benchmark}/tables/accuracy.csv").read_text().splitlines()):
            numbers = (row["score.miou.mean"], row["score.miou.difference.mean"])
            recorded |= {f"{abs(100 * float(number)):.1f}" for number in numbers if number}
    stated = re.findall(r"\b\d+\.\d\b", re.sub(r"(?ms)^```.*?^```$", "", section))
    assert len(stated) >= 4
    assert set(stated) <= recorded


def test_ablations_of_the_readme_are_those_of_the_results() -> None:
    key, recorded = "score.miou.difference.", set()
    for path in (ROOT / "results/ablation_full/ablations").glob("*.csv"):
        for row in csv.DictReader(path.read_text().splitlines()):
            if row.get(f"{key}mean"):
                mean, low, high = (f"{100 * float(row[key + name]):+.1f}" for name in ("mean", "ci95_low", "ci95_high"))
                recorded.add((f"{mean} [{low}, {high}]", row[f"{key}verdict"]))
    stated = re.findall(r"(?m)^\| [^|]+ \| ([+-][\d.]+ \[.*?\]) \| (\w+) \|$", (ROOT / "README.md").read_text())
    assert len(stated) >= 5
    assert set(stated) <= recorded


def test_every_command_is_run_or_listed() -> None:
    assert set(re.findall(r"(?m)^```(\w*)$", README)) <= {"sh", "python", "yaml", ""}, "a block of another shell"
    run_here = {name.removeprefix("test_section_") for name in globals() if name.startswith("test_section_")}
    left = {
        heading
        for heading, commands in SECTIONS.items()
        if any((heading, command) not in NOT_RUN for command in commands)
    }
    assert {re.sub(r"\W+", "_", heading).lower() for heading in left} == run_here


def test_every_listed_command_stands_in_the_readme() -> None:
    listed = {(heading, command) for heading, commands in SECTIONS.items() for command in commands}
    assert set(NOT_RUN) <= listed
    commands = "\n".join(command for _, command in listed)
    for text in (*SMALLER, *PLACES):
        assert text in commands


def test_made_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    named = set(re.findall(r"`make ([a-z-]+)", README)) | {
        command.split()[1] for commands in SECTIONS.values() for command in commands if command.startswith("make ")
    }
    assert {"repro", "test"} <= named
    assert named <= targets


@pytest.mark.slow
def test_section_install_and_run(checkout: Path) -> None:
    outputs = _run_section("Install and run", checkout)
    assert not ran(outputs["make repro"]), "it is up to date"
    assert re.search(r"\d+ passed", outputs["make test"])


@pytest.mark.slow
def test_section_what_each_model_costs(checkout: Path) -> None:
    (output,) = _run_section("What each model costs", checkout).values()
    assert "deeplabv3_resnet50" in output
    assert (checkout / "field.png").stat().st_size > 1000


@pytest.mark.slow
def test_section_the_default_benchmark(checkout: Path, tmp_path: Path) -> None:
    outputs = _run_section("The default benchmark", checkout, {"/path/or/s3/or/ssh/address": tmp_path / "store"})
    assert "miou_percent" in outputs["dvc metrics show"]
    assert not ran(outputs["dvc repro --dry --allow-missing"])
    assert any((tmp_path / "store").rglob("*"))


@pytest.mark.slow
def test_section_your_own_data(checkout: Path, tmp_path: Path) -> None:
    root = make_folder(tmp_path / "own", count=20)
    shutil.copytree(root / "images", checkout / "my" / "pictures")
    outputs = _run_section("Your own data", checkout, {"/path/to/data": root})
    assert {"prepare", "train@sunet_tiny", "evaluate@unet_small", "report"} <= set(ran(outputs["make repro"]))
    assert len(list((checkout / "predictions").glob("*_mask.png"))) == 20


@pytest.mark.slow
def test_section_camvid(checkout: Path, tmp_path: Path) -> None:
    outputs = _run_section("CamVid", checkout, {"/path/to/camvid": make_camvid(tmp_path / "camvid")})
    assert all("params.yaml is now presets/camvid" in output for output in outputs.values())
    assert f'root: "{tmp_path / "camvid"}"' in (checkout / "params.yaml").read_text()


@pytest.mark.slow
def test_section_run_your_own_ablation(checkout: Path) -> None:
    """With the study of the YAML block beside the preset's own one, which is up to date."""
    (study,) = re.findall(r"(?ms)^```yaml\n(ablations:\n.*?)^```$", README)
    study = study.replace("train.epochs: 5", "train.epochs: 1").replace("seeds: [0, 1, 2]", "seeds: [0]")
    edit(checkout / "params.yaml", {r"^ablations:\n": study})
    _run(checkout, "dvc repro prepare")  # a section before this one had another data set in place
    outputs = _run_section("Run your own ablation", checkout)
    assert re.search(r"width +│ one_at_a_time", outputs["python -m ablations plan width"])
    assert ran(outputs["dvc repro ablation_report"]) == ["ablate@width", "ablation_report"]
