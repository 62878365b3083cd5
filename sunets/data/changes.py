"""Whether the files that a data set was prepared from are still those: size, times and digest of each.

`files.csv` beside the manifest holds path, size and SHA-256 of every file and directory that `prepare` read or drew;
nothing in it depends on the machine. When a file was last seen with its digest (times in ns) is kept in `.work/seen/`
of the checkout, so that a check reads the content of those files alone whose times have changed.
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
from sunets.data.raw_dataset import is_left_by_system

FILES = "files.csv"
Stamp: TypeAlias = tuple[int, int, int]
"""Size in bytes, time of the last change of content and of status, in ns."""


class Seen(NamedTuple):
    """A file as it was seen."""

    digest: str
    """SHA-256 of its content, of a directory's names."""
    stamp: Stamp
    """Taken before its content was read."""


def see(path: Path) -> Seen:
    """Read a file, or list a directory.

    Raises:
        DataError: it cannot be read; names it.
    """
    if path.is_dir():
        stamp = _stamp(path.stat())
        names = sorted(os.fsencode(p.name) for p in path.iterdir() if not is_left_by_system(p.name))
        return Seen(hashlib.sha256(b"\0".join(names)).hexdigest(), stamp)
    with open_regular(path) as file:
        return see_open(file)


def see_open(file: io.BufferedReader) -> Seen:
    """Read an open file to its end."""
    stamp = _stamp(os.fstat(file.fileno()))
    return Seen(hashlib.file_digest(file, "sha256").hexdigest(), stamp)


def _stamp(status: os.stat_result) -> Stamp:
    """Size and times of a file; of a directory, whose size says nothing, the times alone."""
    size = 0 if stat.S_ISDIR(status.st_mode) else status.st_size
    return size, status.st_mtime_ns, status.st_ctime_ns


def write_seen(seen: Mapping[str, Seen], directory: Path) -> None:
    """Write `files.csv`.

    Args:
        seen: by path, as the split lists write paths.
        directory: that of the manifest.
    """
    with (directory / FILES).open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["path", "size", "sha256"])
        rows.writerows([path, s.stamp[0], s.digest] for path, s in sorted(seen.items()))


def keep_times(seen: Mapping[str, Seen], directory: Path, key: str = "") -> None:
    """Remember when the files were seen, where the directory belongs to a checkout; losing this costs time alone.

    Args:
        seen: by path, as the split lists write paths.
        directory: that of the manifest.
        key: what the preparation depended on besides the files.
    """
    place = _times_file(directory)
    if place is None:
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([key])
    rows.writerows([path, *s.stamp, s.digest] for path, s in sorted(seen.items()))
    with contextlib.suppress(OSError), replacing(place) as temporary:  # in a checkout that cannot be written to
        temporary.write_text(text.getvalue(), encoding="utf-8", newline="")


def kept_key(directory: Path) -> str:
    """The key that `keep_times` was given; empty where nothing was kept."""
    return next(_kept(directory), ("", None))[0]


def check_unchanged(directory: Path, bases: Mapping[str, Path], count: int) -> None:
    """Check that every file is what `prepare` saw: by its times, else by its content.

    Args:
        directory: that of the manifest.
        bases: directories that `root/` and `out/` at the beginning of a path stand for.
        count: number of files that were prepared from.

    Raises:
        DataError: files have changed, or the list of them is damaged; names each.
    """
    faults: list[str] = []
    unsure: list[tuple[str, Path, Seen]] = []
    kept = _kept(directory)
    key, _ = next(kept, ("", None))
    last = next(kept, None)
    for text, expected in _rows(directory, count):  # both files are sorted by path
        base, _, rest = text.partition("/")
        path = bases[base] / rest
        while last is not None and last[0] < text:
            last = next(kept, None)
        try:
            stamp = _stamp(path.stat())
        except OSError as error:
            faults.append(f"{path}: cannot be read any more ({error.strerror})")
            continue
        if stamp[0] != expected.stamp[0]:
            faults.append(f"{path}: changed since it was prepared")
        elif last != (text, Seen(expected.digest, stamp)):
            unsure.append((text, path, expected))

    def look(item: tuple[str, Path, Seen]) -> Seen | DataError:
        _, path, expected = item
        try:
            if (now := see(path)).digest == expected.digest:
                return now
        except DataError as error:
            return error
        return DataError(f"{path}: changed since it was prepared")

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = list(pool.map(look, unsure))
    faults += [str(now) for now in found if isinstance(now, DataError)]
    if faults:
        raise DataError([f"{fault}; run python -m sunets prepare, or dvc repro" for fault in faults])
    if unsure:
        times = {text: seen for text, seen in list(_kept(directory))[1:] if seen is not None}
        times |= {text: now for (text, _, _), now in zip(unsure, found, strict=True) if isinstance(now, Seen)}
        keep_times(times, directory, key)


def _kept(directory: Path) -> Iterator[tuple[str, Seen | None]]:
    """What `keep_times` wrote, the key (without a file) first; nothing where it is absent, its beginning if damaged."""
    place = _times_file(directory)
    if place is None:
        return
    try:
        with place.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file)
            (key,) = next(rows)
            yield key, None
            for path, size, changed, status, digest in rows:
                yield path, Seen(digest, (int(size), int(changed), int(status)))
    except (OSError, ValueError, StopIteration, csv.Error):
        return


def _rows(directory: Path, count: int) -> Iterator[tuple[str, Seen]]:
    """The rows of `files.csv`, without times."""
    path = directory / FILES
    number = 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["path"].partition("/")[0] not in ("root", "out") or len(row["sha256"]) != 64:
                    raise ValueError("a row is cut")
                number += 1
                yield row["path"], Seen(row["sha256"], (int(row["size"]), 0, 0))
        if number != count:
            raise ValueError(f"{number} lines instead of {count}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{path}: damaged ({error}); run python -m sunets prepare again") from None


def _times_file(directory: Path) -> Path | None:
    """Where the times of a checkout's data are kept; None for a directory outside `data/prepared/`."""
    parts = len(PREPARED.parts)
    if directory.parent.parts[-parts:] != PREPARED.parts:
        return None
    return directory.parents[parts] / ".work" / "seen" / f"{directory.name}.csv"
