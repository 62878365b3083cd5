"""Pages in Markdown: `results/<benchmark>/README.md` of each benchmark, and their index `results/README.md`.

A page is made from records and from the tables of the same build. It links to noisy tables instead of showing them, so
that it changes only when an exact figure does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from sunets.core.config import Suite
from sunets.core.metrics import higher_is_better
from sunets.core.record import Kind, RecordError, read_rows
from sunets.report.claims import claims_table, read_results
from sunets.report.comparison import compare_all, difference_text, estimate_text, joint_estimate, undecided_text
from sunets.report.published import published_everywhere
from sunets.report.records import FINISHED, Records, quantity
from sunets.report.statistics import BETTER, EQUIVALENT, UNDECIDED, WORSE
from sunets.report.tables import LARGE, MEDIUM, compared_models, run_failures
from sunets.report.write import Table, bullets, join, markdown, markdown_cell, plural

KINDS: tuple[Kind, ...] = ("train", "evaluate", "cost", "speed")
"""Kinds of records of a benchmark."""


def benchmark_page(
    suite: Suite, records: Records, tables: Sequence[Table], figures: Mapping[str, str], notes: Sequence[str] = ()
) -> str:
    """Write the page of one benchmark.

    `figures` maps names to paths as seen from the page; `notes` are reasons for missing figures.
    """
    shown = {("table", t.name): _table(t) for t in tables}
    shown |= {("figure", name): _figure(figure_caption(name, records), path) for name, path in figures.items()}
    parts = [
        f"# {suite.report.title}",
        "Made by `dvc repro` (stage `report`) from [`records/`](records): do not edit. `python -m sunets explain "
        "TABLE ROW COLUMN` traces every number to its runs.",
        "## Findings",
        bullets(findings(suite, records)),
        "## What was run",
        _what_was_run(suite, records),
    ]
    for title, names in SECTIONS:
        if body := [shown[name] for name in names if name in shown]:
            parts += [f"## {title}", *body]
    noisy = [t for t in tables if t.noisy]
    if noisy:
        links = ", ".join(f"[{t.caption.rstrip('.').lower()}](tables/{t.name}.md)" for t in noisy)
        parts += ["## Speed", f"Measured, hence different on every run and machine, and kept apart: {links}."]
    if suite.ablations:
        parts += ["## Ablations", "What changes with the structure of the network: [ablations.md](ablations.md)."]
    parts += ["## Limits", bullets([*limits(records), *notes])]
    parts += ["## How it was made", _how(records)]
    return "\n\n".join(parts) + "\n"


SECTIONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Accuracy", (("table", "accuracy"), ("figure", "accuracy"), ("figure", "accuracy_cost"), ("table", "published"))),
    ("Classes", (("table", "per_class"), ("figure", "per_class"), ("figure", "confusion"))),
    ("Object size", (("table", "object_size"), ("figure", "object_size"))),
    ("Test-time variants", (("table", "test_time"),)),
    ("Cost", (("table", "cost"), ("figure", "receptive_field"))),
    ("Training", (("table", "tuning"), ("figure", "tuning"), ("figure", "training_curves"))),
    ("Pictures", (("figure", "qualitative"),)),
)
"""Order of the page."""

FIGURE_CAPTIONS = {
    "accuracy": "{headline} of every seed (dots) and its mean with the 95 % interval of the table.",
    "accuracy_cost": "{headline} against multiply-adds and against parameters. Bars: the 95 % intervals of the table.",
    "training_curves": "Training loss and validation score; mean over the seeds, band: 95 % t-interval.",
    "tuning": "Validation {headline} of every trial (dots) and the best so far, by trial, all of one seed. Trial 0 is "
    "the recipe of the parameter file.",
    "per_class": "IoU of each class, mean over the seeds and 95 % interval over seeds and images.",
    "object_size": "Mean class accuracy on the pixels of small, medium and large objects (connected regions of one "
    f"class that cover less than {MEDIUM}, less than {LARGE}, or at least {LARGE} of the image); bars: 95 % intervals "
    "over the seeds.",
    "confusion": "Confusion matrices over all seeds, each row divided by its sum.",
    "receptive_field": "Effective receptive field: the gradient of a centre logit with respect to the input of the "
    "untrained network, averaged over initialisations and images, relative to its maximum. Line: the area that holds "
    "95 % of the smoothed field. Below: the smallest share of the image that holds 95 % of the gradient.",
    "qualitative": "Test images, their ground truth, and the predictions of each model's first seed.",
}


def findings(suite: Suite, records: Records) -> list[str]:
    """State the headline results in sentences, from the statistics alone."""
    key, reference = records.headline, suite.report.reference
    q = quantity(key)
    means = {m: e for m in records.labels if (e := joint_estimate(records, m, key))}
    if not means:
        why = next(iter(run_failures(records)), "no pixel of the test split is labelled.")
        return [f"No model has been scored: {why}"]
    name = records.labels
    ranked = sorted(means, key=lambda m: means[m].mean, reverse=higher_is_better(key))
    best = ranked[0]
    word = "highest" if higher_is_better(key) else "lowest"
    alone = len(records.labels) == 1
    lead = f"{q.name} of **{name[best]}**: " if alone else f"**{name[best]}** has the {word} {q.name}: "
    lead += f"{estimate_text(q, means[best])} {q.unit} ({plural(means[best].n, 'seed')})"
    if len(ranked) > 1:
        gap = compare_all({m: records.runs(m) for m in ranked[1:]}, records.runs(best), key, suite.report)[ranked[1]]
        verdict = "beyond the noise of the seeds" if gap.verdict in (BETTER, WORSE) else gap.verdict
        told = ", ".join(filter(None, (difference_text(q, gap.difference), verdict)))
        lead += f"; next is {name[ranked[1]]} ({'; '.join(filter(None, (told, undecided_text(q, gap))))})"
    sentences = [lead + "."]
    groups: dict[str, list[str]] = {}
    compared = compared_models(records, reference) if reference in means else {}
    for model, c in ((m, c) for m, c in compared.items() if m in means):
        texts = [text for text in (difference_text(q, c.difference), undecided_text(q, c)) if text]
        shown = f" ({'; '.join(texts)})" if texts else ""
        groups.setdefault(c.verdict, []).append(f"{name[model]}{shown}")
    order = (BETTER, WORSE, EQUIVALENT, UNDECIDED)
    for verdict in sorted(groups, key=lambda v: order.index(v) if v in order else len(order)):
        sentences.append(f"Compared with {name[reference]}, {verdict}: {join(groups[verdict])}.")
    if reference not in means:
        sentences.append(f"The reference {name[reference]} has no score, so no difference is shown.")
    return sentences + _cost_findings(records)


def _cost_findings(records: Records) -> list[str]:
    sentences = []
    for key, least, what in (
        ("cost.params_m", "fewest", "parameters"),
        ("cost.gmacs", "fewest", "multiply-adds"),
        ("memory.saved_mib", "least", "memory saved for the backward pass"),
    ):
        if key in records.cost:
            order = records.cost.dropna(subset=[key]).sort_values(key, kind="stable")
            if len(order) > 1:
                q, low, high = quantity(key), order.iloc[0], order.iloc[-1]
                ends = [f"{q.text(row[key])} {q.unit}" for row in (low, high)]
                same = f"{what.capitalize()}: the same in all ({ends[0]})."
                differ = f"{low.label} has the {least} {what} ({ends[0]}), {high.label} the most ({ends[1]})."
                sentences.append(differ if low[key] < high[key] else same)
    key = "receptive_field.effective_share"
    if key in records.cost and len(order := records.cost.dropna(subset=[key]).sort_values(key, kind="stable")) > 1:
        shares = [f"{quantity(key).text(v)} % in {label}" for v, label in zip(order[key], order.label)]
        sentences.append(f"Share of the image that holds 95 % of the gradient of a centre logit: {join(shares[::-1])}.")
    return sentences


def limits(records: Records) -> list[str]:
    """State what the numbers do not say: missing runs, few seeds, one budget, mixed data or code."""
    sentences = run_failures(records)
    for r in records.cost[records.cost.status != FINISHED].itertuples():
        sentences.append(f"Cost of {r.label}: {r.status} ({r.reason}).")
    if len(records.seeds) == 1:
        sentences.append(
            "One seed: differences between models are not tested, and training again would move every score."
        )
    elif len(records.seeds) < 5:
        sentences.append(f"{len(records.seeds)} seeds: the intervals are wide, and small differences stay undecided.")
    epochs = _values(records, "train.epochs")
    if epochs:
        trials = [n for n in _values(records, "tune.trials") if n != "0"]
        tuned = f"tuned for each model with {join(trials)} trials" if trials else "not tuned for each model"
        budget = "one budget" if len(epochs) == 1 else "several budgets"
        sentences.append(
            f"One data set and {budget} ({join(epochs)} epochs): more data or longer training may change the "
            f"ranking. Recipes were {tuned}."
        )
    for key, what in (("data_digest", "data"), ("code_hash", "code")):
        for kind in ("train", "evaluate"):
            count = len({r["provenance"].get(key) for r in records.all(kind)})
            if count > 1:
                origin = f"{count} versions of the {what}"
                sentences.append(f"The {kind} records come from {origin}: run `dvc repro` until they agree.")
    if any(r["provenance"].get("git_dirty") for kind in ("train", "evaluate") for r in records.all(kind)):
        sentences.append("Some records were made with uncommitted changes; their code hash tells which code it was.")
    unknown = [kind for kind in KINDS if any(r["provenance"]["git_commit"] is None for r in records.all(kind))]
    if unknown:
        sentences.append(commit_unknown(unknown))
    return sentences + [f"Data: {warning}." for warning in records.data_warnings]


def commit_unknown(kinds: Sequence[str]) -> str:
    """State that records have no commit."""
    return (
        f"The commit of some records ({join(kinds)}) is unknown: git was absent or refused when they were made. Their "
        "code hash tells which code it was."
    )


def index_page(results: Path) -> str:
    """Write `results/README.md`: the claims, the benchmarks, and every published number beside ours."""
    rows, damaged = [], []
    for page in sorted(results.glob("*/README.md")):
        title = page.read_text(encoding="utf-8", errors="replace").partition("\n")[0].removeprefix("# ")
        path = page.parent / "tables" / "accuracy.csv"
        try:
            models = read_rows(path, ("n_seeds",)) if path.exists() else []
        except RecordError as error:  # of another benchmark: no reason to stop this one
            models = []
            damaged.append(f"Not counted: {error}.")
        seeds = sorted({row["n_seeds"] for row in models if row["n_seeds"]})
        done = sum(bool(row["n_seeds"]) for row in models)
        rows.append({
            "Benchmark": f"[{title}]({page.parent.name}/README.md)", "Name": f"`{page.parent.name}`",
            "Models scored": f"{done} of {len(models)}",
            "Seeds": "-".join(dict.fromkeys(str(s) for s in seeds[:1] + seeds[-1:])),
        })  # fmt: skip
    read = read_results(results)
    table = published_everywhere(read.benchmarks.values(), read.zoo)
    parts = [
        "# Results",
        claims_table(read).rstrip("\n"),
        "All files here are outputs; each page is made by `dvc repro` from the records beside it. A benchmark has "
        "`records/`, `tables/` (Markdown, LaTeX, CSV), `figures/` (PNG, PDF), and `paper.tex` for pdflatex.",
        markdown(pd.DataFrame(rows), "Benchmarks.").rstrip("\n") if rows else "No benchmark has been run.",
        *damaged,
        *(f"Left out, since its records cannot be read: {name} ({why})." for name, why in read.unreadable.items()),
        "## Published numbers",
        markdown(table.view, table.caption, table.notes),
    ]
    return "\n\n".join(parts)


_IGNORED = {"camvid": "void (label 11): neither trained on nor scored, as in the published numbers"}
"""Data set -> pixels that count nowhere."""


def _what_was_run(suite: Suite, records: Records) -> str:
    runs = [*records.all("train"), *records.all("evaluate")]
    rows = [
        ("Task", f"{records.task} on `{suite.data.name}`"),
        ("Classes", ", ".join(records.classes) if len(records.classes) <= 30 else str(len(records.classes))),
        ("Image size", " × ".join(map(str, suite.data.size or ())) + " pixels" if suite.data.size else ""),
        ("Ignored pixels", _IGNORED.get(suite.data.name, "")),
        ("Data digest", _codes(r["provenance"].get("data_digest") for r in runs)),
        ("Models", join(list(records.labels.values()))),
        ("Seeds", ", ".join(map(str, records.seeds))),
        ("Recipe", _recipe(records)),
        ("Scored on", join([f"`{v}`" for v in _values(records, "data.test_split")])),
        ("Test-time variants", join([v.replace("_", " ") for v in records.variants])),
        ("Device", join(_distinct(_device(r["environment"]) for r in runs))),
        ("Versions", join(_distinct(_versions(r["environment"]) for r in runs))),
        ("Commit", _codes(r["provenance"].get("git_commit") or "unknown" for r in runs)),
    ]
    return _grid([row for row in rows if row[1]], ("What", "Value"))


def _grid(rows: Sequence[Sequence[str]], headings: Sequence[str]) -> str:
    align = ["right" if heading == "Records" else "left" for heading in headings]
    frame = pd.DataFrame(rows, columns=list(headings)).map(markdown_cell)
    return frame.to_markdown(index=False, disable_numparse=True, colalign=align)


def _recipe(records: Records) -> str:
    names = {
        "epochs": "epochs", "batch_size": "batch", "optimizer": "optimizer", "lr": "learning rate",
        "weight_decay": "weight decay", "schedule": "schedule", "amp": "autocast",
    }  # fmt: skip
    shown = {name: _values(records, f"train.{key}") for key, name in names.items()}
    return "; ".join(f"{name} {' or '.join(values)}" for name, values in shown.items() if values)


def _device(e: Mapping[str, Any]) -> str:
    cpu = f"{e.get('cpu')}, {plural(e.get('threads') or 0, 'thread')} per training"
    chip = f"{e['gpu']}, CUDA {e.get('cuda')}" if e.get("gpu") else cpu
    return f"{e.get('device')}: {chip}" if e.get("device") else ""


def _versions(e: Mapping[str, Any]) -> str:
    return " ".join(f"{k} {e[k]}" for k in ("python", "torch", "torchvision") if e.get(k))


def _values(records: Records, key: str) -> list[str]:
    """Collect the values of a parameter in the training records, or else in the evaluations."""
    runs = records.all("train") or records.all("evaluate")
    values = [r["params"].get(key) for r in runs]
    return _distinct(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values if v is not None)


def _distinct(values: Iterable[str]) -> list[str]:
    return [v for v in dict.fromkeys(values) if v]


def _codes(values: Iterable[Any]) -> str:
    return ", ".join(f"`{str(v)[:16]}`" for v in dict.fromkeys(values) if v)


def _table(table: Table) -> str:
    files = f"[LaTeX](tables/{table.name}.tex), [CSV](tables/{table.name}.csv)"
    text = markdown(table.view, table.caption, table.notes).rstrip("\n")
    return f"{text}\n\n<sub>Table `{table.name}`: {files}</sub>"


def figure_caption(name: str, records: Records) -> str:
    """Return the caption of a figure of the report."""
    return FIGURE_CAPTIONS[name].format(headline=quantity(records.headline).name)


def _figure(caption: str, path: str) -> str:
    return f"![{caption}]({path}.png)\n\n<sub>{caption} [PDF]({path}.pdf)</sub>"


def _how(records: Records) -> str:
    rows = []
    for kind, what in (
        ("train", "weights and training curves"), ("evaluate", "scores and confusion matrices"),
        ("cost", "parameters, multiply-adds, memory, receptive field"), ("speed", "latency and throughput"),
    ):  # fmt: skip
        if made := records.all(kind):
            commands = _distinct(r["provenance"].get("command") or "" for r in made)
            if len(commands) > 1:
                commands = [f"{c} MODEL" for c in _distinct(" ".join(c.split()[:4]) for c in commands)]
            path = "records/speed.json" if kind == "speed" else f"records/{kind}/"
            shown = ", ".join(f"`{c}`" for c in commands)
            rows.append((what.capitalize(), shown, f"[{path}]({path})", str(len(made))))
    here = "[tables/](tables), [figures/](figures)"
    rows.append(("Tables, figures, this page", "`python -m sunets report`", here, ""))
    return "`dvc repro` runs all of it.\n\n" + _grid(rows, ("What", "Command", "Where", "Records"))
