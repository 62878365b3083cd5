"""Records: same content gives same bytes, provenance is true, and a kill leaves no half-written file."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sunets.core import provenance as core_provenance
from sunets.core.config import Config, fingerprint, load
from sunets.core.process import Stopped, stop_on_signals
from sunets.core.provenance import code_hash, command_line, environment, module_closure, provenance, stage_command
from sunets.core.record import (
    RecordError,
    json_files,
    make_record,
    read_json,
    read_rows,
    replacing,
    write_json,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[1]


def make_config(**settings: object) -> Config:
    suite = load(ROOT / "presets" / "default.yaml", [f"{k}={json.dumps(v)}" for k, v in settings.items()])
    return suite.config(next(iter(suite.models)), 0)


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """A source root with two packages that import each other in every way that occurs."""
    files = {
        "sunets/__init__.py": "def __getattr__(name):\n    from sunets import lazy\n",
        "sunets/a.py": "import os\nfrom sunets.b import x\nimport sunets.sub.deep as deep\n",
        "sunets/b.py": "from . import c\nfrom .sub import thing\nx = 1\n",
        "sunets/c.py": "try:\n    import sunets.d\nexcept ImportError:\n    pass\n",
        "sunets/d.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sunets import lazy\n",
        "sunets/e.py": "class K:\n    from sunets.c import y\n    def f(self):\n        from sunets import lazy\n",
        "sunets/lazy.py": "",
        "sunets/sub/__init__.py": "from .thing import *\n",
        "sunets/sub/thing.py": "from ..d import z\n",
        "sunets/sub/deep.py": "",
        "ablations/__init__.py": "",
        "ablations/study.py": "import numpy, sunets.d\nfrom ablations import __init__\n",
        "other/__init__.py": "import sunets.a\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def names(paths: tuple[Path, ...]) -> set[str]:
    return {path.as_posix() for path in paths}


def test_closure_follows_module_level_imports_only(packages: Path) -> None:
    base = {"sunets/__init__.py", "sunets/d.py"}
    subs = {"sunets/sub/__init__.py", "sunets/sub/thing.py"}
    assert names(module_closure("sunets.d", root=packages)) == base
    assert names(module_closure("sunets.e", root=packages)) == base | {"sunets/e.py", "sunets/c.py"}
    everything = base | subs | {"sunets/a.py", "sunets/b.py", "sunets/c.py", "sunets/sub/deep.py"}
    assert names(module_closure("sunets.a", root=packages)) == everything
    assert names(module_closure("ablations.study", root=packages)) == base | {
        "ablations/__init__.py",
        "ablations/study.py",
    }
    both = module_closure("sunets.d", "ablations", root=packages)
    assert names(both) == base | {"ablations/__init__.py"}
    assert list(both) == sorted(both)


@pytest.mark.parametrize("name", ["sunets.nothing", "other", "numpy", ""])
def test_closure_of_an_unknown_module_is_an_error(packages: Path, name: str) -> None:
    with pytest.raises(ValueError, match="no such module"):
        module_closure(name, root=packages)


def test_closure_equals_what_python_imports() -> None:
    """Holds the syntax-tree reading against the interpreter on a real module."""
    code = (
        "import sys, sunets.core.record; "
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'sunets'), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {Path(name).resolve().relative_to(ROOT).as_posix() for name in done.stdout.splitlines()}
    assert names(module_closure("sunets.core.record")) == loaded


def test_code_hash_depends_on_the_closure_alone(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = code_hash("sunets.a", root=packages)
    assert len(before) == 16
    assert before == code_hash("sunets.a", root=packages)
    elsewhere = tmp_path_factory.mktemp("other") / "checkout"
    shutil.copytree(packages, elsewhere)
    assert code_hash("sunets.a", root=elsewhere) == before
    (packages / "sunets/lazy.py").write_text("# not followed")
    assert code_hash("sunets.a", root=packages) == before
    (packages / "sunets/sub/thing.py").write_text("from ..d import z as edited")
    edited = code_hash("sunets.a", root=packages)
    assert edited != before
    (packages / "sunets/sub/thing.py").rename(packages / "sunets/sub/thong.py")
    (packages / "sunets/sub/__init__.py").write_text("from .thong import *\n")
    assert code_hash("sunets.a", root=packages) not in (before, edited)


CODE = '''"""Module."""

X = 1
"""Constant."""


def f() -> str:
    """Function."""
    # Why.
    return """
