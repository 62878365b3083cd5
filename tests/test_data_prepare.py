"""prepare: what it writes, and every fault it has to find before anything trains."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from checkout import ROOT
from PIL import Image
from standins import make_camvid, make_folder, make_imagefolder

from sunets.core.config import DataConfig, SyntheticConfig
from sunets.data import folder, preparation
from sunets.data.manifest import load_manifest
from sunets.data.picture import DataError
from sunets.data.preparation import download, prepare
from sunets.data.samples import overlay
from sunets.data.synthetic import SHAPES, draw


def synthetic(**values):
    return DataConfig(synthetic=SyntheticConfig(**({"image_size": 32, "train": 6, "val": 2, "test": 3} | values)))


def camvid(root):
    return DataConfig(name="camvid", root=str(root))


def faults_of(config, out):
    with pytest.raises(DataError) as caught:
        prepare(config, out)
    assert caught.value.faults
    assert all(fault in str(caught.value) for fault in caught.value.faults[:100])
    assert list(out.parent.glob(f".{out.name}*")) == []  # nothing half-written
    return caught.value.faults


def files(directory):
    return {p.relative_to(directory): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_synthetic_manifest(tmp_path):
    manifest = prepare(synthetic(), tmp_path / "data")
    assert manifest.task == "segmentation"
    assert manifest.classes == ("background", "disc_lighter", "disc_darker", "square_lighter", "square_darker")
    assert len(manifest.palette) == manifest.num_classes == 5
    assert {s: len(items) for s, items in manifest.splits.items()} == {"train": 6, "val": 2, "test": 3}
    images = np.stack([np.asarray(Image.open(i.image)) for i in manifest.splits["train"]]) / 255
    np.testing.assert_allclose(manifest.mean, images.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(manifest.std, images.std((0, 1, 2)), atol=1e-6)
    masks = np.stack([np.asarray(Image.open(i.target)) for i in manifest.splits["train"]])
    assert manifest.class_pixels["train"] == np.bincount(masks.ravel(), minlength=5).tolist()
    assert manifest.image_pixels["train"] == [sum(mask.size for mask in masks if (mask == k).any()) for k in range(5)]
    assert load_manifest(tmp_path / "data", synthetic()) == manifest
    with Image.open(tmp_path / "data" / "samples.png") as samples:
        assert samples.width > 100
        assert len(samples.getcolors(1 << 20)) > 100


def test_synthetic_is_deterministic(tmp_path):
    first, again = prepare(synthetic(), tmp_path / "a"), prepare(synthetic(), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert first.digest == again.digest
    assert prepare(synthetic(seed=1), tmp_path / "c").digest != first.digest
    longer = prepare(synthetic(train=8), tmp_path / "d")
    assert longer.splits["train"][2].image.read_bytes() == first.splits["train"][2].image.read_bytes()


def test_control_has_the_same_scenes_and_other_pixels():
    settings = SyntheticConfig(image_size=64)
    scenes = [
        draw(
            np.random.default_rng(3),
            settings.model_copy(update={"context": c}),
            list(SHAPES["classification"]),
            single=False,
        )
        for c in (True, False)
    ]
    assert np.array_equal(scenes[0][1], scenes[1][1])
    outside = scenes[0][1] == 0
    assert np.array_equal(scenes[0][0][outside], scenes[1][0][outside])
    assert not np.array_equal(scenes[0][0][~outside], scenes[1][0][~outside])


def test_labels_say_shape_and_side():
    """Means inside and outside decide lighter or darker; the share of the bounding box decides disc or square."""
    for seed in range(12):
        image, labels = draw(np.random.default_rng(seed), SyntheticConfig(), ("disc", "square"), single=True)
        label = labels.max()
        rows, columns = np.nonzero(labels)
        box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert (rows.size / box > 0.9) == (label >= 3)
        near = np.zeros_like(labels, bool)
        near[max(0, rows.min() - 8) : rows.max() + 9, max(0, columns.min() - 8) : columns.max() + 9] = True
        brighter = image[labels > 0].mean() > image[near & (labels == 0)].mean()
        assert brighter == (label % 2 == 1)


def test_shapes_are_a_classification_set(tmp_path):
    config = DataConfig(name="synthetic_shapes", synthetic=SyntheticConfig(image_size=32, train=60, val=2, test=2))
    manifest = prepare(config, tmp_path / "data")
    assert manifest.task == "classification"
    assert manifest.num_classes == 8
    assert {i.target for i in manifest.splits["train"]} == set(range(8))
    assert manifest.class_pixels["train"] == np.bincount([i.target for i in manifest.splits["train"]]).tolist()
    assert load_manifest(tmp_path / "data", config) == manifest


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_camvid(tmp_path, suffix):
    root = make_camvid(tmp_path / "camvid", suffix=suffix)
    manifest = prepare(camvid(root), tmp_path / "data")
    assert manifest.classes[:3] == ("sky", "building", "pole")
    assert manifest.num_classes == 11
    stored = np.asarray(Image.open(root / "trainannot" / "train_001.png"))
    item = manifest.splits["train"][1]
    assert (item.id, item.height, item.width) == ("train_001", 24, 32)
    assert item.image == root / "train" / f"train_001{suffix}"
    labels = np.asarray(Image.open(item.target))
    assert np.array_equal(labels, np.where(stored == 11, 255, stored))
    assert set(np.unique(labels)) - set(range(11)) == {255}  # void survives the file format


def test_manifest_does_not_hold_the_place(tmp_path):
    root = make_camvid(tmp_path / "camvid")
    first = prepare(camvid(root), tmp_path / "a")
    moved = Path(shutil.move(root, tmp_path / "elsewhere"))
    with pytest.raises(DataError, match=r"data\.root"):
        load_manifest(tmp_path / "a", camvid(root))
    second = prepare(camvid(moved), tmp_path / "b")
    assert second.digest == first.digest
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert str(tmp_path).encode() not in b"".join(files(tmp_path / "a").values())
    assert load_manifest(tmp_path / "a", camvid(moved)).splits["val"][0].image.exists()


def test_digest_follows_every_content(tmp_path):
    root = make_camvid(tmp_path / "camvid")
    digests = [prepare(camvid(root), tmp_path / "data").digest]
    for name in ("testannot/test_000.png", "val/val_000.png"):
        pixels = np.array(Image.open(root / name))
        pixels[-1, -1] = 1
        Image.fromarray(pixels).save(root / name)
        digests.append(prepare(camvid(root), tmp_path / "data").digest)
    assert len(set(digests)) == 3


def test_all_faults_in_one_list(tmp_path):
    root = make_camvid(tmp_path / "camvid", train=6)
    out = tmp_path / "data"
    prepare(camvid(root), out)
    before = files(out)

    truncated = root / "train" / "train_000.png"
    truncated.write_bytes(truncated.read_bytes()[:-400])
    (root / "train" / "train_001.png").write_text("no image")
    Image.new("L", (30, 24)).save(root / "trainannot" / "train_002.png")
    Image.fromarray(np.full((24, 32), 12, np.uint8)).save(root / "trainannot" / "train_003.png")
    Image.new("RGB", (32, 24)).save(root / "trainannot" / "train_004.png")
    (root / "trainannot" / "train_005.png").unlink()
    (root / "val" / "val_000.png").unlink()
    shutil.copy(root / "val" / "val_001.png", root / "test" / "test_001.png")
    (root / "testannot" / "test_000.png").write_bytes(b"")

    faults = faults_of(camvid(root), out)
    for name, text in {
        "train_000.png": "decoded",
        "train_001.png": "decoded",
        "train_002.png": "30x24 pixels",
        "train_003.png": "out of range: 12; allowed are 0..11, 255",
        "train_004.png": "mode RGB",
        "train_005.png": "no mask",
        "val_000.png": "no image",
        "test_001.png": "same content",
        "test_000.png": "decoded",
    }.items():
        assert any(name in f and text in f for f in faults), (name, text, faults)
    assert len(faults) == 9
    assert files(out) == before  # the old data stay until new ones are whole


def test_truncated_jpeg(tmp_path):
    root = make_camvid(tmp_path / "camvid", suffix=".jpg", size=(64, 64))
    path = root / "test" / "test_001.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    (fault,) = faults_of(camvid(root), tmp_path / "data")
    assert str(path) in fault


def test_absent_directories_and_splits(tmp_path):
    assert "data.root" in faults_of(camvid(tmp_path / "nowhere"), tmp_path / "data")[0]
    root = make_camvid(tmp_path / "camvid")
    shutil.rmtree(root / "valannot")
    assert str(root / "valannot") in faults_of(camvid(root), tmp_path / "data")[0]
    (root / "valannot").mkdir()
    shutil.rmtree(root / "val")
    (root / "val").mkdir()
    assert "split 'val'" in faults_of(camvid(root), tmp_path / "data")[0]
    assert not (tmp_path / "data").exists()


def test_empty_class_is_a_warning(tmp_path):
    root = make_camvid(tmp_path / "camvid", train=1)
    warnings = prepare(camvid(root), tmp_path / "data").warnings
    assert any("'bicyclist'" in w for w in warnings)
    assert not any("'road'" in w for w in warnings)


def test_same_image_in_two_splits_of_a_list(tmp_path):
    root = make_folder(tmp_path / "own")
    (root / "splits").mkdir()
    for split, numbers in (("train", [0, 1, 2, 2]), ("val", [3, 4]), ("test", [4, 9])):
        (root / "splits" / f"{split}.txt").write_text("".join(f"photo {n}\n" for n in numbers))
    faults = faults_of(DataConfig(name="folder", root=str(root)), tmp_path / "data")
    assert any("photo 2" in f and "2 times" in f for f in faults)
    assert any("photo 4.jpg" in f and "'val'" in f and "'test'" in f for f in faults)
    assert any("photo 9" in f and "test.txt" in f for f in faults)
    assert len(faults) == 3


def test_folder(tmp_path):
    root = make_folder(tmp_path / "own", count=20)
    config = DataConfig(name="folder", root=str(root))
    manifest = prepare(config, tmp_path / "data")
    assert manifest.classes == ("class 0", "class 1", "class 2")
    ids = {s: [i.id for i in items] for s, items in manifest.splits.items()}
    assert {s: len(v) for s, v in ids.items()} == {"train": 14, "val": 3, "test": 3}
    assert len({i for v in ids.values() for i in v}) == 20
    assert manifest.splits["train"][0].target == root / "masks" / f"{ids['train'][0]}.png"  # used where it lies
    (root / "images" / "photo 7.jpg").rename(root / "images" / "other.jpg")
    (root / "classes.txt").write_text("a\nb\n")
    faults = faults_of(config, tmp_path / "data")
    assert any("other.jpg" in f and "no mask" in f for f in faults)
    assert any("photo 7.png" in f and "no image" in f for f in faults)
    assert any("out of range: 2" in f for f in faults)
    (root / "classes.txt").write_text("a\n \nb\nc\n\n")  # is label 2 class b or c?
    assert "classes.txt: line 2 is blank" in faults_of(config, tmp_path / "data")[0]
    (root / "classes.txt").unlink()
    assert "classes.txt" in faults_of(config, tmp_path / "data")[0]


def test_drawn_splits_do_not_depend_on_how_a_name_is_composed(tmp_path):
    splits = []
    for form in ("NFC", "NFD"):  # as Linux and as a Mac store it
        root = make_folder(tmp_path / form, count=20)
        for path in [*root.glob("images/*"), *root.glob("masks/*")]:
            path.rename(path.with_name(unicodedata.normalize(form, f"é {path.name}")))
        manifest = prepare(DataConfig(name="folder", root=str(root)), tmp_path / f"data {form}")
        splits.append({s: {unicodedata.normalize("NFC", i.id) for i in v} for s, v in manifest.splits.items()})
    assert splits[0] == splits[1]


def test_how_images_are_loaded_is_no_reason_to_check_them_again(tmp_path, monkeypatch):
    root, out = make_folder(tmp_path / "own"), tmp_path / "data" / "prepared" / "own"
    out.parent.mkdir(parents=True)
    checks, check = [], preparation._check
    monkeypatch.setattr(preparation, "_check", lambda *given: checks.append(given) or check(*given))
    for values in ({}, {"workers": 4}, {"cache": True}, {"size": (32, 32)}):
        prepare(DataConfig(name="folder", root=str(root), **values), out)
    assert len(checks) == 2, "the size alone decides what is checked"


def test_an_earlier_result_outlasts_a_failed_rename(tmp_path, monkeypatch):
    root, out = make_folder(tmp_path / "own"), tmp_path / "data"
    prepare(DataConfig(name="folder", root=str(root)), out)
    before, rename = (out / "manifest.json").read_bytes(), Path.rename

    def failing(path, target):
        if path.name.endswith(".partial"):
            raise OSError(errno.EIO, "broken disk")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken disk"):
        prepare(DataConfig(name="folder", root=str(root), size=(32, 32)), out)
    assert (out / "manifest.json").read_bytes() == before


def test_an_incomplete_copy_of_a_published_set_is_told(tmp_path):
    config = DataConfig(name="camvid", root=str(make_camvid(tmp_path / "camvid")))
    assert "split 'train': 4 images, published are 367" in prepare(config, tmp_path / "data").warnings


@pytest.mark.parametrize(
    ("split", "suffix", "clash"), [("test", ".png", True), ("train", ".png", False), ("train", ".gif", True)]
)
def test_images_whose_files_would_be_one_on_a_mac_are_refused(tmp_path, split, suffix, clash):
    """Predictions of test images and masks that `prepare` converts are named by the image."""
    root = make_folder(tmp_path / "own", count=20)
    (root / "splits").mkdir()
    stems = [f"photo {n}" for n in range(20)]
    for number, name in ((0, "photo"), (1, "Photo")):
        (root / "images" / f"photo {number}.jpg").rename(root / "images" / f"{name}.jpg")
        Image.open(root / "masks" / f"photo {number}.png").save(root / "masks" / f"{name}{suffix}")
        (root / "masks" / f"photo {number}.png").unlink()
    others = {"train": stems[2:10], "val": stems[10:14], "test": stems[14:]}
    for name, listed in others.items():
        lines = [*listed, *(["photo", "Photo"] if name == split else [])]
        (root / "splits" / f"{name}.txt").write_text("\n".join(lines))
    if clash:
        (fault,) = faults_of(folder_config(root), tmp_path / "data")
        assert "photo.jpg" in fault
        assert "that of image 'Photo' on a Mac" in fault
    else:
        prepare(folder_config(root), tmp_path / "data")


def test_what_a_killed_run_left_and_cannot_be_removed_is_named(tmp_path, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, "Permission denied", path)

    (tmp_path / ".data.partial").mkdir()
    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(PermissionError, match=r"\.data\.partial"):
        prepare(DataConfig(), tmp_path / "data")


def test_imagefolder(tmp_path):
    root = make_imagefolder(tmp_path / "imagenet")
    config = DataConfig(name="imagefolder", root=str(root), test_split="val")
    manifest = prepare(config, tmp_path / "data")
    assert manifest.task == "classification"
    assert manifest.num_classes == 6
    assert len(manifest.splits["train"]) == 24
    item = manifest.splits["train"][0]
    assert (item.id, item.target) == ("train/n01440764/n01440764_0", 0)
    assert manifest.class_pixels == manifest.image_pixels == {"train": [4] * 6, "val": [2] * 6}

    (root / "val" / "n00000000").mkdir()
    assert "n00000000" in faults_of(config, tmp_path / "data")[0]
    (root / "val" / "n00000000").rmdir()
    shutil.copy(item.image, root / "val" / "ILSVRC2012_val_00000001.JPEG")
    (root / "train" / "n99999999.tar").write_bytes(b"")
    faults = faults_of(config, tmp_path / "data")
    assert any("outside class folders" in f for f in faults)
    assert any("n99999999.tar" in f for f in faults)
    absent = config.model_copy(update={"test_split": "test"})
    assert any("test_split: val" in f for f in faults_of(absent, tmp_path / "data"))


def test_leftovers_of_a_killed_run_are_cleared(tmp_path):
    (tmp_path / ".data.partial" / "images").mkdir(parents=True)
    prepare(synthetic(), tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("link", [False, True])
def test_a_run_after_a_kill_puts_the_earlier_result_back(tmp_path, link):
    """A kill between two renames leaves the only whole result under another name."""
    root, out = make_camvid(tmp_path / "camvid"), tmp_path / "data"
    place = tmp_path / "disk" / "camvid" if link else out
    if link:
        place.mkdir(parents=True)
        out.symlink_to(place)
    prepare(camvid(root), out)
    before = files(out)
    place.rename(place.with_name(f".{place.name}.old"))
    image = root / "val" / "val_000.png"
    content = image.read_bytes()
    image.write_text("no image")
    assert "decoded" in faults_of(camvid(root), out)[0]
    assert files(out) == before
    image.write_bytes(content)
    place.rename(place.with_name(f".{place.name}.old"))
    prepare(camvid(root), out)
    assert files(out) == before
    assert [p.name for p in place.parent.iterdir() if p.name.startswith(".")] == []


def test_a_link_to_another_disk_stays(tmp_path):
    out, place = tmp_path / "checkout" / "data", tmp_path / "disk" / "synthetic"
    for directory in (out.parent, place):
        directory.mkdir(parents=True)
    out.symlink_to(place)
    for seed in (0, 1):
        manifest = prepare(synthetic(seed=seed), out)
        assert load_manifest(out, synthetic(seed=seed)) == manifest
        assert manifest.splits["train"][0].image.is_relative_to(out)
        assert (out.is_symlink(), out.resolve()) == (True, place)
        assert ([p.name for p in out.parent.iterdir()], [p.name for p in place.parent.iterdir()]) == (
            ["data"],
            ["synthetic"],
        )
    shutil.rmtree(place)
    for target in (place, out):  # gone, and itself
        out.unlink()
        out.symlink_to(target)
        (fault,) = faults_of(synthetic(), out)
        assert fault == f"{out}: a link to no directory ({target}); make that, or remove the link"
        assert not place.exists()


def test_a_link_that_an_earlier_version_left_is_cleared(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / ".data.old").symlink_to(tmp_path / "disk")
    prepare(synthetic(), tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "disk"]


def test_load_manifest_refuses(tmp_path):
    with pytest.raises(DataError, match="prepare"):
        load_manifest(tmp_path / "data", synthetic())
    prepare(synthetic(), tmp_path / "data")
    with pytest.raises(DataError, match="synthetic_shapes"):
        load_manifest(tmp_path / "data", DataConfig(name="synthetic_shapes"))
    with pytest.raises(DataError, match="extra"):
        load_manifest(tmp_path / "data", DataConfig(train_split="extra"))
    (tmp_path / "data" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not readable"):
        load_manifest(tmp_path / "data", synthetic())


def test_manifest_json_is_plain(tmp_path):
    manifest = prepare(synthetic(), tmp_path / "data")
    tree = json.loads((tmp_path / "data" / "manifest.json").read_text())
    assert tree["counts"] == {"train": 6, "val": 2, "test": 3}
    assert tree["digest"] == manifest.digest
    assert (tmp_path / "data" / "splits" / "val.csv").read_text().splitlines()[1] == (
        "val_00000,out/images/val_00000.png,out/masks/val_00000.png,32,32"
    )


def test_download_says_where_to_get_the_rest():
    with pytest.raises(DataError, match="cocodataset"):
        download(DataConfig(name="coco", root="x"))
    with pytest.raises(DataError, match="nothing to download"):
        download(DataConfig())


def folder_config(root, **values):
    return DataConfig(name="folder", root=str(root), **values)


def test_files_of_systems_are_skipped_and_counted(tmp_path, capsys):
    root = make_folder(tmp_path / "own")
    plain = prepare(folder_config(root), tmp_path / "a")
    capsys.readouterr()
    for name in ("images/._photo 0.jpg", "images/.DS_Store", "masks/Thumbs.db", "masks/desktop.ini"):
        (root / name).write_bytes(b"\0\5\x16\7")
    (root / "images" / "__MACOSX").mkdir()
    manifest = prepare(folder_config(root), tmp_path / "b")
    assert "note: 5 hidden files" in capsys.readouterr().err
    assert manifest == dataclasses.replace(
        plain, splits={s: manifest.splits[s] for s in plain.splits}
    )  # the same but for paths
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_no_file_is_left_out_without_a_count(tmp_path):
    root = make_folder(tmp_path / "own")
    for name in ("images/notes.txt", "images/raw.cr2", "images/raw2.CR2", "masks/nosuffix"):
        (root / name).write_text("x")
    (root / "images" / "more" / "deep").mkdir(parents=True)
    shutil.copy(root / "images" / "photo 0.jpg", root / "images" / "more" / "deep")
    warnings = "\n".join(prepare(folder_config(root), tmp_path / "data").warnings)
    assert "images: 4 files left out" in warnings
    assert "1 in subdirectories, 1 with suffix .CR2, 1 with suffix .cr2, 1 with suffix .txt" in warnings
    assert "masks: 1 files left out, which are no images of the data set: 1 without suffix" in warnings
    (root / "splits").mkdir()
    for split, numbers in (("train", [0, 1]), ("val", [2]), ("test", [3])):
        (root / "splits" / f"{split}.txt").write_text("".join(f"photo {n}\n" for n in numbers))
    assert any(
        "splits/: 4 images are in no list" in w for w in prepare(folder_config(root), tmp_path / "data").warnings
    )


def test_no_file_of_a_class_is_left_out_without_a_count(tmp_path):
    root = make_imagefolder(tmp_path / "classes")
    config = DataConfig(name="imagefolder", root=str(root), test_split="val")
    count = len(prepare(config, tmp_path / "data").splits["train"])
    source = root / "train" / "n01440764" / "n01440764_1.JPEG"
    with Image.open(source) as image:
        flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    flipped.save(source.with_name("still.gif"))
    flipped.rotate(9).save(source.with_name("browser.jfif"), "JPEG")
    (source.parent / "nested").mkdir()
    for index in range(3):
        flipped.save(source.parent / "nested" / f"{index}.png")
    (root / "train" / "readme.txt").write_text("x")
    manifest = prepare(config, tmp_path / "data")
    assert len(manifest.splits["train"]) == count + 2
    assert any("train: 3 files left out" in w and "3 in subdirectories" in w for w in manifest.warnings)
    assert any("train/: 1 files beside the class folders" in w for w in manifest.warnings)


@pytest.mark.parametrize("name", [b"caf\xe9", b"two\nlines", b"red\x1b[31m"])
def test_unfit_names_are_faults_in_the_list(tmp_path, name):
    root = make_folder(tmp_path / "own")
    for part, suffix in (("images", b".jpg"), ("masks", b".png")):
        os.rename(root / part / f"photo 3{suffix.decode()}", os.fsencode(root / part / "x")[:-1] + name + suffix)
    (root / "images" / "photo 0.jpg").write_text("no image")
    faults = faults_of(folder_config(root), tmp_path / "data")
    assert len(faults) == 3
    assert sum("rename it" in f for f in faults) == 2
    assert all(f.isprintable() for f in faults)
    str(DataError(faults)).encode()  # can be printed anywhere


def test_all_unreadable_files_in_one_list(tmp_path):
    root = make_folder(tmp_path / "own")
    for name in ("images/photo 0.jpg", "masks/photo 1.png"):
        (root / name).unlink()
        os.mkfifo(root / name)
    (root / "images" / "photo 2.jpg").unlink()
    (root / "images" / "photo 2.jpg").symlink_to("/dev/zero")
    (root / "masks" / "photo 3.png").write_bytes(b"")
    Image.new("RGB", (15, 24)).save(root / "images" / "photo 4.jpg")
    faults = faults_of(folder_config(root), tmp_path / "data")
    for number, word in enumerate(("a FIFO", "a FIFO", "a device", "decoded", "15x24 pixels; at least 16")):
        assert any(f"photo {number}." in f and word in f for f in faults), (number, faults)
    (root / "classes.txt").unlink()
    os.mkfifo(root / "classes.txt")
    assert "a FIFO" in faults_of(folder_config(root), tmp_path / "data")[0]


def test_small_images_are_taken_where_they_are_resized(tmp_path):
    root = make_folder(tmp_path / "own", size=(15, 15))
    assert all("15x" in f for f in faults_of(folder_config(root), tmp_path / "data"))
    prepare(folder_config(root, size=(32, 32)), tmp_path / "data")


def binary(root, values, every=True):
    make_folder(root, classes=2, size=(24, 24))
    for index, path in enumerate(sorted((root / "masks").iterdir())):
        mask = np.zeros((24 + 8 * (index % 2), 24), np.uint8)
        mask[4:20, 4:16] = values[-1] if every or index % 2 else values[0]
        Image.fromarray(mask).save(path)
    return folder_config(root)


def test_masks_of_0_and_255_are_refused(tmp_path):
    for every in (True, False):
        (fault,) = faults_of(binary(tmp_path / str(every), (0, 255), every), tmp_path / "data")
        assert "'class 1' (label 1) has not one pixel" in fault
        assert "255" in fault
        assert "% of all pixels" in fault
        assert "classes.txt" in fault
    prepare(binary(tmp_path / "right", (0, 1)), tmp_path / "data")


def test_ignored_pixels_are_told_with_their_share(tmp_path):
    warnings = prepare(folder_config(make_folder(tmp_path / "own", size=(24, 32))), tmp_path / "data").warnings
    assert any(w.startswith("3.6 % of all pixels are 255 in the masks, which is ignored") for w in warnings)  # 1 of 28
    assert load_manifest(tmp_path / "data", folder_config(tmp_path / "own")).warnings == warnings


def test_images_are_upright_and_masks_have_to_fit(tmp_path):
    root = make_folder(tmp_path / "own")
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, turn in ((0, False), (2, True)):
        with (
            Image.open(root / "images" / f"photo {number}.jpg") as image,
            Image.open(root / "masks" / f"photo {number}.png") as mask,
        ):
            image.save(root / "images" / f"photo {number}.jpg", exif=exif)
            if turn:
                mask.transpose(Image.Transpose.ROTATE_270).save(root / "masks" / f"photo {number}.png")
    (fault,) = faults_of(folder_config(root), tmp_path / "data")
    assert "photo 0.png: 32x24 pixels" in fault
    assert "24x32 after its EXIF orientation; turn the mask likewise" in fault
    (root / "images" / "photo 0.jpg").unlink()
    (root / "masks" / "photo 0.png").unlink()
    manifest = prepare(folder_config(root), tmp_path / "data")
    assert any("1 images are turned" in w for w in manifest.warnings)
    (item,) = [i for items in manifest.splits.values() for i in items if i.id == "photo 2"]
    assert (item.height, item.width) == (32, 24)


@pytest.mark.slow
@pytest.mark.parametrize("locale", ["C", "en_US.ISO-8859-1"])
def test_text_is_utf8_in_every_locale(tmp_path, locale):
    root = make_folder(tmp_path / "own")
    (root / "classes.txt").write_text("Straße\n背景\nclass 2\n", encoding="utf-8")
    script = (
        "import sys; from pathlib import Path; from sunets.core.config import DataConfig\n"
        "from sunets.data.preparation import prepare\n"
        f"m = prepare(DataConfig(name='folder', root={str(root)!r}), Path({str(tmp_path / 'data')!r}))\n"
        "assert m.classes[:2] == ('Stra\\xdfe', '\\u80cc\\u666f'), m.classes"
    )
    env = os.environ | {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error::EncodingWarning", "-X", "warn_default_encoding", "-c", script],
                   env=env, cwd=tmp_path, check=True)  # fmt: skip
    assert "背景" in (tmp_path / "data" / "manifest.json").read_text(encoding="utf-8")
    (root / "images" / "photo 0.jpg").rename(root / "images" / "写真.jpg")
    (root / "masks" / "photo 0.png").rename(root / "masks" / "写真.png")
    failed = subprocess.run([sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert "its name cannot be read in this locale; set PYTHONUTF8=1" in failed.stderr
    subprocess.run([sys.executable, "-c", script], env=env | {"PYTHONUTF8": "1"}, cwd=tmp_path, check=True)
    assert "写真" in (tmp_path / "data" / "files.csv").read_text(encoding="utf-8")


def test_text_of_another_encoding_is_a_fault(tmp_path):
    root = make_folder(tmp_path / "own")
    (root / "classes.txt").write_bytes("Straße\nb\nc\n".encode("latin-1"))
    assert "classes.txt: not UTF-8 text (byte 4); save it as UTF-8" in faults_of(folder_config(root), tmp_path / "d")[0]
    (root / "classes.txt").write_text("a\nb\x1b[0m\nc\n")
    assert "control characters" in faults_of(folder_config(root), tmp_path / "d")[0]
    (root / "classes.txt").write_text(f"a\nb\n{'c' * 101}\n")
    assert "has 101 characters; use at most 100" in faults_of(folder_config(root), tmp_path / "d")[0]


def test_the_time_of_a_long_check_is_told_at_its_beginning(tmp_path, monkeypatch, capsys):
    prepare(folder_config(make_folder(tmp_path / "own")), tmp_path / "short")
    assert "takes about" not in capsys.readouterr().err
    monkeypatch.setattr(preparation, "_FIRST_CHUNK", 2)
    prepare(folder_config(tmp_path / "own"), tmp_path / "short")
    assert "takes about" not in capsys.readouterr().err
    clock = iter(range(0, 10**6, 45))
    monkeypatch.setattr(preparation.time, "monotonic", lambda: next(clock))  # 45 s for two of eight images
    prepare(folder_config(tmp_path / "own"), tmp_path / "long")
    assert capsys.readouterr().err == "note: checking 8 images takes about 2 min\n"


def test_colours_of_a_user_without_colours_are_told_apart(tmp_path):
    root = make_folder(tmp_path / "own")
    assert prepare(folder_config(root), tmp_path / "data").palette == folder.OKABE_ITO[:3]
    (root / "classes.txt").write_text("".join(f"class {k}\n" for k in range(255)))
    palette = tuple(folder.find(folder_config(root), tmp_path).palette)
    assert palette[:8] == folder.OKABE_ITO
    assert len(set(palette)) == len(palette) == 255


def test_overlays_blend_classes_and_leave_the_background(tmp_path):
    pixels = np.full((1, 3, 3), 200, np.uint8)
    labels = np.array([[0, 1, 255]], np.uint8)
    assert overlay(pixels, labels, folder.OKABE_ITO).tolist() == [[[200] * 3, [215, 179, 100], [200] * 3]]


def test_directories_and_lists_of_another_kind_are_faults(tmp_path):
    root = make_folder(tmp_path / "own")
    (root / "images" / "loop.jpg").symlink_to("loop.jpg")
    (root / "masks" / "loop.png").symlink_to("loop.png")
    (root / "images" / "more").symlink_to(root / "images")
    faults = faults_of(folder_config(root), tmp_path / "data")
    assert [f.split(":")[0].rpartition("/")[2] for f in faults] == ["loop.jpg", "loop.png"]
    assert all("symbolic links" in f for f in faults)
    (root / "splits").mkdir()
    os.mkfifo(root / "splits" / "train.txt")
    assert "train.txt: not a file but a FIFO" in faults_of(folder_config(root), tmp_path / "data")[0]
    shutil.rmtree(root / "splits")
    (root / "splits").write_text("photo 1\n")
    assert "train.txt: missing" in faults_of(folder_config(root), tmp_path / "data")[0]
    shutil.rmtree(root / "masks")
    os.mkfifo(root / "masks")
    (fault,) = faults_of(folder_config(root), tmp_path / "data")
    assert "masks: cannot be listed (Not a directory); make it a readable directory" in fault


def test_an_empty_split_says_which_files_were_left_out(tmp_path):
    root = make_folder(tmp_path / "own")
    for directory in (root / "images", root / "masks"):
        directory.rename(root / "moved")
        directory.mkdir()
        (root / "moved").rename(directory / "nested")
    faults = faults_of(folder_config(root), tmp_path / "data")
    assert any(f.startswith("images: 8 files left out") and f.endswith("; move the images into it") for f in faults)
    assert len(faults) == 5
