"""Whether the files that a data set was prepared from have changed: size, times and digest of each.

`files.csv` beside the manifest holds path, size and SHA-256 of every file and directory that `prepare` read or drew,
and nothing that depends on the machine. The times (in ns) at which each had its digest are cached in `.work/seen/` of
the checkout, so that a check reads only files whose times have changed.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeAlias

from sunets.core.names import PREPARED
from sunets.core.record import replacing
from sunets.data.picture import DataError, open_regular
from sunets.data.raw_dataset import is_hidden

FILES = "files.csv"
Stamp: TypeAlias = tuple[int, int, int]
"""Size in bytes, time of the last change of content and of status, in ns."""


class FileState(NamedTuple):
    """Digest and stamp of a file or directory."""

    digest: str
    """SHA-256 of its content; of a directory, of the names in it."""
    stamp: Stamp
    """Taken before its content was read."""


def file_state(path: Path) -> FileState:
    """Read a file, or list a directory.

    Raises:
        DataError: it cannot be read; names it.
    """
    if path.is_dir():
        stamp = _stamp(path.stat())
        names = sorted(os.fsencode(p.name) for p in path.iterdir() if not is_hidden(p.name))
        return FileState(hashlib.sha256(b"\0".join(names)).hexdigest(), stamp)
    with open_regular(path) as file:
        return open_file_state(file)


def open_file_state(file: io.BufferedReader) -> FileState:
    """Read an open file to its end."""
    stamp = _stamp(os.fstat(file.fileno()))
    return FileState(hashlib.file_digest(file, "sha256").hexdigest(), stamp)


def _stamp(status: os.stat_result) -> Stamp:
    """Return size and times of a file; of a directory only the times, since its size depends on the file system."""
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return size, status.st_mtime_ns, status.st_ctime_ns


def write_states(states: Mapping[str, FileState], directory: Path) -> None:
    """Write `files.csv`.

    Args:
        states: by path as in the split lists.
        directory: directory of the manifest.
    """
    with (directory / FILES).open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "size", "sha256"])
        rows.writerows([path, s.stamp[0], s.digest] for path, s in sorted(states.items()))


def cache_states(states: Mapping[str, FileState], directory: Path, key: str = "") -> None:
    """Cache stamps and digests, if the directory belongs to a checkout; losing the cache costs only time.

    Args:
        states: by path as in the split lists.
        directory: directory of the manifest.
        key: what the preparation depended on besides the files.
    """
    cache = _cache_file(directory)
    if cache is None:
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([key])
    rows.writerows([path, *s.stamp, s.digest] for path, s in sorted(states.items()))
    with contextlib.suppress(OSError), replacing(cache) as temporary:  # in a checkout that cannot be written to
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def cached_key(directory: Path) -> str:
    """Return the key that `cache_states` was given; empty if nothing is cached."""
    return next(_cached(directory), ("", None))[0]


def check_unchanged(directory: Path, bases: Mapping[str, Path], count: int) -> None:
    """Check that every file is as `prepare` read it: by its stamp, else by its content.

    Args:
        directory: directory of the manifest.
        bases: directories that `root/` and `out/` at the beginning of a path stand for.
        count: number of files in `files.csv`.

    Raises:
        DataError: files have changed, or `files.csv` is damaged; names each.
    """
    faults: list[str] = []
    unsure: list[tuple[str, Path, FileState]] = []
    cached = _cached(directory)
    key, _ = next(cached, ("", None))
    last = next(cached, None)
    for text, expected in _listed(directory, count):  # both files are sorted by path
        base, _, rest = text.partition("/")
        path = bases[base] / rest
        while last is not None and last[0] < text:
            last = next(cached, None)
        try:
            stamp = _stamp(path.stat())
        except OSError as error:
            faults.append(f"{path}: can no longer be read ({error.strerror})")
            continue
        if stamp[0] != expected.stamp[0]:
            faults.append(f"{path}: changed since it was prepared")
        elif last != (text, FileState(expected.digest, stamp)):
            unsure.append((text, path, expected))

    def read(item: tuple[str, Path, FileState]) -> FileState | DataError:
        _, path, expected = item
        try:
            if (state := file_state(path)).digest == expected.digest:
                return state
        except DataError as error:
            return error
        return DataError(f"{path}: changed since it was prepared")

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        states = list(pool.map(read, unsure))
    faults += [str(state) for state in states if isinstance(state, DataError)]
    if faults:
        raise DataError([f"{fault}; run python -m sunets prepare, or dvc repro" for fault in faults])
    if unsure:
        known = {text: state for text, state in list(_cached(directory))[1:] if state is not None}
        known |= {text: s for (text, _, _), s in zip(unsure, states, strict=True) if isinstance(s, FileState)}
        cache_states(known, directory, key)


def _cached(directory: Path) -> Iterator[tuple[str, FileState | None]]:
    """Yield what `cache_states` wrote: the key with None, then path and state of each file, up to any damage."""
    cache = _cache_file(directory)
    if cache is None:
        return
    try:
        with cache.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            (key,) = next(rows)
            yield key, None
            for path, size, changed, status, digest in rows:
                yield path, FileState(digest, (int(size), int(changed), int(status)))
    except (OSError, ValueError, StopIteration, csv.Error):
        return


def _listed(directory: Path, count: int) -> Iterator[tuple[str, FileState]]:
    """Yield the rows of `files.csv`, with times of 0."""
    path = directory / FILES
    number = 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["path"].partition("/")[0] not in ("root", "out") or len(row["sha256"]) != 64:
                    raise ValueError("a row is cut")
                number += 1
                yield row["path"], FileState(row["sha256"], (int(row["size"]), 0, 0))
        if number != count:
            raise ValueError(f"{number} lines instead of {count}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{path}: damaged ({error}); run python -m sunets prepare again") from None


def _cache_file(directory: Path) -> Path | None:
    """Return the cache of a checkout's data set; None for a directory outside `data/prepared/`."""
    parts = len(PREPARED.parts)
    if directory.parent.parts[-parts:] != PREPARED.parts:
        return None
    return directory.parents[parts] / ".work" / "seen" / f"{directory.name}.csv"
