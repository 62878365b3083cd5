"""What leaves a run: one tidy record, with where it came from and what it ran on.

Records are the truth of the suite: tables, figures and MLflow are made from them and from nothing else. They hold no
time stamp and no absolute path, so that a rerun of the same code, configuration and data on the same machine writes the
same bytes. Nothing heavy is imported here; torch only where the environment is asked for.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sunets.config import Section, Suite, fingerprint, flatten

if TYPE_CHECKING:
    import torch

SOURCE_ROOT = Path(__file__).resolve().parents[1]
"""Directory that holds the packages: the checkout, or site-packages of a wheel install."""
PACKAGES = ("sunets", "ablations")

Kind = Literal["train", "evaluate", "profile", "speed", "trial"]
Status = Literal["finished", "failed", "pruned"]
Record = dict[str, Any]


def make_record(
    kind: Kind,
    *,
    benchmark: str,
    model: str,
    label: str | None = None,
    status: Status = "finished",
    reason: str | None = None,
    seed: int | None = None,
    variant: str | None = None,
    config: Section | Mapping[str, Any] | None = None,
    scores: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    environment: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    **extra: Any,
) -> Record:
    """One record: plain values only, every key present.

    Args:
        kind: what was run.
        benchmark: name of the benchmark.
        model: key of the model in `params.yaml`.
        label: its name in tables; the key where None.
        status: `failed` and `pruned` need a reason.
        reason: why the run has no result, in one line.
        seed: training seed, where the run has one.
        variant: test-time variant of an evaluation.
        config: all that decides the run, kept flat under `params`; or flat dotted values already.
        scores: `score.*`; an absent score is None, never NaN.
        cost: `cost.*`, `memory.*`, `field.*` or `speed.*`.
        environment: what `environment()` returned.
        provenance: what `provenance()` returned, before the work began.
        extra: keys of a trial: study, number, phase, arm.

    Raises:
        ValueError: a failed or pruned run without a reason, or a reason where there was no failure.
    """
    if (status == "finished") == bool(reason):
        raise ValueError(f"record of {model}, seed {seed}: status {status!r} does not go with reason {reason!r}")
    record = {
        "kind": kind,
        "status": status,
        "reason": reason,
        "benchmark": benchmark,
        "model": model,
        "label": label or model,
        "seed": seed,
        "variant": variant,
        "params": parameters(config or {}),
        "scores": scores or {},
        "cost": cost or {},
        "environment": environment or {},
        "provenance": provenance or {},
    }
    if clash := sorted(record.keys() & extra.keys()):
        raise ValueError(f"record of {model}: keys given twice: {', '.join(clash)}")
    return dict(_plain(record | extra))


def parameters(config: Section | Mapping[str, Any]) -> dict[str, Any]:
    """Flat plain parameters that mean the same on every machine: where the user keeps a file is not one of them."""
    flat = flatten(config) if isinstance(config, Section) else config
    return dict(_plain({name: _portable(value) if isinstance(value, str) else value for name, value in flat.items()}))


def parameters_hash(params: Mapping[str, Any]) -> str:
    """Digest of what a record keeps under `params`."""
    return fingerprint(dict(params))


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
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _driver_version() -> str | None:
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found.group(1) if found else None


def provenance(data_digest: str | None, code_hash: str, config: Section | Mapping[str, Any], command: str) -> Record:
    """Where a result comes from. Call it before the work begins: code that is edited meanwhile did not make it.

    Args:
        data_digest: digest of the prepared data; None where a run reads none.
        code_hash: what `code_hash()` returned for the modules that do the work.
        config: all that decides the run.
        command: a command line that repeats it, such as `command_line()` or `stage_command()` gives.
    """
    commit, dirty = _git_state(SOURCE_ROOT)
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "data_digest": data_digest,
        "code_hash": code_hash,
        "config_hash": parameters_hash(parameters(config)),
        "command": command,
    }


def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the repository whose root is `root` and which tracks this package, and whether its source differs.

    An installed wheel may lie inside somebody's repository: that one's commit says nothing about this code.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}  # a git hook sets GIT_DIR
    clean |= {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}

    def git(*arguments: str) -> str:
        command = ["git", "-c", "core.quotePath=true", "-C", str(root), *arguments]
        done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=30, check=True)
        return done.stdout.strip()

    try:
        if not root.samefile(git("rev-parse", "--show-toplevel")):
            return None, None
        git("ls-files", "--error-unmatch", "--", "sunets/record.py")
        commit = git("rev-parse", "--verify", "HEAD")
        dirty = git("status", "--porcelain", "--", *(f":(glob){name}/**/*.py" for name in PACKAGES))
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(dirty)


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
    return shlex.join(program + [_portable(part) for part in (sys.argv[1:] if arguments is None else arguments)])


def stage_command(suite: Suite, *words: str, package: str = "sunets") -> str:
    """The command that runs a stage on these parameters, without what does not change its result (workers)."""
    return shlex.join(["python", "-m", package, *words, *map(_portable, suite.options)])


def utc_now() -> str:
    """The time in ISO 8601, to the second; for timing files only."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _portable(argument: str) -> str:
    name, sign, value = argument.rpartition("=")
    path = Path(value)
    if path.is_absolute():
        value = str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name
    return name + sign + value


def module_closure(*modules: str, root: Path = SOURCE_ROOT) -> tuple[Path, ...]:
    """The package-internal files that importing `modules` executes, sorted and relative to `root`.

    Read from the syntax tree; nothing is executed. Imports inside functions and under `if TYPE_CHECKING` are not
    followed: what a result depends on is imported at module level here.

    Args:
        modules: dotted names, such as "sunets.train" or "ablations.study".
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


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path`, of the same suffix, that takes its place if the block ends without an error.

    A reader, or a kill at any moment, meets the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write plain values as JSON, atomically, with sorted keys; NaN and infinity become null."""
    text = json.dumps(_plain(value), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no JSON; names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it and run its stage again") from None


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV, atomically.

    Args:
        path: the file.
        rows: each a mapping of column to number, text or None (an empty cell).
        columns: names that come first; others follow in order of their first appearance.
    """
    rows = [_plain_row(row) for row in rows]
    names = list(dict.fromkeys([*columns, *(name for row in rows for name in row)]))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read what `write_rows` wrote: numbers as int or float (exactly), empty cells as None, the rest as text."""
    with Path(path).open(newline="", encoding="utf-8") as file:
        return [{name: _cell(text) for name, text in row.items()} for row in csv.DictReader(file)]


def _cell(text: str) -> int | float | str | None:
    if not text:
        return None
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf", text):
        return float(text)
    return text


def _scalar(value: Any) -> Any:
    """Zero-dimensional values of numpy and torch as Python's own."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: "" if (cell := _scalar(value)) is None else cell for name, value in row.items()}


def _plain(value: Any) -> Any:
    """`value` in JSON's types."""
    value = _scalar(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple) or hasattr(value, "tolist"):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.as_posix() if isinstance(value, Path) else value
