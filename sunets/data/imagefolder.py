"""Classification from class folders: train/<class>/<image>, and likewise val/ and, where there is one, test/.

ImageNet (ILSVRC 2012) in class folders is one of these; its validation archive is flat and has to be sorted into them
first. ImageNet as published holds a few equal images in two splits, so that is a warning for it.
"""

from __future__ import annotations

import re
from pathlib import Path

from sunets.core.config import DataConfig
from sunets.core.names import name_fault
from sunets.data.picture import DataError
from sunets.data.raw_dataset import IMAGE_SUFFIXES, Entry, RawDataset, color_map, existing_root, split_path, used_splits

_WORDNET = re.compile(r"n\d{8}")
_IMAGENET_COUNTS = {"train": 1_281_167, "val": 50_000}


def find(config: DataConfig, work: Path) -> RawDataset:
    """List the used splits; the training split's folders are the classes."""
    root = existing_root(config)
    source = RawDataset(root)
    folders: dict[str, dict[str, Path]] = {}
    faults = source.faults
    for split in used_splits(config):
        directory = split_path(root, split)
        if not directory.is_dir():
            faults.append(
                f"{directory}: no such directory; data.root holds train/, val/ and test/ (or set data.test_split: val)"
            )
            continue
        inside = [directory / e.name for e in source.entries_of(directory)]
        archives = [p for p in inside if p.suffix in (".tar", ".gz", ".tgz", ".zip") and not p.is_dir()]
        loose = [p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES and not p.is_dir()]
        faults += [f"{p}: an archive; extract it into {directory / p.stem}/" for p in archives]
        if loose:
            faults.append(f"{directory}: {len(loose)} images outside class folders, such as {loose[0].name}; sort them")
        folders[split] = {p.name: p for p in inside if p.is_dir()}
        unfit = {name: fault for name in folders[split] if (fault := name_fault(name))}
        faults += [f"{directory}: class {name!r}: {fault}; rename it" for name, fault in unfit.items()]
        other = len(inside) - len(folders[split]) - len(archives) - len(loose)
        if other:
            source.warnings.append(f"{split}/: {other} files beside the class folders, which are no images; left out")
    if faults:
        raise DataError(faults)
    classes = sorted(folders[config.train_split])
    if len(classes) < 2:
        raise DataError(f"{root / config.train_split}: {len(classes)} class folders; at least 2 are needed")
    source.classes, source.palette = classes, color_map(len(classes))
    imagenet = len(classes) == 1000 and all(_WORDNET.fullmatch(c) for c in classes)
    source.overlap_is_published = imagenet
    labels = {name: label for label, name in enumerate(classes)}
    for split, directories in folders.items():
        source.splits[split] = []
        for name, directory in directories.items():
            if name not in labels:
                source.faults.append(
                    f"{directory}: split {config.train_split!r} has no class {name!r}; remove or rename it"
                )
                continue
            source.splits[split] += [
                Entry(f"{split}/{name}/{path.stem}", path, labels[name])
                for path in source.images(directory, group=root / split)
            ]
        count = len(source.splits[split])
        if imagenet and count != _IMAGENET_COUNTS.get(split, count):
            source.warnings.append(
                f"split {split!r}: {count} images, ImageNet as published has {_IMAGENET_COUNTS[split]}"
            )
    return source
