"""Where a result comes from: environment, commit, command line, and the hash of the code that made it."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sunets.core.config import Section, Suite
from sunets.core.names import printable
from sunets.core.record import Record, parameters, parameters_hash, portable

if TYPE_CHECKING:
    import torch


SOURCE_ROOT = Path(__file__).resolve().parents[2]
"""Directory that holds the packages: the checkout, or site-packages of a wheel install."""
PACKAGES = ("sunets", "ablations")


def environment(device: str | torch.device = "cpu", threads: int = 1) -> dict[str, Any]:
    """Versions and hardware that a result may depend on.

    Args:
        device: where the run computes: "cpu", "cuda", "cuda:1" or "auto" (CUDA where there is a GPU).
        threads: CPU threads of the run.
    """
    import numpy
    import torch
    import torchvision

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "numpy": numpy.__version__,
        "platform": " ".join([platform.system(), platform.machine(), *platform.libc_ver()]).strip(),
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "device": device.type,
    }
    if found["device"] == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver_version(),
        }
    return found


def _cpu_name() -> str:
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$",
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"),
            re.MULTILINE,
        )
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _driver_version() -> str | None:
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        return None
    return found.group(1) if found else None


def provenance(data_digest: str | None, code_hash: str, config: Section | Mapping[str, Any], command: str) -> Record:
    """Where a result comes from. Call it before the work begins: code that is edited meanwhile did not make it.

    A commit that git does not tell is recorded as None, and standard error says once why.

    Args:
        data_digest: digest of the prepared data; None where a run reads none.
        code_hash: what `code_hash()` returned for the modules that do the work.
        config: all that decides the run.
        command: a command line that repeats it, such as `command_line()` or `stage_command()` gives.
    """
    try:
        commit, dirty = _git_state(SOURCE_ROOT)
    except _UnknownCommitError as unknown:
        commit, dirty = None, None
        # An installed wheel has no checkout that git could know.
        if (SOURCE_ROOT / "pyproject.toml").is_file():
            _say_once(f"note: the commit of the code is recorded as unknown: {unknown}")
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "data_digest": data_digest,
        "code_hash": code_hash,
        "config_hash": parameters_hash(parameters(config)),
        "command": command,
    }


class _UnknownCommitError(Exception):
    """Why a commit is unknown, with the remedy."""


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _git_state(root: Path) -> tuple[str, bool]:
    """Commit of the repository whose root is `root` and which tracks this package, and whether its source differs.

    An installed wheel may lie inside somebody's repository: that one's commit says nothing about this code.

    Raises:
        _UnknownCommitError: git is absent, refuses, or knows no such repository.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # a git hook sets GIT_DIR
    clean |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}

    def git(*arguments: str) -> str:
        command = ["git", "-c", "core.quotePath=true", "-C", str(root), *arguments]
        done = subprocess.run(command, env=clean, capture_output=True, timeout=30, check=True)
        return os.fsdecode(done.stdout).strip()

    try:
        if not root.samefile(git("rev-parse", "--show-toplevel")):
            raise _UnknownCommitError("the code lies inside a repository that is not its own")
        git("ls-files", "--error-unmatch", "--", "sunets/__init__.py")
        commit = git("rev-parse", "--verify", "HEAD")
        dirty = git("status", "--porcelain", "--", *(f":(glob){name}/**/*.py" for name in PACKAGES))
    except FileNotFoundError:
        raise _UnknownCommitError("git is not installed") from None
    except subprocess.CalledProcessError as error:
        raise _UnknownCommitError(_git_reason(os.fsdecode(error.stderr))) from None
    except (OSError, subprocess.SubprocessError) as error:
        raise _UnknownCommitError(f"git: {error}") from None
    return commit, bool(dirty)


def _git_reason(text: str) -> str:
    """What git says on standard error, on one line: its first error, and the command that it advises."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    reason = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[0])
    advice = next((f"; remedy: {line}" for line in lines if line.startswith("git config")), "")
    return printable(f"git: {reason.partition(': ')[2] or reason}{advice}")


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The running command as one can type it in the root of any checkout: no interpreter's path, no absolute path.

    Args:
        arguments: what follows the module or program name; None takes this process's own.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        program = [Path(sys.argv[0]).name or "python"]
    return shlex.join(program + [portable(part) for part in (sys.argv[1:] if arguments is None else arguments)])


def stage_command(suite: Suite, *words: str, package: str = "sunets") -> str:
    """The command that runs a stage on these parameters, without what does not change its result (workers)."""
    return shlex.join(["python", "-m", package, *words, *map(portable, suite.options)])


def utc_now() -> str:
    """The time in ISO 8601, to the second; for timing files only."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def module_closure(*modules: str, root: Path = SOURCE_ROOT) -> tuple[Path, ...]:
    """The package-internal files that importing `modules` executes, sorted and relative to `root`.

    Read from the syntax tree; nothing is executed. Imports inside functions and under `if TYPE_CHECKING` are not
    followed: what a result depends on is imported at module level here.

    Args:
        modules: dotted names, such as "sunets.training.fit" or "ablations.study".
        root: the directory that holds the packages.

    Raises:
        ValueError: a name that is no module under `root`.
    """
    found: set[Path] = set()
    waiting = []
    for name in modules:
        if _module_file(name, root) is None:
            raise ValueError(f"{name}: no such module in {', '.join(PACKAGES)}")
        waiting.append(name)
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        parts = name.split(".")
        for dotted in (".".join(parts[:end]) for end in range(1, len(parts) + 1)):  # a package's __init__ runs first
            file = None if dotted in seen else _module_file(dotted, root)
            seen.add(dotted)
            if file is not None:
                found.add(file.relative_to(root))
                waiting += _imported(dotted, file)
    return tuple(sorted(found))


def _module_file(name: str, root: Path) -> Path | None:
    """File of an internal module; None for anything else."""
    if name.partition(".")[0] not in PACKAGES:
        return None
    stem = root.joinpath(*name.split("."))
    return next((file for file in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")) if file.is_file()), None)


def _imported(name: str, file: Path) -> list[str]:
    """Dotted names that the module imports when it is executed; some may be attributes rather than modules."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    names = []
    waiting: list[ast.AST] = list(ast.parse(file.read_bytes(), str(file)).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            names += [source, *(f"{source}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return names


def code_hash(*modules: str, root: Path = SOURCE_ROOT) -> str:
    """Digest (16 hexadecimal digits) of all files in `module_closure(*modules)`: names and bytes, as they are now."""
    digest = hashlib.sha256()
    for path in module_closure(*modules, root=root):
        content = (root / path).read_bytes()
        digest.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]
