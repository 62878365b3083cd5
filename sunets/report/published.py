"""Numbers that others published, quoted beside ours and never mixed with them: reproduced, not reproduced, or not run.

The quotes are Python, not a data file, so that an edit of one is an edit of the code that the report depends on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sunets.core.metrics import higher_is_better
from sunets.core.record import Record
from sunets.report.comparison import joint_estimate
from sunets.report.records import FINISHED, Records, quantity
from sunets.report.statistics import Estimate, paired_difference
from sunets.report.tables import model_status, state_text
from sunets.report.write import Table

TOLERANCE = 0.5
"""Percentage points within which a published score counts as reproduced, also outside the interval."""
COUNT_TOLERANCE = 0.01
"""Relative difference within which a count of parameters, quoted to three digits, counts as reproduced."""
PARAMETERS = "cost.params_m"


@dataclass(frozen=True)
class Quote:
    """One published number."""

    data: str
    """Family of benchmarks that measures the same: `benchmark` in params.yaml up to its first - or _."""
    model: str
    """Name in the zoo or, of another network, the one it was published under."""
    metric: str
    """Record key."""
    value: float | None
    """As published, in the unit that tables show (percent, millions); None where no source could be opened."""
    source: str
    """Where it can be read. "torchvision V Enum.MEMBER.meta" is that attribute of the installed package, with which a
    test compares the value (an error is 100 minus the accuracy there). "second-hand, opened: " says what was opened
    instead of the publication."""
    other_network: bool = False
    """Another network's value, which every model of the benchmark is held against."""
    params_m: float | None = None
    """Published parameters of that network, in millions."""
    pretrained: bool | None = None
    """Whether its training started from other weights; None where that does not matter or is not known."""
    minus: str = ""
    """Name in the zoo of a network whose score is subtracted: the value is a difference."""

    @property
    def name(self) -> str:
        """The published network in words; tells quotes of the same data and metric apart."""
        start = {None: "", True: " (pre-trained)", False: "" if self.other_network else " (from scratch)"}
        return self.model + (f" minus {self.minus}" if self.minus else "") + start[self.pretrained]


_TOP1, _TOP5, _MIOU, _PIXELS = (
    "score.top1_error_percent", "score.top5_error_percent", "score.miou", "score.pixel_accuracy",
)  # fmt: skip
_IMAGENET = "torchvision 0.29.1 {}_Weights.IMAGENET1K_V1.meta"
_COCO = "torchvision 0.29.1 {}_Weights.COCO_WITH_VOC_LABELS_V1.meta"
_SECOND_HAND = "second-hand, opened: "
_TIRAMISU = (
    f"Jégou et al., arXiv 1611.09326; {_SECOND_HAND}"
    "https://www.paperswithcode.com/paper/the-one-hundred-layers-tiramisu-fully"
)
_TABLE3 = (
    f"Jégou et al., arXiv 1611.09326, table 3; {_SECOND_HAND}docs/authors_results_table.png of "
    "https://github.com/bfortuner/pytorch_tiramisu"
)
_THESIS = (
    f"Shah et al., arXiv 1804.10343; {_SECOND_HAND}W. Dai, MSc thesis, UCL, 2018, {{}}, "
    "https://github.com/wenliangdai/msc-project"
)
_DAI = (
    f"W. Dai's run, batch 10, read off a figure (±0.5); {_SECOND_HAND}visualisation.ipynb of "
    "https://github.com/wenliangdai/msc-project"
)
_ENET = f"a third party's run; {_SECOND_HAND}README of https://github.com/davidtvs/PyTorch-ENet"
_UNET = (
    f"a third party's run; {_SECOND_HAND}README of https://github.com/GitLanx/Semantic-Segmentation-PyTorch at 0eb9465 "
    "(its versions differ by a point)"
)
_RELEASED = {"sunet7128": "; the authors' released code has 39.11 M too (tests/test_cost.py)"}
_SUNET = "not quoted: no source opened (arXiv 1804.10343)"
_TOP2 = "; the authors' project page says top 2 of the PASCAL VOC challenge, without a score"

