"""`make paper`: ImageNet -> COCO -> VOC -> multi-scale test -> server archive, on stand-ins in the real formats."""

from __future__ import annotations

import csv
import os
import re
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkout import clone, edit, ran, shell, start_shell
from cluster import NO_SERVER
from standins import make_coco, make_imagefolder, make_sbd, make_voc

from sunets.core.record import read_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the whole chain is a fixture
PAPER = "make paper ARCHIVES=sunet64"
PRESETS = ("imagenet", "coco", "voc")
MODEL_STAGES = {f"{stage}@sunet64" for stage in ("tune", "train", "evaluate")}


def _tiny(path: Path) -> None:
    """The recipe with its values, for one model, at a size that a laptop trains in a second."""
    tiny = "width: 4, stage_channels: [8, 8, 16, 16], num_blocks: 1"
    changes = {
        r"^  workers: .*": "  workers: 0",
        r"(?s)^models:\n(  sunet64: \{[^\n]*)\}\n.*?\n\n": rf"models:\n\1, {tiny}}}\n\n",
        r"^  epochs: .*": "  epochs: 1",
        r"^  batch_size: .*": "  batch_size: 4",
        r"^  threads: .*": "  threads: 1",
        r"^  amp: .*": "  amp: none",
        r"^  size: .*": "  size: [32, 32]\n  repeats: 3\n  warmup: 1",
    }
    if path.stem == "imagenet":
        changes["resized_crop: 224"] = "resized_crop: 32"
    else:
        changes[r"crop: \[.*?\]"] = "crop: [32, 32]"
    if path.stem == "voc":
        changes[r"window: \[.*?\]"] = "window: [40, 40]"
    edit(path, changes)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = clone(tmp_path_factory.mktemp("chain"))
    for name in PRESETS:
        _tiny(root / "presets" / f"{name}.yaml")
    make_imagefolder(root / "datasets" / "imagenet")
    make_coco(root / "datasets" / "coco")
    make_sbd(make_voc(root / "datasets" / "voc"))
    return root


def _parts(log: str) -> dict[str, str]:
    """Preset -> what was printed of it."""
    _, *parts = re.split(r"sunets preset (\w+) &&", log)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _steps(log: str) -> dict[str, list[str]]:
    """Preset -> stages that ran, in order."""
    return {name: ran(part) for name, part in _parts(log).items()}


@pytest.fixture(scope="module")
def killed(checkout: Path) -> str:
    """What the chain printed until it was killed in the training on COCO."""
    process, lines = start_shell(checkout, PAPER, NO_SERVER), []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if "preset coco" in "".join(lines) and "train@sunet64" in line:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL, "".join(lines)
    # Where process 1 of a container reaps nothing, the killed dvc stays a zombie, which DVC takes for a living one.
    (checkout / ".dvc" / "tmp" / "rwlock").unlink(missing_ok=True)
    return "".join(lines)


@pytest.fixture(scope="module")
def log(checkout: Path, killed: str) -> str:
    """What the same command printed when it was started again, with another recipe for COCO."""
    edit(checkout / "presets" / "coco.yaml", {r"^  lr: .*": "  lr: 0.001"})
    return shell(checkout, PAPER, NO_SERVER, timeout=1500)


def _record(root: Path, benchmark: str, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(root / "results" / benchmark / "records" / kind / "sunet64.json")[0]
    assert found["status"] == "finished", found["reason"]
    return found


def test_a_kill_goes_on_where_it_stopped(killed: str, log: str) -> None:
    before, after = _steps(killed), _steps(log)
    assert list(before) == ["imagenet", "coco"]
    assert {*MODEL_STAGES, "report"} <= set(before["imagenet"])
    trained = [name for name, text in _parts(log).items() if "sunet64 seed 0 epoch 1/1" in text]
    assert trained == ["coco", "voc"], "the training on ImageNet and its scores are found again"
    assert "scored" not in _parts(log)["imagenet"]
    assert not {*MODEL_STAGES, "cost@sunet64", "speed"} - {"tune@sunet64"} & set(after["imagenet"])
    assert list(after) == list(PRESETS)
    for preset in ("coco", "voc"):
        assert {*MODEL_STAGES, "report"} <= set(after[preset])


def test_every_step_starts_from_the_one_before(checkout: Path, log: str) -> None:
    for benchmark, start in (("coco", "imagenet"), ("voc", "coco")):
        record = _record(checkout, benchmark, "train")
        assert record["params"]["train.init_from"] == f"outputs/{start}/weights/sunet64/seed0.pt"
        assert (record["params"]["train.lr"] == 0.001) == (benchmark == "coco"), "the recipe that was edited meanwhile"
        assert record["provenance"]["command"] == "python -m sunets train sunet64"
    assert _record(checkout, "imagenet", "train")["params"]["train.init_from"] is None


def test_scores_of_both_tasks_and_every_variant(checkout: Path, log: str) -> None:
    assert {"score.top1_error_percent", "score.top5_error_percent"} <= _record(checkout, "imagenet", "evaluate")[
        "scores"
    ].keys()
    variants = read_json(checkout / "results" / "voc" / "records" / "evaluate" / "sunet64.json")
    assert [r["variant"] for r in variants] == ["single_scale", "multi_scale_flip"]
    assert all(0 <= r["scores"]["score.miou"] <= 1 for r in variants)
    for benchmark in PRESETS:
        assert "SUNet-64" in (checkout / "results" / benchmark / "tables" / "accuracy.md").read_text()


def test_no_val_image_was_trained_on(checkout: Path, log: str) -> None:
    ids = {}
    for split in ("train_aug", "val"):
        with (checkout / "data" / "prepared" / "voc" / "splits" / f"{split}.csv").open(newline="") as file:
            ids[split] = {row["id"] for row in csv.DictReader(file)}
    assert len(ids["train_aug"]) == 4 + 3
    assert ids["val"]
    assert not ids["train_aug"] & ids["val"]


def test_archive_for_the_server_is_complete(checkout: Path, log: str) -> None:
    path = checkout / "outputs" / "voc" / "archives" / "sunet64" / "comp6_test_cls.tgz"
    listed = (checkout / "datasets/voc/VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt").read_text().split()
    with tarfile.open(path) as archive:
        names = archive.getnames()
    assert sorted(names) == [f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in listed]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["archive", "sunet64", "--params", "presets/coco.yaml"], ["data.name", "PASCAL VOC"]),
        (["archive", "sunet64", "--set", "benchmark=other"], ["outputs/other/weights/sunet64/seed0.pt", "train"]),
        (["train", "sunet64", "--set", "train.init_from=outputs/absent.pt"], ["train.init_from", "outputs/absent.pt"]),
        (["plan", "vok"], ["vok", "imagenet"]),
    ],
)
def test_nonsense_is_one_clear_error(
    checkout: Path, log: str, call: Callable[..., str], command: list[str], words: list[str]
) -> None:
    output = call(checkout, *command, code=2)
    assert "Traceback" not in output
    assert [word for word in words if word not in output] == []
