"""Numbers that others published, quoted beside ours and never mixed with them: reproduced, not reproduced, or not run.

The quotes are Python, not a data file, so that an edit of one is an edit of the code that the report depends on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sunets.core.metrics import higher_is_better
from sunets.core.record import read_rows
from sunets.report.records import FINISHED, Records, quantity
from sunets.report.statistics import Estimate, mean_interval
from sunets.report.tables import model_status, state_text
from sunets.report.write import Table

TOLERANCE = 0.5
"""Percentage points within which a published value counts as reproduced, whatever the interval."""


@dataclass(frozen=True)
class Quote:
    """One published number."""

    data: str
    """Family of benchmarks that measures the same: `benchmark` in params.yaml up to its first - or _."""
    model: str
    """Name in the zoo, or, of a other_network, the published network's own."""
    metric: str
    """Record key."""
    percent: float | None
    """As published; None where no source could be opened."""
    source: str
    """Where it can be read. "torchvision V Enum.MEMBER.meta" is that attribute of the installed package, with which a
    test compares the value (an error is 100 minus the accuracy there)."""
    other_network: bool = False
    """Another network's value, which every model of the benchmark is held against."""


_TOP1, _TOP5, _MIOU = "score.top1_error_percent", "score.top5_error_percent", "score.miou"
_IMAGENET = "torchvision 0.29.1 {}_Weights.IMAGENET1K_V1.meta"
_COCO = "torchvision 0.29.1 {}_Weights.COCO_WITH_VOC_LABELS_V1.meta"
_TIRAMISU = "Jégou et al., arXiv 1611.09326, as listed at https://www.paperswithcode.com/paper/the-one-hundred-layers-tiramisu-fully"
_SUNET = "not quoted: no source opened (arXiv 1804.10343)"

QUOTES = (
    Quote("imagenet", "resnet18", _TOP1, 30.242, _IMAGENET.format("ResNet18")),
    Quote("imagenet", "resnet18", _TOP5, 10.922, _IMAGENET.format("ResNet18")),
    Quote("imagenet", "resnet50", _TOP1, 23.87, _IMAGENET.format("ResNet50")),
    Quote("imagenet", "resnet50", _TOP5, 7.138, _IMAGENET.format("ResNet50")),
    Quote("imagenet", "resnet101", _TOP1, 22.626, _IMAGENET.format("ResNet101")),
    Quote("imagenet", "resnet101", _TOP5, 6.454, _IMAGENET.format("ResNet101")),
    Quote("imagenet", "densenet161", _TOP1, 22.862, _IMAGENET.format("DenseNet161")),
    Quote("imagenet", "densenet161", _TOP5, 6.44, _IMAGENET.format("DenseNet161")),
    Quote("imagenet", "densenet201", _TOP1, 23.104, _IMAGENET.format("DenseNet201")),
    Quote("imagenet", "densenet201", _TOP5, 6.63, _IMAGENET.format("DenseNet201")),
    Quote("imagenet", "sunet64", _TOP1, None, _SUNET),
    Quote("imagenet", "sunet128", _TOP1, None, _SUNET),
    Quote("imagenet", "sunet7128", _TOP1, None, _SUNET),
    Quote("coco", "fcn_resnet50", _MIOU, 60.5, _COCO.format("FCN_ResNet50")),
    Quote("coco", "deeplabv3_resnet50", _MIOU, 66.4, _COCO.format("DeepLabV3_ResNet50")),
    Quote("coco", "deeplabv3_resnet101", _MIOU, 67.4, _COCO.format("DeepLabV3_ResNet101")),
    Quote("coco", "lraspp_mobilenet_v3_large", _MIOU, 57.9, _COCO.format("LRASPP_MobileNet_V3_Large")),
    Quote("camvid", "FC-DenseNet103", _MIOU, 66.9, _TIRAMISU, other_network=True),
    Quote("camvid", "FC-DenseNet103", "score.pixel_accuracy", 91.5, _TIRAMISU, other_network=True),
    Quote("voc", "sunet7128", _MIOU, None, _SUNET),
)


def verdict(ours: Estimate, published: float, *, higher_is_better: bool, other_network: bool) -> str:
    """How a measured value stands to a published one.

    Args:
        ours: percent; mean and interval over the seeds.
        published: percent.
        higher_is_better: direction of the score.
        other_network: the published value is another network's, to be reached rather than reproduced.
    """
    gain = (ours.mean - published) * (1 if higher_is_better else -1)
    inside = ours.low is not None and ours.high is not None and ours.low <= published <= ours.high
    if other_network:
        return "reached within noise" if inside else "reached" if gain >= 0 else "not reached"
    if inside or abs(gain) <= TOLERANCE:
        return "reproduced"
    return f"not reproduced ({'better' if gain > 0 else 'worse'})"


