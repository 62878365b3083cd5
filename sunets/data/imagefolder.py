"""Classification from class folders: train/<class>/<image>, likewise val/ and, if used, test/.

ImageNet (ILSVRC 2012) is one of these, once its flat validation archive has been sorted into class folders. As
published it holds a few equal images in two splits: for ImageNet a warning instead of a fault.
"""

from __future__ import annotations

import re
from pathlib import Path

from sunets.core.config import DataConfig
from sunets.core.names import name_fault
from sunets.data.picture import DataError
from sunets.data.raw_dataset import IMAGE_SUFFIXES, Entry, RawDataset, color_map, existing_root, split_path, used_splits

_WORDNET = re.compile(r"n\d{8}")
IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}
"""Images of each split, as published."""
IMAGENET_CLASSES = 1000
IMAGENET_SIZE = (375, 500)


def find(config: DataConfig, work: Path) -> RawDataset:
    """List the used splits; the training split's folders are the classes."""
    root = existing_root(config)
    raw = RawDataset(root)
    folders: dict[str, dict[str, Path]] = {}
    faults = raw.faults
    for split in used_splits(config):
        directory = split_path(root, split)
        if not directory.is_dir():
            faults.append(
                f"{directory}: no such directory; data.root holds train/, val/ and test/ (or set data.test_split: val)"
            )
            continue
        paths = [directory / e.name for e in raw.list_directory(directory)]
        archives = [p for p in paths if p.suffix in (".tar", ".gz", ".tgz", ".zip") and not p.is_dir()]
        loose = [p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES and not p.is_dir()]
        faults += [f"{p}: an archive; extract it into {directory / p.stem}/" for p in archives]
        if loose:
            faults.append(f"{directory}: {len(loose)} images outside class folders, such as {loose[0].name}; sort them")
        folders[split] = {p.name: p for p in paths if p.is_dir()}
        invalid = {name: fault for name in folders[split] if (fault := name_fault(name))}
        faults += [f"{directory}: class {name!r}: {fault}; rename it" for name, fault in invalid.items()]
        other = len(paths) - len(folders[split]) - len(archives) - len(loose)
        if other:
            raw.warnings.append(f"{split}/: {other} files beside the class folders, which are no images; left out")
    if faults:
        raise DataError(faults)
    classes = sorted(folders[config.train_split])
    if len(classes) < 2:
        raise DataError(f"{root / config.train_split}: {len(classes)} class folders; at least 2 are needed")
    raw.classes, raw.palette = classes, color_map(len(classes))
    imagenet = len(classes) == IMAGENET_CLASSES and all(_WORDNET.fullmatch(c) for c in classes)
    raw.overlap_is_published = imagenet
    labels = {name: label for label, name in enumerate(classes)}
    for split, directories in folders.items():
        raw.splits[split] = []
        for name, directory in directories.items():
            if name not in labels:
                raw.faults.append(
                    f"{directory}: split {config.train_split!r} has no class {name!r}; remove or rename it"
                )
                continue
            raw.splits[split] += [
                Entry(f"{split}/{name}/{path.stem}", path, labels[name])
                for path in raw.by_stem(directory, group=root / split).values()
            ]
        if imagenet:
            raw.compare_count(split, len(raw.splits[split]), IMAGENET_COUNTS)
    return raw
