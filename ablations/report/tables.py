"""Tables of a study: settings, axes, trials of its sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from ablations.report.importance import variance_table
from ablations.report.results import KINDS, Recipe, Setting, Study, arm_text, axis_name
from sunets.core.metrics import higher_is_better
from sunets.core.record import Record
from sunets.report.comparison import (
    NO_COMPARISON,
    WINS,
    declared_notes,
    difference_columns,
    difference_text,
    estimate_columns,
    estimate_text,
    verdict_note,
    verdict_text,
    wins_text,
)
from sunets.report.latex import Paper
from sunets.report.records import DIVERGED, FINISHED, quantity
from sunets.report.statistics import mean_interval, paired_difference
from sunets.report.tables import SIZE_KEYS, SIZE_NOTE, budget_note, budget_text
from sunets.report.write import TRIAL_NUMBERS, Table, join, plural, value_text

COSTS = ("cost.params_m", "cost.gmacs", "memory.saved_mib", "receptive_field.effective_share")


def settings_table(study: Study) -> Table | None:
    """Make the table of settings: score, difference from the reference, cost; None where none was trained."""
    if not study.settings:
        return None
    q, rows, lines = study.shown, [], []
    for index, (setting, change) in enumerate(zip(study.settings, study.last_fifths, strict=True)):
        comparison = study.compared.get(index, NO_COMPARISON)
        estimate = setting.estimate
        tuned = setting.records[0]["tuned"]
        failed = [r for r in setting.records if r["status"] != FINISHED]
        row: dict[str, Any] = {"study": study.name, **{p: value_text(setting.arm[p]) for p in study.axes}, **tuned}
        row |= {
            "reference": setting.reference,
            "n_seeds": len(setting.scores),
            "status": FINISHED if not failed else f"{len(setting.scores)} of {len(setting.records)} seeds",
            "reason": failed[0]["reason"] if failed else None,
            TRIAL_NUMBERS: _numbers([setting]),
            **estimate_columns(study.headline, estimate),
            **difference_columns(study.headline, _reference_text(study), comparison),
            f"{study.validation}.last_fifth": change,
            **{key: setting.cost(key) for key in COSTS},
        }
        line = {axis_name(p): value_text(setting.arm[p]) for p in study.axes}
        line |= {axis_name(path): value_text(value) for path, value in tuned.items()}
        line["Seeds"] = str(len(setting.scores))
        total = len(setting.records)
        line[q.heading] = estimate_text(q, estimate) if estimate else f"{DIVERGED} ({total} of {total})"
        line["Budget"] = budget_text(study.headline, change)
        line |= {"Difference": difference_text(q, comparison.difference), "Wins": wins_text(comparison)}
        line["Verdict"] = "reference" if setting.reference else verdict_text(q, comparison) if estimate else ""
        line |= {quantity(key).heading: quantity(key).text(row[key]) for key in COSTS}
        rows.append(row)
        lines.append(line)
    view = pd.DataFrame(lines)
    if not any(view.Budget):
        view = view.drop(columns="Budget")
    notes = [
        f"Mean with its 95 % t-interval over the seeds, for these test images; difference from the reference "
        f"({_reference_text(study)}), paired by seed, with its 95 % interval. {WINS} "
        f"{verdict_note(study.report, q, study.compared.values())}",
        *declared_notes({arm_text(study, study.settings[i].arm): c for i, c in study.compared.items()}),
        *budget_note(study.headline, study.last_fifths, "setting"),
    ]
    if leads := _leads(study):
        notes.append(
            f"Lead of the chosen recipe over the next best in validation, in {q.difference_unit}: {'; '.join(leads)}. "
            "A lead within the noise of the seeds does not tell which recipe is better."
        )
    twice = [(setting.arm, arm) for setting in study.settings for arm in setting.same_as]
    if twice:
        one, other = (arm_text(study, arm) for arm in twice[0])
        count = plural(len(twice), "setting")
        notes.append(f"Not trained again, since a row has the same network: {count}, such as {other} (same as {one}).")
    return Table(
        study.name,
        f"Ablation {study.name}: {study.label}, {KINDS[study.config.kind]}.",
        pd.DataFrame(rows),
        view,
        tuple(notes),
        paper=Paper(view, names=len(study.axes)),
    )


def object_size_table(study: Study) -> Table | None:
    """Make the table of the mean class accuracy on small, medium and large objects; None where no trial has it."""
    rows, lines = [], []
    for setting in study.settings:
        finished = [r for r in setting.records if r["status"] == FINISHED]
        scores = {k: [r["scores"][k] for r in finished if r["scores"].get(k) is not None] for k in SIZE_KEYS}
        if not all(scores.values()):
            continue
        means = {key: mean_interval(values) for key, values in scores.items()}
        row = {"study": study.name, **{p: value_text(setting.arm[p]) for p in study.axes}}
        row |= setting.records[0]["tuned"] | {"n_seeds": len(finished), TRIAL_NUMBERS: _numbers([setting])}
        rows.append(row | {k: v for key, e in means.items() for k, v in estimate_columns(key, e).items()})
        line = {axis_name(p): value_text(setting.arm[p]) for p in study.axes}
        lines.append(line | {quantity(key).name: estimate_text(quantity(key), e) for key, e in means.items()})
    if not rows:
        return None
    caption = f"Ablation {study.name}: accuracy by object size."
    note = f"{SIZE_NOTE} In brackets: 95 % t-interval over the seeds."
    data, view = pd.DataFrame(rows), pd.DataFrame(lines)
    return Table(f"{study.name}_object_size", caption, data, view, (note,), paper=Paper(view, names=len(study.axes)))


def _leads(study: Study) -> list[str]:
    """Write the lead of the chosen recipe of each tuned arm, such as `0.34 [-0.10, +0.78] (U-Net depth 1, 1, 1)`."""
    leads = []
    for setting in study.settings if study.config.kind == "tuned" else ():
        if several := [r for r in study.recipes if r.records[0]["arm"] == setting.arm]:
            better, worse = (r.scores for r in (several[:2] if higher_is_better(study.headline) else several[1::-1]))
            if lead := paired_difference(better, worse):
                text = difference_text(study.shown, lead)
                leads.append(f"{text} ({arm_text(study, setting.arm)}; {plural(lead.n, 'seed')})")
            continue
        trials = [r for r in study.sampled if r["arm"] == setting.arm and r.get("duplicate_of") is None]
        scores = sorted(r["scores"][study.search_key] for r in trials if r["status"] == FINISHED)
        if len(scores) > 1:
            best, second = scores[:-3:-1] if higher_is_better(study.headline) else scores[:2]
            leads.append(f"{study.shown.text(abs(best - second))} ({arm_text(study, setting.arm)}; 1 seed)")
    return leads


def axes_table(study: Study) -> Table | None:
    """Make the table of axes, each value averaged over the other axes; None where none can be averaged."""
    if not study.crossed or len(study.axes) < 2 or study.reference is None:
        return None
    q, rows, lines = study.shown, [], []
    for path in study.axes:
        base, effects, averaged = value_text(study.reference.arm[path]), study.effects(path), study.averaged(path)
        for value, scores in study.marginal(path).items():
            estimate, comparison = mean_interval(list(scores.values())), effects.get(value, NO_COMPARISON)
            rows.append({
                "study": study.name, "axis": path, "value": value, "reference": value == base, "n_seeds": estimate.n,
                TRIAL_NUMBERS: _numbers(averaged[value]), **estimate_columns(study.headline, estimate),
                **difference_columns(study.headline, base, comparison),
            })  # fmt: skip
            lines.append({
                "Axis": axis_name(path), "Value": value, "Seeds": str(estimate.n),
                q.heading: estimate_text(q, estimate), "Difference": difference_text(q, comparison.difference),
                "Wins": wins_text(comparison), "Verdict": "reference" if value == base else verdict_text(q, comparison),
            })  # fmt: skip
    if not rows:  # no setting of the other axes has scores for every value
        return None
    note = (
        "Mean over the settings of the other axes that have scores for every value and seed, seed by seed; intervals "
        "over the seeds. Differences from the reference's value, paired by seed; verdicts adjusted in an axis (Holm). "
        f"{WINS}"
    )
    notes = [note]
    if unchanged := [axis_name(path) for path in study.axes if study.contexts(path)[1]]:
        notes.append(f"Left out: settings of the other axes at which {join(unchanged)} changes nothing.")
    return Table(
        f"{study.name}_axes",
        f"Ablation {study.name}: each axis alone, averaged over the others.",
        pd.DataFrame(rows),
        view := pd.DataFrame(lines),
        tuple(notes),
        paper=Paper(view, pd.DataFrame(False, view.index, view.columns), names=2),
    )


def _numbers(rows: Iterable[Setting | Recipe]) -> str:
    """Return the trials behind a row of a table, by which `sunets explain` finds their records."""
    return " ".join(str(number) for number in sorted({r["number"] for row in rows for r in row.records}))


def _reference_text(study: Study) -> str:
    return arm_text(study, study.reference.arm) if study.reference else "none was run"


def sampled_table(study: Study) -> Table | None:
    """Make the table of a sampler's trials; None without a sampler."""
    return _trials(study, study.sampled, "trials", f"Trials on the validation split for {study.name}.")


