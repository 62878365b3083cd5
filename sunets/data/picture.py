"""The one reader of images and masks: `prepare`, training, evaluation and `predict` see the same pixels.

An image becomes 8-bit RGB: 16 bits are scaled, transparency is blended with white, an EXIF orientation is applied. A
mask keeps the integers that the file stores. A file without a defined conversion is an error that names it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sunets.core.names import name_fault, printable

MIN_SIDE = 16
"""Least height and width in pixels for the networks (`sunets.models.sunet.MIN_SIZE`)."""
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**26)
"""Most pixels of an image or mask; a larger one is treated as a decompression bomb, as by Pillow."""
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_LOSSY = ("AVIF", "JPEG", "JPEG2000", "MPO")
_ORIENTATION = 0x0112  # EXIF tag
_FAULTS_SHOWN = 100
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


class DataError(ValueError):
    """Unusable data. `faults` holds one line per fault, which names the file and the remedy."""

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults = tuple(map(printable, (faults,) if isinstance(faults, str) else faults))
        lines = list(self.faults[:_FAULTS_SHOWN])
        if len(self.faults) > 1:
            lines.insert(0, f"{len(self.faults)} faults in the data:")
        if len(self.faults) > _FAULTS_SHOWN:
            lines.append(f"... and {len(self.faults) - _FAULTS_SHOWN} more")
        super().__init__("\n".join(lines))


class Picture(NamedTuple):
    """A decoded image."""

    pixels: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    turned: bool
    """Whether the EXIF orientation changed it."""


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading; never wait for a FIFO or a device.

    Raises:
        DataError: the file is missing, of another kind or unreadable, or its name is invalid; names it.
    """
    fault = name_fault(Path(path).name)
    if fault:
        raise DataError(f"{path}: {fault}; rename it")
    try:
        if kind := _KINDS.get(stat.S_IFMT(Path(path).stat().st_mode)):
            raise DataError(f"{path}: not a file but {kind}; remove it or name another")
        # O_NONBLOCK: a FIFO may have replaced the file since
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        file = os.fdopen(os.open(path, flags), "rb")
    except FileNotFoundError:
        raise DataError(f"{path}: missing; put it there, or extract its archive again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise DataError(f"{path}: not a regular file; remove it or name another")
    return file


def read_picture(path: str | Path) -> NDArray[np.uint8]:
    """Read an image file.

    Returns:
        (H, W, 3) RGB.

    Raises:
        DataError: the file is missing, damaged or has no defined conversion; names it.
    """
    with open_regular(path) as file:
        return decode_picture(path, file).pixels


def decode_picture(path: str | Path, file: BufferedReader) -> Picture:
    """Decode an open image file, as `read_picture` does."""
    image = _open(path, file)
    file_format = image.format
    try:
        turned = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" or (image.mode == "I" and file_format == "TIFF"):
            values = {"F": "floating-point values", "I": "32-bit or signed values"}[image.mode]
            raise DataError(f"{path}: {values} have no defined white; save it with 8 or 16 bits")
        if image.mode.startswith("I"):
            gray = np.asarray(image).astype(np.int64)
            if gray.min() < 0 or gray.max() > 65535:
                raise DataError(f"{path}: values outside 0..65535; save it with 8 or 16 bits")
            image = Image.fromarray(((gray * 255 + 32767) // 65535).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return Picture(np.array(image.convert("RGB")), turned)
    except DataError:
        raise
    except Exception as error:  # decoders fail in many ways
        raise DataError(_undecodable(path, error)) from None


def read_mask(path: str | Path) -> NDArray[np.integer]:
    """Read a mask file: the integers that it stores, palette indices for a palette image.

    Returns:
        (H, W).

    Raises:
        DataError: the file is missing, damaged, or does not store labels exactly; names it.
    """
    with open_regular(path) as file:
        return decode_mask(path, file)


def decode_mask(path: str | Path, file: BufferedReader) -> NDArray[np.integer]:
    """Decode an open mask file, as `read_mask` does."""
    image = _open(path, file)
    if image.format in _LOSSY:
        raise DataError(f"{path}: {image.format} does not keep labels exactly; save masks as PNG")
    if image.mode not in ("L", "P", "I", "I;16", "I;16B", "I;16L"):
        raise DataError(f"{path}: mode {image.mode}; save the mask with one channel of 8 or 16 bits")
    # Pillow scales 2 and 4 bits to 0..255, and inverts a TIFF whose 0 is white: not the stored labels.
    tiles: list[Any] = getattr(image, "tile", [])
    for _, _, _, arguments in tiles:
        raw = arguments[0] if isinstance(arguments, tuple) else arguments
        if image.mode == "L" and isinstance(raw, str) and raw != "L":
            raise DataError(f"{path}: gray values stored as {raw}, which change when read; save it as 8-bit PNG")
    if image.format == "PPM" and tiles[0][0] != "raw":
        raise DataError(f"{path}: a PGM whose values change when read; save it as 8-bit PNG")
    try:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return np.array(image)
    except Exception as error:  # decoders fail in many ways
        raise DataError(_undecodable(path, error)) from None


def _open(path: str | Path, file: BufferedReader) -> Image.Image:
    """Read and check the header of an open image file."""
    try:
        Image.init()
        image = Image.open(file, formats=[f for f in _FORMATS if f in Image.OPEN])
        frames = getattr(image, "n_frames", 1)
    except Exception as error:  # decoders fail in many ways
        raise DataError(_undecodable(path, error)) from None
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"{path}: {image.width}x{image.height} pixels; at most {MAX_PIXELS} are read; cut it up")
    if frames > 1 and image.format != "MPO":  # the first image of an MPO is the photo, by its standard
        raise DataError(f"{path}: holds {frames} images; save the one to use as a file")
    return image


def _undecodable(path: str | Path, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        reason = "not an image of a known format"
    else:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{path}: cannot be decoded ({reason}); fetch, extract or save it again"
