"""Loading: what a sample looks like, and that it depends on seed, pass and index alone."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from standins import make_camvid, make_folder, make_imagefolder, make_voc
from torchvision import tv_tensors
from torchvision.transforms import v2

from sunets.core.config import AugmentConfig, DataConfig, SyntheticConfig
from sunets.data.loading import (
    RandomScale,
    eval_batches,
    iterations_per_epoch,
    make_dataset,
    train_batches,
    training_transforms,
)
from sunets.data.picture import DataError, read_picture
from sunets.data.preparation import prepare

HEAVY = AugmentConfig(scale=(0.5, 2.0), crop=(24, 28), rotate_degrees=10, color_jitter=0.4, lighting=0.1)
PLAIN = AugmentConfig(flip=False)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    config = DataConfig(synthetic=SyntheticConfig(image_size=32, train=10, val=5, test=3))
    return config, prepare(config, tmp_path_factory.mktemp("small") / "data")


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


def raw(manifest, images):
    """Normalised images back to 0..255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (manifest.mean, manifest.std))
    return ((images * std + mean) * 255).round()


def test_evaluation_item_is_the_file(small):
    config, manifest = small
    image, target = make_dataset(manifest, "val", config, None, 0)[2]
    item = manifest.splits["val"][2]
    assert (image.dtype, target.dtype) == (torch.float32, torch.int64)
    assert type(image) is type(target) is torch.Tensor
    assert np.array_equal(raw(manifest, image).permute(1, 2, 0).numpy(), np.asarray(Image.open(item.image)))
    assert np.array_equal(target.numpy(), np.asarray(Image.open(item.target)))


def test_every_sample_once_and_batches_full(small):
    config, manifest = small
    dataset = make_dataset(manifest, "train", config, PLAIN, 0)
    assert iterations_per_epoch(10, 4) == 3
    batches = list(train_batches(dataset, batch_size=4, seed=0, epoch=0))
    assert [tuple(x.shape) for x, _ in batches] == [(4, 3, 32, 32)] * 3
    assert [tuple(y.shape) for _, y in batches] == [(4, 32, 32)] * 3
    seen = torch.cat([x for x, _ in batches])
    for index in range(10):
        assert any(torch.equal(x, dataset[index][0]) for x in seen[:10])
    assert torch.equal(seen[10:], seen[:2])  # completed from the epoch's beginning
    assert len(next(iter(train_batches(dataset, batch_size=32, seed=0, epoch=0)))[0]) == 32


def test_order_and_changes_follow_seed_and_epoch(small):
    config, manifest = small
    dataset = make_dataset(manifest, "train", config, AugmentConfig(color_jitter=0.4), 0)

    def epoch(number, seed=0):
        return list(train_batches(dataset, batch_size=5, seed=seed, epoch=number))

    assert equal(epoch(0), epoch(0))
    assert not equal(epoch(0), epoch(1))
    assert not equal(epoch(0), epoch(0, seed=1))
    assert not torch.equal(dataset[0, 3][0], dataset[1, 3][0])
    assert torch.equal(dataset[0, 3][0], dataset[3][0])
    other = make_dataset(manifest, "train", config, AugmentConfig(color_jitter=0.4), 1)
    assert not torch.equal(dataset[0, 3][0], other[0, 3][0])