def recipes_table(study: Study) -> Table | None:
    """Make the table of the recipes that each arm was chosen from; None where one seed chose."""
    if not study.recipes:
        return None
    q, rows, lines = study.shown, [], []
    for recipe in study.recipes:
        first, estimate = recipe.records[0], mean_interval([*recipe.scores.values()])
        names = {p: value_text(first["arm"][p]) for p in study.axes}
        row = {"study": study.name, **names, **first["tuned"], "n_seeds": estimate.n, TRIAL_NUMBERS: _numbers([recipe])}
        rows.append(row | {"chosen": recipe.chosen, **estimate_columns(study.search_key, estimate)})
        line = {axis_name(p): text for p, text in names.items()}
        line |= {axis_name(p): value_text(value) for p, value in first["tuned"].items()}
        line |= {"Seeds": str(estimate.n), f"Search {q.heading}": estimate_text(q, estimate)}
        lines.append(line | {"Chosen": "yes" if recipe.chosen else ""})
    view = pd.DataFrame(lines)
    note = (
        f"Mean over the tuning seeds and its 95 % t-interval, on the {study.sampled[0]['split']} split: by it the "
        "recipe of each arm is chosen. One that diverged on a seed is behind the others. No other table has these "
        "seeds."
    )
    caption = f"Recipes that each arm of {study.name} was chosen from."
    return Table(
        f"{study.name}_recipes", caption, pd.DataFrame(rows), view, (note,), paper=Paper(view, names=len(study.axes))
    )


