"""Files that change after `prepare` are noticed: by a training through the manifest, by `prepare`, by `dvc repro`."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from checkout import ROOT, clone, ran, run
from cluster import NO_SERVER
from PIL import Image
from standins import make_camvid, make_cityscapes, make_folder, make_imagefolder, make_voc

from sunets.core.config import DataConfig, SyntheticConfig
from sunets.data import preparation as module
from sunets.data.manifest import load_manifest
from sunets.data.picture import DataError
from sunets.data.preparation import prepare


def folder(root: Path) -> DataConfig:
    return DataConfig(name="folder", root=str(root))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "dataset")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """As in a checkout, where times are kept in .work/seen/."""
    return tmp_path / "data" / "prepared" / "tiny"


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def edit_mask(path: Path) -> None:
    """Give one pixel of a mask another label."""
    with Image.open(path) as file:
        labels = np.array(file)
    labels[0, 0] = 1 - labels[0, 0] % 2
    Image.fromarray(labels).save(path)


@pytest.mark.parametrize("where", ["data/prepared/tiny", "plain"])
def test_an_edited_mask_is_noticed(dataset: Path, tmp_path: Path, where: str) -> None:
    out = tmp_path / where
    first = prepare(folder(dataset), out)
    edit_mask(dataset / "masks" / "photo 3.png")
    with pytest.raises(DataError, match=r"photo 3\.png: changed since it was prepared; run"):
        load_manifest(out, folder(dataset))
    second = prepare(folder(dataset), out)
    assert second.digest != first.digest
    assert load_manifest(out, folder(dataset)) == second


def test_lists_of_splits_that_are_added_count(dataset: Path, out: Path) -> None:
    first = prepare(folder(dataset), out)
    (dataset / "splits").mkdir()
    for split, numbers in (("train", (0, 1, 2, 3)), ("val", (4, 5)), ("test", (6, 7))):
        (dataset / "splits" / f"{split}.txt").write_text("".join(f"photo {n}\n" for n in numbers))
    second = prepare(folder(dataset), out)
    assert [item.id for item in second.splits["test"]] == ["photo 6", "photo 7"]
    assert second.digest != first.digest


def test_prepared_data_of_other_parameters_that_were_put_back_are_not_taken(out: Path, tmp_path: Path) -> None:
    """As `dvc checkout` does, after which a parameter is edited again."""
    small, large = (DataConfig(synthetic=SyntheticConfig(image_size=size, train=4, val=2, test=2)) for size in (32, 48))
    prepare(small, out)
    shutil.copytree(out, tmp_path / "kept")
    digest = prepare(large, out).digest
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "kept", out)
    assert prepare(large, out).digest == digest


def test_stems_of_composed_and_decomposed_characters_are_one(dataset: Path, out: Path) -> None:
    (dataset / "images" / "photo 0.jpg").rename(dataset / "images" / "cafe\u0301.jpg")
    (dataset / "masks" / "photo 0.png").rename(dataset / "masks" / "caf\u00e9.png")
    (dataset / "splits").mkdir()
    for split, names in (("train", ["caf\u00e9", "photo 1"]), ("val", ["photo 2"]), ("test", ["photo 3"])):
        (dataset / "splits" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    assert {item.id for item in prepare(folder(dataset), out).splits["train"]} == {"cafe\u0301", "photo 1"}


def test_a_change_that_keeps_size_and_time_is_noticed(dataset: Path, out: Path) -> None:
    """As by a tool that sets the time back: the time of the last change of status cannot be set."""
    prepare(folder(dataset), out)
    path = dataset / "classes.txt"
    times = path.stat()
    path.write_text(path.read_text().replace("class 0\nclass 1", "class 1\nclass 0"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    with pytest.raises(DataError, match=r"classes\.txt: changed since it was prepared"):
        load_manifest(out, folder(dataset))
    assert prepare(folder(dataset), out).classes[:2] == ("class 1", "class 0")


def test_each_kind_of_change_is_noticed(dataset: Path, out: Path) -> None:
    prepare(folder(dataset), out)

    def restored(path: Path) -> None:
        shutil.copytree(path, dataset, dirs_exist_ok=True)

    kept = dataset.with_name("kept")
    shutil.copytree(dataset, kept)
    for change, word in (
        (lambda: (dataset / "images" / "photo 0.jpg").unlink(), "photo 0.jpg"),
        (lambda: shutil.copy(dataset / "images" / "photo 0.jpg", dataset / "images" / "photo 1.jpg"), "photo 1.jpg"),
        (lambda: (dataset / "classes.txt").write_text("class 0\nclass 2\nclass 1\n"), "classes.txt"),
    ):
        change()
        with pytest.raises(DataError, match=re.escape(word)):
            load_manifest(out, folder(dataset))
        restored(kept)
        load_manifest(out, folder(dataset))
    shutil.copy(dataset / "images" / "photo 0.jpg", dataset / "images" / "new.jpg")  # of which the lists know nothing
    with pytest.raises(DataError, match="images: changed"):
        load_manifest(out, folder(dataset))


def test_touched_files_are_no_change_and_are_read_once(
    dataset: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(folder(dataset), out)
    before = content(out)
    for path in dataset.rglob("*"):
        os.utime(path)
    (dataset / "images" / ".DS_Store").write_text("left by a Mac")
    load_manifest(out, folder(dataset))
    monkeypatch.setattr("sunets.data.changes.file_state", lambda path: pytest.fail(f"{path} is read again"))
    load_manifest(out, folder(dataset))
    monkeypatch.setattr(module, "_check", lambda *_: pytest.fail("checked again"))
    prepare(folder(dataset), out)
    assert content(out) == before


def test_preparing_again_writes_the_same_bytes(dataset: Path, out: Path) -> None:
    prepare(folder(dataset), out)
    before = content(out)
    times = out.parents[2] / ".work" / "seen" / "tiny.csv"
    times.unlink()
    prepare(folder(dataset), out)
    assert content(out) == before
    copy = dataset.with_name("copied")
    shutil.copytree(dataset, copy)  # other times, another place, as in another clone
    prepare(folder(copy), out)
    assert content(out) == before


@pytest.mark.parametrize("damage", ["", "x", "key\nroot/a,1\n", "\x00"])
def test_lost_or_damaged_times_cost_only_time(dataset: Path, out: Path, damage: str) -> None:
    prepare(folder(dataset), out)
    times = out.parents[2] / ".work" / "seen" / "tiny.csv"
    intact = times.read_text()
    times.write_text(damage)
    load_manifest(out, folder(dataset))
    assert times.read_text().splitlines()[1:] == intact.splitlines()[1:]


@pytest.mark.parametrize(
    ("make", "config", "edited"),
    [
        (make_camvid, {"name": "camvid"}, "trainannot/train_000.png"),
        (make_voc, {"name": "voc2012"}, "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt"),
        (make_cityscapes, {"name": "cityscapes"}, "gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelIds.png"),
        (make_imagefolder, {"name": "imagefolder", "test_split": "val"}, "train/n01440764/n01440764_0.JPEG"),
    ],
    ids=["camvid", "voc2012", "cityscapes", "imagefolder"],
)
def test_originals_of_what_was_converted_are_watched(
    tmp_path: Path, out: Path, make, config: dict, edited: str
) -> None:
    root = make(tmp_path / "set")
    data = DataConfig(root=str(root), **config)
    prepare(data, out)
    load_manifest(out, data)
    (root / edited).write_bytes((root / edited).read_bytes() + b"\n")
    with pytest.raises(DataError, match=re.escape(Path(edited).name)):
        load_manifest(out, data)


def test_drawn_images_are_watched_and_mended(out: Path) -> None:
    config = DataConfig(synthetic=SyntheticConfig(image_size=32, train=3, val=1, test=1))
    prepare(config, out)
    before = content(out)
    (out / "masks" / "val_00000.png").write_bytes((out / "masks" / "train_00000.png").read_bytes())
    with pytest.raises(DataError, match="val_00000"):
        load_manifest(out, config)
    prepare(config, out)
    assert content(out) == before


def test_damaged_manifests_are_one_line_with_a_remedy(dataset: Path, out: Path) -> None:
    prepare(folder(dataset), out)
    whole = content(out)
    manifest, train, listed = (whole[name] for name in ("manifest.json", "splits/train.csv", "files.csv"))
    for name, damages in {
        "manifest.json": [b"", b"[]", b"null", b"{", b'{"name": "folder"}', b"\xff\xfe", b"[" * 100000,
                          manifest.replace(b'"counts": {', b'"counts": [{'),
                          manifest.replace(b'"mean": [', b'"mean": ["x", '), manifest.replace(b" 0.", b" 0.0"),
                          manifest.replace(b'"sha256": "', b'"sha256": "0')],
        "splits/train.csv": [b"", b"id,image\n", b"\xff", train[:70], train[:-30], train.replace(b"root/", b"toor/"),
                             train.replace(b"\n", b"\n../../", 2), train.replace(b",32,", b",33,"),
                             b"\n".join(train.split(b"\n")[:-2]) + b"\n"],
        "files.csv": [b"", b"path,size\n", b"\xff", listed[:-40], listed.replace(b"root/", b"x/"),
                      b"\n".join(listed.split(b"\n")[:-2]) + b"\n"],
    }.items():  # fmt: skip
        for damage in damages:
            (out / name).write_bytes(damage)
            with pytest.raises(DataError, match=r"run python -m sunets prepare (again|first)") as caught:
                load_manifest(out, folder(dataset))
            assert Path(name).name in str(caught.value), damage[:40]
            assert "\n" not in str(caught.value)
            (out / name).write_bytes(whole[name])
    (out / "splits" / "val.csv").unlink()
    (out / "splits" / "val.csv").mkdir()
    with pytest.raises(DataError, match=r"val\.csv: damaged"):
        load_manifest(out, folder(dataset))
    prepare(folder(dataset), out)  # it mends what it wrote
    assert content(out) == whole


def test_files_that_prepare_did_not_write_are_kept(dataset: Path, out: Path) -> None:
    prepare(folder(dataset), out)
    (out / "notes.txt").write_text("mine")
    edit_mask(dataset / "masks" / "photo 3.png")
    with pytest.raises(DataError, match=r"notes\.txt: `prepare` did not write it"):
        prepare(folder(dataset), out)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(DataError, match="overlaps"):
        prepare(folder(dataset), dataset / "images")
    with pytest.raises(DataError, match="overlaps"):
        prepare(folder(dataset), dataset.parent)


@pytest.mark.slow
def test_two_at_once_in_one_directory(dataset: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, leave = threading.Event(), threading.Event()
    original = module._prepare

    def slow(*arguments):
        inside.set()
        leave.wait(60)
        return original(*arguments)

    monkeypatch.setattr(module, "_prepare", slow)
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.2)
    first = threading.Thread(target=prepare, args=(folder(dataset), out))
    first.start()
    assert inside.wait(60)
    with pytest.raises(DataError, match="another command is preparing it"):
        prepare(folder(dataset), out)
    leave.set()
    first.join()
    assert load_manifest(out, folder(dataset)).splits["train"]
    assert sorted(p.name for p in out.parent.iterdir()) == ["tiny"]  # no lock is left


@pytest.mark.slow
def test_dvc_repro_notices_and_is_quiet_otherwise(tmp_path: Path, call: Callable[..., str]) -> None:
    root, dataset = clone(tmp_path / "checkout"), make_folder(tmp_path / "dataset", size=(32, 32))
    tree = yaml.safe_load((ROOT / "presets" / "folder.yaml").read_text())
    tree["seeds"] = [0]
    tree["data"] |= {"root": str(dataset), "size": [32, 32]}
    tree["models"] = {"plain": {"name": "plain_conv_small", "width": 4}}
    tree["report"]["reference"] = "plain"
    tree["train"] |= {"epochs": 1, "batch_size": 4, "warmup_epochs": 0, "augment": {"flip": True}}
    (root / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    train = ("dvc", "repro", "train@plain")
    assert ran(run(root, *train, env=NO_SERVER)) == ["watch@files", "prepare", "tune@plain", "train@plain"]
    lock, made = (root / "dvc.lock").read_bytes(), content(root / "data")
    for path in dataset.rglob("*"):
        os.utime(path)
    assert ran(run(root, *train, env=NO_SERVER)) == ["watch@files"]
    assert (root / "dvc.lock").read_bytes() == lock
    assert content(root / "data") == made
    edit_mask(dataset / "masks" / "photo 3.png")
    assert "photo 3.png: changed since it was prepared" in call(root, "train", "plain", code=2)
    assert ran(run(root, *train, env=NO_SERVER)) == ["watch@files", "prepare", "tune@plain", "train@plain"]
    Image.fromarray(np.full((32, 32), 99, np.uint8)).save(dataset / "masks" / "photo 3.png")
    assert "photo 3.png" in run(root, *train, code=255)


@pytest.mark.slow
def test_dvc_deletes_nothing_that_lies_where_it_writes(tmp_path: Path) -> None:
    """A root by hand inside the prepared data: DVC would delete an output before its command, were it not kept."""
    root = clone(tmp_path / "checkout")
    dataset = make_folder(root / "data" / "prepared" / "folder" / "mine")
    before = content(dataset)
    tree = yaml.safe_load((ROOT / "presets" / "folder.yaml").read_text())
    tree["data"]["root"] = "data/prepared/folder/mine"
    for watch in ({"files": True}, {}):
        tree["watch"] = watch
        (root / "params.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        assert "data.root" in run(root, "dvc", "repro", "prepare", code=255)
        assert content(dataset) == before