def test_an_image_is_augmented_by_one_thread_as_in_a_loader_process(small, monkeypatch):
    threads = []
    monkeypatch.setattr(v2.Compose, "forward", lambda self, *inputs: threads.append(torch.get_num_threads()) or inputs)
    config, manifest = small
    dataset = make_dataset(manifest, "train", config, AugmentConfig(), 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        dataset[0]
        assert (threads, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_workers_change_nothing(small):
    config, manifest = small
    dataset = make_dataset(manifest, "train", config, HEAVY, 0)
    kwargs = {"batch_size": 4, "seed": 3, "epoch": 1}
    assert equal(list(train_batches(dataset, **kwargs)), list(train_batches(dataset, **kwargs, workers=2)))


def test_processes_share_the_same_global_batches(small):
    config, manifest = small
    dataset = make_dataset(manifest, "train", config, HEAVY, 0)
    kwargs = {"batch_size": 6, "seed": 3, "epoch": 1}
    whole = list(train_batches(dataset, **kwargs))
    halves = [list(train_batches(dataset, **kwargs, rank=r, world_size=2)) for r in (0, 1)]
    assert equal(whole, [tuple(map(torch.cat, zip(a, b))) for a, b in zip(*halves)])
    with pytest.raises(DataError, match=r"train\.batch_size: 6 is not a multiple of 4 processes"):
        train_batches(dataset, **kwargs, world_size=4)


def test_resume_equals_the_tail(small):
    config, manifest = small
    dataset = make_dataset(manifest, "train", config, HEAVY, 0)
    kwargs = {"batch_size": 3, "seed": 3, "epoch": 1}
    whole = list(train_batches(dataset, **kwargs))
    tail = train_batches(dataset, **kwargs, start_iteration=2)
    assert len(tail) == 2
    assert equal(list(tail), whole[2:])
    assert list(train_batches(dataset, **kwargs, start_iteration=4)) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_training_generator_alone(small, workers):
    config, manifest = small
    dataset = make_dataset(manifest, "train", config, HEAVY, 0)
    before = torch.get_rng_state()
    next(iter(train_batches(dataset, batch_size=3, seed=3, epoch=1, workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_cache_changes_nothing(small):
    config, manifest = small
    cached = config.model_copy(update={"cache": True, "size": (24, 40)})
    sets = [make_dataset(manifest, "train", c, HEAVY, 0) for c in (cached, cached.model_copy(update={"cache": False}))]
    kwargs = {"batch_size": 4, "seed": 0, "epoch": 0}
    first, second, again = (list(train_batches(d, **kwargs)) for d in (*sets, sets[0]))
    assert equal(first, second)
    assert equal(first, again)


CACHED = """
import multiprocessing, resource, sys
from pathlib import Path

def read():
    from sunets.core.config import AugmentConfig, DataConfig, SyntheticConfig
    from sunets.data.loading import make_dataset, train_batches
    from sunets.data.manifest import load_manifest
    config = DataConfig(cache=True, synthetic=SyntheticConfig(image_size=32, train=300, val=1, test=1))
    dataset = make_dataset(load_manifest(Path(sys.argv[1]), config), "train", config, AugmentConfig(), 0)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    assert len(list(train_batches(dataset, batch_size=50, seed=0, epoch=0, workers=1))) == 6

if __name__ == "__main__":
    job = multiprocessing.get_context("forkserver").Process(target=read)
    job.start()
    job.join(60)
    sys.exit(job.exitcode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere loader processes cannot be forked")
def test_a_large_cached_split_is_read_by_loader_processes_of_a_job(tmp_path):
    """Jobs side by side start by `forkserver`, which then is the default of their own processes."""
    prepare(DataConfig(synthetic=SyntheticConfig(image_size=32, train=300, val=1, test=1)), tmp_path / "data")
    (tmp_path / "job.py").write_text(CACHED)
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_size_is_height_and_width(small):
    config, manifest = small
    dataset = make_dataset(manifest, "val", config.model_copy(update={"size": (20, 44)}), None, 0)
    image, target = dataset[0]
    assert (image.shape, target.shape) == ((3, 20, 44), (20, 44))
    assert dataset.output_size(0) == (20, 44)
    assert set(target.unique().tolist()) <= set(range(5))  # nearest: no label in between


def test_image_and_mask_change_together():
    """Where the mask says so, the image is white; so it stays under every change of geometry."""
    mask = torch.zeros(60, 60, dtype=torch.uint8)
    mask[10:40, 12:36] = 1
    image = (mask * 255).expand(3, 60, 60)
    geometry = AugmentConfig(scale=(0.5, 2.0), crop=(48, 56), rotate_degrees=10)
    transform = training_transforms(geometry, (0.5, 0.5, 0.5))
    padded = compared = 0
    for seed in range(30):
        torch.manual_seed(seed)
        x, y = transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        assert x.shape[-2:] == y.shape == (48, 56)
        assert set(y.unique().tolist()) <= {0, 1, 255}
        inside, outside, padding = (x[0][y == k].float() for k in (1, 0, 255))
        for pixels, value in ((inside, 255), (outside, 0), (padding, 127.5)):
            if pixels.numel() > 200:  # but for the edges, which bilinear interpolation softens
                assert (pixels - value).abs().median() < 2
                assert (pixels - value).abs().mean() < 40
                compared += value != 127.5
        padded += padding.numel() > 200
    assert padded > 3
    assert compared > 30


def test_scale_flip_and_crop_are_drawn_as_configured():
    labels = torch.arange(50, dtype=torch.uint8).expand(50, 50)  # the column number
    scales, mirrored = [], 0
    transform = training_transforms(AugmentConfig(scale=(0.5, 2.0), crop=(100, 100)), (0, 0, 0))
    for seed in range(40):
        torch.manual_seed(seed)
        _, y = transform(tv_tensors.Image(labels.expand(3, 50, 50)), tv_tensors.Mask(labels))
        row = y[(y != 255).any(1)][0]
        row = row[row != 255].long()
        scales.append(len(row) / 50)
        mirrored += bool(row[0] > row[-1])
    assert 0.5 <= min(scales) < 0.7
    assert 1.7 < max(scales) <= 2.0
    assert 8 < mirrored < 32


def test_lighting_is_one_offset_an_image():
    grey = torch.full((3, 8, 8), 128, dtype=torch.uint8)
    mask = tv_tensors.Mask(torch.zeros(8, 8, dtype=torch.uint8))
    transform = training_transforms(AugmentConfig(flip=False, lighting=0.1), (0, 0, 0))
    offsets = []
    for seed in range(200):
        torch.manual_seed(seed)
        x, y = transform(tv_tensors.Image(grey), mask)
        assert torch.equal(y, mask)
        difference = x - 128 / 255
        assert (difference.amax((1, 2)) - difference.amin((1, 2))).max() < 1e-6
        offsets.append(difference[:, 0, 0])
    # the covariance is vectors diag((0.1 values)^2) vectors^T, whose trace is the sum of (0.1 values)^2
    assert torch.stack(offsets).var(0).sum().item() == pytest.approx(
        0.01 * (0.2175**2 + 0.0188**2 + 0.0045**2), rel=0.3
    )


def test_no_augmentation_is_no_transform():
    assert training_transforms(PLAIN, (0, 0, 0)) is None


def test_classification(tmp_path):
    config = DataConfig(name="imagefolder", root=str(make_imagefolder(tmp_path / "imagenet")), test_split="val")
    manifest = prepare(config, tmp_path / "data")
    augment = AugmentConfig(resized_crop=32, color_jitter=0.4, lighting=0.1)
    train = make_dataset(manifest, "train", config, augment, 0)
    images, targets = next(iter(train_batches(train, batch_size=8, seed=0, epoch=0)))
    assert images.shape == (8, 3, 32, 32)
    assert (targets.dtype, targets.shape) == (torch.int64, (8,))

    val = make_dataset(manifest, "val", config, None, 0, center_crop=28)
    _, images, targets = next(eval_batches(val, 20))
    assert images.shape == (12, 3, 28, 28)  # one batch, though the files differ in size
    assert targets.tolist() == [k for k in range(6) for _ in range(2)]
    with Image.open(manifest.splits["val"][0].image) as file:  # 48x40: the shorter side to 32, then the centre
        expected = np.asarray(file.convert("RGB").resize((38, 32), Image.Resampling.BILINEAR))[2:30, 5:33]
    difference = raw(manifest, images[0]).permute(1, 2, 0).numpy() - expected
    assert abs(difference).max() <= 2


def test_eval_batches_end_where_the_size_changes(tmp_path):
    config = DataConfig(name="voc2012", root=str(make_voc(tmp_path / "voc", train=1, val=5, test=2)))
    manifest = prepare(config, tmp_path / "data")
    dataset = make_dataset(manifest, "val", config, None, 0)
    batches = list(eval_batches(dataset, 4))
    assert [i for ids, _, _ in batches for i in ids] == [item.id for item in manifest.splits["val"]]
    assert all(x.shape[-2:] == y.shape[-2:] for _, x, y in batches)
    assert len(batches) == 5  # the heights alternate
    sized = make_dataset(manifest, "val", config.model_copy(update={"size": (48, 64)}), None, 0)
    assert [len(ids) for ids, _, _ in eval_batches(sized, 4, workers=1)] == [4, 1]
    part = list(eval_batches(dataset, 4, indices=[4, 2, 0]))
    assert list(itertools.chain(*(ids for ids, _, _ in part))) == [manifest.splits["val"][i].id for i in (4, 2, 0)]
    assert [len(ids) for ids, _, _ in part] == [3]
    assert torch.equal(part[0][1][1], dataset[2][0])
    (_, images, targets), *_ = eval_batches(make_dataset(manifest, "test", config, None, 0), 4)
    assert images.ndim == 4
    assert targets is None


def test_converted_masks_keep_255(tmp_path):
    config = DataConfig(name="camvid", root=str(make_camvid(tmp_path / "camvid")))
    manifest = prepare(config, tmp_path / "data")
    _, target = make_dataset(manifest, "train", config, None, 0)[0]
    assert (target[0] == 255).all()
    assert (target[1:] < 11).all()


def test_unfit_requests_are_refused_before_training(tmp_path, small):
    config, manifest = small
    with pytest.raises(DataError, match=r"resized_crop: for classification"):
        make_dataset(manifest, "train", config, AugmentConfig(resized_crop=32), 0)
    with pytest.raises(DataError, match=r"augment\.scale: needs train\.augment\.crop"):
        make_dataset(manifest, "train", config, AugmentConfig(scale=(0.5, 2)), 0)
    with pytest.raises(DataError, match="not prepared"):
        make_dataset(manifest, "trainval", config, None, 0)
    voc = DataConfig(name="voc2012", root=str(make_voc(tmp_path / "voc")))
    with pytest.raises(DataError, match=r"differ in size .* is 64x48, .* 64x52"):
        make_dataset(prepare(voc, tmp_path / "data"), "train", voc, AugmentConfig(), 0)


def edge(size, at):
    """An image (3, size, size), white right of a column, and its mask (size, size)."""
    mask = torch.zeros(size, size, dtype=torch.uint8)
    mask[:, at:] = 1
    return (mask * 255).expand(3, size, size).contiguous(), mask


@pytest.mark.parametrize("at", [20, 21, 22, 23, 30, 37])
@pytest.mark.parametrize("factor", [0.37, 0.5, 0.75, 1.5, 2.0])
def test_random_scale_moves_no_straight_edge_against_the_image(at, factor):
    """The edge lies where the image has it, to half a pixel, and each label is what lies at its pixel's centre."""
    image, mask = edge(60, at)
    x, y = RandomScale(factor, factor)(tv_tensors.Image(image), tv_tensors.Mask(mask))
    assert isinstance(y, tv_tensors.Mask)
    width = y.shape[1]
    by_image, by_mask = width - x[0, 5].sum().item() / 255, width - y[5].sum().item()
    assert abs(by_image - at * width / 60) < 0.05
    assert abs(by_mask - by_image) <= 0.55
    assert y[5].tolist() == [int((column + 0.5) * 60 / width >= at) for column in range(width)]


@pytest.mark.parametrize("size", [(30, 30), (45, 20), (40, 100), (60, 25)])
def test_data_size_moves_no_straight_edge_against_the_image(tmp_path, size):
    root = make_folder(tmp_path / "own", size=(60, 60))
    image, mask = edge(60, 23)
    for path in (root / "images").iterdir():
        stem, value = path.stem, int(path.stem.split()[1])
        path.unlink()
        Image.fromarray((image.permute(1, 2, 0).numpy() // 255 * (200 + value)).astype(np.uint8)).save(
            root / "images" / f"{stem}.png"
        )
        Image.fromarray(mask.numpy()).save(root / "masks" / f"{stem}.png")
    config = DataConfig(name="folder", root=str(root), size=size)
    manifest = prepare(config, tmp_path / "data")
    x, y = make_dataset(manifest, "train", config, None, 0)[0]
    bright = raw(manifest, x)[0] > 100
    width = size[1]
    expected = sum((column + 0.5) * 60 / width < 23 for column in range(width))  # columns whose centre is left of it
    assert (y == 0).sum(1).tolist() == [expected] * size[0]
    assert ((y == 1) != bright).float().mean() <= 1 / width  # at most the column that the edge lies in


@pytest.mark.parametrize("kind", ["deep", "turned", "clear", "ink"])
def test_training_sees_what_predict_sees(tmp_path, kind):
    root = make_folder(tmp_path / "own", size=(32, 32))
    draw = np.random.default_rng(1)
    for path in sorted((root / "images").iterdir()):
        index = int(path.stem.split()[1])
        color = draw.integers(0, 256, (32 + 8 * (index % 2), 32, 3), dtype=np.uint8)
        path.unlink()
        new = root / "images" / path.stem
        if kind == "deep":
            Image.fromarray(color[..., 0].astype(np.uint16) * 200).save(new.with_suffix(".png"))
        elif kind == "turned":
            exif = Image.Exif()
            exif[0x0112] = 3
            Image.fromarray(color).save(new.with_suffix(".png"), exif=exif)
        elif kind == "clear":
            Image.fromarray(np.dstack([color, color[..., :1]])).save(new.with_suffix(".png"))
        else:
            Image.fromarray(color).convert("CMYK").save(new.with_suffix(".jpg"))
    config = DataConfig(name="folder", root=str(root))
    manifest = prepare(config, tmp_path / "data")
    for index, item in enumerate(manifest.splits["train"]):
        image, _ = make_dataset(manifest, "train", config, None, 0)[index]
        seen = raw(manifest, image).permute(1, 2, 0).numpy()
        assert np.array_equal(seen, read_picture(item.image))
        assert len(np.unique(seen)) > 10
    pixels = np.concatenate([read_picture(i.image).reshape(-1, 3) for i in manifest.splits["train"]]) / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean(0), atol=1e-6)


def test_a_small_image_of_a_class_is_named_before_training(tmp_path):
    root = make_imagefolder(tmp_path / "classes", size=(40, 12))
    config = DataConfig(name="imagefolder", root=str(root), test_split="val")
    with pytest.raises(DataError, match="12x40 pixels; at least 16"):
        prepare(config, tmp_path / "data")
    manifest = prepare(config, tmp_path / "data", min_side=1)
    with pytest.raises(DataError, match=r"\.JPEG: 12x4\d pixels; .* or set train\.augment\.resized_crop"):
        make_dataset(manifest, "train", config, AugmentConfig(), 0)
    make_dataset(manifest, "train", config, AugmentConfig(resized_crop=32), 0)
