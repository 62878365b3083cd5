"""VOC 2012 with SBD, COCO and Cityscapes, on stand-ins in their exact on-disk formats."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from standins import make_cityscapes, make_coco, make_imagefolder, make_sbd, make_voc

from sunets.core.config import DataConfig
from sunets.data import voc as voc_module
from sunets.data.loading import make_dataset
from sunets.data.manifest import load_manifest
from sunets.data.picture import DataError
from sunets.data.preparation import prepare

# pycocotools' compiled part does not know NumPy 2's copy keyword yet
quiet_coco = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


def ids(manifest, split):
    return [item.id for item in manifest.splits[split]]


def labels_of(item):
    with Image.open(item.target) as file:
        return np.array(file)


@pytest.fixture
def voc(tmp_path):
    return make_sbd(make_voc(tmp_path / "voc"))


def voc_config(root, **values):
    return DataConfig(name="voc2012", root=str(root), **values)


def test_voc(voc, tmp_path):
    manifest = prepare(voc_config(voc), tmp_path / "data")
    assert manifest.num_classes == 21
    assert manifest.palette[15] == (192, 128, 128)  # person, in VOC's colour map
    lists = voc / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    for split in ("train", "val", "test"):
        assert ids(manifest, split) == (lists / f"{split}.txt").read_text().split()
    assert all(item.target is None for item in manifest.splits["test"])
    labels = labels_of(manifest.splits["train"][0])
    assert set(np.unique(labels)) == {0, 1, 255}
    _, target = make_dataset(manifest, "train", voc_config(voc), None, 0)[0]
    assert np.array_equal(target.numpy(), labels)
    assert any("split 'train': 4 images, published are 1464" in w for w in manifest.warnings)
    assert load_manifest(tmp_path / "data", voc_config(voc)) == manifest


def test_voc_directory_itself_is_a_root_too(voc, tmp_path):
    inner = prepare(voc_config(voc / "VOCdevkit" / "VOC2012"), tmp_path / "a")
    assert inner.digest == prepare(voc_config(voc), tmp_path / "b").digest


def test_train_aug_has_no_val_image(voc, tmp_path):
    """The stand-in SBD, like the real one, contains VOC's val images."""
    config = voc_config(voc, train_split="train_aug", test_split="val")
    manifest = prepare(config, tmp_path / "data")
    listed = {
        n for part in ("train", "val") for n in (voc / f"benchmark_RELEASE/dataset/{part}.txt").read_text().split()
    }
    assert set(ids(manifest, "val")) <= listed  # planted
    assert not set(ids(manifest, "train_aug")) & set(ids(manifest, "val"))
    assert len(manifest.splits["train_aug"]) == 4 + 3
    assert any("published are 10582" in w for w in manifest.warnings)
    from_voc, from_sbd = manifest.splits["train_aug"][0], manifest.splits["train_aug"][-1]
    assert "SegmentationClass" in from_voc.target.parts  # VOC's own annotation is the better one
    assert from_sbd.target.is_relative_to(tmp_path / "data")
    assert set(np.unique(labels_of(from_sbd))) == {0, 3}


def test_trainval_aug_contains_val_by_definition(voc, tmp_path):
    config = voc_config(voc, train_split="trainval_aug", test_split="test")
    manifest = prepare(config, tmp_path / "data")
    assert len(manifest.splits["trainval_aug"]) == 4 + 2 + 3
    assert any("'trainval_aug' and 'val' share 2 images" in w for w in manifest.warnings)
    with pytest.raises(DataError, match="no labels"):
        prepare(voc_config(voc, val_split="test"), tmp_path / "other")


def test_sbd_directory_of_torchvision(voc, tmp_path):
    config = voc_config(voc, train_split="train_aug")
    first = prepare(config, tmp_path / "a")
    (voc / "benchmark_RELEASE" / "dataset").rename(voc / "sbd")
    assert prepare(config, tmp_path / "b").digest == first.digest


def test_voc_faults(voc, tmp_path):
    inside = voc / "VOCdevkit" / "VOC2012"
    (inside / "JPEGImages" / "2007_000001.jpg").unlink()
    (inside / "SegmentationClass" / "2007_000002.png").unlink()
    with (inside / "ImageSets" / "Segmentation" / "val.txt").open("a") as file:
        file.write("2007_000000\n2099_000000\n")
    with pytest.raises(DataError) as caught:
        prepare(voc_config(voc), tmp_path / "data")
    faults = caught.value.faults
    for name in (
        "2007_000001.jpg: missing",
        "2007_000002.png: missing",
        "2099_000000.jpg: missing",
        "2007_000000.jpg: in split",
    ):
        assert any(name in f for f in faults), (name, faults)
    (inside / "ImageSets" / "Segmentation" / "train.txt").unlink()
    with pytest.raises(DataError, match=r"train\.txt: no such file"):
        prepare(voc_config(voc), tmp_path / "data")
    with pytest.raises(DataError, match="VOCdevkit"):
        prepare(voc_config(inside / "JPEGImages"), tmp_path / "data")


