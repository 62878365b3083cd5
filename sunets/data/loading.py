"""From a manifest to batches: decoding, augmentation, order.

A sample depends only on (seed, epoch, index) and the order of an epoch only on (seed, epoch): loader processes, the
number of training processes and resuming change no bit of either.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from sunets.core.config import IGNORE_INDEX, AugmentConfig, Config, ConfigError, DataConfig, derive_seed
from sunets.core.hardware import torch_threads
from sunets.data.manifest import Item, Manifest
from sunets.data.picture import MIN_SIDE, DataError, read_mask, read_picture

Key: TypeAlias = int | tuple[int, int]
"""(epoch, index), or an index for epoch 0."""

# Principal components of ImageNet's RGB values, 0..1 (Krizhevsky et al., 2012), as in all re-implementations.
_LIGHTING_VALUES = (0.2175, 0.0188, 0.0045)
_LIGHTING_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


class RandomScale(v2.Transform):
    """Resize by a random factor; torchvision's transforms draw a target size instead, or keep the canvas."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the new size of all inputs."""
        factor = torch.empty(()).uniform_(self.low, self.high).item()
        return {"size": [max(1, round(side * factor)) for side in v2.query_size(flat_inputs)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize an image by bilinear interpolation, a mask by `resize_mask`."""
        if isinstance(inpt, tv_tensors.Mask):
            return resize_mask(inpt, params["size"])
        return self._call_kernel(F.resize, inpt, params["size"], antialias=True)


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Resize labels (H, W) by sampling at pixel centres.

    torchvision resizes masks by `nearest`, which samples the upper left corner of a pixel: relative to the image, which
    is resized about the centres, labels would move by up to half a pixel.
    """
    labels = mask.as_subclass(Tensor)[None, None]
    return tv_tensors.wrap(interpolate(labels, list(size), mode="nearest-exact")[0, 0], like=mask)


class Lighting(v2.Transform):
    """Noise along the principal components of ImageNet's colours (Krizhevsky et al., 2012); the image becomes float."""

    _transformed_types = (tv_tensors.Image,)

    def __init__(self, std: float) -> None:
        super().__init__()
        self.std = std
        self.components = torch.tensor(_LIGHTING_VECTORS) * torch.tensor(_LIGHTING_VALUES)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the RGB offset of an image."""
        return {"offset": (self.components @ (torch.randn(3) * self.std)).view(3, 1, 1)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Add the offset: (3, H, W) uint8 -> float, about 0..1."""
        return F.to_dtype(inpt, torch.float32, scale=True) + params["offset"]


def training_transforms(augment: AugmentConfig, mean: Sequence[float]) -> v2.Transform | None:
    """Build the augmentation of an image and its mask, in the order scale, rotate, crop, flip, colour, lighting.

    Args:
        augment: the settings.
        mean: RGB, 0..1, to pad images with, so that padding is about 0 after normalisation. Masks are padded with 255.
    """
    fill: dict[Any, Any] = {tv_tensors.Image: [255 * m for m in mean], tv_tensors.Mask: IGNORE_INDEX}
    steps: list[v2.Transform] = []
    if augment.scale is not None:
        steps.append(RandomScale(*augment.scale))
    if augment.rotate_degrees:
        steps.append(v2.RandomRotation(augment.rotate_degrees, F.InterpolationMode.BILINEAR, fill=fill))
    if augment.crop is not None:
        steps.append(v2.RandomCrop(augment.crop, pad_if_needed=True, fill=fill))
    if augment.resized_crop is not None:
        steps.append(v2.RandomResizedCrop(augment.resized_crop, antialias=True))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment.color_jitter:
        steps.append(v2.ColorJitter(augment.color_jitter, augment.color_jitter, augment.color_jitter))
    if augment.lighting:
        steps.append(Lighting(augment.lighting))
    return v2.Compose(steps) if steps else None


class ImageDataset(Dataset[tuple[Tensor, Any]]):
    """A split of a manifest; made by `make_dataset`.

    `dataset[epoch, index]` and `dataset[index]` (epoch 0) return the image, float32 (3, H, W), normalised by the
    manifest's mean and std, and its target: int64 (H, W) with 255 ignored, the class, or None without labels.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        config: DataConfig,
        augment: AugmentConfig | None,
        seed: int,
        center_crop: int | None,
    ) -> None:
        self.manifest = manifest
        self.split = split
        self.items: tuple[Item, ...] = manifest.splits[split]
        self.size = config.size
        self.seed = seed
        self.center_crop = center_crop
        self.transforms = training_transforms(augment, manifest.mean) if augment is not None else None
        self._mean = torch.tensor(manifest.mean).view(3, 1, 1)
        self._std = torch.tensor(manifest.std).view(3, 1, 1)
        self._cache = [self._read(item) for item in self.items] if config.cache else None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: Key) -> tuple[Tensor, Any]:
        image, target = self._sample(key)
        return self._normalize(image), _long(target)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Any]:
        """Return a batch, for the loader: images (B, 3, H, W) and targets (B, H, W), (B,) or None."""
        images, targets = zip(*map(self._sample, keys), strict=True)
        if targets[0] is None:
            stacked = None
        elif isinstance(targets[0], int):
            stacked = torch.tensor(targets)
        else:
            stacked = _long(torch.stack(targets))
        return self._normalize(torch.stack(images)), stacked

    def output_size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of an image in evaluation."""
        if self.center_crop is not None:
            return self.center_crop, self.center_crop
        return self.size or (self.items[index].height, self.items[index].width)

    def _sample(self, key: Key) -> tuple[Tensor, Any]:
        """Return the augmented image (3, H, W), uint8 or float 0..1, and its target in the stored type."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        image, target = self._cache[index] if self._cache is not None else self._read(self.items[index])
        if self.transforms is not None:
            # A mean over an image, as of the contrast, is rounded otherwise by more threads, which a loader lacks.
            with torch.random.fork_rng(devices=[]), torch_threads(1):
                # not torch.manual_seed, which would seed the GPUs too, outside the fork
                torch.default_generator.manual_seed(derive_seed(self.seed, "augment", epoch, index))
                image, target = self.transforms(image, target)
        return image, target

    def _read(self, item: Item) -> tuple[Tensor, Any]:
        """Decode and resize: uint8 image (3, H, W) and uint8 mask (H, W), class or None."""
        image: Tensor = tv_tensors.Image(torch.from_numpy(read_picture(item.image)).permute(2, 0, 1).contiguous())
        target: Any = item.target
        if item.target is not None and not isinstance(item.target, int):
            target = tv_tensors.Mask(torch.from_numpy(read_mask(item.target).astype("uint8")))
        if self.size is not None and tuple(image.shape[-2:]) != self.size:
            image = F.resize(image, list(self.size), antialias=True)
            if isinstance(target, Tensor):
                target = resize_mask(target, self.size)
        if self.center_crop is not None:
            image = F.resize(image, [round(self.center_crop * 256 / 224)], antialias=True)  # the shorter side
            image = F.center_crop(image, [self.center_crop, self.center_crop])
        return image, target

    def _normalize(self, images: Tensor) -> Tensor:
        """Turn (..., 3, H, W), uint8 or 0..1, into float32 of mean 0 and standard deviation 1 on the training split."""
        images = images.as_subclass(Tensor)
        scaled = images.float().div_(255) if images.dtype == torch.uint8 else images
        return scaled.sub(self._mean).div_(self._std)


def _long(target: Any) -> Any:
    return target.as_subclass(Tensor).long() if isinstance(target, Tensor) else target


def make_dataset(
    manifest: Manifest,
    split: str,
    config: DataConfig,
    augment: AugmentConfig | None,
    seed: int,
    *,
    center_crop: int | None = None,
) -> ImageDataset:
    """Make a map-style data set of a split.

    Args:
        manifest: from `prepare` or `load_manifest`.
        split: name of the split.
        config: size and cache.
        augment: augmentation for training; None for evaluation.
        seed: seed of the augmentation.
        center_crop: classification without `augment`: resize the shorter side to 256/224 of this and crop the centre.

    Raises:
        DataError: the split does not exist, or its images do not fit into one batch.
    """
    if split not in manifest.splits:
        raise DataError(f"split {split!r}: not prepared; prepared are {', '.join(manifest.splits)}")
    if augment is not None:
        if augment.resized_crop is not None and manifest.task != "classification":
            raise DataError("train.augment.resized_crop: for classification; use scale and crop for segmentation")
        cropped = augment.crop is not None or augment.resized_crop is not None
        sizes = {(i.height, i.width): i for i in manifest.splits[split]}
        if not cropped and augment.scale is not None:
            raise DataError(
                "train.augment.scale: needs train.augment.crop, so that all images of a batch have one size"
            )
        small = next((i for i in manifest.splits[split] if min(i.height, i.width) < MIN_SIDE), None)
        if small is not None and augment.resized_crop is None and config.size is None:
            raise DataError(
                f"{small.image}: {small.width}x{small.height} pixels; at least {MIN_SIDE} per side are needed; "
                "enlarge or remove it, or set train.augment.resized_crop"
            )
        if not cropped and config.size is None and len(sizes) > 1:
            (a, first), (b, second), *_ = sizes.items()
            raise DataError(
                f"split {split!r}: images differ in size ({first.id} is {a[1]}x{a[0]}, {second.id} {b[1]}x{b[0]}); "
                "set data.size, train.augment.crop or train.augment.resized_crop"
            )
    return ImageDataset(manifest, split, config, augment, seed, center_crop)


def scoring_dataset(manifest: Manifest, split: str, config: Config) -> ImageDataset:
    """Make the data set to score a split on: not augmented; centre crops if a classifier trains on random crops.

    Its images are read once, so none are cached.
    """
    data = config.data.model_copy(update={"cache": False})
    crop = config.train.augment.resized_crop if manifest.task == "classification" else None
    return make_dataset(manifest, split, data, None, 0, center_crop=crop)


def check_scoring(config: Config, manifest: Manifest) -> None:
    """Refuse test-time variants that the test split cannot be scored with.

    Raises:
        ConfigError: no such split, no labels, a window for classification, or a scale that makes an image too small.
    """
    split = config.data.test_split
    items = manifest.splits.get(split)
    if not items:
        raise ConfigError(f"data.test_split: no split {split!r} in the data set; it has {', '.join(manifest.splits)}")
    if any(item.target is None for item in items):
        raise ConfigError(f"data.test_split: the split {split!r} has no labels to score; choose another")
    dataset = scoring_dataset(manifest, split, config)
    height, width = min((dataset.output_size(index) for index in range(len(items))), key=min)
    for name, variant in config.evaluate.variants.items():
        key = f"evaluate.variants.{name}"
        if variant.window is not None:
            if manifest.task != "segmentation":
                raise ConfigError(f"{key}.window: for segmentation; leave it out for classification")
            continue  # images smaller than the window are padded
        for scale, factor in zip(variant.scales, variant.factors(height, width), strict=True):
            if round(min(height, width) * factor) < MIN_SIDE:
                raise ConfigError(
                    f"{key}.scales: {scale} makes {round(height * factor)} x {round(width * factor)} pixels of the "
                    f"smallest test image ({height} x {width}); networks need {MIN_SIDE} per side: omit the scale, "
                    "or give the variant a window"
                )


def iterations_per_epoch(n: int, batch_size: int) -> int:
    """Return the number of batches of `n` samples: the last is filled up from the beginning of the epoch."""
    return math.ceil(n / batch_size)


class _EpochBatches:
    """Batches of one process in an epoch, as (epoch, index) keys."""

    def __init__(self, n: int, batch_size: int, seed: int, epoch: int, start: int, rank: int, world_size: int) -> None:
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        self.order = torch.randperm(n, generator=generator).tolist()
        self.epoch, self.batch_size, self.start = epoch, batch_size, start
        self.stop = iterations_per_epoch(n, batch_size)
        local_size = batch_size // world_size
        self.positions = range(rank * local_size, (rank + 1) * local_size)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        n = len(self.order)
        for iteration in range(self.start, self.stop):
            first = iteration * self.batch_size
            yield [(self.epoch, self.order[(first + p) % n]) for p in self.positions]


def train_batches(
    dataset: ImageDataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start_iteration: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> DataLoader[tuple[Tensor, Any]]:
    """Load one epoch of full batches: images (B, 3, H, W) float32 and targets (B, H, W) or (B,) int64.

    Args:
        dataset: with augmentation.
        batch_size: images per global batch; a process gets `batch_size / world_size` consecutive ones of it.
        seed: seed of the order.
        epoch: for the order and the augmentation.
        start_iteration: number of batches to skip, in a resumed training.
        rank: rank of this process.
        world_size: number of processes.
        workers: number of loader processes.

    Raises:
        DataError: the batch cannot be divided by the number of processes.
    """
    if batch_size % world_size:
        raise DataError(f"train.batch_size: {batch_size} is not a multiple of {world_size} processes; use a multiple")
    batches = _EpochBatches(len(dataset), batch_size, seed, epoch, start_iteration, rank, world_size)
    return _loader(dataset, batches, workers)


def eval_batches(
    dataset: ImageDataset, batch_size: int, workers: int = 0, indices: Sequence[int] | None = None
) -> Iterator[tuple[list[str], Tensor, Any]]:
    """Load (ids, images, targets) in the order of the split; a batch ends where the image size changes.

    Args:
        dataset: without augmentation.
        batch_size: most images per batch.
        workers: number of loader processes.
        indices: items to load; None loads all.

    Yields:
        ids of B images; images (B, 3, H, W) float32; targets (B, H, W) or (B,) int64, or None without labels.
    """
    batches: list[list[int]] = []
    for index in range(len(dataset)) if indices is None else indices:
        if (
            batches
            and len(batches[-1]) < batch_size
            and dataset.output_size(batches[-1][-1]) == dataset.output_size(index)
        ):
            batches[-1].append(index)
        else:
            batches.append([index])
    for batch, (images, targets) in zip(batches, _loader(dataset, batches, workers), strict=True):
        yield [dataset.items[i].id for i in batch], images, targets


def _loader(dataset: ImageDataset, batches: Any, workers: int) -> DataLoader[tuple[Tensor, Any]]:
    # Forked processes inherit a cached split. By another start method, such as that of jobs side by side, each of its
    # tensors would be sent as an open file. Fork is safe here: they compute with one thread, and never on a GPU.
    context = "fork" if workers and sys.platform == "linux" else None
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_identity,
        multiprocessing_context=context,
        # a separate one: the loader draws a base seed for its workers, which would advance the training's generator
        generator=torch.Generator(),
    )


def _identity(batch: Any) -> Any:
    """Return the batch that `ImageDataset.__getitems__` has made."""
    return batch