QUOTES = (
    *(
        Quote("imagenet", name.lower(), metric, error, _IMAGENET.format(name))
        for name, *errors in (
            ("ResNet18", 30.242, 10.922), ("ResNet50", 23.87, 7.138), ("ResNet101", 22.626, 6.454),
            ("DenseNet161", 22.862, 6.44), ("DenseNet201", 23.104, 6.63),
        )
        for metric, error in zip((_TOP1, _TOP5), errors, strict=True)
    ),
    *(Quote("imagenet", name, _TOP1, None, _SUNET) for name in ("sunet64", "sunet128", "sunet7128")),
    *(
        Quote("imagenet", name, PARAMETERS, count, _THESIS.format("section 4.1") + _RELEASED.get(name, ""))
        for name, count in (("sunet64", 6.9), ("sunet128", 24.6), ("sunet7128", 37.7))
    ),
    *(
        Quote("coco", name.lower(), _MIOU, miou, _COCO.format(name))
        for name, miou in (
            ("FCN_ResNet50", 60.5), ("DeepLabV3_ResNet50", 66.4), ("DeepLabV3_ResNet101", 67.4),
            ("LRASPP_MobileNet_V3_Large", 57.9),
        )
    ),
    *(
        Quote("camvid", name, _MIOU, miou, _TABLE3, other_network=True, params_m=params, pretrained=pretrained)
        for name, miou, params, pretrained in (
            ("Classic Upsampling", 55.2, 20, False), ("FC-DenseNet56", 58.9, 1.5, False),
            ("FC-DenseNet67", 65.8, 3.5, False), ("FC-DenseNet103", 66.9, 9.4, False), ("SegNet", 46.4, 29.5, True),
            ("FCN8", 57.0, 134.5, True), ("DeepLab-LFOV", 61.6, 37.3, True), ("Dilation8", 65.3, 140.8, True),
        )
    ),
    Quote("camvid", "FC-DenseNet103", _PIXELS, 91.5, _TIRAMISU, other_network=True, params_m=9.4, pretrained=False),
    Quote("camvid", "ENet", _MIOU, 52.1, _ENET, other_network=True, params_m=0.37),
    Quote("camvid", "U-Net", _MIOU, 48.7, _UNET, other_network=True),
    Quote("camvid", "U-Net", _PIXELS, 85.17, _UNET, other_network=True),
    Quote("voc", "sunet64", _MIOU, 4.5, _THESIS.format("p. 23"), minus="dilated_resnet101"),
    Quote("voc", "sunet64", _MIOU, 64.5, _DAI, pretrained=True),
    Quote("voc", "sunet64", _MIOU, 38.0, _DAI, pretrained=False),
    Quote("voc", "sunet7128", _MIOU, None, _SUNET + _TOP2),
)  # fmt: skip


def verdict(ours: Estimate, quote: Quote) -> str:
    """Judge a measured value against a published one: another network's, or one to be reproduced.

    The measured value is in the quote's unit, which has a value.
    """
    assert quote.value is not None
    difference = ours.mean - quote.value
    if quote.metric == PARAMETERS:
        if abs(difference) <= COUNT_TOLERANCE * quote.value:
            return "reproduced"
        return f"not reproduced ({'more' if difference > 0 else 'fewer'})"
    gain = difference if higher_is_better(quote.metric) else -difference
    inside = ours.low is not None and ours.high is not None and ours.low <= quote.value <= ours.high
    if quote.other_network:
        return "reached within noise" if inside else "reached" if gain >= 0 else "not reached"
    if inside or abs(gain) <= TOLERANCE:
        return "reproduced"
    return f"not reproduced ({'better' if gain > 0 else 'worse'})"


def family(benchmark: str) -> str:
    """Return what a benchmark's numbers may be compared by: its name up to the first - or _."""
    return re.split("[-_]", benchmark)[0]


def published(records: Records, names: Mapping[str, str]) -> Table | None:
    """Put our values beside the published ones of the same data; None where nothing is quoted for it.

    `names` maps the key of a model in `params.yaml` to its name in the zoo.
    """
    rows = _benchmark_rows(records, names)
    return _table(rows, "Published numbers beside ours.") if rows else None


def published_everywhere(benchmarks: Iterable[Records], zoo: Iterable[Record]) -> Table:
    """Put every quoted number beside ours; what has no records is "not run".

    Cost records of `make zoo` count the networks that no benchmark has.
    """
    rows = [row for records in benchmarks for row in _benchmark_rows(records, zoo_names(records))]
    measured = {_key(row) for row in rows if pd.notna(row.get("ours.mean"))}
    counted = {r["label"]: r["cost"][PARAMETERS] for r in zoo if r["task"] == "classification"}
    rows = [row for row in rows if row["metric"] != PARAMETERS or _key(row) in measured]
    present = {_key(row) for row in rows}
    for quote in QUOTES:
        row = _quoted("zoo" if quote.metric == PARAMETERS else None, quote)
        if _key(row) in present:
            continue
        if quote.metric == PARAMETERS and quote.model in counted:
            row |= {"our_model": quote.model, "our_label": quote.model}
            row |= _compared(quote, Estimate(counted[quote.model], None, None, 1))
        else:
            row["verdict"] = f"not run: no records on {quote.data}"
        rows.append(row)
    return _table(rows, "Published numbers beside ours, all benchmarks.")


def zoo_names(records: Records) -> dict[str, str]:
    """Return the key of each model that has a record -> its name in the zoo."""
    rows = [*records.all("train"), *records.all("evaluate"), *records.all("cost")]
    return {row["model"]: row["params"].get("model.name") or row["model"] for row in reversed(rows)}


def _benchmark_rows(records: Records, names: Mapping[str, str]) -> list[dict[str, Any]]:
    rows = []
    for quote in (q for q in QUOTES if q.data == family(records.benchmark)):
        row = _quoted(records.benchmark, quote)
        keys = [k for k, name in names.items() if quote.other_network or name == quote.model]
        rows += [row | _beside(quote, records, names, key) for key in keys]
        if not keys:
            rows.append(row | {"verdict": "not run: not among this benchmark's models"})
    return rows


