"""`sunets preset`: what it writes, and what it keeps."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from checkout import ROOT
from PIL import Image
from typer.testing import CliRunner

from sunets import presets
from sunets.__main__ import app
from sunets.core.config import load
from sunets.presets import list_presets, use_preset

SMOKE = (ROOT / "presets/smoke.yaml").read_bytes()
MINE = SMOKE + "# mein Versuch, 写真\n".encode()


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


@pytest.fixture(autouse=True)
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with its presets, one of them in place and committed."""
    for key in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(key, raising=False)
    folder = tmp_path / "my project (1)"
    shutil.copytree(ROOT / "presets", folder / "presets")
    monkeypatch.chdir(folder)
    (folder / "params.yaml").write_bytes(MINE)
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "mine")
    return folder


def kept(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("params.yaml.kept-*"))]


def test_what_a_commit_holds_is_replaced(checkout: Path) -> None:
    assert use_preset("smoke") == (None, None)
    assert (checkout / "params.yaml").read_bytes() == SMOKE
    assert use_preset("default") == (None, None)  # a preset is in place
    assert kept(checkout) == []


def test_what_an_earlier_commit_of_another_branch_holds_is_replaced(checkout: Path) -> None:
    git("checkout", "-q", "-b", "other")
    (checkout / "params.yaml").write_bytes(b"# another\n")
    git("commit", "-q", "-am", "another")
    (checkout / "params.yaml").write_bytes(MINE)
    assert use_preset("smoke") == (None, None)


@pytest.mark.parametrize("staged", [False, True])
def test_edits_in_no_commit_are_kept_and_named(checkout: Path, staged: bool) -> None:
    edited = MINE + b"\xff not even UTF-8\n"
    (checkout / "params.yaml").write_bytes(edited)
    if staged:
        git("add", ".")  # git knows the content, and may drop it
    result = CliRunner().invoke(app, ["preset", "smoke"])
    assert result.exit_code == 0
    (name,) = re.findall(r"kept as (\S+)", result.stderr)
    assert (checkout / name).read_bytes() == edited
    assert (checkout / "params.yaml").read_bytes() == SMOKE
    (checkout / "params.yaml").write_bytes(edited + b"# more\n")
    use_preset("smoke")
    assert kept(checkout) == sorted([edited, edited + b"# more\n"], key=kept(checkout).index)


def test_without_git_everything_but_a_preset_is_kept(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout))
    use_preset("smoke")
    assert kept(checkout) == [MINE]
    use_preset("default")
    assert kept(checkout) == [MINE]


def test_a_refused_preset_touches_nothing(checkout: Path) -> None:
    (checkout / "params.yaml").write_bytes(b"# edited\n")
    with pytest.raises(FileNotFoundError, match="--root nowhere: no such directory"):
        use_preset("folder", Path("nowhere"))
    (checkout.parent / "set").mkdir()
    with pytest.raises(ValueError, match="embedded data"):
        use_preset("smoke", checkout.parent / "set")
    with pytest.raises(ValueError, match=r"--root: .* of the checkout, whose content the pipeline deletes"):
        use_preset("folder", checkout)
    for name in ("nonsense", "../params"):
        with pytest.raises(ValueError, match=rf"{name}: no such preset; there are .*smoke"):
            use_preset(name)
    assert (checkout / "params.yaml").read_bytes() == b"# edited\n"
    assert kept(checkout) == []


@pytest.mark.parametrize(
    "name",
    ["données", "写真", "a\\b", r"C:\new\1", 'quote"s', "it's", "a # b", "tab\there", "line\nbreak", "\x7f", "\u2028",
     "😀", "\\g<0>", "%s {x}", "  spaces  "],
)  # fmt: skip
def test_any_path_of_a_data_set_comes_back_from_the_file(checkout: Path, name: str) -> None:
    root = checkout.parent / "sets" / name
    root.mkdir(parents=True)
    use_preset("folder", root)
    text = (checkout / "params.yaml").read_text(encoding="utf-8")
    assert load("params.yaml").data.root == str(root.resolve())
    assert text.splitlines()[1:3] == (ROOT / "presets/folder.yaml").read_text(encoding="utf-8").splitlines()[1:3]


def test_a_path_that_is_not_utf8_is_one_line(checkout: Path) -> None:
    root = Path(str(checkout.parent / "caf\udce9"))
    try:
        root.mkdir()
    except (OSError, UnicodeError):
        pytest.skip("this file system takes UTF-8 alone")
    with pytest.raises(ValueError, match=r"--root .*caf\\udce9: its path is not UTF-8; rename it"):
        use_preset("folder", root)


