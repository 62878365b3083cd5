"""What must not change by accident: the losses of a tiny training, and the list of commands and options.

Where a change is meant, write both files anew and let the commit say why:

    PYTHONPATH=. python tests/test_frozen_surface.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tiny
import typer

import ablations.__main__
import sunets.__main__
from sunets.core.config import Config
from sunets.data.manifest import Manifest
from sunets.data.preparation import prepare
from sunets.training.fit import fit

ROOT = Path(__file__).resolve().parents[1]
ASSETS = Path(__file__).parent / "assets"
RENEW = "if that is meant, run `PYTHONPATH=. python tests/test_frozen_surface.py`"
TOLERANCES = {"strided, sgd": 1e-4, "dilated, adamw": 1e-3}
"""Relative. Measured between one and two threads, and between AVX-512, AVX2 and plain SSE kernels: at most 4e-6 and
1.8e-4. Deeper U-Nets, larger steps and smaller images amplify rounding until nothing can be compared."""

TRAININGS: dict[str, dict[str, Any]] = {
    "strided, sgd": {
        "train__optimizer": "sgd",
        "train__lr": 0.01,
        "train__weight_decay": 0.1,
        "train__clip_grad_norm": 0.1,
    },
    "dilated, adamw": {
        "train__optimizer": "adamw",
        "train__lr": 1e-5,
        "model__output_stride": 8,
        "model__unet_depth": [2, 1, 1],
        "model__head": "degridding",
        "model__memory_efficient": True,
    },
}
APPS = {"sunets": sunets.__main__.app, "ablations": ablations.__main__.app}


def config(**values: Any) -> Config:
    """A SUNet of 5 U-Nets on 64 embedded images of 64 pixels: two epochs of four steps."""
    data = {"data__synthetic__image_size": 64, "data__synthetic__train": 64, "data__synthetic__val": 8}
    model = {"model__name": "sunet_tiny", "model__width": 8, "model__num_blocks": [2, 2, 1], "model__unet_depth": 1}
    train = {"train__batch_size": 16, "train__device": "cpu", "train__threads": 1, "train__augment__flip": True}
    return tiny.tiny_config(**data | model | train | values)


def losses(manifest: Manifest, work: Path, **values: Any) -> dict[str, list[float]]:
    """Losses after each epoch, by column of the history."""
    history = fit(config(**values), manifest, work_dir=work).history
    return {column: [row[column] for row in history] for column in ("train.loss", "val.loss")}


def commands() -> list[str]:
    """One line per argument and option of every command, as its help names them."""
    lines = []
    for program, app in APPS.items():
        group: Any = typer.main.get_command(app)
        for name, command in [("", group), *sorted(group.commands.items())]:
            start = f"{program} {name}".rstrip()
            lines.append(start)
            for parameter in command.params:
                kind = "required" if parameter.required else "optional"
                names = "/".join([*parameter.opts, *parameter.secondary_opts])
                lines.append(f"{start} {names} ({parameter.param_type_name}, {kind})")
    return lines


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepare(config().data, tmp_path_factory.mktemp("frozen") / "data")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_losses_of_a_tiny_training(name, manifest, tmp_path):
    golden = json.loads((ASSETS / "losses.json").read_text())
    assert set(golden) == set(TRAININGS)
    for column, values in losses(manifest, tmp_path, **TRAININGS[name]).items():
        assert values == pytest.approx(golden[name][column], rel=TOLERANCES[name]), f"{column} changed; {RENEW}"


def test_commands_and_options_are_the_listed_ones():
    listed = (ASSETS / "commands.txt").read_text().splitlines()
    found = commands()
    new, gone = sorted(set(found) - set(listed)), sorted(set(listed) - set(found))
    assert found == listed, f"new: {new}; gone: {gone}. A hyper-parameter belongs into params.yaml; {RENEW}"


def test_the_ablations_are_a_command_of_sunets():
    ran = subprocess.run([sys.executable, "-m", "sunets", "ablate", "list"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "unet_depth" in ran.stdout


def renew() -> None:
    """Write both files anew."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        drawn = prepare(config().data, work / "data")
        golden = {name: losses(drawn, work / name, **values) for name, values in TRAININGS.items()}
    (ASSETS / "losses.json").write_text(json.dumps(golden, indent=2) + "\n")
    (ASSETS / "commands.txt").write_text("\n".join(commands()) + "\n")


if __name__ == "__main__":
    renew()