def family(benchmark: str) -> str:
    """What a benchmark's numbers may be compared by: its name up to the first - or _."""
    return re.split("[-_]", benchmark)[0]


def published(records: Records, names: Mapping[str, str]) -> Table | None:
    """Our values beside the published ones of the same data; None where nothing is quoted for it.

    Args:
        records: of the benchmark.
        names: key of a model in `params.yaml` -> its name in the zoo.
    """
    rows: list[dict[str, Any]] = []
    for quote in (q for q in QUOTES if q.data == family(records.benchmark)):
        keys = [k for k, name in names.items() if quote.other_network or name == quote.model]
        if not keys:
            rows.append(_row(records.benchmark, quote) | {"verdict": "not run: not among this benchmark's models"})
        for key in keys:
            q = quantity(quote.metric)
            values = [q.scale * v for v in records.scores(key, quote.metric).values()]
            row = _row(records.benchmark, quote) | {"our_model": key, "our_label": records.labels[key]}
            if not values:
                status, reason, _ = model_status(records, key)
                why = state_text(status, reason) if status != FINISHED else "not run: no such score"
                rows.append(row | {"verdict": why})
                continue
            ours = mean_interval(values)
            row |= {
                "ours_percent.mean": ours.mean,
                "ours_percent.ci95_low": ours.low,
                "ours_percent.ci95_high": ours.high,
            }
            row |= {"n_seeds": ours.n, "verdict": "not quoted"}
            if quote.percent is not None:
                row["difference_percent"] = ours.mean - quote.percent
                row["verdict"] = verdict(
                    ours,
                    quote.percent,
                    higher_is_better=higher_is_better(quote.metric),
                    other_network=quote.other_network,
                )
            rows.append(row)
    if not rows:
        return None
    data = pd.DataFrame(rows, columns=_COLUMNS)
    return Table(
        "published",
        "Published numbers beside ours.",
        data,
        _view(data),
        _NOTES,
    )


def published_everywhere(results: Path) -> Table:
    """Every quoted number with ours from any benchmark under `results`; what has no records is "not run"."""
    named = ("data", "published_model", "metric")
    rows = [row for path in sorted(results.glob("*/tables/published.csv")) for row in read_rows(path, named)]
    seen = {(r["data"], r["published_model"], r["metric"]) for r in rows}
    rows += [
        _row(None, q) | {"verdict": f"not run: no records on {q.data}"}
        for q in QUOTES
        if (q.data, q.model, q.metric) not in seen
    ]
    data = pd.DataFrame(rows, columns=_COLUMNS)
    return Table("published", "Published numbers beside ours, all benchmarks.", data, _view(data), _NOTES)


_COLUMNS = [
    "benchmark", "data", "published_model", "metric", "published_percent", "our_model", "our_label",
    "ours_percent.mean", "ours_percent.ci95_low", "ours_percent.ci95_high", "n_seeds", "difference_percent", "verdict",
    "source",
]  # fmt: skip
_NOTES = (
    f"Reproduced: the published value lies in our 95 % interval over the seeds, or at most {TOLERANCE} points from our "
    "mean. Reached: another network's value, and ours is at least as good. Published values are quoted from the source "
    "in the last column and were not measured here; recipes and image sizes may differ from ours.",
)


def _row(benchmark: str | None, quote: Quote) -> dict[str, Any]:
    return {
        "benchmark": benchmark,
        "data": quote.data,
        "published_model": quote.model,
        "metric": quote.metric,
        "published_percent": quote.percent,
        "source": quote.source,
    }


def _view(data: pd.DataFrame) -> pd.DataFrame:
    def number(value: Any, sign: bool = False) -> str:
        return "" if value is None or pd.isna(value) else f"{value:{'+' if sign else ''}.2f}"

    lines = []
    for r in data.to_dict("records"):
        low, high = r["ours_percent.ci95_low"], r["ours_percent.ci95_high"]
        half = f" ± {number((high - low) / 2)}" if number(low) else ""
        lines.append(
            {
                "Data": r["data"],
                "Published model": r["published_model"],
                "Score": quantity(r["metric"]).heading,
                "Published": number(r["published_percent"]) or "not quoted",
                "Our model": r["our_label"] if isinstance(r["our_label"], str) else "",
                "Ours": number(r["ours_percent.mean"]) + half,
                "Difference": number(r["difference_percent"], sign=True),
                "Verdict": r["verdict"] if isinstance(r["verdict"], str) else "",
                "Source": r["source"],
            }
        )
    return pd.DataFrame(lines)
