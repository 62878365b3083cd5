"""Parameters: one reader, one pattern of names, bounds on every value, and errors of one line a fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from sunets.core.config import ConfigError, Suite, load, read_yaml
from sunets.core.names import check_name
from sunets.core.record import read_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]
SMOKE = (ROOT / "presets" / "smoke.yaml").read_text(encoding="utf-8")
PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: 1\nb: {c: 1, c: 2}\n", ["line 2", "'c'", "twice"]),
        (b"a: 1\na: 1\n", ["line 2", "'a'", "twice"]),
        (b"a: [1\n", ["not valid YAML"]),
        (b"a:\n\t- 1\n", ["line 2", "not valid YAML"]),
        (b"a: &x [1, *x]\n", ["alias"]),
        (b"a: *x\n", ["undefined alias 'x'"]),
        (b"a: \xe9\n", ["not UTF-8", "byte 3"]),
        (b"a: \x01\n", ["not valid YAML"]),
        (b"a: !!python/object:os.system x\n", ["not valid YAML"]),
        (b"a: 2001-01-01\n", ["date", "quotes"]),
        (b"1: a\n", ["the key 1", "quotes"]),
        (b"[" * 3000, ["not valid YAML"]),
        (b'a: "x\\0y"\n', ["NUL", "again"]),
        (b'a: {"\\ud800": 1}\n', ["half of a character"]),
    ],
)
def test_yaml_that_cannot_be_trusted_is_one_error(tmp_path: Path, content: bytes, words: list[str]) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_yaml(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a regular file"):
        read_yaml(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("a: 1e-3\nb: 010\nc: yes\n")
    assert read_yaml(path) == {"a": 0.001, "b": 10, "c": "yes"}


def test_committed_parameter_files_have_every_key_once() -> None:
    assert len(PRESETS) > 10
    for path in [ROOT / "params.yaml", *PRESETS]:
        assert read_yaml(path)["benchmark"], path


@pytest.mark.parametrize(
    "setting", ["train.lr=[", "train.lr=!!python/name:os.system", "train.lr", "seeds.x=1", "train={lr: 1, lr: 2}"]
)
def test_settings_that_are_no_yaml_are_one_error(setting: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load(ROOT / "presets" / "smoke.yaml", [setting])


@pytest.mark.parametrize("name", ["a", "tiny_0-5x", "_x", "9", "A" * 64])
def test_names_that_are_safe(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "-x", "a b", "a/b", "../x", "a.b", "x; touch PWNED #", "$(x)", "'", "é", "a\n", "A" * 65, "\0"]
)
def test_names_that_would_leave_their_directory_or_reach_a_shell(name: str) -> None:
    for section in ("models", "ablations"):
        text = SMOKE.replace("plain_conv_small:" if section == "models" else "unet_depth:", "PLACE:", 1)
        assert text != SMOKE
        tree = YAML(typ="safe").load(text)
        tree[section][name] = tree[section].pop("PLACE")
        with pytest.raises(ConfigError, match=r"use letters, digits, _ and -|has NUL"):
            _load(tree)


@pytest.mark.parametrize(
    "name", ["18", '"18"', "1e3", '"1e3"', '"1e-3"', '"007"', '"nan"', '"Inf"', "null", "true", "1.5"]
)
@pytest.mark.parametrize("section", ["models", "ablations", "variants"])
def test_names_that_are_numbers_or_no_text_are_one_clear_line(section: str, name: str, tmp_path: Path) -> None:
    """Tables would give back a number in place of the name."""
    named = {
        "models": f"models: {{net: {{name: unet_small}}, {name}: {{name: unet_small}}}}",
        "ablations": f"ablations: {{{name}: {{kind: one_at_a_time, model: net, "
        "axes: [{path: model.width, values: [4]}]}}",
        "variants": f"evaluate: {{variants: {{{name}: {{scales: [1.0]}}}}}}",
    }
    rest = "" if section == "models" else "models: {net: {name: unet_small}}\n"
    path = tmp_path / "params.yaml"
    path.write_text(f"benchmark: b\ndata: {{name: synthetic}}\nreport: {{reference: net}}\n{rest}{named[section]}\n")
    with pytest.raises(ConfigError, match=r"(one|name) that is not a number, such as resnet18") as raised:
        load(path)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["on", '"null"', '"true"', "off", "no", "resnet18", "18x", "e3", "1_x"])
def test_names_of_words_are_text(name: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = name.strip('"')
    path.write_text(f"benchmark: b\ndata: {{name: synthetic}}\nreport: {{reference: {name}}}\n"
                    f"models: {{{name}: {{name: unet_small}}}}\n")  # fmt: skip
    assert list(load(path).models) == [text]
    write_rows(tmp_path / "table.csv", [{"model": text}])
    assert read_rows(tmp_path / "table.csv") == [{"model": text}]


def test_names_that_differ_in_case_only_are_refused() -> None:
    tree = YAML(typ="safe").load(SMOKE)
    tree["models"]["SUNET_tiny"] = tree["models"]["sunet_tiny"]
    with pytest.raises(ConfigError, match="one file on a Mac"):
        _load(tree)
    tree["data"] = {"name": "folder", "root": "own", "val_split": "val", "test_split": "Val"}
    with pytest.raises(ConfigError, match="names 'val' and 'Val' are one file on a Mac"):
        _load(tree)


@pytest.mark.parametrize("chosen", ["tune", "ablations.chosen"])
def test_the_scored_split_chooses_nothing(chosen: str) -> None:
    tree = YAML(typ="safe").load(SMOKE)
    axis = {"path": "train.lr", "low": 0.001, "high": 0.01}
    tree["data"]["test_split"] = "val"
    tree |= {"tune": {"trials": 0}, "ablations": {}}
    _load(tree)
    if chosen == "tune":
        tree["tune"] = {"trials": 2, "space": [axis]}
    else:
        tree["ablations"]["chosen"] = {"kind": "search", "model": "sunet_tiny", "trials": 2, "axes": [axis]}
    with pytest.raises(ConfigError, match=rf"data\.test_split: another split .*\(val\), on which {chosen} chooses"):
        _load(tree)


def test_a_range_of_whole_numbers_is_no_recipe() -> None:
    space = "[{path: train.batch_size, low: 8, high: 64}]"
    with pytest.raises(ConfigError, match=r"tune\.space: train\.batch_size: whole numbers; give values"):
        load(ROOT / "presets" / "smoke.yaml", ["tune.trials=2", f"tune.space={space}"])


@pytest.mark.parametrize(
    "setting",
    [
        "evaluate.variants.single_scale.scales=[.inf]",
        "evaluate.variants.single_scale.scales=[.nan]",
        "evaluate.variants.single_scale.scales=[]",
        "evaluate.variants.single_scale.scales=[0]",
        "evaluate.variants.single_scale.window=[0, 0]",
        "evaluate.variants.single_scale.window=[-5, 10]",
        "train.augment.crop=[-8, -8]",
        "train.augment.scale=[-1, 0]",
        "train.augment.scale=[2, 0.5]",
        "train.augment.scale=[1e-9, 1]",
        "train.augment.lighting=.inf",
        "train.betas=[2, 2]",
        "train.class_weights=[.nan, 1, 1, 1, 1]",
        "train.class_weights=[0, 0, 0]",
        "train.class_weights=[1e-300, 1, 1, 1, 1]",
        "train.class_weights=[1e300, 1, 1, 1, 1]",
        "data.val_split=train",
        "data.test_split=train",
        "train.lr=.inf",
        "train.weight_decay=.inf",
        "train.warmup_epochs=.nan",
        "train.threads=100000",
        "train.batch_size=0",
        "train.epochs=1000000000",
        "cost.size=[0, 0]",
        "cost.size=[1000000, 1000000]",
        "data.size=[8, 8]",
        "data.workers=-1",
        "data.synthetic.image_size=1000000",
        "seeds=[-1]",
        "seeds=[0, 0]",
        "models.sunet_tiny.width=0",
        "models.sunet_tiny.num_blocks=-1",
        "ablations.unet_depth.overrides={train.epochs: 0}",
        "ablations.unet_depth.axes=[{path: train.lr, values: [.inf]}]",
        "ablations.unet_depth.axes=[{path: model.no_such_key, values: [1, 2]}]",
    ],
)
def test_values_that_no_run_can_use_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(ROOT / "presets" / "smoke.yaml", [setting])
    key = setting.partition("=")[0]
    assert key.rpartition(".")[2] in str(raised.value), "the key is named"


def _load(tree: dict[str, Any]) -> Suite:
    import tempfile

    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        YAML(typ="safe").dump(tree, file)
        file.flush()
        return load(file.name)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["../x", "none", "auto", 0, -1, 10**30, 1e308]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)


def _paths(node: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(node, dict):
        return [prefix]
    return [prefix] * bool(prefix) + [path for key, value in node.items() for path in _paths(value, (*prefix, key))]


EVERY_KEY = _paths(load(ROOT / "presets" / "smoke.yaml").model_dump(mode="json"))


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(EVERY_KEY), VALUES), min_size=1, max_size=3))
def test_any_parameter_file_loads_or_is_an_error_for_the_user(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    tree = load(ROOT / "presets" / "smoke.yaml").model_dump(mode="json")
    for (*parents, leaf), value in changes:
        node = tree
        for key in parents:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict):
            node[leaf] = value
    try:
        suite = Suite.checked(tree, "params.yaml")
    except ConfigError as error:
        message = str(error)
    else:
        message = "params.yaml"
        assert suite.config(next(iter(suite.models)), suite.seeds[0]).train.lr > 0
    assert all(line.startswith("params.yaml") for line in message.splitlines())
