"""The page of the ablations and everything that it links to."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure

from ablations.report.figures import DRAWN
from ablations.report.importance import RESAMPLES
from ablations.report.results import KINDS, Study, arm_text, axis_name
from ablations.report.tables import MADE
from sunets.core.config import Suite
from sunets.core.history import read_history
from sunets.core.paths import BenchmarkPaths
from sunets.core.record import write_text
from sunets.core.stage import stage
from sunets.core.trials import check_trials, startup_trials
from sunets.report.comparison import Comparison, difference_text, undecided_text
from sunets.report.page import commit_unknown
from sunets.report.records import FAILED, ReportError, read_checked
from sunets.report.statistics import BETTER, EQUIVALENT, UNDECIDED, WORSE
from sunets.report.style import save_figure
from sunets.report.tables import budget_text
from sunets.report.write import Table, bullets, join, markdown, markdown_cell, plural, value_text, write

CAPTIONS = {
    "axes": "{score} by the value of each axis: every seed (dots), mean and 95 % t-interval. Square and band: the "
    "reference. Hollow: neither better nor worse than it.",
    "interaction": "Mean {score} over the seeds, and over axes that are not shown. The colours span at least the mean "
    "width of the 95 % intervals.",
    "variance": "What explains the variance of {score} over settings and seeds: exact functional ANOVA of the "
    "complete grid.",
    "importance": "Importance by fANOVA (Hutter et al., 2014; Optuna's evaluator, 64 trees): share of the variance "
    "of the score over all trials (of a sampler, of its search score) that an axis alone explains. "
    f"Lines: 95 % of {RESAMPLES} bootstrap samples of the trials (16 trees each).",
    "pareto": "{score} against multiply-adds. Left: trials of the search; right: points trained again on every seed, "
    "with 95 % t-intervals.",
    "history": "Optimisation history: every trial and the best so far (search score, validation split). Crosses: "
    "pruned or failed.",
}
BUDGET = {
    "train.epochs": "{} epochs", "train.batch_size": "batch {}", "train.optimizer": "{}",
    "train.lr": "learning rate {:g}", "train.weight_decay": "weight decay {:g}",
}  # fmt: skip
"""Parameters that the page states where all trainings share them."""
PAGE_ROWS = 16
"""Rows beyond which the page links to a table instead of showing it."""


def build_ablation_report(suite: Suite, root: Path = Path()) -> list[Path]:
    """Write the tables, figures and page of a benchmark's ablations anew; return every path written.

    Studies without records are named as not run.

    Raises:
        FileNotFoundError: no study has records.
        RecordError: a file of records is damaged, or a record contradicts its parameters.
        ReportError: files of two studies would have one name.
        StageError: the page is being written already, or its code or parameters changed meanwhile.
    """
    _check_names(suite.ablations)
    params = ("benchmark", "models", "report", "ablations")
    with stage("ablation_report", BenchmarkPaths(suite.benchmark, root), __name__, suite=suite, params=params):
        return _write(suite, root)


def _check_names(studies: Iterable[str]) -> None:
    """Refuse a study `depth_axes` beside a study `depth`, whose table of the axes has this name."""
    ends = ("axes", "object_size", "recipes", "variance", "trials", *DRAWN)
    names = set(studies)
    for name in sorted(names):
        for first in names & {name.removesuffix(f"_{end}") for end in ends} - {name}:
            raise ReportError(f"ablations.{name}: files of the study {first} have this name; rename one of the two")


def _write(suite: Suite, root: Path) -> list[Path]:
    folder = root / "results" / suite.benchmark
    studies, absent = [], []
    for name, config in suite.ablations.items():
        path = folder / "records" / "ablations" / f"{name}.json"
        if path.exists() and (records := read_checked(path, "trial")):
            check_trials(records, path)
            curves = path.with_suffix(".history.csv")
            history = read_history(curves, "number") if curves.exists() else ()
            studies.append(Study(name, config, records, records[0]["label"], suite.report, history))
            studies[-1].check(path)
        else:
            absent.append(name)
    if suite.ablations and not studies:
        raise FileNotFoundError(f"{folder / 'records' / 'ablations'}: no records; run `dvc repro` first")
    made = [(study, _tables(study), _figures(study)) for study in studies]  # before anything old is removed
    if (folder / "ablations").exists():
        shutil.rmtree(folder / "ablations")  # all of it is written anew
    (folder / "ablations").mkdir(parents=True)
    written: list[Path] = []
    parts = [
        f"# Ablations: {suite.report.title}",
        "Made by `dvc repro` (stage `ablation_report`) from [`records/ablations/`](records/ablations): do not edit. "
        "A record is one trial, with all its parameters, environment, commit and command. "
        "`python -m sunets explain ablations/TABLE ROW COLUMN` traces every number of a table to its trials.",
    ]
    if not suite.ablations:
        parts[1:] = ["The parameter file has no study."]
    if absent:
        parts.append(f"Not run: {', '.join(absent)}.")
    for study, tables, figures in made:
        for table in tables:
            written += write(table, folder / "ablations")
        for name, figure in figures.items():
            written += save_figure(figure, folder / "ablations" / f"{study.name}_{name}")
        parts += _section(study, tables, figures)
    page = folder / "ablations.md"
    write_text(page, "\n\n".join(parts) + "\n")
    return [*written, page]


def _tables(study: Study) -> list[Table]:
    return [table for make in MADE if (table := make(study)) is not None]


def _figures(study: Study) -> dict[str, Figure]:
    return {name: figure for name, draw in DRAWN.items() if (figure := draw(study)) is not None}


def _section(study: Study, tables: Iterable[Table], figures: Iterable[str]) -> list[str]:
    parts = [f"## {study.name}", markdown_cell(what_was_run(study)), bullets(findings(study))]
    for table in tables:
        stem = f"ablations/{table.name}"
        if len(table.view) <= PAGE_ROWS and not table.name.endswith("_trials"):
            parts.append(markdown(table.view, table.caption, table.notes).strip())
        else:
            parts.append(f"{table.caption} [Table of {len(table.view)} rows]({stem}.md), [CSV]({stem}.csv).")
    for name in figures:
        stem = f"ablations/{study.name}_{name}"
        text = CAPTIONS[name].format(score=study.shown.name)
        parts.append(f"![{study.name}: {name}]({stem}.png)\n\n*{text}* ([PDF]({stem}.pdf))")
    if failed := [r for r in study.records if r["status"] == FAILED]:
        trials = (f"trial {r['number']} ({arm_text(study, r['arm'])}, seed {r['seed']}): {r['reason']}" for r in failed)
        parts.append("Trials that diverged:\n\n" + bullets(trials))
    return parts


def what_was_run(study: Study) -> str:
    """Describe the protocol of a study in a few sentences."""
    c = study.config
    axes = "; ".join(
        f"{axis_name(a.path)} (`{a.path}`) "
        + (", ".join(_bracketed(map(value_text, a.values))) or f"{a.low:g} to {a.high:g}")
        for a in c.axes
    )
    budget = []
    for path, text in BUDGET.items():
        value, *others = {r["params"].get(path) for r in study.records}  # others: it may change with an axis
        if path not in study.varied and value is not None and not others:
            budget.append(text.format(value))
    fixed = [f"{path} {value_text(value)}" for path, value in c.overrides.items() if path.startswith("model.")]
    base = f"{study.label} with {', '.join(fixed)}" if fixed else study.label
    sentences = [
        f"{base}, {KINDS[c.kind]}: {axes}.",
        f"Every training: {', '.join(budget) or 'see the axes'}; "
        f"seeds {', '.join(map(str, c.seeds))}, the same for all settings; "
        f"{plural(len(study.final), 'training')} scored on the {study.final[0]['split']} split."
        if study.final
        else "No trial has been trained on the seeds yet.",
    ]
    if study.sampled:
        nuisance = f" over {', '.join(axis_name(a.path).lower() for a in c.nuisance)}" if c.nuisance else ""
        per = " per arm" if c.kind == "tuned" else ""
        pruned = any(r["status"] == "pruned" for r in study.sampled)
        sentences.append(
            f"Before that, {c.trials} trials{per}{nuisance}{_alike(study)}: {_drawn(study)}; "
            f"{min(c.batch, c.trials)} at a time, with training seed {c.tuning_seed}, scored on the "
            f"{study.sampled[0]['split']} split only"
            + ("; those below the median at an early epoch were stopped." if pruned else ".")
        )
        if study.recipes:
            more = sorted({r["seed"] for recipe in study.recipes for r in recipe.records} - {c.tuning_seed})
            sentences.append(
                f"The best recipes of each arm, at most {min(c.confirm, c.trials)}, were trained on "
                f"{plural(len(more), 'more tuning seed')} ({', '.join(map(str, more))}); the one with the best mean on "
                "that split was chosen."
            )
        if repeated := sum(r.get("duplicate_of") is not None for r in study.sampled):
            sentences.append(
                f"Only {len(study.sampled) - repeated} of them have different settings, all that exist: the "
                "others repeat a result and were not trained again."
            )
    if shared := sorted({r["seed"] for r in study.final if r.get("benchmark_training")}):
        sentences.append(
            f"The benchmark trains the same network by the same recipe on {plural(len(shared), 'seed')} "
            f"({', '.join(map(str, shared))}): where one machine runs both, one training serves both."
        )
    devices = sorted({r["environment"].get("gpu") or r["environment"].get("cpu", "?") for r in study.records})
    sentences.append(f"Device: {', '.join(devices)}.")
    if any(r["provenance"]["git_commit"] is None for r in study.records):
        sentences.append(commit_unknown(["trial"]))
    return " ".join(sentences)


def _drawn(study: Study) -> str:
    """Say how a sampler's settings were drawn: at random until the start-up trials have ended."""
    c = study.config
    base = int(any(r.get("recipe_of_base") for r in study.sampled))
    # Whole batches, drawn before those trials have ended.
    blind = min(c.trials, -(-startup_trials(c.trials) // c.batch) * c.batch)
    parts = ["the first with the recipe of the base"] if base else []
    parts += [f"{blind - base} at random"] if blind > base else []
    parts += [f"{c.trials - blind} by Optuna's TPE (multivariate)"] if c.trials > blind else []
    return f"{join(parts)} (sampler seed {c.search_seed})"


def _alike(study: Study) -> str:
    """List the values that tuning tried, if it was one parameter and the same values in every arm."""
    paths = [axis.path for axis in study.config.nuisance]
    if study.config.kind != "tuned" or len(paths) != 1:
        return ""
    tried: dict[str, list[str]] = {}
    for r in study.sampled:
        tried.setdefault(arm_text(study, r["arm"]), []).append(value_text(r["tuned"][paths[0]]))
    values = next(iter(tried.values()))
    return f" ({', '.join(values)} in every arm)" if all(other == values for other in tried.values()) else ""


def findings(study: Study) -> list[str]:
    """Write one sentence per axis, or per confirmed point of a search, from the statistics alone."""
    if study.reference is None or not study.reference.scores:
        return ["The reference has no score, so no difference can be shown."]
    unsettled = _unsettled(study)
    if study.config.kind != "search":
        return [*(_axis_finding(study, path) for path in study.axes), *unsettled]
    sentences = []
    default = study.reference.cost("cost.gmacs")
    for index, comparison in study.compared.items():
        setting = study.settings[index]
        name, gmacs = arm_text(study, setting.arm, study.reference.arm), setting.cost("cost.gmacs")
        cost = f", at {gmacs / default:.2f} times its multiply-adds" if gmacs is not None and default else ""
        sentences.append(f"{name}: {_words(study, comparison)} against the default{cost}.")
    sentences = sentences or ["No point of the search but the default was trained again: no difference shown."]
    return [*sentences, *unsettled]


def _unsettled(study: Study) -> list[str]:
    """Name the settings whose validation score was still changing."""
    texts = [budget_text(study.headline, change) for change in study.last_fifths]
    moving = [f"{arm_text(study, s.arm)} {text}" for s, text in zip(study.settings, texts, strict=True) if text]
    if not moving:
        return []
    rest = [f"{len(moving) - 3} more settings"] if len(moving) > 4 else []
    shown = "; ".join([*moving[: 3 if rest else 4], *rest])
    return [f"Not settled at the end of training, so more epochs may change the verdict: {shown}."]


def _axis_finding(study: Study, path: str) -> str:
    base, effects = study.base(path), study.effects(path)
    head = f"**{axis_name(path)}** (`{path}`, reference {base}{_context_words(study, path)}): "
    if base is None or not effects:
        return head + "no two values have scores to compare: no difference shown."
    if all(c.verdict == UNDECIDED for c in effects.values()):
        largest = max(effects.values(), key=lambda c: abs(c.difference.mean) if c.difference else 0.0)
        text = f"{difference_text(study.shown, largest.difference)} {study.shown.difference_unit}"
        why = undecided_text(study.shown, largest)
        return head + (
            f"no difference shown between {join(_bracketed([base, *effects]))}; the largest, {text}, is undecided"
            f"{f' ({why})' if why else ''}."
        )
    return head + "; ".join(f"{value}: {_words(study, c)}" for value, c in effects.items()) + "."


def _context_words(study: Study, path: str) -> str:
    """Say at which values of the other axes an axis is measured."""
    if len(study.axes) == 1 or not study.crossed:
        return ""
    contexts, unchanged = study.contexts(path)
    if len(contexts) == 1:
        others = [axis_name(p).lower() for p in study.axes if p != path]
        return ", at " + join([f"{name} {value}" for name, value in zip(others, *contexts, strict=True)])
    return ", on average over the other axes" + (" where it changes the network" if unchanged else "")


def _words(study: Study, comparison: Comparison) -> str:
    difference = comparison.difference
    if difference is None:
        return comparison.verdict
    text = f"{difference_text(study.shown, difference)} {study.shown.difference_unit}"
    if comparison.verdict in (BETTER, WORSE, EQUIVALENT):
        return f"{comparison.verdict}, {text}"
    if comparison.verdict == UNDECIDED:
        return f"no difference shown ({'; '.join(filter(None, (text, undecided_text(study.shown, comparison))))})"
    why = "one seed has no interval" if difference.n == 1 else "the seeds do not differ in it"
    return f"no difference shown, {why} ({text})"


def _bracketed(values: Iterable[str]) -> list[str]:
    """Return values for an enumeration: those with commas in brackets."""
    return [f"({value})" if "," in value else value for value in values]
