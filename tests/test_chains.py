"""The chain ImageNet -> COCO -> VOC -> multi-scale test -> server archive, by DVC, on stand-ins in the real formats."""

from __future__ import annotations

import csv
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkout import ROOT, clone, edit, ran, run
from standins import make_coco, make_imagefolder, make_sbd, make_voc
from test_structure import code_units

from sunets.core.record import read_json

PAPER = "presets/paper/dvc.yaml"
CHAINS = {name: ROOT / "presets" / name / "pipeline.yaml" for name in ("paper", "transfer")}
MODULES = {"prepare": "prepare", "classify": "evaluate", "test": "evaluate", "archive": "archive"}
"""Stage -> module of `sunets.stages`; any other stage trains, and `report` builds a report."""


def _tiny(path: Path) -> None:
    """The recipe with its values, at a size that a laptop trains in a second."""
    changes = {
        r"^  workers: .*": "  workers: 0",
        r"^(  sunet64: \{.*)\}": r"\1, width: 4, stage_channels: [8, 8, 16, 16], num_blocks: 1}",
        r"^  epochs: .*": "  epochs: 1",
        r"^  batch_size: .*": "  batch_size: 4",
        r"^  threads: .*": "  threads: 1",
        r"^  amp: .*": "  amp: none",
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
    for name in ("imagenet", "coco", "voc"):
        _tiny(root / "presets" / f"{name}.yaml")
    (root / PAPER).write_text(CHAINS["paper"].read_text().replace("[sunet64, sunet128, sunet7128]", "[sunet64]"))
    make_imagefolder(root / "datasets" / "imagenet")
    make_coco(root / "datasets" / "coco")
    make_sbd(make_voc(root / "datasets" / "voc"))
    return root


@pytest.fixture(scope="module")
def log(checkout: Path) -> str:
    return run(checkout, "dvc", "repro", PAPER)


def _record(root: Path, benchmark: str, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(root / "results" / benchmark / "records" / kind / "sunet64.json")[0]
    assert found["status"] == "finished", found["reason"]
    return found


@pytest.mark.slow
def test_every_step_starts_from_the_one_before(checkout: Path, log: str) -> None:
    steps = [name.partition(":")[2] for name in ran(log)]
    order = ["pretrain@sunet64", "coco@sunet64", "voc@sunet64"]
    assert [s for s in steps if s in order] == order
    assert {"test@sunet64", "archive@sunet64", "classify@sunet64", "report@imagenet", "report@voc"} <= set(steps)
    for benchmark, start in (("coco", "imagenet"), ("voc", "coco")):
        record = _record(checkout, f"{benchmark}_paper", "train")
        assert record["params"]["train.init_from"] == f"outputs/{start}_paper/weights/sunet64/seed0.pt"
        assert f"--params presets/{benchmark}.yaml" in record["provenance"]["command"]
    assert _record(checkout, "imagenet_paper", "train")["params"]["train.init_from"] is None


@pytest.mark.slow
def test_scores_of_both_tasks_and_every_variant(checkout: Path, log: str) -> None:
    assert {"score.top1_error_percent", "score.top5_error_percent"} <= _record(checkout, "imagenet_paper", "evaluate")[
        "scores"
    ].keys()
    variants = read_json(checkout / "results" / "voc_paper" / "records" / "evaluate" / "sunet64.json")
    assert [r["variant"] for r in variants] == ["single_scale", "multi_scale_flip"]
    assert all(0 <= r["scores"]["score.miou"] <= 1 for r in variants)
    for benchmark in ("imagenet_paper", "voc_paper"):
        assert "SUNet-64" in (checkout / "results" / benchmark / "tables" / "accuracy.md").read_text()


@pytest.mark.slow
def test_no_val_image_was_trained_on(checkout: Path, log: str) -> None:
    ids = {}
    for split in ("train_aug", "val"):
        with (checkout / "data" / "prepared" / "voc_paper" / "splits" / f"{split}.csv").open(newline="") as file:
            ids[split] = {row["id"] for row in csv.DictReader(file)}
    assert len(ids["train_aug"]) == 4 + 3
    assert ids["val"]
    assert not ids["train_aug"] & ids["val"]


@pytest.mark.slow
def test_archive_for_the_server_is_complete(checkout: Path, log: str) -> None:
    path = checkout / "outputs" / "voc_paper" / "archives" / "sunet64" / "comp6_test_cls.tgz"
    listed = (checkout / "datasets/voc/VOCdevkit/VOC2012/ImageSets/Segmentation/test.txt").read_text().split()
    with tarfile.open(path) as archive:
        names = archive.getnames()
    assert sorted(names) == [f"results/VOC2012/Segmentation/comp6_test_cls/{name}.png" for name in listed]


@pytest.mark.slow
def test_an_edited_recipe_runs_again_from_its_step_on(checkout: Path, log: str) -> None:
    assert not ran(run(checkout, "dvc", "repro", PAPER))
    path = checkout / "presets" / "voc.yaml"
    before = path.read_text()
    edit(path, {r"^  lr: .*": "  lr: 0.001"})
    try:
        # A dry run cannot know that the weights will differ, on which the archive depends.
        steps = {name.partition(":")[2] for name in ran(run(checkout, "dvc", "repro", "--dry", PAPER))}
        assert steps - {"archive@sunet64"} == {"voc@sunet64", "test@sunet64", "report@voc"}
    finally:
        path.write_text(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["archive", "sunet64", "--params", "presets/coco.yaml"], ["data.name", "PASCAL VOC"]),
        (["archive", "sunet64", "--params", "presets/voc.yaml"], ["outputs/voc/weights/sunet64/seed0.pt", "train"]),
        (["train", "sunet64", "--params", "presets/voc.yaml", "--set", "benchmark=voc_paper"],
         ["train.init_from", "outputs/coco/weights/sunet64/seed0.pt"]),
        (["plan", "vok"], ["vok", "imagenet"]),
    ],
)  # fmt: skip
def test_nonsense_is_one_clear_error(checkout: Path, log: str, command: list[str], words: list[str]) -> None:
    output = run(checkout, "sunets", *command, code=2)
    assert "Traceback" not in output
    assert [word for word in words if word not in output] == []


@pytest.mark.parametrize("chain", CHAINS)
def test_stages_list_the_folders_that_their_imports_reach(chain: str) -> None:
    for name, body in yaml.safe_load(CHAINS[chain].read_text())["stages"].items():
        module = "sunets.report.build" if name == "report" else f"sunets.stages.{MODULES.get(name, 'train')}"
        listed = {d for d in body["do"]["deps"] if d.split("/")[0] in ("sunets", "ablations")}
        assert listed == code_units(module), name
