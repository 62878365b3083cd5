"""Tiny data and configurations for the tests of training, scoring and prediction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from sunets.core.config import Config, DataConfig, EvaluateConfig, ModelConfig, TrainConfig, load, override
from sunets.data.manifest import Item, Manifest
from sunets.data.preparation import prepare

torch.set_num_threads(1)  # threads that wait for each other on a busy machine take ten times as long

COLORS = np.array([[40, 40, 40], [200, 60, 60], [60, 200, 90]], dtype=np.uint8)
SUNET = {
    "model.name": "sunet_tiny",
    "model.width": 4,
    "model.stem_channels": 8,
    "model.stage_channels": [8, 8, 8],
    "model.num_blocks": 1,
    "model.unet_depth": 1,
}
"""The smallest network with every kind of layer of a SUNet."""
SYNTHETIC = {"name": "synthetic", "synthetic": {"image_size": 32, "train": 16, "val": 4, "test": 4}}
"""Section `data` of a parameter file."""
NET = {key.removeprefix("model."): value for key, value in SUNET.items()}
"""The same as a model of a parameter file."""
PLAIN = {"name": "plain_conv_small", "width": 4}
TINY: dict[str, Any] = {
    "benchmark": "tiny",
    "seeds": [0, 1],
    "data": SYNTHETIC,
    "models": {"net": NET},
    "report": {"reference": "net"},
}
"""A parameter file of the defaults; tests add sections."""
DEPTH_STUDY = {
    "kind": "one_at_a_time",
    "model": "net",
    "seeds": [0],
    "axes": [{"path": "model.unet_depth", "values": [1]}],
}
"""The shortest study of a model `net`."""


class NoTracker:
    """Takes what a live tracker takes."""

    def __init__(self, *arguments: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments, **options: None


def write_checkout(root: Path, params: dict[str, Any]) -> Path:
    """Write params.yaml and prepare its data, in a directory that is made where it is absent."""
    root.mkdir(exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    prepare(load(root / "params.yaml").data, root / "data/prepared" / params["benchmark"])
    return root


def tiny_config(**values: Any) -> Config:
    """A configuration of two short epochs; keys are dotted paths with `__` for the dot."""
    base = Config(
        benchmark="tiny",
        seed=0,
        data=DataConfig(),
        model=ModelConfig(name="plain_conv_small", width=4),
        train=TrainConfig(epochs=2, batch_size=4, lr=0.01),
        evaluate=EvaluateConfig(batch_size=3, num_qualitative=2),
    )
    return override(base, {key.replace("__", "."): value for key, value in values.items()})


def tiny_manifest(folder: Path, task: str = "segmentation", train: int = 10, val: int = 5, size: int = 32) -> Manifest:
    """Rectangles of three colours with an ignored border; as classes of images, the rectangle's colour.

    The images of `val` differ in size. The same arguments give the same files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    splits: dict[str, tuple[Item, ...]] = {}
    counts: dict[str, list[int]] = {}
    shown: dict[str, list[int]] = {}
    for split, number in {"train": train, "val": val, "test": 2}.items():
        items, pixels, image_pixels = [], np.zeros(256, dtype=np.int64), np.zeros(256, dtype=np.int64)
        for index in range(number):
            draw = np.random.default_rng([len(split), index])
            height, width = size, size + (8 * (index % 2) if split == "val" and task == "segmentation" else 0)
            label = 1 + index % 2
            mask = np.zeros((height, width), dtype=np.uint8)
            (top, left), border = draw.integers(4, size // 2, 2), 1 + index % 3
            mask[top - border : top + size // 2 + border, left - border : left + size // 2 + border] = 255
            mask[top : top + size // 2, left : left + size // 2] = label
            noise = draw.integers(-30, 30, (height, width, 3))
            image = COLORS[np.where(mask == 255, 0, mask)].astype(np.int64) + noise
            name = f"{split}{index}"
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
            Image.fromarray(mask).save(folder / f"{name}_mask.png")
            target = folder / f"{name}_mask.png" if task == "segmentation" else label
            items.append(Item(id=name, image=folder / f"{name}.png", target=target, height=height, width=width))
            pixels += np.bincount(mask.ravel(), minlength=256)
            image_pixels[np.unique(mask)] += mask.size
        splits[split], counts[split], shown[split] = tuple(items), pixels[:3].tolist(), image_pixels[:3].tolist()
    return Manifest(
        name="synthetic",
        task=task,  # type: ignore[arg-type]
        classes=("ground", "red", "green"),
        palette=((0, 0, 0), (128, 0, 0), (0, 128, 0)),
        digest=f"tiny-{task}-{train}-{val}-{size}",
        mean=(0.4, 0.3, 0.3),
        std=(0.25, 0.2, 0.2),
        splits=splits,
        class_pixels=counts,
        image_pixels=shown,
    )