@pytest.mark.parametrize("content", ["text", "other struct", "HDF5", "truncated"])
def test_mat_of_another_kind(voc, tmp_path, content):
    path = voc / "benchmark_RELEASE" / "dataset" / "cls" / "2008_000000.mat"
    if content == "text":
        path.write_text("hello, this is no MATLAB file at all" * 8)
    elif content == "other struct":
        savemat(path, {"GTinst": {"Segmentation": np.zeros((4, 4), np.uint8)}})
    elif content == "HDF5":
        path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n" + bytes(256))
    else:
        path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(DataError) as caught:
        prepare(voc_config(voc, train_split="train_aug"), tmp_path / "data")
    (fault,) = caught.value.faults
    assert str(path) in fault
    assert ("cannot be decoded" if content == "truncated" else "GTcls") in fault


def test_half_extracted_sbd(voc, tmp_path):
    (voc / "benchmark_RELEASE" / "dataset" / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt"):
        prepare(voc_config(voc, train_split="train_aug"), tmp_path / "data")


@quiet_coco
def test_coco(tmp_path):
    root = make_coco(tmp_path / "coco")
    config = DataConfig(name="coco", root=str(root), test_split="val")
    manifest = prepare(config, tmp_path / "data")
    assert ids(manifest, "train") == [f"{n:012d}" for n in (1, 2, 3)]  # neither the tiny person nor the zebra
    assert ids(manifest, "val") == [f"{n:012d}" for n in (101, 102)]
    labels = labels_of(manifest.splits["train"][0])
    expected = np.zeros((64, 72), np.uint8)
    expected[40:60, 40:60] = 18  # sofa, from a compressed code, behind
    expected[:, :8] = 15  # person, from an uncompressed crowd
    expected[10:50, 10:50] = 20  # tvmonitor, a polygon, in front
    assert np.array_equal(labels, expected)
    assert manifest.class_pixels["train"][20] == 3 * 1600


@quiet_coco
def test_coco_faults(tmp_path):
    root = make_coco(tmp_path / "coco")
    config = DataConfig(name="coco", root=str(root), test_split="val")
    with pytest.raises(DataError, match="test_split: val"):
        prepare(DataConfig(name="coco", root=str(root)), tmp_path / "data")
    path = root / "annotations" / "instances_val2017.json"
    tree = json.loads(path.read_text())
    tree["annotations"][0]["segmentation"] = {"size": "?", "counts": [1]}
    path.write_text(json.dumps(tree))
    (root / "train2017" / f"{2:012d}.jpg").unlink()
    Image.new("RGB", (20, 20)).save(root / "train2017" / f"{3:012d}.jpg")
    with pytest.raises(DataError) as caught:
        prepare(config, tmp_path / "data")
    faults = caught.value.faults
    for text in ("annotation 1 of 000000000101.jpg", "000000000002.jpg: missing", "000000000003.jpg has 20x20"):
        assert any(text in f for f in faults), (text, faults)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"instances_val2017\.json: not COCO"):
        prepare(config, tmp_path / "data")
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        prepare(config, tmp_path / "data")


def test_cityscapes(tmp_path):
    root = make_cityscapes(tmp_path / "cityscapes")
    manifest = prepare(DataConfig(name="cityscapes", root=str(root)), tmp_path / "data")
    assert manifest.num_classes == 19
    assert ids(manifest, "train")[0] == "aachen_000000_000019"
    stored = np.asarray(Image.open(root / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png"))
    labels = labels_of(manifest.splits["train"][0])
    for stored_label, label in {7: 0, 8: 1, 23: 10, 3: 255}.items():
        assert (stored == stored_label).any()
        assert (labels[stored == stored_label] == label).all()
    assert manifest.splits["test"][0].target is None

    (root / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png").unlink()
    (root / "leftImg8bit/val/frankfurt/frankfurt_000000_000019_leftImg8bit.png").unlink()
    with pytest.raises(DataError) as caught:
        prepare(DataConfig(name="cityscapes", root=str(root)), tmp_path / "data")
    assert len(caught.value.faults) == 2
    assert "aachen_000001" in str(caught.value)
    assert "frankfurt_000000" in str(caught.value)


@pytest.mark.parametrize("name", ["../../../evil", "/etc/evil", "a/b", "..", "caf\\x", "x" * 300])
def test_names_of_lists_never_lead_outside(voc, tmp_path, name):
    segmentation = voc / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    before = (segmentation / "val.txt").read_text()
    (segmentation / "val.txt").write_text(before + name + "\n")
    with pytest.raises(DataError, match=r"val\.txt: names .*; remove it"):
        prepare(voc_config(voc), tmp_path / "data")
    (segmentation / "val.txt").write_text(before)
    sbd = voc / "benchmark_RELEASE" / "dataset" / "train.txt"
    sbd.write_text(sbd.read_text() + f"\n{name}\n")
    with pytest.raises(DataError, match=r"dataset/train\.txt: names .*; remove it"):
        prepare(voc_config(voc, train_split="train_aug"), tmp_path / "data")


@quiet_coco
@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "val2017/a.jpg", ""])
def test_names_of_annotations_never_lead_outside(tmp_path, name):
    root = make_coco(tmp_path / "coco")
    path = root / "annotations" / "instances_val2017.json"
    tree = json.loads(path.read_text())
    tree["images"][0]["file_name"] = name
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"instances_val2017\.json: names .*; remove it"):
        prepare(DataConfig(name="coco", root=str(root), test_split="val"), tmp_path / "data")


