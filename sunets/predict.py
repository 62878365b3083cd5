"""Segmentation of a user's pictures, and the archive for the PASCAL VOC server."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from torch import nn

from sunets.core.config import IGNORE_INDEX, ConfigError, Suite, VariantConfig
from sunets.core.names import OUTPUTS, child, name_fault, printable
from sunets.core.paths import BenchmarkPaths
from sunets.core.recipes import tuned
from sunets.core.record import replacing
from sunets.core.stage import stage
from sunets.data.manifest import Item, Manifest, load_manifest
from sunets.data.picture import MIN_SIDE, DataError, open_regular, read_picture
from sunets.data.preparation import prepare
from sunets.data.raw_dataset import composed
from sunets.data.samples import overlay
from sunets.evaluation.multi_scale import multi_scale_probabilities
from sunets.models.device import select_device
from sunets.models.tensor_file import CheckpointError
from sunets.models.weights import check_weights, load_trained
from sunets.profiling.modes import full_precision

SINGLE_SCALE = VariantConfig()
"""The whole image at its original scale."""
_SOFTWARE = ("Software", "sunets predict")
"""PNG text entry that marks the files of `predict`."""
BORDER_COLOR = (224, 224, 192)
"""Colour of label 255 in a palette image, as in PASCAL VOC."""


def predict_images(
    checkpoint: str | Path,
    paths: Sequence[str | Path],
    out_dir: str | Path,
    *,
    variant: VariantConfig = SINGLE_SCALE,
) -> list[Path]:
    """Segment pictures; write `<stem>_mask.png` (palette image of the labels) and `<stem>_overlay.png` for each.

    Pictures need sides of at least 16 pixels and a format that `read_picture` reads. Both files have the picture's size
    after its EXIF rotation. For a network trained on resized images, the picture is resized to the same number of
    pixels, with sides of at least 16.

    Args:
        checkpoint: weights file of a segmentation network.
        paths: picture files.
        out_dir: directory for the results, created if absent; earlier results of the same names are replaced.
        variant: scales, mirroring, window.

    Returns:
        The files written.

    Raises:
        DataError: unreadable or too small pictures, two pictures of one name, or results that would replace an input or
            a file not written by `predict`, or lie where the pipeline deletes; lists all of them, before anything is
            written.
        CheckpointError, FileNotFoundError: the weights file cannot be used.
    """
    pictures = list(dict.fromkeys(Path(path) for path in paths))
    out = Path(out_dir)
    faults: list[str] = []
    for path in pictures:
        try:
            height, width = read_picture(path).shape[:2]
        except DataError as error:
            faults += error.faults
        else:
            if min(height, width) < MIN_SIDE:
                faults.append(f"{path}: {width}x{height} pixels; at least {MIN_SIDE} per side are needed; enlarge it")
    results = {path: (out / f"{path.stem}_mask.png", out / f"{path.stem}_overlay.png") for path in pictures}
    faults += [
        f"{path}: {fault} with the suffix of a result; rename it"
        for path, files in results.items()
        if (fault := name_fault(files[1].name)) and not name_fault(path.name)
    ]
    first: dict[str, Path] = {}
    for path in pictures:  # on some file systems, Photo and photo are one name, and so are the two forms of an accent
        if (other := first.setdefault(composed(path.stem).casefold(), path)) != path:
            faults.append(f"{path}: {other} would write the same files; rename one or use two calls")
    inputs = {path.resolve() for path in [*pictures, Path(checkpoint)]}
    for file in dict.fromkeys(file for files in results.values() for file in files):
        if file.resolve() in inputs:
            faults.append(f"{file}: an input, which a result would replace; choose another --out")
        elif not _is_result(file):
            faults.append(f"{file}: `predict` did not write it and would replace it; choose another --out")
    if next((p for p in [out, *out.parents] if p.exists()), out).is_file():
        faults.append(f"{out}: a file is in the way of this directory; choose another --out")
    owner = next((o for o in OUTPUTS if out.resolve().is_relative_to(o.resolve())), None)
    if owner and Path("dvc.yaml").exists():
        faults.append(f"{out}: lies in {owner}/, whose content the pipeline deletes; choose another --out")
    if faults:
        raise DataError(faults)
    predictor = _Predictor(checkpoint, variant)
    out.mkdir(parents=True, exist_ok=True)
    png_text = PngImagePlugin.PngInfo()
    png_text.add_text(*_SOFTWARE)
    for path, (mask_file, overlay_file) in results.items():
        picture = read_picture(path)
        labels = predictor(picture)
        with replacing(mask_file) as temporary:
            palette_image(labels, predictor.info["palette"]).save(temporary, pnginfo=png_text)
        with replacing(overlay_file) as temporary:
            Image.fromarray(overlay(picture, labels, predictor.info["palette"])).save(temporary, pnginfo=png_text)
    return [file for files in results.values() for file in files]


def _is_result(file: Path) -> bool:
    """Return whether a file is absent or was written by `predict`."""
    if not (file.exists() or file.is_symlink()):
        return True
    try:
        with open_regular(file) as opened, Image.open(opened, formats=["PNG"]) as image:
            return image.info.get(_SOFTWARE[0]) == _SOFTWARE[1]
    except Exception:  # decoders fail in many ways
        return False


def archive(
    suite: Suite,
    key: str,
    *,
    split: str = "test",
    variant: str | None = None,
    seed: int | None = None,
) -> Path:
    """Segment a split of PASCAL VOC with a trained model, and write and check the archive for the server.

    The competition is comp6 (data other than VOC's were used) if training started from published or earlier weights or
    used SBD's labels, else comp5.

    Args:
        suite: parameters of a PASCAL VOC benchmark.
        key: key under `models`.
        split: split of VOC; the server scores `test`, whose labels are not public.
        variant: test-time variant; None takes the last one of `evaluate.variants`, the most thorough by convention.
        seed: training seed of the weights; None takes the first.

    Returns:
        The archive in `outputs/<benchmark>/archives/<key>/`.

    Raises:
        ConfigError: a data set other than VOC, or no such variant or seed.
        DataError: the data lack the split, or the finished archive fails its check.
        CheckpointError, FileNotFoundError: the weights cannot be used.
    """
    if suite.data.name != "voc2012":
        raise ConfigError(f"data.name: the server scores PASCAL VOC (voc2012), not {suite.data.name}")
    variants = suite.evaluate.variants
    variant = variant or list(variants)[-1]
    if variant not in variants:
        raise ConfigError(f"--variant {variant}: no such variant; evaluate.variants has {', '.join(variants)}")
    if fault := name_fault(split):
        raise ConfigError(f"--split {printable(split)}: {fault}; name a split of PASCAL VOC")
    seed = suite.seeds[0] if seed is None else seed
    if seed not in suite.seeds:
        raise ConfigError(f"--seed {seed}: not trained; seeds are {', '.join(map(str, suite.seeds))}")
    paths = BenchmarkPaths(suite.benchmark)
    suite = tuned(suite, paths, [key])
    config = suite.config(key, seed)
    weights = paths.weights(key, seed)
    if not weights.is_file():
        raise FileNotFoundError(f"{weights}: no such file; train {key} first")
    params = ("benchmark", "seeds", "data", "train", "tune", "evaluate", f"models.{key}")
    with stage(f"archive@{key}", paths, __name__, suite=suite, params=params):
        manifest = load_manifest(paths.data, suite.data)
        check_weights(weights, config, manifest, f"train {key} again")
        if split not in (suite.data.train_split, suite.data.val_split, suite.data.test_split):
            # prepared in another directory, so that the benchmark's data stay unchanged
            held_out = suite.data.val_split
            data = suite.data.model_copy(update={"train_split": held_out, "test_split": split})
            manifest = prepare(data, paths.data.with_name(f"{paths.data.name}.{split}"))
        outside = bool(config.train.init_from or config.model.weights or suite.data.train_split.endswith("_aug"))
        return write_server_archive(
            weights,
            manifest,
            Path("outputs") / suite.benchmark / "archives" / key,
            split=split,
            variant=variants[variant],
            outside_data=outside,
            batch_size=config.evaluate.batch_size,
            device=config.train.device,
        )


def write_server_archive(
    checkpoint: str | Path,
    manifest: Manifest,
    out_dir: str | Path,
    *,
    split: str = "test",
    variant: VariantConfig = SINGLE_SCALE,
    outside_data: bool = False,
    batch_size: int = 8,
    device: str = "auto",
) -> Path:
    """Segment a split, which needs no labels, and write and check the archive for the PASCAL VOC server.

    Args:
        checkpoint: weights file of a network for the data set's classes.
        manifest: the prepared data set.
        out_dir: directory for the archive.
        split: split of the data set.
        variant: scales, mirroring, window.
        outside_data: whether data other than VOC's were used in training (comp6 instead of comp5).
        batch_size: windows and mirrors per forward pass.
        device: auto, cpu or cuda.

    Returns:
        The archive: one palette PNG per image in results/VOC2012/Segmentation/comp5_<split>_cls/.

    Raises:
        DataError: no such split, an unreadable image, or an archive that fails its check.
        CheckpointError, FileNotFoundError: the weights file cannot be used, or has other classes.
    """
    if split not in manifest.splits:
        raise DataError(f"split {split!r}: the data set has no such split; it has {', '.join(manifest.splits)}")
    predictor = _Predictor(checkpoint, variant, batch_size, device)
    if predictor.info["classes"] != list(manifest.classes):
        raise CheckpointError(f"{checkpoint}: its classes are not those of {manifest.name}; name another weights file")
    competition = f"{'comp6' if outside_data else 'comp5'}_{split}_cls"
    path = child(Path(out_dir), competition, ".tgz")
    folder = Path("results/VOC2012/Segmentation") / competition
    with replacing(path) as temporary:
        with (
            temporary.open("wb") as file,
            gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
            tarfile.open(mode="w", fileobj=packed) as archive,
        ):
            for item in manifest.splits[split]:
                png = io.BytesIO()
                palette_image(predictor(read_picture(item.image)), manifest.palette).save(png, format="PNG")
                member = tarfile.TarInfo(child(folder, item.id, ".png").as_posix())
                member.size = png.tell()
                png.seek(0)
                archive.addfile(member, png)
        check_server_archive(temporary, manifest, split=split, outside_data=outside_data)
    return path


def check_server_archive(
    path: str | Path, manifest: Manifest, *, split: str = "test", outside_data: bool = False
) -> None:
    """Check an archive for the PASCAL VOC server: names, completeness, sizes, format, palette, labels.

    Raises:
        DataError: lists all faults, each naming the file.
    """
    folder = f"results/VOC2012/Segmentation/{'comp6' if outside_data else 'comp5'}_{split}_cls"
    expected = {f"{folder}/{item.id}.png": item for item in manifest.splits[split]}
    palette = _palette_bytes(manifest.palette)
    faults: list[str] = []
    seen: set[str] = set()
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.isdir():
                    continue
                item, file = expected.get(member.name), archive.extractfile(member)
                if item is None or file is None or member.name in seen:
                    faults.append(f"{path}: {member.name}: not expected (or twice) in {folder}/")
                    continue
                seen.add(member.name)
                png_faults = _png_faults(file.read(), item, palette, manifest.num_classes)
                faults += [f"{path}: {member.name}: {fault}" for fault in png_faults]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable archive ({error}); write it again") from None
    faults += [f"{path}: {name}: missing" for name in expected if name not in seen]
    if faults:
        raise DataError(faults)


def palette_image(labels: NDArray[np.integer], palette: Iterable[Sequence[int]]) -> Image.Image:
    """Make an 8-bit palette image of labels (H, W)."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(_palette_bytes(palette))
    return image


class _Predictor:
    """A trained segmentation network, called with a picture."""

    def __init__(
        self, checkpoint: str | Path, variant: VariantConfig, batch_size: int = 8, device: str = "auto"
    ) -> None:
        self.model: nn.Module
        self.info: dict[str, Any]
        self.model, self.info = load_trained(checkpoint)
        if self.info["task"] != "segmentation":
            raise CheckpointError(f"{checkpoint}: a {self.info['task']} network; name one trained for segmentation")
        self.variant, self.batch_size, self.device = variant, batch_size, select_device(device)
        self.model.to(self.device)

    @torch.inference_mode()
    def __call__(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Predict the labels (H, W) of a picture (H, W, 3)."""
        height, width = picture.shape[:2]
        trained = self.info["config"]["data"]["size"]
        zoom = (trained[0] * trained[1] / (height * width)) ** 0.5 if trained else 1.0
        zoomed = self.variant
        if zoomed.short_side is None:
            zoomed = zoomed.model_copy(update={"scales": tuple(scale * zoom for scale in zoomed.scales)})
        image = torch.from_numpy(picture).to(self.device).permute(2, 0, 1)[None].float() / 255
        mean, std = (torch.tensor(self.info[k], device=self.device).view(3, 1, 1) for k in ("mean", "std"))
        with full_precision():
            probabilities = multi_scale_probabilities(self.model, (image - mean) / std, zoomed, self.batch_size)
        return probabilities[0].argmax(0).to(torch.uint8).cpu().numpy()


def _palette_bytes(palette: Iterable[Sequence[int]]) -> bytes:
    colors = bytearray(768)
    flat = [value for color in palette for value in color]
    colors[: len(flat)] = bytes(flat)
    colors[3 * IGNORE_INDEX :] = bytes(BORDER_COLOR)
    return bytes(colors)


def _png_faults(content: bytes, item: Item, palette: bytes, num_classes: int) -> list[str]:
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        return [f"not a readable image ({error})"]
    faults = []
    if image.format != "PNG" or image.mode != "P":
        return [f"an 8-bit palette PNG is expected, not {image.format} of mode {image.mode}"]
    if image.size != (item.width, item.height):
        faults.append(f"{image.height}x{image.width} pixels, not the image's {item.height}x{item.width}")
    stored, count = bytes(image.getpalette() or []), 3 * num_classes
    if stored[:count] != palette[:count]:
        faults.append("another palette than the data set's")
    labels = np.unique(np.asarray(image))
    if labels.max() >= num_classes:
        faults.append(f"label {labels.max()}, but the classes are 0..{num_classes - 1}")
    return faults
