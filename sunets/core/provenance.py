"""Provenance of a result: environment, commit, command line, and the hash of the code that made it."""

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
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sunets.core.config import Section, Suite, fingerprint
from sunets.core.names import printable
from sunets.core.record import Record, parameters, parameters_hash, portable

if TYPE_CHECKING:
    import torch


SOURCE_ROOT = Path(__file__).resolve().parents[2]
"""Directory that holds the packages: the checkout, or site-packages of a wheel install."""
PACKAGES = ("sunets", "ablations")
LIBRARIES = ("torch", "torchvision", "segmentation-models-pytorch", "pillow", "scipy")
"""Distributions that decode, augment, train and score; a result belongs to their versions, as it does to the code."""


@functools.cache
def library_versions() -> dict[str, str | None]:
    """Return the version of each of `LIBRARIES`; None for one that is not installed."""

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: installed(name) for name in LIBRARIES}


def environment(device: str | torch.device = "cpu", threads: int = 1) -> dict[str, Any]:
    """Describe the versions and hardware that a result may depend on.

    Args:
        device: device of the run: "cpu", "cuda", "cuda:1" or "auto" (CUDA if there is a GPU).
        threads: CPU threads of the run.
    """
    import numpy
    import torch
    import torchvision

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    versions: dict[str, Any] = library_versions() | {
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
    if device.type == "cuda":
        versions |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver_version(),
        }
    return versions


def _cpu_name() -> str:
    name = _search(r"(?m)^model name\s*:\s*(.+)$", Path("/proc/cpuinfo"))
    return name or platform.processor() or platform.machine()


def _driver_version() -> str | None:
    return _search(r"NVRM version:.*?\s(\d+\.[\d.]+)\s", Path("/proc/driver/nvidia/version"))


def _search(pattern: str, path: Path) -> str | None:
    """Return the first group of a pattern in a file; None if there is no match or no file."""
    try:
        match = re.search(pattern, path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return match[1].strip() if match else None


def provenance(data_digest: str | None, code_hash: str, config: Section | Mapping[str, Any], command: str) -> Record:
    """Describe the provenance of a result. Call it before the work: code edited meanwhile did not make the result.

    An unknown commit is recorded as None, and standard error says why, once.

    Args:
        data_digest: digest of the prepared data; None if the run reads none.
        code_hash: `code_hash()` of the modules that do the work.
        config: complete configuration of the run.
        command: command line that repeats it, from `command_line()` or `stage_command()`.
    """
    try:
        commit, dirty = _git_state(SOURCE_ROOT)
    except _UnknownCommitError as unknown:
        commit, dirty = None, None
        # An installed wheel has no checkout.
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
    """Reason why a commit is unknown, with the remedy."""


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _git_state(root: Path) -> tuple[str, bool]:
    """Return the commit of the repository at `root`, and whether the packages differ from it.

    The repository must track this package: a wheel may be installed inside another project's repository.

    Raises:
        _UnknownCommitError: git is absent, refuses, or finds no such repository.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # a git hook sets GIT_DIR
    clean |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}

    def git(*arguments: str) -> str:
        command = ["git", "-c", "core.quotePath=true", "-C", str(root), *arguments]
        done = subprocess.run(command, env=clean, capture_output=True, timeout=30, check=True)
        return os.fsdecode(done.stdout).strip()

    try:
        top = Path(git("rev-parse", "--show-toplevel"))
        if not top.exists() or not root.samefile(top):
            raise _UnknownCommitError("the code lies inside the repository of another project")
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
    """Summarise git's standard error in one line: the first error and the command it advises."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
    reason = next((line for line in lines if line.startswith(("fatal:", "error:"))), lines[0])
    advice = next((f"; remedy: {line}" for line in lines if line.startswith("git config")), "")
    return printable(f"git: {reason.partition(': ')[2] or reason}{advice}")


def command_line(arguments: Sequence[str] | None = None) -> str:
    """Return the running command without interpreter or absolute paths, as it works in any checkout.

    Args:
        arguments: arguments after the module or program name; None takes those of this process.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None and spec.name:
        program = ["python", "-m", spec.name.removesuffix(".__main__")]
    else:
        program = [Path(sys.argv[0]).name or "python"]
    return shlex.join(program + [portable(part) for part in (sys.argv[1:] if arguments is None else arguments)])


def stage_command(suite: Suite, *words: str, package: str = "sunets") -> str:
    """Return the command of a stage with these parameters, without options that do not change its result (workers)."""
    return shlex.join(["python", "-m", package, *words, *map(portable, suite.options)])


def utc_now() -> str:
    """Return the time in ISO 8601, to the second; for timing files only."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def module_closure(*modules: str, root: Path = SOURCE_ROOT) -> tuple[Path, ...]:
    """List the files of these packages that importing `modules` executes, sorted and relative to `root`.

    The syntax tree is read; nothing is executed. Imports inside functions and under `if TYPE_CHECKING` are not
    followed: in this package, code that results depend on is imported at module level.

    Args:
        modules: dotted names, such as "sunets.training.fit" or "ablations.study".
        root: the directory that holds the packages.

    Raises:
        ValueError: a name is no module under `root`.
    """
    files: set[Path] = set()
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
                files.add(file.relative_to(root))
                waiting += _imported(dotted, file)
    return tuple(sorted(files))


def _module_file(name: str, root: Path) -> Path | None:
    """Return the file of a module of these packages; None for any other name."""
    if name.partition(".")[0] not in PACKAGES:
        return None
    stem = root.joinpath(*name.split("."))
    return next((file for file in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")) if file.is_file()), None)


def _imported(name: str, file: Path) -> list[str]:
    """List the dotted names that a module imports when executed; some may be attributes rather than modules."""
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
            module = ".".join(filter(None, (base, node.module)))
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)
    return names


def code_hash(*modules: str, root: Path = SOURCE_ROOT) -> str:
    """Hash the names and current code of `module_closure(*modules)` to 16 hexadecimal digits; see `file_hash`."""
    return fingerprint({path.as_posix(): file_hash(root / path) for path in module_closure(*modules, root=root)})


def file_hash(path: Path) -> str:
    """Hash the code of a module.

    Docstrings, comments on separate lines and blank lines do not count, since no result depends on them.
    """
    return hashlib.sha256("\n".join(_code_lines(path.read_text(encoding="utf-8"))).encode()).hexdigest()


def _code_lines(source: str) -> list[str]:
    """List the lines of a module that belong to its code; lines of a string that it uses do, whatever they hold."""
    lines = source.split("\n")
    documentation: set[int] = set()
    strings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Expr | ast.Constant | ast.JoinedStr) or node.end_lineno is None:
            continue
        span = range(node.lineno - 1, node.end_lineno)
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)):
            strings.update(span)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            before = lines[span[0]].encode()[: node.col_offset]
            after = lines[span[-1]].encode()[node.end_col_offset :]
            if not (before + after).strip():  # nothing else on its lines
                documentation.update(span)
    return [
        line
        for number, line in enumerate(lines)
        if number not in documentation and (number in strings or line.strip().partition("#")[0])
    ]