@quiet_coco
def test_images_that_coco_leaves_out_are_counted(tmp_path):
    root = make_coco(tmp_path / "coco")
    warnings = prepare(DataConfig(name="coco", root=str(root), test_split="val"), tmp_path / "data").warnings
    for split in ("train", "val"):
        assert f"split '{split}': 1 images have no object of a PASCAL VOC class; left out" in warnings
        assert f"split '{split}': 1 images have too few labelled pixels; left out" in warnings


@quiet_coco
def test_a_picture_without_end_in_the_annotations_is_a_fault(tmp_path):
    root = make_coco(tmp_path / "coco")
    path = root / "annotations" / "instances_train2017.json"
    tree = json.loads(path.read_text())
    tree["images"][0] |= {"height": 10**6, "width": 10**6}
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"000000000001\.jpg cannot be drawn"):
        prepare(DataConfig(name="coco", root=str(root), test_split="val"), tmp_path / "data")


def test_cityscapes_takes_no_companion_of_a_mac_for_a_picture(tmp_path, capsys):
    root = make_cityscapes(tmp_path / "cityscapes")
    config = DataConfig(name="cityscapes", root=str(root))
    digest = prepare(config, tmp_path / "a").digest
    for path in list(root.rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert prepare(config, tmp_path / "b").digest == digest
    assert "note: 11 hidden files" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["FIFO", "directory"])
def test_a_mask_of_sbd_that_is_no_file(voc, tmp_path, content):
    path = voc / "benchmark_RELEASE" / "dataset" / "cls" / "2008_000000.mat"
    path.unlink()
    os.mkfifo(path) if content == "FIFO" else path.mkdir()
    with pytest.raises(DataError, match=rf"2008_000000\.mat: not a file but a {content}"):
        prepare(voc_config(voc, train_split="train_aug"), tmp_path / "data")


def test_two_images_of_one_stem_in_a_class_are_named(tmp_path: Path) -> None:
    root = make_imagefolder(tmp_path / "folders")
    image = next((root / "train" / "n01440764").iterdir())
    shutil.copy(image, image.with_suffix(".jpg"))
    config = DataConfig(name="imagefolder", root=str(root), test_split="val")
    with pytest.raises(DataError, match=rf"{image.stem}\.\w+: the same stem as {image.stem}\.\w+; remove or rename"):
        prepare(config, tmp_path / "out")


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torchvision was asked for; each first attempt is killed while it extracts."""
    asked: list[str] = []

    def voc(root: str, *_: object, **options: object) -> None:
        asked.append("voc")
        Path(root, "VOCdevkit/VOC2012/ImageSets").mkdir(parents=True)
        Path(root, "VOCtrainval.tar").touch()
        if asked.count("voc") == 1:
            raise KeyboardInterrupt
        Path(root, "VOCdevkit/VOC2012/JPEGImages").mkdir()

    def sbd(root: str, *_: object, **options: object) -> None:
        asked.append("sbd")
        Path(root, "img").mkdir(parents=True)  # torchvision moves directories that must not exist yet
        Path(root, "train.txt").touch(exist_ok=False)
        Path(root, "benchmark.tgz").touch()
        if asked.count("sbd") == 1:
            raise KeyboardInterrupt
        Path(root, "val.txt").touch()
        Path(root, "cls").mkdir()

    monkeypatch.setattr("torchvision.datasets.VOCSegmentation", voc)
    monkeypatch.setattr("torchvision.datasets.SBDataset", sbd)
    return asked


def test_a_killed_download_is_made_whole(tmp_path: Path, fetched: list[str]) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            voc_module.download(tmp_path)
    voc_module.download(tmp_path)
    assert fetched == ["voc", "voc", "sbd", "sbd"]
    assert (tmp_path / "VOCdevkit/VOC2012/JPEGImages").is_dir()
    assert {path.name for path in (tmp_path / "sbd").iterdir()} >= {"train.txt", "val.txt", "cls", "img"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["VOCdevkit", "sbd"]
    voc_module.download(tmp_path)
    assert len(fetched) == 4, "what is whole is not fetched again"


def test_a_download_touches_nothing_of_the_user(tmp_path: Path, fetched: list[str]) -> None:
    (tmp_path / "VOCdevkit/VOC2012").mkdir(parents=True)
    (tmp_path / "sbd").mkdir()
    (tmp_path / "sbd/train.txt").write_text("mine")
    with pytest.raises(DataError, match=r"sbd/val\.txt: no such file or directory; move .*sbd elsewhere"):
        voc_module.download(tmp_path)
    assert not fetched
    assert (tmp_path / "sbd/train.txt").read_text() == "mine"
