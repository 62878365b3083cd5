"""The paper's claims about SUNets, and what the records of all benchmarks say about them.

Only the wording of the claims is fixed: each is turned into comparisons, each comparison supports it, contradicts it
or decides nothing, and `judge` derives the verdict from them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from sunets.core.record import Kind, Record, RecordError
from sunets.report.comparison import Comparison, difference_text, estimate_text, joint_estimate, verdict_text
from sunets.report.published import family, zoo_names
from sunets.report.records import FINISHED, Records, find_records, quantity, read_checked
from sunets.report.statistics import BETTER, EQUIVALENT, UNDECIDED, WORSE
from sunets.report.tables import SIZE_KEYS, compared_models
from sunets.report.write import markdown, plural

SHOWN, NOT_SHOWN, REFUTED, NOT_RUN = "shown", "not shown", "refuted", "not run"
NOT_TESTED = "not tested here"
LARGE_M = 5.0
"""Million parameters from which a network is large: memory and speed are claimed against large networks."""
PAPER_DATA = ("imagenet", "voc", "cityscapes")
"""Families of benchmarks that the paper reports accuracy on."""

ACCURACY = (
    "Accuracy with few parameters",
    "At least as accurate as every network with more parameters, and not less accurate than any with fewer",
)
GLOBAL = ("Global information ...", "More accurate than every network whose receptive field is smaller than the image")
RESOLUTION = (
    "... while keeping resolution",
    "Boundaries at least as accurate as those of every network that sees the whole image",
)
MEMORY = ("Low memory", "Less memory saved for the backward pass than every larger network at the same output stride")
SPEED = ("Fast training", "A shorter training step than every larger network in the same run")
SIMPLE = (
    "Simple and portable",
    "No operator that the other networks do not need; the same output after export and in other runtimes",
)
CAPTION = "What the paper claims about SUNets, and what the records here say."
NOTES = (
    "Each comparison supports a claim, contradicts it or decides nothing. Shown: every comparison supports it. "
    "Refuted: every one contradicts it. Not shown: anything else. Accuracy is compared seed by seed with Holm's "
    "adjustment over all networks of the benchmark, and the verdict is that of the other network: worse or equivalent "
    "supports the claim and better contradicts it; for global information, equivalent contradicts it too, and for "
    "accuracy with few parameters, a network with fewer cannot support it. Rows that differ in budget, data or effort "
    "are not compared. Counts of memory are exact; timings differ where their interquartile ranges do not overlap.",
    "A network sees the whole image if its theoretical receptive field is at least as large as the image's shorter "
    "side. The synthetic images were designed so that a network that does not cannot label large objects.",
    f"Larger: more parameters than the SUNet; for memory and speed, both networks have at least {LARGE_M:g} M.",
)


@dataclass(frozen=True, eq=False)
class Results:
    """The records of all benchmarks below `results/`."""

    benchmarks: dict[str, Records]
    zoo: list[Record]
    """Cost records of `make zoo`."""
    zoo_speed: list[Record]
    """Timings of networks of the zoo within one run, `results/zoo/speed.json`."""
    unreadable: dict[str, str]
    """Name of a benchmark whose records cannot be read -> the error."""


def read_results(results: Path) -> Results:
    """Read the records of every benchmark; unreadable ones, such as those of other code, do not stop the report."""
    read = Results({}, [], [], {})
    for directory in sorted(path.parent for path in results.glob("*/records")):
        try:
            read.benchmarks[directory.name] = find_records(results, directory.name)
        except FileNotFoundError:
            continue
        except RecordError as error:
            read.unreadable[directory.name] = str(error)
    files: dict[str, tuple[Kind, list[Record]]] = {"records": ("cost", read.zoo), "speed": ("speed", read.zoo_speed)}
    for name, (kind, rows) in files.items():
        path = results / "zoo" / f"{name}.json"
        try:
            rows += read_checked(path, kind) if path.exists() else []
        except RecordError as error:
            read.unreadable["zoo"] = str(error)
    return read


@dataclass(frozen=True)
class Finding:
    """A claim on one benchmark: a row of the table."""

    claim: tuple[str, str]
    """The claim, and what would show it."""
    benchmark: str
    measured: str
    verdict: str
    table: str = ""
    """Path of the table below `results/`."""
    keys: tuple[str, ...] = ()
    """What is compared, as the records name it."""
    records: tuple[Record, ...] = field(default=(), repr=False)
    """Those that are compared."""

    @property
    def cells(self) -> dict[str, str]:
        """Heading -> text of the row."""
        return {
            "Claim": self.claim[0], "Would be shown by": self.claim[1], "Benchmark": self.benchmark,
            "Measured": self.measured, "Verdict": self.verdict, "Table": self.table,
        }  # fmt: skip


def judge(outcomes: Iterable[bool | None]) -> str:
    """Judge several comparisons: True supports the claim, False contradicts it, None decides nothing."""
    given = list(outcomes)
    if not given:
        return f"{NOT_TESTED}: nothing comparable"
    return SHOWN if all(given) else REFUTED if all(outcome is False for outcome in given) else NOT_SHOWN


def claims_table(results: Results) -> str:
    """Write the claims as Markdown, with links as seen from `results/README.md`."""
    rows: list[dict[str, str]] = []
    last = None
    for f in findings(results):
        link = f"[{Path(f.table).stem}]({f.table})" if f.table else ""
        verdict = f"**{f.verdict}**" if f.verdict in (SHOWN, NOT_SHOWN, REFUTED) else f.verdict
        rows.append(f.cells | {"Verdict": verdict, "Table": link})
        if f.claim == last:
            rows[-1] |= {"Claim": "", "Would be shown by": ""}
        last = f.claim
    return markdown(pd.DataFrame(rows), CAPTION, NOTES)


@functools.lru_cache(maxsize=2)
def findings(results: Results) -> list[Finding]:
    """Return all rows, claim by claim."""
    benchmarks = results.benchmarks.values()
    ran = {family(name) for name in results.benchmarks}
    rows = [f for records in benchmarks for f in _accuracy(records)]
    rows += [Finding(ACCURACY, data, "", NOT_RUN) for data in PAPER_DATA if data not in ran]
    for claim, make in ((GLOBAL, _global), (RESOLUTION, _resolution)):
        made = [f for records in benchmarks for f in make(records)]
        rows += made or [Finding(claim, "", "", NOT_RUN)]
    return [
        *rows,
        _memory(results.zoo, results.zoo_speed),
        _speed(results.zoo, results.zoo_speed),
        _simple(results.zoo),
    ]


# --- claims on scores -------------------------------------------------------------------------------------------------

_OUTCOMES = {WORSE: True, EQUIVALENT: True, BETTER: False, UNDECIDED: None}
"""Verdict of another network against a SUNet -> what it says of the claim; other verdicts are not comparable."""


def _accuracy(records: Records) -> list[Finding]:
    """Judge accuracy against every other network; one with fewer parameters cannot support."""
    key, params = records.headline, _cost(records, "cost.params_m")
    sunets, others = _split(records)
    outcomes, texts = [], []
    for sunet in (m for m in sunets if others and m in params):
        compared = _compare(records, sunet, [m for m in others if m in params], key)
        judged = {m: _OUTCOMES[c.verdict] for m, c in compared.items() if c.verdict in _OUTCOMES}
        outcomes += [outcome for m, outcome in judged.items() if params[m] > params[sunet] or not outcome]
        texts.append(_text(records, sunet, compared, key, params))
    return _finding(ACCURACY, records, outcomes, texts, (key, "cost.params_m"), (*sunets, *others))


def _global(records: Records) -> list[Finding]:
    """Judge against networks that see a neighbourhood only; equal accuracy contradicts."""
    key, share = records.headline, "receptive_field.effective_share"
    shares = _cost(records, share)
    sunets, others = _split(records)
    local = [m for m in others if m in _local(records)]
    outcomes, texts = [], []
    for sunet in sunets if local else ():
        compared = _compare(records, sunet, local, key)
        told = _OUTCOMES | {EQUIVALENT: False}
        outcomes += [told[c.verdict] for c in compared.values() if c.verdict in told]
        text = _text(records, sunet, compared, key, {})
        fields = [f"{records.labels[m]} {quantity(share).text(shares[m])} %" for m in (sunet, *local) if m in shares]
        if fields:
            text += (
                f"; share of the image that holds 95 % of the untrained network's input gradient: {', '.join(fields)}"
            )
        texts.append(text + _by_object_size(records, (sunet, *local)))
    keys = (key, "receptive_field.theoretical_px", share)
    return _finding(GLOBAL, records, outcomes, texts, keys, (*sunets, *local))


def _by_object_size(records: Records, models: Sequence[str]) -> str:
    """Write `; mean class accuracy on small, medium, large objects: A 50.0, 60.0, 90.0 %; B ...`; else nothing."""
    texts = []
    for model in models:
        means = [joint_estimate(records, model, key) for key in SIZE_KEYS]
        values = [quantity(key).text(e.mean) for key, e in zip(SIZE_KEYS, means, strict=True) if e]
        if len(values) == len(SIZE_KEYS):
            texts.append(f"{records.labels[model]} {', '.join(values)} %")
    sizes = [quantity(key).name.split()[0].lower() for key in SIZE_KEYS]
    return f"; mean class accuracy on {', '.join(sizes)} objects: {'; '.join(texts)}" if texts else ""


def _resolution(records: Records) -> list[Finding]:
    key, local = "score.boundary_f", _local(records)
    sunets, others = _split(records)
    measured = _cost(records, "receptive_field.theoretical_px")
    others = [m for m in others if m in measured and m not in local]
    outcomes, texts = [], []
    for sunet in sunets:
        compared = _compare(records, sunet, others, key)
        outcomes += [_OUTCOMES[c.verdict] for c in compared.values() if c.verdict in _OUTCOMES]
        if compared and records.scores(sunet, key):
            texts.append(_text(records, sunet, compared, key, {}))
    return _finding(RESOLUTION, records, outcomes, texts, (key,), (*sunets, *others))


def _split(records: Records) -> tuple[list[str], list[str]]:
    """Return the keys of the SUNets and of the other networks."""
    names = zoo_names(records)
    sunets = [m for m in records.labels if names.get(m, m).startswith("sunet")]
    return sunets, [m for m in records.labels if m not in sunets]


def _local(records: Records) -> set[str]:
    """Return the networks whose theoretical receptive field is smaller than the shorter side of the image."""
    sizes = {r["model"]: min(r["params"].get("cost.size") or [0]) for r in records.all("cost")}
    field = _cost(records, "receptive_field.theoretical_px")
    return {model for model, pixels in field.items() if pixels < sizes.get(model, 0)}


def _cost(records: Records, key: str) -> dict[str, float]:
    cost = records.cost.set_index("model")
    return cost[key].dropna().to_dict() if key in cost else {}


def _compare(records: Records, sunet: str, others: Sequence[str], key: str) -> dict[str, Comparison]:
    """Compare each of the other networks that has the score with a SUNet, as one of all comparisons with it."""
    compared = compared_models(records, sunet, key)
    return {m: c for m, c in compared.items() if m in others and records.scores(m, key)}


def _text(
    records: Records, sunet: str, compared: Mapping[str, Comparison], key: str, params: Mapping[str, float]
) -> str:
    """Write `mIoU of A (0.2 M): 80.0 [79.0, 81.0] %; compared with it, B (0.3 M): -5.0 [-6.0, -4.0], worse`."""
    q = quantity(key)
    names = records.labels | {
        m: f"{records.labels[m]} ({quantity('cost.params_m').text(count)} M)" for m, count in params.items()
    }
    estimate = joint_estimate(records, sunet, key)
    score = f"{estimate_text(q, estimate)} {q.unit}" if estimate else "not scored"
    parts = [
        f"{names[m]}: {', '.join(filter(None, (difference_text(q, c.difference), verdict_text(q, c))))}"
        for m, c in compared.items()
    ]
    return f"{q.name} of {names[sunet]}: {score}" + (f"; compared with it, {'; '.join(parts)}" if parts else "")


def _finding(
    claim: tuple[str, str],
    records: Records,
    outcomes: list[bool | None],
    texts: list[str],
    keys: tuple[str, ...],
    models: tuple[str, ...],
) -> list[Finding]:
    """Return the row of a claim on a benchmark; none where there is nothing to compare a SUNet with."""
    if not texts:
        return []
    name = records.benchmark
    compared = tuple(
        r
        for model in models
        for r in (*records.all("evaluate", model), *records.all("cost", model))
        if r["variant"] in (None, records.variants[0])
        and (r["status"] != FINISHED or any(key in r["scores"] or key in r["cost"] for key in keys))
    )
    return [Finding(claim, name, ". ".join(texts), judge(outcomes), f"{name}/tables/accuracy.md", keys, compared)]


# --- claims on cost ---------------------------------------------------------------------------------------------------

Pairs = list[tuple[Record, Record]]
"""Every SUNet of the paper beside every larger network."""


def _segmentation(zoo: Iterable[Record]) -> list[Record]:
    return [r for r in zoo if r["task"] == "segmentation" and r["status"] == FINISHED]


def _pairs(rows: Sequence[Record], counted: Sequence[Record]) -> Pairs:
    """Return the pairs of rows, by the parameters in cost records."""
    params = {r["label"]: r["cost"]["cost.params_m"] for r in counted if r["cost"].get("cost.params_m")}
    large = [r for r in rows if params.get(r["label"], 0.0) >= LARGE_M]
    sunets = [r for r in large if r["label"].startswith("sunet")]
    others = [r for r in large if r not in sunets]
    return [(s, o) for s in sunets for o in others if params[o["label"]] > params[s["label"]]]


def _cost_finding(
    claim: tuple[str, str], pairs: Pairs, text: str, outcomes: Iterable[bool | None], table: str, keys: tuple[str, ...]
) -> Finding:
    members = {id(r): r for pair in pairs for r in pair}  # each record once
    return Finding(claim, "zoo", text, judge(outcomes), f"zoo/{table}", keys, tuple(members.values()))


def _memory(zoo: Sequence[Record], speed: Sequence[Record]) -> Finding:
    key, stride = "memory.saved_mib", "cost.output_stride"
    rows = [r for r in _segmentation(zoo) if r["cost"].get(key)]
    pairs = [(s, o) for s, o in _pairs(rows, rows) if s["cost"][stride] == o["cost"][stride]]
    if not pairs:
        return Finding(MEMORY, "zoo", "", NOT_RUN)
    text, recomputing = _ratios(pairs, key), f"{key}_memory_efficient"
    if efficient := [s["cost"][recomputing] / o["cost"][key] for s, o in pairs if s["cost"].get(recomputing)]:
        text += f"; recomputing its U-Nets, {min(efficient):.2f} to {max(efficient):.2f}"
    text += f"; counted at {_pixels(rows[0])} pixels"
    peaks = _pairs([r for r in speed if r["cost"].get("memory.peak_mib")], rows)
    text += f"; measured peak {_ratios(peaks, 'memory.peak_mib')}" if peaks else "; no peak measured, which needs a GPU"
    outcomes = (s["cost"][key] < o["cost"][key] for s, o in pairs)
    return _cost_finding(
        MEMORY, pairs, text, outcomes, "cost_segmentation.md", ("cost.params_m", stride, key, recomputing)
    )


def _speed(zoo: Sequence[Record], speed: Sequence[Record]) -> Finding:
    key = "speed.step_ms"
    rows = [r for r in speed if r["status"] == FINISHED and r["cost"].get(key)]
    pairs = _pairs(rows, _segmentation(zoo))
    if not pairs:
        return Finding(SPEED, "zoo", "", NOT_RUN)
    e, params = rows[0]["environment"], rows[0]["params"]
    threads = e.get("threads")
    strides = sorted({s["params"]["model.output_stride"] for s, _ in pairs if "model.output_stride" in s["params"]})
    outcomes = [_faster(*pair) for pair in pairs]
    close = [pair for pair, outcome in zip(pairs, outcomes, strict=True) if outcome is None]
    noise = f", within the noise of the rounds in {len(close)}: {_named(close, key)}" if close else ""
    text = (
        f"{_ratios(pairs, key)}{noise}; at output stride {' and '.join(map(str, strides)) or '?'} alone, batch "
        f"{params.get('cost.batch_size', '?')}, {_pixels(rows[0])} pixels, {e.get('gpu') or e.get('cpu')}, "
        f"{plural(threads or 0, 'thread')}"
    )
    return _cost_finding(SPEED, pairs, text, outcomes, "speed.md", (key, "speed.step_iqr_ms"))


def _pixels(record: Record) -> str:
    return " x ".join(map(str, record["params"].get("cost.size") or ()))


def _faster(sunet: Record, other: Record) -> bool | None:
    """Return whether a step is shorter; None where the interquartile ranges, taken as symmetric, overlap."""
    spread = sum(r["cost"].get("speed.step_iqr_ms") or 0.0 for r in (sunet, other))
    difference = sunet["cost"]["speed.step_ms"] - other["cost"]["speed.step_ms"]
    return None if abs(difference) <= spread / 2 else difference < 0


def _simple(zoo: Sequence[Record]) -> Finding:
    key, rows = "cost.uncounted_operators", [r for r in zoo if r["status"] == FINISHED]
    used: dict[bool, set[str]] = {True: set(), False: set()}
    for r in rows:
        operators = str(r["cost"].get(key) or "").split(", ")
        used[r["label"].startswith("sunet")] |= {name for name in operators if name}
    why = f"{NOT_TESTED}: no record measures it; the tests compile and export the network and run it elsewhere"
    if not used[True]:
        return Finding(SIMPLE, "zoo", "", why)
    extra = used[True] - used[False]
    text = f"SUNets need {len(used[True])} operators besides convolution and linear layers "
    text += f"({', '.join(sorted(used[True]))}); "
    text += f"no other network needs {', '.join(sorted(extra))}" if extra else "other networks need all of them too"
    return Finding(SIMPLE, "zoo", text, why, "zoo/cost_segmentation.md", (key,), tuple(rows))


def _ratios(pairs: Pairs, key: str) -> str:
    """Write `0.20 to 2.05 times that of the larger network (24 pairs), not smaller in 2: A / B at stride 8 (2.05)`."""
    ratios = [_ratio(pair, key) for pair in pairs]
    text = f"{min(ratios):.2f} to {max(ratios):.2f} times that of the larger network ({plural(len(ratios), 'pair')})"
    above = [pair for pair in pairs if _ratio(pair, key) >= 1]
    return text + (f", not smaller in {len(above)}: {_named(above, key)}" if above else "")


def _ratio(pair: tuple[Record, Record], key: str) -> float:
    return float(pair[0]["cost"][key] / pair[1]["cost"][key])


def _named(pairs: Pairs, key: str) -> str:
    """Write the three pairs of the largest ratios: `A / B at stride 8 (2.05), ...`."""
    names = []
    for sunet, other in sorted(pairs, key=lambda pair: -_ratio(pair, key)):
        stride = other["cost"].get("cost.output_stride") or other["params"].get("model.output_stride")
        at = f" at stride {stride:g}" if stride else ""
        names.append(f"{sunet['label']} / {other['label']}{at} ({_ratio((sunet, other), key):.2f})")
    return ", ".join([*names[:3], *(["..."] if names[3:] else [])])