def pareto_table(study: Study) -> Table | None:
    """Make the table of a search's Pareto front; None without a search."""
    word = "high" if higher_is_better(study.headline) else "low"
    more = f" On the front: no other trial has as {word} a score with as few multiply-adds."
    return _trials(study, study.front, "pareto", f"Pareto front of {study.name}: trials of the search.", more)


def _trials(study: Study, trials: Sequence[Record], name: str, caption: str, more: str = "") -> Table | None:
    if not trials:
        return None
    rows = []
    for r in trials:
        row = {key: r.get(key) for key in ("number", "phase", "status", "reason", "duplicate_of")}
        row |= {p: value_text(r["arm"][p]) for p in study.axes} | r["tuned"]
        row |= {key: (r["scores"] | r["cost"]).get(key) for key in (study.search_key, "cost.gmacs")}
        rows.append(row)
    data = pd.DataFrame(rows)
    q = study.shown
    view = pd.DataFrame({"Trial": data.number.astype(str), "Status": data.status})
    if data.duplicate_of.notna().any():
        view["Same as trial"] = ["" if pd.isna(n) else str(int(n)) for n in data.duplicate_of]
    for path in [*study.axes, *(a.path for a in study.config.nuisance)]:
        view[axis_name(path)] = data[path].map(value_text)
    view[f"Search {q.heading}"] = data[study.search_key].map(q.text)
    gmacs = quantity("cost.gmacs")
    view[gmacs.heading] = data["cost.gmacs"].map(gmacs.text)
    note = f"Scores of one seed on the {trials[0]['split']} split, used to choose settings, not to compare them.{more}"
    return Table(f"{study.name}_{name}", caption, data, view, (note,), paper=Paper(view, names=1))


MADE: tuple[Callable[[Study], Table | None], ...] = (
    settings_table, axes_table, object_size_table, variance_table, recipes_table, pareto_table, sampled_table,
)  # fmt: skip
"""What makes the tables of a study, in the order of the page."""