# text
"""
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [('"""Module."""', '"""Another."""\n\n'), ('"""Constant."""\n', ""), ("Function.", "Function\n\n    # of x."),
     ("    # Why.\n", ""), ("# Why.", "# Because.")],
)  # fmt: skip
def test_code_hash_ignores_documentation(packages: Path, old: str, new: str) -> None:
    module = packages / "sunets/d.py"
    module.write_text(CODE)
    before = code_hash("sunets.d", root=packages)
    assert CODE.count(old) == 1
    module.write_text(CODE.replace(old, new))
    assert code_hash("sunets.d", root=packages) == before


@pytest.mark.parametrize(
    ("old", "new"),
    [("X = 1", "X = 2"), ("# text", "# another"), ("# text\n", ""), ("def f", "def g"), ("X = 1\n", "X = 1; 'x'\n"),
     ("    # Why.\n", "    'x'.strip()\n")],
)  # fmt: skip
def test_code_hash_follows_code(packages: Path, old: str, new: str) -> None:
    module = packages / "sunets/d.py"
    module.write_text(CODE)
    before = code_hash("sunets.d", root=packages)
    module.write_text(CODE.replace(old, new))
    assert code_hash("sunets.d", root=packages) != before


def test_code_hash_follows_bytes_that_look_like_comments(packages: Path) -> None:
    hashes = set()
    for text in ("# one", "# two"):
        (packages / "sunets/d.py").write_text(f'X = b"""\n{text}\n"""\n')
        hashes.add(code_hash("sunets.d", root=packages))
    assert len(hashes) == 2


def test_files_of_a_killed_process_are_no_records(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), replacing(tmp_path / "net.json") as temporary:
        left = tmp_path / f"{temporary.name}.kept"
        temporary.write_text("[")
        temporary.rename(left)
        raise KeyboardInterrupt
    left.rename(temporary)
    write_json(tmp_path / "net.json", [])
    assert json_files(tmp_path) == [tmp_path / "net.json"]
    ignored = (ROOT / ".dvcignore").read_text().split()
    assert any(fnmatch.fnmatch(temporary.name, pattern) for pattern in ignored)


def test_a_terminal_that_closes_ends_a_command_as_an_interrupt_does() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    try:
        with pytest.raises(Stopped) as stopped, stop_on_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stopped.value.status == 129


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(packages: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed checkout that tracks the package; GIT_DIR points elsewhere, as inside a git hook."""
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)
    (packages / "sunets/__init__.py").write_text("")
    (packages / "params.yaml").write_text("")
    git(packages, "init", "-q")
    git(packages, "add", ".")
    git(packages, "commit", "-q", "-m", "first")
    monkeypatch.setattr(core_provenance, "SOURCE_ROOT", packages)
    return packages


def source() -> tuple[str | None, bool | None]:
    found = provenance("d" * 64, "c" * 16, {}, "python -m sunets train x")
    return found["git_commit"], found["git_dirty"]