@pytest.mark.parametrize(
    ("sizes", "size"),
    [
        ([(480, 640)], (224, 288)),
        ([(640, 480)], (288, 224)),
        ([(480, 640), (480, 640), (640, 480)], (224, 288)),  # the median
        ([(300, 300), (2000, 2000)], None),
        ([(96, 160)], (96, 160)),  # not enlarged
        ([(20, 2000)], (32, 2000)),
        ([], None),
    ],
)
def test_own_data_keeps_the_aspect_ratio_of_most_images(
    checkout: Path, sizes: list[tuple[int, int]], size: tuple[int, int] | None
) -> None:
    root = checkout.parent / "[256, 256]"  # a path, not the size that is replaced
    (root / "images").mkdir(parents=True)
    (root / "images/damaged.png").write_bytes(b"none")  # `prepare` names it
    for index, (height, width) in enumerate(sizes):
        Image.new("L", (width, height)).save(root / f"images/{index}.png")
    assert use_preset("folder", root) == (None, size)
    suite = load("params.yaml")
    expected = size or (256, 256)
    assert suite.data.size == suite.train.augment.crop == suite.cost.size == expected
    assert suite.data.root == str(root)
    printed = CliRunner().invoke(app, ["preset", "folder", "--root", str(root)]).stdout
    assert (f"data.size is now {expected[0]} x {expected[1]} pixels" in printed) is (size is not None)


@pytest.mark.parametrize("text", ["", "data:\n", "data: [\n", "data:\n  name: folder\n  root: set\n", "\ttab: {\n"])
def test_a_preset_of_the_user_is_taken_as_it_is(checkout: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "set/images").mkdir(parents=True)
    Image.new("L", (64, 32)).save(checkout / "set/images/a.png")
    monkeypatch.setattr(presets, "PRESETS", checkout / "mine")
    (checkout / "mine").mkdir()
    (checkout / "mine/mine.yaml").write_text(text)
    assert use_preset("mine")[1] is None
    assert (checkout / "params.yaml").read_text() == text


def test_the_list_has_the_first_line_of_each() -> None:
    listed = list_presets()
    assert listed.keys() == {path.stem for path in (ROOT / "presets").glob("*.yaml")}
    assert all(listed.values())


def test_a_file_that_is_no_preset_is_named_and_hides_no_other(checkout: Path) -> None:
    (checkout / "presets/latin1.yaml").write_bytes(b"# Stra\xdfen\n" + SMOKE)
    os.mkfifo(checkout / "presets/fifo.yaml")
    assert list_presets()["latin1"] == "Stra\ufffden"
    assert "fifo" not in list_presets()
    with pytest.raises(ValueError, match=r"presets/latin1\.yaml: not UTF-8 \(byte 6\); save the file as UTF-8"):
        use_preset("latin1")
    (checkout / "params.yaml").unlink()
    os.mkfifo(checkout / "params.yaml")
    with pytest.raises(ValueError, match=r"params\.yaml: not a regular file; move it away"):
        use_preset("smoke")


@pytest.fixture
def environment(checkout: Path) -> Path:
    """Directory of programs of an environment that `make` takes for complete."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, checkout)
    programs = checkout / ".venv/bin"
    programs.mkdir(parents=True)
    (checkout / ".venv/.stamp").touch()
    return programs


@pytest.mark.parametrize("target", ["repro", "repro-from-nothing", "transfer", "paper"])
def test_make_removes_a_table_of_locks_that_a_kill_left_empty(target: str, checkout: Path, environment: Path) -> None:
    locks = checkout / ".dvc/tmp/rwlock"
    for name, does in (("dvc", "ls .dvc/tmp"), ("python", "true")):
        (environment / name).write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
        (environment / name).chmod(0o755)
    locks.parent.mkdir(parents=True)
    for content, kept in (("", False), ("{}", True)):
        locks.write_text(content)
        done = subprocess.run(["make", target], capture_output=True, encoding="utf-8", check=True)
        assert ("rwlock" in done.stdout.splitlines()) == kept


def test_make_ui_gives_mlflow_one_address_in_a_path_with_spaces(environment: Path) -> None:
    program = environment / "mlflow"
    program.write_text('#!/bin/sh\nfor a in "$@"; do echo "argument: $a"; done\n', encoding="utf-8")
    program.chmod(0o755)
    done = subprocess.run(["make", "ui"], capture_output=True, encoding="utf-8", check=True)
    assert "argument: sqlite:///mlflow.db" in done.stdout.splitlines()  # of the directory in which make runs
