"""Prediction of a user's own pictures, and the PASCAL VOC server's archive."""

from __future__ import annotations

import dataclasses
import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SUNET, tiny_config, tiny_manifest

from sunets.core.config import VariantConfig as Variant
from sunets.data.manifest import Manifest
from sunets.data.picture import DataError, read_picture
from sunets.evaluation.evaluate import evaluate
from sunets.models.tensor_file import CheckpointError, atomic_save
from sunets.models.weights import load_trained
from sunets.predict import check_server_archive, palette_image, predict_images, write_server_archive
from sunets.training.fit import fit

MULTI_SCALE = Variant(scales=(0.75, 1.0), flip=True, window=(32, 32))


@pytest.fixture(scope="module")
def checkpoint(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(train__epochs=6, train__lr=0.03)
    return fit(config, manifest, work_dir=tmp_path_factory.mktemp("run")).weights_path


def test_pictures_of_every_kind(checkpoint: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    pictures = {
        "gray": Image.fromarray(draw.integers(0, 255, (17, 90), dtype=np.uint8)),
        "deep": Image.fromarray(draw.integers(0, 65535, (40, 31), dtype=np.uint16)),
        "color": Image.fromarray(draw.integers(0, 255, (33, 47, 3), dtype=np.uint8)),
        "clear": Image.fromarray(draw.integers(0, 255, (20, 21, 4), dtype=np.uint8)),
        "palette": Image.fromarray(draw.integers(0, 255, (30, 20, 3), dtype=np.uint8)).quantize(8),
        "binary": Image.fromarray(draw.integers(0, 255, (64, 64), dtype=np.uint8)).convert("1"),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    pictures["print"] = pictures["color"].convert("CMYK")
    pictures["print"].save(tmp_path / "print.jpg")
    paths = [next(tmp_path.glob(f"{name}.*")) for name in pictures]
    written = predict_images(checkpoint, paths, tmp_path / "out", variant=MULTI_SCALE)
    assert {p.name for p in written} == {f"{n}_{kind}.png" for n in pictures for kind in ("mask", "overlay")}
    for path in paths:
        size = read_picture(path).shape[1::-1]
        with Image.open(tmp_path / "out" / f"{path.stem}_mask.png") as mask:
            assert (mask.mode, mask.size) == ("P", size)
            assert (mask.getpalette() or [])[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
            colors = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]])[np.array(mask)]
        with Image.open(tmp_path / "out" / f"{path.stem}_overlay.png") as overlay:
            assert (overlay.mode, overlay.size) == ("RGB", size)
            pixels = read_picture(path).astype(int)
            blended = np.where(colors.any(-1, keepdims=True), (pixels + colors) // 2, pixels)  # black darkens nothing
            np.testing.assert_array_equal(np.array(overlay), blended)


def test_predictions_are_those_of_the_evaluation(checkpoint: Path, manifest: Manifest, tmp_path: Path) -> None:
    model, _ = load_trained(checkpoint)
    expected = evaluate(model, manifest, tiny_config(), split="val", variant=MULTI_SCALE).predictions
    paths = [item.image for item in manifest.splits["val"] if item.id in expected]
    predict_images(checkpoint, paths, tmp_path, variant=MULTI_SCALE)
    for name, labels in expected.items():
        found = np.array(Image.open(tmp_path / f"{name}_mask.png"))
        assert (found != labels).sum() <= 2
        assert len(np.unique(labels)) > 1


def test_predictions_have_full_precision(checkpoint: Path, manifest: Manifest, tmp_path: Path) -> None:
    allowed: list[bool] = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda *_: allowed.append(torch.backends.cudnn.allow_tf32)
    )
    torch.backends.cudnn.allow_tf32 = True
    try:
        predict_images(checkpoint, [manifest.splits["val"][0].image], tmp_path)
    finally:
        hook.remove()
        torch.backends.cudnn.allow_tf32 = False
    assert allowed
    assert not any(allowed)


def test_a_network_trained_on_resized_images_sees_the_same_scale(manifest: Manifest, tmp_path: Path) -> None:
    """Blowing a picture up changes its mask's size only, when training fixed the number of pixels."""
    result = fit(tiny_config(data__size=[32, 32], train__epochs=6, train__lr=0.03), manifest, work_dir=tmp_path / "run")
    with Image.open(manifest.splits["train"][0].image) as picture:
        picture.save(tmp_path / "small.png")
        picture.resize((128, 128), Image.Resampling.BILINEAR).save(tmp_path / "large.png")
    predict_images(result.weights_path, [tmp_path / "small.png", tmp_path / "large.png"], tmp_path)
    small, large = (np.array(Image.open(tmp_path / f"{name}_mask.png")) for name in ("small", "large"))
    assert large.shape == (128, 128)
    assert (large[2::4, 2::4] == small).mean() > 0.9
    assert len(np.unique(small)) > 1


def test_every_bad_picture_is_named_before_anything_is_written(checkpoint: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    good = tmp_path / "good.png"
    Image.fromarray(draw.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "good.jpg").write_bytes(good.read_bytes())
    Image.fromarray(draw.random((4, 4)).astype(np.float32)).save(tmp_path / "float.tif")
    names = ["good.png", "cut.png", "text.jpg", "absent.png", "other/good.jpg", "float.tif", "other"]
    with pytest.raises(DataError) as raised:
        predict_images(checkpoint, [tmp_path / name for name in names], tmp_path / "out")
    assert len(raised.value.faults) == 6
    accents = [tmp_path / "a" / "e\u0301.png", tmp_path / "b" / "\u00e9.png"]  # one name on a Mac
    for path in accents:
        path.parent.mkdir()
        path.write_bytes(good.read_bytes())
    with pytest.raises(DataError, match="would write the same files"):
        predict_images(checkpoint, accents, tmp_path / "out")
    for name in names[1:]:
        assert str(tmp_path / name) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_name_that_is_too_long_for_a_result_is_named_before_anything_is_written(
    checkpoint: Path, tmp_path: Path
) -> None:
    good, long = tmp_path / "good.png", tmp_path / f"{'x' * 232}.png"
    for path in (good, long):
        Image.new("RGB", (32, 32)).save(path)
    with pytest.raises(DataError, match=r"x\.png: its name has 244 bytes; at most 240 are allowed with the suffix"):
        predict_images(checkpoint, [good, long], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    fits = long.rename(tmp_path / f"{'x' * 228}.png")
    assert all(path.exists() for path in predict_images(checkpoint, [good, fits], tmp_path / "out"))


def test_checkpoints_that_cannot_predict(checkpoint: Path, manifest: Manifest, tmp_path: Path) -> None:
    picture = manifest.splits["test"][0].image
    _, info = load_trained(checkpoint)
    classifier = tiny_manifest(tmp_path / "data", task="classification", train=4, val=1)
    config = tiny_config(**SUNET, data__name="synthetic_shapes", train__epochs=1)
    weights = fit(config, classifier, work_dir=tmp_path / "run").weights_path
    with pytest.raises(CheckpointError, match="a classification network; name one trained for segmentation"):
        predict_images(weights, [picture], tmp_path / "out")
    atomic_save(info, tmp_path / "info.pt")
    with pytest.raises(CheckpointError, match=r"info.pt: no weights file of this package"):
        predict_images(tmp_path / "info.pt", [picture], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"absent.pt"):
        predict_images(tmp_path / "absent.pt", [picture], tmp_path / "out")
    other = dataclasses.replace(manifest, classes=("a", "b", "c"))
    with pytest.raises(CheckpointError, match="its classes are not those of synthetic"):
        write_server_archive(checkpoint, other, tmp_path / "out")


def test_server_archive(checkpoint: Path, manifest: Manifest, tmp_path: Path) -> None:
    """A split without labels becomes the server's directory tree, the same bytes each time."""
    items = tuple(dataclasses.replace(item, target=None) for item in manifest.splits["val"])
    blind = dataclasses.replace(manifest, splits={**manifest.splits, "test": items})
    path = write_server_archive(checkpoint, blind, tmp_path / "a", variant=MULTI_SCALE)
    assert path == tmp_path / "a" / "comp5_test_cls.tgz"
    assert list(path.parent.iterdir()) == [path]
    with tarfile.open(path) as archive:
        assert archive.getnames() == [f"results/VOC2012/Segmentation/comp5_test_cls/{item.id}.png" for item in items]
        for item, member in zip(items, archive, strict=True):
            file = archive.extractfile(member)
            assert file is not None
            image = Image.open(io.BytesIO(file.read()))
            assert (image.mode, image.size) == ("P", (item.width, item.height))
    again = write_server_archive(checkpoint, blind, tmp_path / "b", variant=MULTI_SCALE)
    assert again.read_bytes() == path.read_bytes()
    other = write_server_archive(checkpoint, blind, tmp_path / "b", outside_data=True, split="val")
    assert other.name == "comp6_val_cls.tgz"
    check_server_archive(other, blind, outside_data=True, split="val")
    with pytest.raises(DataError, match="no such split"):
        write_server_archive(checkpoint, blind, tmp_path / "b", split="more")


def test_the_check_of_an_archive_names_every_fault(manifest: Manifest, tmp_path: Path) -> None:
    items = manifest.splits["val"]
    palette = manifest.palette
    good = [np.zeros((item.height, item.width), dtype=np.uint8) for item in items]
    pictures = {
        "val0": palette_image(good[0], palette),
        "val1": palette_image(good[1].T, palette),
        "val2": Image.fromarray(good[2]),
        "val3": palette_image(good[3] + 7, palette),
        "extra": palette_image(good[0], palette),
    }
    pictures["val4"] = palette_image(good[4], [(9, 9, 9), *palette[1:]])

    def write(names: list[str]) -> Path:
        path = tmp_path / "archive.tgz"
        with tarfile.open(path, "w:gz") as archive:
            for name in names:
                file = io.BytesIO()
                pictures[name].save(file, format="PNG")
                member = tarfile.TarInfo(f"results/VOC2012/Segmentation/comp5_val_cls/{name}.png")
                member.size = file.tell()
                file.seek(0)
                archive.addfile(member, file)
        return path

    with pytest.raises(DataError) as raised:
        check_server_archive(write(["val1", "val2", "val3", "val4", "extra"]), manifest, split="val")
    faults = dict(fault.split("comp5_val_cls/")[1].split(".png: ", 1) for fault in raised.value.faults)
    assert faults["val0"] == "missing"
    assert faults["val1"] == "40x32 pixels, not the image's 32x40"
    assert faults["val2"] == "an 8-bit palette PNG is expected, not PNG of mode L"
    assert faults["val3"] == "label 7, but the classes are 0..2"
    assert faults["val4"] == "another palette than the data set's"
    assert "not expected" in faults["extra"]
    whole = write(["val0", "val1"])
    whole.write_bytes(whole.read_bytes()[:200])
    with pytest.raises(DataError, match="not a readable archive"):
        check_server_archive(whole, manifest, split="val")


def picture(path: Path, height: int, width: int) -> Path:
    draw = np.random.default_rng([height, width])
    Image.fromarray(draw.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def test_small_pictures_and_files_of_no_kind_are_named_before_anything_is_written(
    checkpoint: Path, tmp_path: Path
) -> None:
    paths = [picture(tmp_path / "a.png", 40, 40), picture(tmp_path / "small.png", 15, 60)]
    os.mkfifo(tmp_path / "fifo.png")
    paths.append(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    paths.append(tmp_path / "zero.png")
    paths.append(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")))
    Image.new("RGB", (40, 40)).save(paths[-1])
    with pytest.raises(DataError) as raised:
        predict_images(checkpoint, paths, tmp_path / "out")
    for name, word in {
        "small": "60x15 pixels; at least 16",
        "fifo": "a FIFO",
        "zero": "a device",
        "caf": "UTF-8",
    }.items():
        assert any(name in fault and word in fault for fault in raised.value.faults), name
    assert len(raised.value.faults) == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", [(16, 1600), (2400, 24), (16, 16), (33, 700)])
def test_strips_are_segmented_at_their_size(strips: Path, tmp_path: Path, size: tuple[int, int]) -> None:
    """A network trained at 32 x 32 pixels: no side may fall below what it takes."""
    mask, _ = predict_images(strips, [picture(tmp_path / "strip.png", *size)], tmp_path / "out")
    with Image.open(mask) as image:
        assert image.size == size[::-1]


@pytest.fixture(scope="module")
def strips(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(data__size=[32, 32], train__epochs=1)
    return fit(config, manifest, work_dir=tmp_path_factory.mktemp("strips")).weights_path


def test_inputs_and_files_of_others_are_never_replaced(checkpoint: Path, tmp_path: Path) -> None:
    a, mask = picture(tmp_path / "a.png", 20, 20), picture(tmp_path / "a_mask.png", 20, 20)
    before = mask.read_bytes()
    with pytest.raises(DataError, match=r"a_mask\.png: an input, which a result would replace"):
        predict_images(checkpoint, [a, mask], tmp_path)
    with pytest.raises(DataError, match=r"a_mask\.png: `predict` did not write it"):  # a user's own mask beside it
        predict_images(checkpoint, [a], tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"a_mask\.png: an input"):
        predict_images(checkpoint, [a, mask], tmp_path / "link")
    assert mask.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a_mask.png", "link"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="a file is in the way"):
        predict_images(checkpoint, [a], tmp_path / "file" / "below")
    first = predict_images(checkpoint, [a, a], tmp_path / "out")
    assert predict_images(checkpoint, [a], tmp_path / "out") == first  # its own results it replaces


def test_a_kill_leaves_no_half_of_a_result(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = picture(tmp_path / "a.png", 20, 20)
    predict_images(checkpoint, [a], tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    original = Image.Image.save

    def half(self: Image.Image, path: Path, **options: Any) -> None:
        original(self, path, **options)
        Path(path).write_bytes(Path(path).read_bytes()[:50])
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        predict_images(checkpoint, [a], tmp_path / "out")
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


def test_an_archive_that_fails_its_check_leaves_the_old_one(
    checkpoint: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_server_archive(checkpoint, manifest, tmp_path, split="val")
    before = path.read_bytes()
    monkeypatch.setattr("sunets.predict._png_faults", lambda *_: ["a fault"])
    with pytest.raises(DataError, match="a fault"):
        write_server_archive(checkpoint, manifest, tmp_path, split="val")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {path.name: before}
    evil = dataclasses.replace(
        manifest, splits={"val": (dataclasses.replace(manifest.splits["val"][0], id="../../evil"),)}
    )
    with pytest.raises(ValueError, match="rename it"):
        write_server_archive(checkpoint, evil, tmp_path, split="val")


@pytest.mark.parametrize("out", ["outputs/mine", "results", "link"])
def test_nothing_is_written_where_the_pipeline_deletes(
    out: str, checkpoint: Path, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "link").symlink_to("outputs")
    picture = manifest.splits["val"][0].image
    (tmp_path / "dvc.yaml").touch()
    with pytest.raises(DataError, match=rf"{out}: lies in (outputs|results)/, whose content the pipeline deletes"):
        predict_images(checkpoint, [picture], out)
    (tmp_path / "dvc.yaml").unlink()  # not a checkout
    assert predict_images(checkpoint, [picture], out)