def test_git_state_is_of_the_source(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert source() == (commit, False)
    (checkout / "params.yaml").write_text("changed: true")  # recorded in full under params: not the code's business
    assert source() == (commit, False)
    (checkout / "sunets/sub/deep.py").write_text("new")
    assert source() == (commit, True)
    monkeypatch.delenv("GIT_DIR")
    git(checkout, "checkout", "-q", ".")
    (checkout / "sunets/extra.py").write_text("not in any commit")
    assert source() == (commit, True)


def test_a_foreign_repository_is_not_ours(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = checkout / "venv/lib/site-packages"  # untracked, below somebody's checkout
    shutil.copytree(checkout / "sunets", installed / "sunets")
    monkeypatch.setattr(core_provenance, "SOURCE_ROOT", installed)
    assert source() == (None, None)
    monkeypatch.setattr(core_provenance, "SOURCE_ROOT", checkout)
    git(checkout, "rm", "-q", "--cached", "sunets/__init__.py")  # as after `pip install --target .`
    assert source() == (None, None)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What standard error says of commits from here on."""
    core_provenance._say_once.cache_clear()
    return lambda: capsys.readouterr().err


def test_provenance_without_git(checkout: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]) -> None:
    (checkout / "pyproject.toml").touch()
    monkeypatch.setenv("PATH", str(checkout))
    assert source() == (None, None)
    assert source() == (None, None)  # of the next seed
    assert said() == "note: the commit of the code is recorded as unknown: git is not installed\n"


def test_provenance_where_git_refuses(checkout: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]) -> None:
    """As for a checkout of another owner, which root in a container has mounted."""
    (checkout / "pyproject.toml").touch()
    (checkout / "git").write_text(
        "#!/bin/sh\nexec >&2\necho \"fatal: detected dubious ownership in repository at '/co'\"\n"
        "echo 'To add an exception for this directory, call:'\necho\n"
        "echo '\tgit config --global --add safe.directory /co'\nexit 128\n"
    )
    (checkout / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{checkout}{os.pathsep}{os.environ['PATH']}")
    assert source() == (None, None)
    assert said() == (
        "note: the commit of the code is recorded as unknown: git: detected dubious ownership in repository at '/co'; "
        "remedy: git config --global --add safe.directory /co\n"
    )


def test_a_git_that_answers_nonsense_is_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    (checkout / "pyproject.toml").touch()
    (checkout / "git").write_text("#!/bin/sh\necho nonsense\n")
    (checkout / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{checkout}{os.pathsep}{os.environ['PATH']}")
    assert source() == (None, None)
    assert "inside the repository of another project" in said()


def test_provenance_without_a_repository(
    packages: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[], str]
) -> None:
    monkeypatch.setattr(core_provenance, "SOURCE_ROOT", packages)
    assert source() == (None, None)
    assert said() == ""  # an installed package has no commit
    (packages / "pyproject.toml").touch()  # an exported tree
    assert source() == (None, None)
    assert "not a git repository" in said()


def test_provenance_of_a_known_commit_says_nothing(checkout: Path, said: Callable[[], str]) -> None:
    (checkout / "pyproject.toml").touch()
    assert None not in source()
    assert said() == ""


def test_record_holds_the_whole_configuration() -> None:
    config = make_config()
    origin = provenance("d" * 64, "c" * 16, config, "python -m sunets train sunet_tiny")
    made = make_record(
        "train",
        task="segmentation",
        benchmark="b",
        model="m",
        seed=0,
        config=config,
        scores={"score.miou": np.float32(0.5), "score.nan": float("nan"), "score.iou.a": None},
        cost={"cost.params_m": torch.tensor(1.5)},
        provenance=origin,
    )
    assert made["params"]["train.lr"] == config.train.lr
    assert made["params"]["data.synthetic.train"] == 800
    assert made["label"] == "m"
    assert made["scores"] == {"score.miou": 0.5, "score.nan": None, "score.iou.a": None}
    assert made["cost"] == {"cost.params_m": 1.5}
    assert made["provenance"]["config_hash"] == fingerprint(made["params"])
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_where_a_file_lies_is_no_parameter() -> None:
    here = make_config(**{"data.name": "camvid", "data.root": "/home/a/data/camvid"})
    there = make_config(**{"data.name": "camvid", "data.root": "/mnt/b/camvid"})
    records = [
        make_record("train", task="segmentation", benchmark="b", model="m", config=config) for config in (here, there)
    ]
    assert records[0] == records[1]
    assert records[0]["params"]["data.root"] == "camvid"
    assert provenance(None, "c", here, "x")["config_hash"] == provenance(None, "c", there, "x")["config_hash"]


def test_status_and_reason_belong_together() -> None:
    with pytest.raises(ValueError, match="does not go with reason None"):
        make_record("train", task="segmentation", benchmark="b", model="m", status="failed")
    with pytest.raises(ValueError, match="does not go with reason 'NaN'"):
        make_record("train", task="segmentation", benchmark="b", model="m", reason="NaN")
    failed = make_record(
        "trial", task="segmentation", benchmark="b", model="m", status="failed", reason="NaN", number=3, study="s"
    )
    assert (failed["status"], failed["reason"], failed["number"]) == ("failed", "NaN", 3)


def test_a_long_reason_keeps_its_beginning_and_its_end() -> None:
    reason = f"the loss became nan, on the images {', '.join(map(str, range(2000)))};\n  lower train.lr"
    made = make_record("train", task="segmentation", benchmark="b", model="m", status="failed", reason=reason)["reason"]
    assert len(made) <= 500
    assert made.startswith("the loss became nan, on the images 0, 1, 2")
    assert made.endswith("1999; lower train.lr")
    assert " ... " in made
    assert (
        make_record("train", task="segmentation", benchmark="b", model="m", status="failed", reason="a\n b")["reason"]
        == "a b"
    )


def test_json_is_the_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    write_json(tmp_path / "deep/a.json", {"b": [1, 0.1, np.int64(3)], "a": {"é": None}, "p": Path("x/y")})
    write_json(tmp_path / "b.json", {"p": "x/y", "a": {"é": float("inf")}, "b": (1, 0.1, 3)})
    assert (tmp_path / "deep/a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert read_json(tmp_path / "b.json") == {"a": {"é": None}, "b": [1, 0.1, 3], "p": "x/y"}
    (tmp_path / "b.json").write_text("[1,")
    with pytest.raises(ValueError, match=r"b\.json: not valid JSON"):
        read_json(tmp_path / "b.json")


def test_rows_come_back_exactly(tmp_path: Path) -> None:
    rows = [
        {"model": "a, b", "seed": 0, "epoch": 1, "lr": 1e-05, "train.loss": 0.1 + 0.2},
        {"model": "1x", "seed": 0, "epoch": 2, "lr": None, "val.miou": np.float64(1 / 3), "train.loss": float("nan")},
    ]
    write_rows(tmp_path / "h.csv", rows, columns=["epoch"])
    assert (tmp_path / "h.csv").read_text().splitlines()[0] == "epoch,model,seed,lr,train.loss,val.miou"
    found = read_rows(tmp_path / "h.csv")
    assert found[0] == rows[0] | {"val.miou": None}
    assert np.isnan(found[1].pop("train.loss"))
    assert found[1] == {k: v for k, v in rows[1].items() if k != "train.loss"}
    assert type(found[0]["epoch"]) is int
    write_rows(tmp_path / "none.csv", [], columns=["model", "epoch"])
    assert read_rows(tmp_path / "none.csv") == []


def test_an_error_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as temporary:
            assert temporary.suffix == ".npz"
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_device_or_pipe_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecordError, match=r"pipe: not a regular file, .* name another"):
        write_json(tmp_path / "pipe", {})
    assert (tmp_path / "pipe").is_fifo()


def test_a_kill_never_leaves_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    code = f"from sunets.core.record import write_json\nwhile True: write_json({str(path)!r}, list(range(200_000)))"
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        end = time.monotonic() + 60
        while not path.exists() and time.monotonic() < end:
            time.sleep(0.02)
        for _ in range(20):
            assert len(read_json(path)) == 200_000  # a reader beside the writer
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert len(read_json(path)) == 200_000


def test_environment_names_what_a_result_depends_on() -> None:
    found = environment("cpu", 3)
    assert found["threads"] == 3
    assert found["device"] == "cpu"
    assert found["torch"] == torch.__version__
    assert found["cpu"]
    assert "gpu" not in found
    assert os.uname().nodename not in json.dumps(found)
    assert environment(torch.device("cpu"), 3) == found


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVIDIA UNIX aarch64 Kernel Module  540.3.0  Release Build  (builder)  Tue 2024", "540.3.0"),
        ("NVIDIA UNIX Open Kernel Module for x86_64  595.58.03  Release Build  (dvs-builder@U22-I3-AM02)", "595.58.03"),
        ("NVIDIA UNIX Open Kernel Module for aarch64  580.95  Release Build", "580.95"),
        ("unreadable", None),
    ],
)
def test_the_driver_s_version_is_that_of_either_kernel_module(
    line: str, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "version"
    file.write_text(f"NVRM version: {line}\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n")
    monkeypatch.setattr(core_provenance, "Path", lambda _: file)
    assert core_provenance._driver_version() == expected


@pytest.mark.gpu
def test_environment_of_a_gpu() -> None:
    found = environment("auto", 1)
    assert found["device"] == "cuda"
    assert found["gpu"] == torch.cuda.get_device_name(0)
    assert found["cuda"] == torch.version.cuda


def test_commands_hold_no_path_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "a b", "--params", str(tmp_path / "sub/p.yaml"), "--root=/mnt/big/camvid", "--set", "a.b=1"]
    line = command_line(arguments)
    assert line.endswith("train 'a b' --params sub/p.yaml --root=camvid --set a.b=1")
    code = "from sunets.core.provenance import command_line; print(command_line())"
    (tmp_path / "sunets_example.py").write_text(code)
    environ = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "sunets_example", "train", str(tmp_path / "x")]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "python -m sunets_example train x"


def test_stage_command_names_the_parameters_that_were_read(tmp_path: Path) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(Path("params.yaml").read_text())
    assert stage_command(load(), "train", "a") == "python -m sunets train a"
    suite = load(path, ["train.lr=0.01", "data.root=/mnt/big/set"])
    expected = "python -m sunets speed --params other.yaml --set train.lr=0.01 --set data.root=set"
    assert stage_command(suite, "speed") == expected
