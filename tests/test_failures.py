"""What the machine does to a command (no room, no permission, no memory) is one line; a bug is a traceback."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from checkout import ENV, ROOT
from typer.testing import CliRunner

import ablations.__main__
from sunets.__main__ import app
from sunets.core import cli
from sunets.core.config import load
from sunets.core.failure import line_for_user
from sunets.core.process import is_ours
from sunets.core.record import replacing, write_json
from sunets.profile import profile


def error_of(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        call()
    return caught.value


def full(path: Path) -> None:
    """Write to a device that is always full, under the name of `path`."""
    path.symlink_to("/dev/full")
    with path.open("w", encoding="utf-8") as file:
        file.write("x" * 100_000)
        file.flush()


def cases(root: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    """What is done, and the file and remedy that its line names."""
    (root / "file").touch()

    def half(to: Path) -> None:
        with replacing(to) as temporary:
            full(temporary)

    def raised(number: int) -> Callable[[], Any]:
        def call() -> None:
            raise OSError(number, os.strerror(number), str(root / "x"))

        return call

    return {
        "a file where a directory is needed": ((root / "file").mkdir, r"/file: File exists; .*move that file away"),
        "a file on the way": (lambda: write_json(root / "file/x.json", 1), r"/file.*move that file away"),
        "a directory where a file is needed": (root.read_text, rf"{root}: Is a directory; a file is needed"),
        "no such file": (lambda: open(root / "absent"), r"/absent: No such file or directory; check the path"),
        "a name too long": ((root / ("n" * 300)).touch, r"nnn: File name too long; use a shorter name"),
        "a link to itself": (lambda: ((root / "l").symlink_to("l"), (root / "l").read_text()), r"/l: Too many .*link"),
        "full, while open": (lambda: full(root / "a.csv"), r"/a\.csv: No space left on device; make room .* go on"),
        "full, while replacing": (lambda: half(root / "b.csv"), r"/b\.csv: No space left on device; make room"),
        "read-only": (raised(errno.EROFS), r"/x: Read-only file system; make the file system writable"),
        "no permission": (raised(errno.EACCES), r"/x: Permission denied; check the owner and the permissions"),
        "too many files": (raised(errno.EMFILE), r"/x: Too many open files; raise .*ulimit -n"),
        "file too large": (raised(errno.EFBIG), r"/x: File too large; raise .*ulimit -f"),
        "unknown to this list": (raised(errno.ENXIO), r"/x: .*; fix that, then run again"),
    }


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_error_of_the_system_names_file_and_remedy(tmp_path: Path) -> None:
    for name, (call, expected) in cases(tmp_path).items():
        line = line_for_user(error_of(call))
        assert line is not None, name
        assert re.search(expected, line), f"{name}: {line}"
        assert "\n" not in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_torch_is_told_as_the_system_tells_it(tmp_path: Path) -> None:
    def save() -> None:
        (tmp_path / "w.pt").symlink_to("/dev/full")
        with (tmp_path / "w.pt").open("wb", buffering=0) as file:
            torch.save({"w": torch.zeros(100_000)}, file)

    error = error_of(save)
    line = line_for_user(error)
    assert line is not None, repr(error)
    assert "make room" in line
    assert "w.pt: No space left" in line


def test_an_error_that_came_of_the_system_s_is_told_as_that_one() -> None:
    def write() -> None:
        try:
            raise OSError(errno.EROFS, "Read-only file system", "w.pt")
        except OSError:
            raise RuntimeError("the writer could not close")  # noqa: B904  # as libraries do

    line = line_for_user(error_of(write))
    assert line is not None
    assert line.startswith("w.pt: Read-only file system; make the file system writable")


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at inline_container.cc:664] . unexpected pos 288448 vs 288344",
        "PytorchStreamWriter failed writing file data/0: file write failed",
        "unable to write to file </torch_1_2_3>: No space left on device (28)",
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
    ],
)
def test_words_of_torch_about_the_machine_are_one_line(text: str) -> None:
    line = line_for_user(RuntimeError(text + "\nException raised from somewhere"))
    assert line is not None
    assert "run again" in line
    assert "\n" not in line


def test_too_little_memory_is_one_line_with_the_keys_to_turn() -> None:
    line = line_for_user(error_of(lambda: bytearray(1 << 62)))
    assert line is not None
    assert "train.micro_batch_size" in line
    assert line_for_user(error_of(lambda: torch.empty(1 << 50))) is not None


def test_a_directory_for_temporary_files_with_a_long_path_is_named() -> None:
    line = line_for_user(OSError("AF_UNIX path too long"))
    assert line is not None
    assert "TMPDIR" in line


def module(code: str) -> types.ModuleType:
    """A module of this package that is not on disk."""
    made = types.ModuleType("sunets.made_up")
    exec(compile(code, "made_up.py", "exec"), made.__dict__)
    return made


@pytest.mark.parametrize(
    ("code", "ours"),
    [
        ("def f(): raise ValueError('train.lr: above 0')", True),
        ("def f():\n try: int('x')\n except ValueError: raise ValueError('words') from None", True),
        ("def f():\n try: raise ValueError('words')\n finally: len('x')", True),
        ("def f(): int('x')", False),
        ("def f():\n a, b = [1]", False),
        ("def f(): {}['x']", False),
        ("import torch\ndef f(): torch.zeros(2) @ torch.zeros(3)", False),
    ],
)
def test_only_a_raise_of_ours_speaks_to_the_user(code: str, ours: bool) -> None:
    error = error_of(module(code).f)
    assert is_ours(error) is ours
    assert (line_for_user(error) is not None) is ours


@pytest.mark.parametrize("code", ["int('x')", "[][1]", "None.x", "assert False", "{}['x']"])
def test_a_bug_is_a_traceback(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(module(f"def f(): {code}").f)
    monkeypatch.setattr(sys, "argv", ["sunets"])
    with pytest.raises((ValueError, IndexError, AttributeError, AssertionError, KeyError)):
        cli.run(app)


def test_a_debugger_sees_the_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a.pt")

    monkeypatch.setattr(sys, "argv", ["sunets"])
    with pytest.raises(SystemExit) as caught:
        cli.run(app)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: a.pt: No space left on device; make room on the disk, then run")
    monkeypatch.setenv("SUNETS_DEBUG", "1")
    with pytest.raises(OSError, match="No space"):
        cli.run(app)


def command(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=ENV | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )


@pytest.mark.slow
def test_a_file_in_the_place_of_the_work_directory_is_one_line(tmp_path: Path) -> None:
    shutil.copy(ROOT / "presets/smoke.yaml", tmp_path / "params.yaml")
    (tmp_path / ".work").write_text("mine", encoding="utf-8")
    done = command(tmp_path, "sunets", "prepare")
    assert done.returncode == 2
    assert re.fullmatch(r"error: \.work: File exists; .* move that file away\n", done.stderr)
    assert (tmp_path / ".work").read_text(encoding="utf-8") == "mine"


@pytest.mark.slow
def test_workers_in_a_directory_with_a_long_path(tmp_path: Path) -> None:
    """Multiprocessing makes a socket in TMPDIR, whose path may have 107 bytes."""
    shutil.copy(ROOT / "presets/smoke.yaml", tmp_path / "params.yaml")
    assert command(tmp_path, "sunets", "prepare").returncode == 0
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    done = command(tmp_path, "sunets", "train", "plain_conv_small", "--set", "tune.trials=0", TMPDIR=str(deep))
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("MLflow", "note:"))]
    assert lines[-1].startswith("error: ")
    assert "set TMPDIR to a shorter one" in lines[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("tuning", ["tune.trials=0", "tune.trials=2"])
@pytest.mark.parametrize("name", ["train", "evaluate", "cost", "archive", "tune"])
def test_a_misspelt_model_is_named_with_those_that_there_are(
    name: str, tuning: str, tmp_path: Path, call: Callable[..., str]
) -> None:
    """Before data, recipes or weights are missed, which no such model would ever have."""
    shutil.copy(ROOT / "presets/smoke.yaml", tmp_path / "params.yaml")
    commands = ablations.__main__.app if name == "tune" else app
    error = call(tmp_path, name, "typo", "--set", tuning, code=2, app=commands)
    known = ", ".join(load(tmp_path / "params.yaml").models)
    assert error == f"error: models.typo: no such key; there are {known}\n"


def test_a_picture_that_is_no_png_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--picture .*x\.txt: the picture is a PNG; name it \*\.png"):
        profile(["no such model"], size=(64, 64), picture_path=tmp_path / "x.txt")


def test_an_output_stride_that_no_network_has_is_refused_by_the_command_line() -> None:
    result = CliRunner().invoke(app, ["profile", "sunet_tiny", "--output-stride", "0"])
    assert result.exit_code == 2
    assert "output-stride" in result.stderr


def test_output_that_the_locale_lacks_ends_no_command(tmp_path: Path) -> None:
    code = (
        "import typer; from sunets.core.cli import run; app = typer.Typer();\n"
        "@app.command()\ndef f() -> None:\n    print('±写真')\nrun(app)"
    )
    env = ENV | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"\\xb1\\u5199\\u771f\n"