def _beside(quote: Quote, records: Records, names: Mapping[str, str], key: str) -> dict[str, Any]:
    """Put one model of a benchmark beside a quote, or say why it cannot be compared."""
    cost = records.cost.set_index("model")[PARAMETERS].dropna()
    ours: Estimate | None
    if quote.metric == PARAMETERS:
        ours = Estimate(cost[key], None, None, 1) if key in cost else None
    elif quote.minus:
        other = next((k for k, name in names.items() if name == quote.minus), "")
        ours = paired_difference(records.scores(key, quote.metric), records.scores(other, quote.metric))
    else:
        ours = joint_estimate(records, key, quote.metric)
    row = {"our_model": key, "our_label": records.labels[key]}
    row |= {"our_network": names[key], "ours.params_m": cost.get(key)}
    if ours is None:
        status, reason, _ = model_status(records, key)
        known = quote.metric != PARAMETERS and status != FINISHED
        return row | {"verdict": state_text(status, reason) if known else "not run: no such score"}
    row |= _compared(quote, ours)
    started = {r["params"].get("train.init_from") is not None for r in records.all("train", key)}
    if not quote.other_network and quote.pretrained is not None and started != {quote.pretrained}:
        row["verdict"] = f"not comparable: {'from scratch' if quote.pretrained else 'pre-trained'} here"
    return row


def _compared(quote: Quote, ours: Estimate) -> dict[str, Any]:
    shown = ours.scaled(quantity(quote.metric).scale)
    row = {
        "ours.mean": shown.mean, "ours.ci95_low": shown.low, "ours.ci95_high": shown.high,
        "n_seeds": None if quote.metric == PARAMETERS else ours.n,
    }  # fmt: skip
    if quote.value is None:
        return row | {"verdict": "not quoted"}
    return row | {"difference": shown.mean - quote.value, "verdict": verdict(shown, quote)}


_COLUMNS = [
    "benchmark", "data", "published_model", "metric", "published", "published_params_m", "our_model", "our_label",
    "our_network", "ours.params_m", "ours.mean", "ours.ci95_low", "ours.ci95_high", "n_seeds", "difference", "verdict",
    "source", "second_hand",
]  # fmt: skip
_NOTES = (
    f"Reproduced: the published value lies in our 95 % interval, or at most {TOLERANCE} points from our "
    f"mean; a count of parameters, at most {100 * COUNT_TOLERANCE:g} % from it. Reached: our score is "
    "at least as good as that of another network. Of our networks, the SUNets and the best are shown; the CSV has all.",
    "Published values are quoted from the source in the last column and were not measured here; recipes and image "
    "sizes may differ from ours. Second-hand: the publication itself was not opened.",
)


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["data"], row["published_model"], row["metric"]


def _quoted(benchmark: str | None, quote: Quote) -> dict[str, Any]:
    return {
        "benchmark": benchmark, "data": quote.data, "published_model": quote.name, "metric": quote.metric,
        "published": quote.value, "published_params_m": quote.params_m, "source": quote.source,
        "second_hand": _SECOND_HAND in quote.source,
    }  # fmt: skip


def _table(rows: list[dict[str, Any]], caption: str) -> Table:
    data = pd.DataFrame(rows, columns=_COLUMNS)
    return Table("published", caption, data, _view(data), _NOTES)


def _view(data: pd.DataFrame) -> pd.DataFrame:
    """Return what a reader sees: of our networks beside another network's score, the SUNets and the best."""
    data = data.astype({"ours.mean": float} | dict.fromkeys(("benchmark", "our_label", "verdict"), object))
    ours = data.groupby(["benchmark", "data", "published_model", "metric"], dropna=False)["ours.mean"]
    best = ours.rank(method="first", ascending=False, na_option="bottom") == 1  # of scores: more is better
    others = data.published_model.isin([q.name for q in QUOTES if q.other_network])
    data = data[~others | best | data.our_network.astype(str).str.startswith("sunet")].reset_index(drop=True)

    def numbers(column: str, sign: str = "") -> pd.Series:
        return data[column].map(lambda value: "" if pd.isna(value) else f"{value:{sign}.2f}")

    low, high = numbers("ours.ci95_low"), numbers("ours.ci95_high")
    return pd.DataFrame({
        "Benchmark": data.benchmark.fillna(data["data"]),
        "Published network": data.published_model,
        "Published parameters (M)": numbers("published_params_m"),
        "Quantity": data.metric.map(lambda key: quantity(key).heading),
        "Published": numbers("published").replace("", "not quoted"),
        "Our network": data.our_label.fillna(""),
        "Our parameters (M)": numbers("ours.params_m"),
        "Ours": numbers("ours.mean") + (" [" + low + ", " + high + "]").where(low != "", ""),
        "Difference": numbers("difference", "+"),
        "Verdict": data.verdict.fillna(""),
        "Source": data.source,
    })  # fmt: skip
