"""Figures made of pixels: what their colours and lines say, and that their text can be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from test_report import record

from sunets.report import figures, images
from sunets.report.records import Records
from sunets.report.style import save_files


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Contrast of two colours as WCAG 2 defines it."""
    dark, light = sorted((images.luminance(one), images.luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    figures.plt.close("all")


@pytest.fixture
def street(tmp_path: Path) -> Records:
    """Three models on eleven classes, two seeds."""
    names = tuple(f"class_{i}" for i in range(11))
    rng = np.random.default_rng(0)
    raw, labels = {}, {}
    for model in "abc":
        labels[model] = f"Network {model}"
        rows = [
            record("evaluate", model, labels[model], seed=seed, variant="single_scale",
                   scores={"score.miou": 0.4} | {f"score.iou.{n}": float(rng.uniform()) for n in names})
            for seed in (0, 1)
        ]  # fmt: skip
        raw[f"evaluate/{model}.json"] = rows
        (tmp_path / "confusion").mkdir(exist_ok=True)
        counts = {f"seed{s}.single_scale": rng.integers(0, 90, (3, 11, 11)).astype(np.uint32) for s in (0, 1)}
        np.savez(tmp_path / "confusion" / f"{model}.npz", images=np.array(["x", "y", "z"]), **counts)
    return Records("camvid", tmp_path, labels, (0, 1), ("single_scale",), "segmentation", raw, classes=names)


def test_a_heat_map_of_one_value_is_drawn_and_its_texts_are_legible() -> None:
    _, ax = figures.plt.subplots()
    images.heat_map(ax, np.full((2, 2), 11.5), np.full((2, 2), "11.5"), (11.5, 11.5), 8.0)
    (mesh,) = ax.collections
    drawn = mesh.cmap(mesh.norm(11.5))[:3]
    assert len(ax.texts) == 4
    assert all(contrast(to_rgb(text.get_color()), drawn) >= 4.5 for text in ax.texts)


def test_ink_has_enough_contrast_to_every_colour_of_the_map() -> None:
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    shades = [colormaps["cividis"](x) for x in np.linspace(0, 1, 256)]
    grays = [(x, x, x) for x in np.linspace(0, 1, 256)]
    for color in (*shades, *grays):
        assert contrast(to_rgb(images.ink(color)), color[:3]) >= 4.5


def test_numbers_of_classes_can_be_read_and_show_their_spread(street: Records) -> None:
    ax = images.per_class(street).axes[0]
    assert len(ax.texts) == 3 * 11
    colors = ax.collections[0].get_facecolor()
    for text, background in zip(ax.texts, colors, strict=True):
        assert contrast(to_rgb(text.get_color()), tuple(background[:3])) >= 4.5
    assert sum("\n[" in text.get_text() for text in ax.texts) > 3 * 11 / 2  # the others reach 0 or 100 % somewhere


def test_confusion_of_eleven_classes_has_its_numbers(street: Records) -> None:
    axes = [ax for ax in images.confusion(street).axes if ax.images]
    assert len(axes) == 3
    for ax in axes:
        shown = np.asarray(ax.images[0].get_array())
        assert [text.get_text() for text in ax.texts] == [f"{v:.0f}" for v in shown.ravel()]
        assert min(text.get_fontsize() for text in ax.texts) >= 4.3
        for text in ax.texts:
            x, y = (int(v) for v in text.get_position())
            assert contrast(to_rgb(text.get_color()), ax.images[0].cmap(shown[y, x] / 100)[:3]) >= 4.5


def test_contour_encloses_95_percent_of_a_receptive_field() -> None:
    y, x = np.mgrid[-40:40, -40:40] + 0.5
    wide, narrow = (np.exp(-(x**2 + y**2) / (2 * s**2)) for s in (10.0, 3.0))
    for field in (wide, narrow):
        level = images.mass_level(field)
        assert field[field >= level].sum() >= 0.95 * field.sum()
        assert field[field > level].sum() < 0.95 * field.sum()
    figure = images.draw_fields({"wide": wide, "narrow": narrow, "flat": np.ones((80, 80))}, {})
    areas = []
    for ax in figure.axes[:2]:
        (contour,) = ax.collections
        (path,) = contour.get_paths()
        u, v = path.vertices.T
        areas.append(abs(np.sum(u[:-1] * v[1:] - u[1:] * v[:-1])) / 2)
    # 95 % of a Gaussian lie within 2.45 sigma; the smoothing of two pixels adds to the variance.
    for area, sigma in zip(areas, (10.0, 3.0), strict=True):
        assert area == pytest.approx(np.pi * 5.99 * (sigma**2 + 4), rel=0.05)
    assert not figure.axes[2].collections, "a constant field has no contour"
    assert figure.axes[0].images[0].get_clim() == (-3, 0)


def test_a_dollar_in_a_name_starts_no_formula(street: Records, tmp_path: Path) -> None:
    name = r"$5 or $6 or $\bad$"
    named = replace(street, labels={"a": name})
    pixels = np.zeros((16, 16), np.uint8)
    example = images.Example("x", np.zeros((16, 16, 3), np.uint8), pixels, {name: pixels})
    drawn = (
        images.per_class(named),
        images.qualitative([example], [name], ["road", name], np.zeros((2, 3), np.uint8)),
    )
    for number, figure in enumerate(drawn):
        save_files(figure, tmp_path / f"{number}.png")


def test_a_date_in_the_environment_that_is_no_number_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    (path,) = save_files(plt.figure(), tmp_path / "a.pdf")
    assert path.read_bytes().startswith(b"%PDF")
