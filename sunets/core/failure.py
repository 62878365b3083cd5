"""One-line messages for errors of the user's input and of the machine, as opposed to bugs."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Iterator

from sunets.core.names import printable
from sunets.core.process import is_ours

_AGAIN = "run again to go on; no finished work is lost"
_ROOM = f"make room on the disk, then {_AGAIN}"
_FEWER = f"use fewer --workers, then {_AGAIN}"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: f"raise the largest size of a file (ulimit -f), then {_AGAIN}",
    errno.EIO: f"check the disk, then {_AGAIN}",
    errno.EROFS: "make the file system writable, or work in a directory that is",
    errno.EACCES: "check the owner and the permissions",
    errno.EPERM: "check the owner and the permissions",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a directory is needed where a file stands; move that file away",
    errno.EEXIST: "a directory is needed where a file stands; move that file away",
    errno.EISDIR: "a file is needed where a directory stands; move it away or name a file",
    errno.ENOTEMPTY: f"another process writes there; {_AGAIN}",
    errno.ENAMETOOLONG: "use a shorter name or path",
    errno.ELOOP: "the link leads back to itself; remove it",
    errno.EMFILE: f"raise the number of open files (ulimit -n), then {_AGAIN}",
    errno.ENFILE: f"raise the number of open files (ulimit -n), then {_AGAIN}",
    errno.EAGAIN: f"raise the number of processes (ulimit -u), or {_FEWER}",
    errno.ENOMEM: f"free memory, or {_FEWER}",
}
_MEMORY = f"use a smaller data.size, train.batch_size or train.micro_batch_size, or {_FEWER}"
# torch reports failures of the machine as RuntimeError.
_TORCH_MEMORY = re.compile(r"can't allocate memory|out of memory|cannot allocate memory", re.IGNORECASE)
_TORCH_DISK = re.compile(r"inline_container\.cc|PytorchStreamWriter failed|unable to (write|open|mmap|resize)")


def line_for_user(error: BaseException) -> str | None:
    """Describe what is wrong with the input or the machine, and the remedy.

    Returns:
        The message of a check of this package, or one line about a failure of the machine; None for a bug.
    """
    is_check = isinstance(error, ValueError | RuntimeError) or (isinstance(error, OSError) and error.errno is None)
    return str(error) if is_check and is_ours(error) else machine_failure(error)


def machine_failure(error: BaseException) -> str | None:
    """Describe a failure of the machine: the file, what the system says and the remedy.

    Returns:
        One line; None for any other error.
    """
    if isinstance(error, OSError):
        return _system_failure(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _one_line(f"out of memory: {error}".rstrip(": ") + f"; {_MEMORY}")
    if not isinstance(error, RuntimeError):
        return None
    if _TORCH_MEMORY.search(str(error)):
        return _one_line(f"out of memory: {str(error)[:200]}; {_MEMORY}")
    # torch raises its own error while it handles the system's.
    for cause in _chain(error):
        if isinstance(cause, OSError):
            return _system_failure(cause)
    if _TORCH_DISK.search(str(error)):
        return _one_line(f"torch cannot write or map a file ({str(error)[:200]}); {_ROOM}")
    return None


def _system_failure(error: OSError) -> str:
    if "AF_UNIX path too long" in str(error):  # has no errno
        return "the path of the directory for temporary files is too long for a socket; set TMPDIR to a shorter one"
    if error.errno is None or error.strerror is None:  # raised by a library
        return _one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    file = _file(error)
    remedy = _REMEDIES.get(error.errno, f"fix that, then {_AGAIN}")
    return _one_line(f"{file}: {error.strerror}; {remedy}" if file else f"{error.strerror}; {remedy}")


def _file(error: OSError) -> str | None:
    """Return the file named by an error, else the one that was open where it was raised."""
    for name in (error.filename2, error.filename):
        if isinstance(name, str | bytes | os.PathLike) and name:
            return os.fsdecode(name)
    frames = []
    trace = error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames):
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(name := getattr(value, "name", None), str):
                return name
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the causes of an error, the nearest first."""
    seen = {id(error)}
    following = error.__cause__ or error.__context__
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
