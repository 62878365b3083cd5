"""The one reader of images and masks: what each kind of file becomes, and what is refused by name."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sunets.data.picture import MIN_SIDE, DataError, read_mask, read_picture
from sunets.models.sunet import MIN_SIZE

RNG = np.random.default_rng(0)
GRAY = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def png(path: Path, width: int, height: int, depth: int, color: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> Path:
    """A PNG by hand: Pillow writes no 2 or 4 bits of gray."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    middle = b"".join(chunk(*c) for c in chunks)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + middle
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


def test_the_least_side_is_that_of_the_networks() -> None:
    assert MIN_SIDE == MIN_SIZE


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    deep = (np.arange(600).reshape(20, 30) * 100).astype(np.uint16)
    pixels = read_picture(saved(tmp_path / f"a.{suffix}", Image.fromarray(deep)))
    assert np.array_equal(pixels[..., 0], np.round(deep * 255.0 / 65535).astype(np.uint8))
    assert len(np.unique(pixels)) > 100


def test_sixteen_bits_of_color_are_not_saturated(tmp_path: Path) -> None:
    rows = b"".join(
        b"\0" + b"".join(struct.pack(">HHH", v, v // 2, 65535) for v in range(0, 65536, 4096)) for _ in "ab"
    )
    pixels = read_picture(png(tmp_path / "a.png", 16, 2, 16, 2, rows))
    assert pixels[0, :, 0].tolist() == [v >> 8 for v in range(0, 65536, 4096)]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_without_a_white_are_refused(tmp_path: Path, kind: type) -> None:
    path = saved(tmp_path / "a.tif", Image.fromarray(GRAY.astype(kind)))
    with pytest.raises(DataError, match=r"a\.tif: .* no defined white; save it with 8 or 16 bits"):
        read_picture(path)


def test_kinds_of_color(tmp_path: Path) -> None:
    palette = Image.fromarray(COLOR).quantize(16)
    for name, image, expected in (
        ("gray", Image.fromarray(GRAY), np.repeat(GRAY[..., None], 3, 2)),
        ("palette", palette, np.asarray(palette.convert("RGB"))),
        ("binary", Image.fromarray(GRAY).convert("1"), np.asarray(Image.fromarray(GRAY).convert("1").convert("RGB"))),
    ):
        assert np.array_equal(read_picture(saved(tmp_path / f"{name}.png", image)), expected), name
    ink = Image.fromarray(COLOR).convert("CMYK")
    assert np.array_equal(read_picture(saved(tmp_path / "ink.tif", ink)), np.asarray(ink.convert("RGB")))


def test_transparency_is_white_in_every_mode(tmp_path: Path) -> None:
    clear = np.dstack([COLOR, np.zeros((20, 30), np.uint8)])
    grey = np.dstack([GRAY, np.zeros((20, 30), np.uint8)])
    palette = Image.fromarray(np.zeros((20, 30), np.uint8))
    palette.putpalette([9, 9, 9])
    assert (read_picture(saved(tmp_path / "rgba.png", Image.fromarray(clear))) == 255).all()
    assert (read_picture(saved(tmp_path / "la.png", Image.fromarray(grey, "LA"))) == 255).all()
    assert (read_picture(saved(tmp_path / "p.png", palette, transparency=0)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = read_picture(saved(tmp_path / "a.png", Image.fromarray(COLOR), exif=exif))
    turned = {
        1: COLOR, 2: COLOR[:, ::-1], 3: COLOR[::-1, ::-1], 4: COLOR[::-1], 5: COLOR.transpose(1, 0, 2),
        6: np.rot90(COLOR, -1), 7: COLOR[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(COLOR),
    }  # fmt: skip
    assert np.array_equal(pixels, turned[orientation])


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_several_pictures_in_one_file_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    first, second = Image.fromarray(COLOR), Image.fromarray(COLOR[::-1])
    first.save(path, save_all=True, append_images=[second])
    with pytest.raises(DataError, match="holds 2 images"):
        read_picture(path)
    assert read_picture(saved(tmp_path / "still.gif", first)).shape == (20, 30, 3)


def test_the_first_picture_of_a_phone_is_the_photo(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(COLOR).save(path, "MPO", save_all=True, append_images=[Image.fromarray(GRAY)])
    assert read_picture(path).shape == (20, 30, 3)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "dir.png").mkdir()
    (tmp_path / "broken.png").symlink_to("nowhere")
    for name, word in {"fifo": "a FIFO", "zero": "a device", "dir": "a directory", "broken": "missing"}.items():
        for read in (read_picture, read_mask):
            with pytest.raises(DataError, match=rf"{name}\.png: .*{word}"):
                read(tmp_path / f"{name}.png")


@pytest.mark.parametrize("read", [read_picture, read_mask])
def test_bombs_and_other_formats_are_faults(tmp_path: Path, read: object) -> None:
    bomb = png(tmp_path / "bomb.png", 50000, 50000, 8, 0, bytes(99))
    script = tmp_path / "script.png"
    script.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for path in (bomb, script):
        with pytest.raises(DataError, match=rf"{path.name}: cannot be decoded"):
            read(path)  # type: ignore[operator]


def test_masks_keep_what_the_file_stores(tmp_path: Path) -> None:
    labels = RNG.integers(0, 5, (20, 30)).astype(np.uint8)
    palette = Image.fromarray(labels)
    palette.putpalette([200, 0, 0, 0, 200, 0, 9, 9, 9, 4, 4, 4, 7, 7, 7])
    plain, deep, wide = (Image.fromarray(labels.astype(kind)) for kind in (np.uint8, np.uint16, np.int32))
    for name, image in {
        "gray.png": plain, "palette.png": palette, "deep.png": deep, "wide.tif": wide,
        "a.bmp": palette, "a.gif": palette, "a.pgm": plain,
    }.items():  # fmt: skip
        assert np.array_equal(read_mask(saved(tmp_path / name, image)), labels), name


def test_masks_that_lose_labels_are_refused(tmp_path: Path) -> None:
    inverted = {262: 0}  # TIFF: 0 is white
    few = png(tmp_path / "few.png", 4, 1, 4, 0, b"\0\x01\x23")
    pgm = tmp_path / "few.pgm"
    pgm.write_bytes(b"P5 2 1 15\n\x01\x0f")
    for path, word in (
        (saved(tmp_path / "a.jpg", Image.fromarray(GRAY)), "JPEG does not keep labels"),
        (saved(tmp_path / "rgb.png", Image.fromarray(COLOR)), "mode RGB"),
        (saved(tmp_path / "white.tif", Image.fromarray(GRAY), tiffinfo=inverted), "which change when read"),
        (few, "which change when read"),
        (pgm, "whose values change when read"),
    ):
        with pytest.raises(DataError, match=rf"{path.name}: .*{word}.*save"):
            read_mask(path)
