"""Names that become paths, and directories that no data set may lie in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from checkout import ROOT, clone, run

from sunets.core.config import ConfigError, DataConfig, load
from sunets.core.names import child, overlap, printable

BAD = ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\nb", "a\x00b", "caf\udce9", "x" * 300, "a\u2028b"]


@pytest.mark.parametrize("name", BAD)
def test_a_name_never_leads_out_of_its_directory(name: str) -> None:
    with pytest.raises(ValueError, match="rename it"):
        child(Path("here"), name)


@pytest.mark.parametrize("name", ["photo 0", "2007_000032", "Straße.v2", "写真", "..a", "-x"])
def test_ordinary_names_are_kept(name: str) -> None:
    assert child(Path("here"), name, ".png") == Path("here") / f"{name}.png"


@pytest.mark.parametrize("name", ["../x", "a/b", "", "a b", "x.y", "tr\n", "x" * 65])
def test_split_names_are_checked(name: str) -> None:
    for key in ("train_split", "val_split", "test_split"):
        with pytest.raises(ValueError, match=key):
            DataConfig(**{key: name})


def test_printable_is_one_line() -> None:
    assert printable("a\nb\x1b[31m caf\udce9 é 写") == "a\\nb\\x1b[31m caf\\udce9 é 写"


@pytest.mark.parametrize(
    ("place", "relation"),
    [
        ("data/prepared", "is"),
        ("data/prepared/folder", "lies in"),
        ("outputs/mine", "lies in"),
        ("results", "is"),
        (".work/x/y", "lies in"),
        ("data", "contains"),
        (".", "contains"),
        ("..", "contains"),
        ("link", "lies in"),
        ("data/folder", None),
        ("datasets/folder", None),
        ("../elsewhere", None),
    ],
)
def test_places_of_a_data_set(
    place: str, relation: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = tmp_path / "checkout"
    (checkout / "outputs" / "mine").mkdir(parents=True)
    (checkout / "link").symlink_to("outputs/mine")
    monkeypatch.chdir(checkout)
    fault = overlap(place)
    assert (fault is None) == (relation is None)
    assert fault is None or relation in fault
    assert overlap(checkout / place, checkout) == (fault and fault.replace(place, str(checkout / place), 1))


def test_an_output_that_is_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "set").mkdir(parents=True)
    (tmp_path / "outputs").symlink_to("disk")
    assert "lies in outputs/" in str(overlap(tmp_path / "disk" / "set", tmp_path))


def test_loading_refuses_such_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.root: outputs lies|data\.root: outputs is"):
        load(ROOT / "presets" / "folder.yaml", ["data.root=outputs"])


@pytest.mark.slow
def test_commands_touch_nothing_of_such_a_root(tmp_path: Path, call: Callable[..., str]) -> None:
    root = clone(tmp_path / "checkout")
    for place in ("data/prepared/folder", "outputs", "results/mine", ".work", "data/.."):
        mine = root / place / "images" / "mine.txt"
        mine.parent.mkdir(parents=True, exist_ok=True)
        mine.write_text("mine")
        before = (root / "params.yaml").read_bytes()
        assert "of the checkout" in call(root, "preset", "folder", "--root", place, code=2)
        assert (root / "params.yaml").read_bytes() == before
        tree = yaml.safe_load((root / "presets" / "folder.yaml").read_text())
        tree["data"]["root"] = place
        (root / "other.yaml").write_text(yaml.safe_dump(tree))
        assert "data.root" in call(root, "prepare", "--params", "other.yaml", code=2)
        assert mine.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "cost"])
def test_dvc_deletes_nothing_by_a_key_that_leads_outside(stage: str, tmp_path: Path) -> None:
    root = clone(tmp_path / "checkout")
    run(root, "dvc", "repro", "prepare")
    key = "../../../../mine/a"  # of outputs/smoke/weights/KEY and results/smoke/records/KIND/KEY.json
    mine = [tmp_path / "mine" / name for name in ("a.json", "a.npz", "a.csv")]
    mine += [root / "mine" / name for name in ("a.json", "a.npz", "a.csv", "a/thesis.txt")]
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    tree = yaml.safe_load((root / "params.yaml").read_text())
    tree["models"][key] = tree["models"].pop("plain_conv_small")
    (root / "params.yaml").write_text(yaml.safe_dump(tree))
    run(root, "dvc", "repro", "--single-item", f"{stage}@{key}", code=255)
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)


def test_every_preset_of_files_is_watched() -> None:
    for path in (ROOT / "presets").glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
        assert ("root" in tree["data"] or "init_from:" in text) == ("watch" in tree), path.name
