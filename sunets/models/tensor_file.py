"""Files of tensors and plain values: written atomically, sealed by a SHA-256, read without running code in them."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sunets.core.record import replacing

SEAL = "sha256"
"""Key of the digest of everything else in a file that `atomic_save` wrote."""


class CheckpointError(ValueError):
    """A checkpoint or weights file cannot be used; names the file, the fault and the remedy."""


def atomic_save(content: Mapping[str, Any], path: Path) -> None:
    """Write atomically with `torch.save`, sealed by a SHA-256 of the content."""
    with replacing(path) as temporary, temporary.open("wb") as file:  # torch would store a file's name in the archive
        torch.save({**content, SEAL: content_digest(content)}, file)


def read_file(path: str | Path, remedy: str, error: type[ValueError] = CheckpointError) -> Any:
    """Load a file of tensors and plain values onto the CPU, without running code in it.

    Args:
        path: the file.
        remedy: end of the error message.
        error: type of the error for a file that cannot be read.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError, or the type `error`: the file is damaged, holds code, or is no regular file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; {remedy}")
    if not path.is_file():  # a pipe would be waited for
        raise error(f"{path}: no regular file; {remedy}")
    try:
        with path.open("rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as failure:
        raise error(f"{path}: not readable ({failure.strerror or type(failure).__name__}); {remedy}") from None
    except pickle.UnpicklingError as failure:
        # torch's message goes on to recommend loading the file with its code.
        if code := re.search(r"GLOBAL (\S+)", str(failure)):
            raise error(
                f"{path}: refused, and nothing in it was run: it holds {code[1]} besides weights and plain values; "
                f"{remedy}"
            ) from None
        raise error(f"{path}: not readable (no file of weights, or a damaged one); {remedy}") from None
    except Exception as failure:  # torch raises errors of many types for a damaged file
        reason = f"damaged or cut short, {type(failure).__name__}"
        raise error(f"{path}: not readable ({reason}); {remedy}") from None


def check_seal(content: Any, path: Path, remedy: str) -> None:
    """Check the SHA-256 that `atomic_save` wrote; torch does not verify what it reads.

    Raises:
        CheckpointError: the content has another SHA-256, or states none.
    """
    stated = content.get(SEAL) if isinstance(content, dict) else None
    if stated is None:
        raise CheckpointError(f"{path}: lacks the SHA-256 of its content, so it cannot be verified; {remedy}")
    if stated != content_digest({key: value for key, value in content.items() if key != SEAL}):
        raise CheckpointError(f"{path}: damaged or edited: its content has another SHA-256 than it states; {remedy}")


def first_not_finite(state: Mapping[str, Any]) -> str | None:
    """Return the name of the first floating-point tensor that holds NaN or infinity, or None."""
    tensors = ((name, value) for name, value in state.items() if isinstance(value, Tensor))
    return next((n for n, v in tensors if v.is_floating_point() and not bool(v.isfinite().all())), None)


def content_digest(content: Any) -> str:
    """Return the SHA-256 of nested dicts, lists and tuples of tensors (on any device) and plain values."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"tensor {value.dtype} {list(value.shape)}\n".encode())
            raw: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digest.update(raw)
        elif isinstance(value, Mapping):
            digest.update(f"mapping {len(value)}\n".encode())
            for key, item in value.items():
                feed(key)
                feed(item)
        elif isinstance(value, list | tuple):
            digest.update(f"{type(value).__name__} {len(value)}\n".encode())
            for item in value:
                feed(item)
        else:
            text = repr(value).encode()
            digest.update(f"{type(value).__name__} {len(text)}\n".encode() + text)

    feed(content)
    return digest.hexdigest()
