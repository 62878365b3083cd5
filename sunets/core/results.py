"""Results of jobs on disk, each under the fingerprint of what decides it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sunets.core.config import fingerprint
from sunets.core.record import replacing

_PLAIN = "plain values"


class _Job(Protocol):
    @property
    def function(self) -> str: ...
    @property
    def arguments(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class ResultStore:
    """A directory of results, one file each; written whole or not at all."""

    folder: Path | None
    """None keeps nothing."""

    def _path(self, job: _Job, needs: Mapping[str, Any]) -> Path | None:
        decides = [needs[name] for name in ("code", "torch", "digest", "device")]
        key = fingerprint(job.function, dict(job.arguments), decides)
        return None if self.folder is None else self.folder / f"{key}.npz"

    def get(self, job: _Job, needs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Read the result of a job; None if there is none.

        Raises:
            ValueError: the file is damaged; names it.
        """
        path = self._path(job, needs)
        if path is None or not path.exists():
            return None
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            return {**json.loads(arrays.pop(_PLAIN).tobytes()), **arrays}
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(f"{path}: not readable ({error}); delete it, and its job runs again") from None

    def put(self, job: _Job, needs: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Keep the result of a job, and return it as `get` would."""
        arrays = {name: value for name, value in result.items() if isinstance(value, np.ndarray)}
        plain = json.dumps({name: value for name, value in result.items() if name not in arrays}).encode()
        if (path := self._path(job, needs)) is not None:
            with replacing(path) as temporary:
                content: dict[str, Any] = {_PLAIN: np.frombuffer(plain, np.uint8), **arrays}
                np.savez(temporary, **content)
        return {**json.loads(plain), **arrays}
