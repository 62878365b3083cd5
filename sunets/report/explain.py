"""Trace a number in a table back to its records."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sunets.core.metrics import PRIMARY_METRIC, search_key
from sunets.core.recipes import COLUMNS
from sunets.core.record import Record, RecordError, read_rows
from sunets.report.claims import Results, findings, read_results
from sunets.report.records import FINISHED, Records, ReportError, find_records, quantity, read_checked
from sunets.report.write import NAMES, TRIAL_NUMBERS, plural

CLAIMS = "claims"
"""The table of results/README.md."""
_SUFFIX = re.compile(r"\.(mean|ci95_low|ci95_high|joint_ci95_low|joint_ci95_high|difference\.[a-z0-9_]+)$")
_KEYS = {
    "cost": ("model",), "accuracy": ("model",), "per_class": ("model",), "object_size": ("model",),
    "test_time": ("model", "variant"),
    "tuning": ("model",), "speed": ("model",),
    "training_time": ("model", "seed"), "published": ("our_model", "published_model", "metric"),
}  # fmt: skip
_KIND = {"cost": "cost", "tuning": "tune", "speed": "speed", "training_time": "train"}
_STUDY_KEYS: dict[str, tuple[str, ...]] = {
    "_axes": ("axis", "value"), "_variance": ("term",), "_trials": ("number",), "_pareto": ("number",),
    "_object_size": (), "_recipes": (),
}  # fmt: skip
"""End of the file stem of an ablation's table -> columns that name its rows; without any, a row is a setting of the
axes, or a recipe of one."""
_HEADINGS = {
    r"Difference.*": r".*\bdifference(\.mean)?", "Verdict": r".*\bverdict", "Wins": r".*\bwins",
    "Seeds": "n_seeds", "Ours": r"ours\.mean",
    r"Published parameters \(M\)": "published_params_m", r"Our parameters \(M\)": r"ours\.params_m",
    r"Trainings|Median time \(s\)": "seconds", "Share of variance .*": "share", "Search .*": r"search\..*",
    "Epochs": r"train\.epochs", "Default recipe .*": r"val\..*\.default", "Chosen .*": r"val\.[^.]*",
    **{name: re.escape(path) for path, name in NAMES.items()},
}  # fmt: skip
"""Heading on a page -> column of the CSV file, where the heading is not that of a quantity."""
Cells = Mapping[str, Any]


def explain(results_dir: Path, benchmark: str, table: str, row: str, column: str) -> str:
    """Trace one number; see `Explainer.explain`."""
    return Explainer(results_dir).explain(benchmark, table, row, column)


class Explainer:
    """Tracer of numbers in the tables below `results/`; it reads every file once."""

    def __init__(self, results_dir: Path, read: Results | None = None) -> None:
        """Read files on demand; `read` are records that the caller has read already."""
        self._results = results_dir
        self._all = functools.cache(lambda: read or read_results(results_dir))
        self._records = functools.cache(lambda name: read.benchmarks[name] if read else find_records(results_dir, name))
        self._rows, self._checked = functools.cache(_read_table), functools.cache(read_checked)
        self._tables = functools.cache(_tables)

    def explain(self, benchmark: str, table: str, row: str, column: str) -> str:
        """Trace a number in a table to its runs: seeds and values, commit, data digest, code, command.

        Args:
            benchmark: name of the benchmark.
            table: file stem of a table in `tables/`, such as accuracy; of an ablation, ablations/STUDY, or the same
                with _axes, _object_size, _variance, _recipes, _trials or _pareto; zoo/cost_segmentation,
                zoo/cost_classification or zoo/speed; or claims.
            row: key or label of a model, a claim, values of a study's axes, or the number of a trial; several are
                joined by slashes.
            column: name of a CSV column, with or without its .mean or .ci95_low, or its heading on the page.

        Returns:
            Lines of plain text.

        Raises:
            ReportError: no such table, row or column; names the existing ones.
            RecordError: a table or a file of records is damaged, or they do not belong together.
        """
        paths = self._tables(self._results, benchmark)
        if table == CLAIMS:
            lines = self._claim(row, column)
        elif table not in paths:
            names = ", ".join([*paths, CLAIMS]) if paths else "none: run `dvc repro` first"
            raise ReportError(f"{table}: no such table in {self._results / benchmark}; there are {names}")
        elif table.startswith("ablations/"):
            lines = self._study(paths[table], self._results / benchmark / "records" / "ablations", table, row, column)
        elif table.startswith("zoo/"):
            lines = self._zoo(paths[table], table, row, column)
        else:
            lines = self._benchmark(paths[table], self._records(benchmark), table, row, column)
        whose = "" if table == CLAIMS or table.startswith("zoo/") else f"{benchmark}, "
        return "\n".join([f"{whose}table {table}, row {row}", *lines])

    def _benchmark(self, path: Path, records: Records, table: str, row: str, column: str) -> list[str]:
        rows = self._rows(path, _KEYS[table])
        cells = _row(rows, _KEYS[table], table, row)
        base, columns = _column(tuple(cells), table, column)
        lines = _values(cells, columns)
        model = str(cells["our_model"] if table == "published" else cells["model"])
        if table == "published":
            base = str(cells["metric"])
            lines += [f"published value: {cells['source']}", ""]
            if cells["our_model"] is None:
                return [*lines, str(cells["verdict"])]
        kind = "cost" if base.startswith("cost.") else _KIND.get(table, "evaluate")
        variant = str(cells["variant"]) if "variant" in cells else records.variants[0]
        seed = int(cells["seed"]) if table == "training_time" else None
        used = [
            r
            for r in records.all(kind, model)
            if r["model"] == model
            and (kind != "evaluate" or r["variant"] == variant)
            and (seed is None or r["seed"] == seed)
        ]
        if not used:
            return [*lines, f"no record of {model}: it has not been run"]
        lines += _runs(used, (base,), records.directory / ("speed.json" if kind == "speed" else f"{kind}/{model}.json"))
        tuned = next(iter(records.all("tune", model)), None)
        if kind == "tune":
            file, chosen = records.directory / "tune" / f"{model}.csv", used[0]["trial"]
            tried = [r | {"chosen": "yes" if r["number"] == chosen else None} for r in read_rows(file, COLUMNS)]
            lines += ["", f"trials in {file}:", *_listed(tried)]
        elif tuned is not None and kind in ("train", "evaluate"):
            lines += ["", f"recipe: trial {tuned['trial']} of its tuning, see `sunets explain tuning {model} trial`"]
        if table == "training_time":
            timings = [t for t in records.all("timing", model) if t["seed"] == seed]
            lines += ["", f"timed in {records.directory / 'timing' / model}.json:", *_listed(timings)]
        if ".difference." in " ".join(columns) and kind == "evaluate":
            lines += _reference(records, table, cells, base)
        return lines

    def _zoo(self, path: Path, table: str, row: str, column: str) -> list[str]:
        kind, name = ("speed", "speed") if table == "zoo/speed" else ("cost", "records")
        file = self._results / "zoo" / f"{name}.json"
        cells = _row(self._rows(path, ("model",)), ("model",), table, row)
        base, columns = _column(tuple(cells), table, column)
        used = [r for r in self._checked(file, kind) if r["model"] == cells["model"]]
        if not used:
            raise RecordError(f"{file}: has no record of {cells['model']}, a row of {path}; run `make zoo` again")
        return [*_values(cells, columns), *_runs(used, (base,), file)]

    def _study(self, path: Path, folder: Path, table: str, row: str, column: str) -> list[str]:
        """Trace a number of an ablation to its trials."""
        ends = [end for end in ("", *_STUDY_KEYS) if path.stem.endswith(end)]
        end = next((end for end in ends if (folder / f"{path.stem.removesuffix(end)}.json").exists()), None)
        if end is None:
            raise ReportError(f"{path}: no study of {folder} has such a table; run `python -m ablations report` again")
        file = folder / f"{path.stem.removesuffix(end)}.json"
        trials = {r["number"]: r for r in self._checked(file, "trial")}
        rows = self._rows(path, _STUDY_KEYS.get(end) or (TRIAL_NUMBERS,))
        parts = ("arm", "tuned") if end == "_recipes" else ("arm",)
        keys = _STUDY_KEYS.get(end) or tuple(
            c for c in rows[0] if any(c in r[part] for r in trials.values() for part in parts)
        )
        cells = _row(rows, keys, table, row)
        base, columns = _column(tuple(cells), table, column)

        def behind(row: Cells) -> list[Record]:
            """Return the trials of a row."""
            if end == "_variance":
                return [r for r in trials.values() if r["phase"] in ("grid", "confirmation")]
            numbers = [row["number"]] if "number" in keys else [int(n) for n in str(row[TRIAL_NUMBERS]).split()]
            if absent := [n for n in numbers if n not in trials]:
                raise RecordError(f"{path}: trial {absent[0]} is not in {file}; run `python -m ablations report` again")
            return [trials[n] for n in numbers]

        used = behind(cells)
        headline = PRIMARY_METRIC[used[0]["task"]]
        searched = search_key(headline)
        key = searched if "number" in keys else headline
        if any(base in r["cost"] or base in r["scores"] for r in used):
            key = base
        lines = [*_values(cells, columns), *_runs(used, (key,), file)]
        if "number" in keys and cells.get("duplicate_of") in trials:
            original = trials[cells["duplicate_of"]]
            lines += ["", "not trained again, since it is the same as:", *_states([original], (key,))]
        alike = [r for r in trials.values() if r["arm"] == used[0]["arm"]]
        sampled = [r for r in alike if r["phase"] in ("tuning", "search")]
        if not end and sampled:
            title = f"the sampler's trials with this setting, scored on the {sampled[0]['split']} split:"
            lines += ["", title, *_states(sampled, (searched,))]
        if end == "_pareto":
            confirmed = [r for r in alike if r["phase"] == "confirmation"]
            lines += ["", "on the front: no other trial of the search scores as well with as few multiply-adds"]
            lines += ["", "trained again on every seed:", *_states(confirmed, (headline,))] if confirmed else []
        if ".difference." in " ".join(columns):
            for reference in (r for r in rows if r["reference"] == "True"):
                if cells.get("axis") == reference.get("axis"):
                    name = cells.get(f"{base}.difference.reference")
                    lines += ["", f"difference from {name}, paired by seed:", *_states(behind(reference), (key,))]
        return lines

    def _claim(self, row: str, column: str) -> list[str]:
        """Trace a row of the table of claims, which no CSV file holds, to the records of its comparisons."""
        results = self._all()
        made = findings(results)
        rows: list[Cells] = [finding.cells for finding in made]
        cells = _row(rows, ("Claim", "Benchmark"), CLAIMS, row)
        finding = made[rows.index(cells)]
        _, chosen = _column(tuple(cells), CLAIMS, column)
        lines = _values(cells, chosen)
        others = (name for name, value in cells.items() if value and name not in ("Claim", *chosen))
        lines += [f"{name.lower()}: {cells[name]}" for name in others]
        lines += [f"left out, since its records cannot be read: {why}" for why in results.unreadable.values()]
        if not finding.records:
            return [*lines, "no record: it has not been run"]
        folder = self._results / finding.benchmark
        folder = folder if folder.name == "zoo" else folder / "records"
        return [*lines, "", *_runs(finding.records, finding.keys, folder)]


# --- files and cells of a table ---------------------------------------------------------------------------------------


def _tables(results_dir: Path, benchmark: str) -> dict[str, Path]:
    """Map the name of each existing table to its CSV file."""
    folders = {"": results_dir / benchmark / "tables", "ablations/": results_dir / benchmark / "ablations"}
    return {
        prefix + path.stem: path
        for prefix, folder in (folders | {"zoo/": results_dir / "zoo"}).items()
        for path in sorted(folder.glob("*.csv"))
        if prefix or path.stem in _KEYS
    }


def _read_table(path: Path, columns: Sequence[str]) -> Sequence[Cells]:
    rows = read_rows(path, columns)
    if not rows:
        raise RecordError(f"{path}: holds no row; run `dvc repro` again")
    return rows


def _row(rows: Sequence[Cells], keys: Sequence[str], table: str, row: str) -> Cells:
    names = ["/".join(str(cells[key]) for key in keys if cells[key] not in (None, "")) for cells in rows]
    hit = [cells for cells, name in zip(rows, names, strict=True) if name == row]
    for other in ("label", "our_label", "Claim"):  # what the page shows
        hit = hit or [cells for cells in rows if cells.get(other) == row]
    if len(hit) == 1:
        return hit[0]
    problem = "several rows" if hit else "no row"
    raise ReportError(f"{row}: {problem} of table {table}; there are {', '.join(names)}")


@functools.cache  # the HTML page asks for every cell of a column
def _column(names: tuple[str, ...], table: str, column: str) -> tuple[str, tuple[str, ...]]:
    """Return the record key and the CSV columns, of those of a table, that a name stands for."""
    pattern = "|".join(name for heading, name in _HEADINGS.items() if re.fullmatch(heading, column)) or "(?!)"
    column = next((name for name in names if re.fullmatch(pattern, name)), column)
    bases = list(dict.fromkeys(_SUFFIX.sub("", name) for name in names))
    headings = {quantity(b).heading.lower(): b for b in bases} | {quantity(b).name.lower(): b for b in bases}
    if column in names:
        return _SUFFIX.sub("", column), (column,)
    base = column if column in bases else headings.get(column.lower())
    if base is None:
        raise ReportError(f"{column}: no column of table {table}; there are {', '.join(bases)}")
    return base, tuple(name for name in names if _SUFFIX.sub("", name) == base)


def _values(cells: Cells, columns: Iterable[str]) -> list[str]:
    return [*(f"  {name} = {'none' if cells[name] is None else cells[name]}" for name in columns), ""]


# --- records ---------------------------------------------------------------------------------------------------------


def _runs(used: Sequence[Record], keys: Sequence[str], path: Path) -> list[str]:
    """Say what the records hold of some keys, and where they come from."""
    lines = [f"from {plural(len(used), 'record')} in {path}:", *_states(used, keys)]
    models, trial = len({r["model"] for r in used}) > 1, used[0]["kind"] == "trial"
    names = ["git_commit", "data_digest", "code_hash", "command", "environment"]
    if not models and not trial:  # of many, they would hide the rest
        names.insert(3, "config_hash")
    what, name = ("of", "model") if models else ("trial", "number") if trial else ("seed", "seed")
    for origin in names:
        values: dict[str, list[str]] = {}
        for r in used:
            if (text := _origin(r, origin)) is not None:
                values.setdefault(text, []).append(str(r[name]))
        for text, ids in values.items():
            which = f" ({what} {', '.join(dict.fromkeys(ids))})" if len(values) > 1 else ""
            lines.append(f"{origin.replace('_', ' ')}: {text}{which}")
    return lines


def _states(used: Sequence[Record], keys: Sequence[str]) -> list[str]:
    """Write a line per record: what it is, and its values of some keys, or why it has none."""
    several = len({r["model"] for r in used}) > 1
    lines = []
    for r in used:
        if r["kind"] == "trial":
            setting = ", ".join(f"{path} = {value}" for path, value in {**r["arm"], **r["tuned"]}.items())
            name = f"trial {r['number']}, {r['phase']}, seed {r['seed']}, {setting}"
        else:
            parts = [*([r["model"]] if several else []), r["kind"]]
            name = ", ".join([*parts, *(f"{k} {r[k]}" for k in ("seed", "variant") if r[k] is not None)])
        values = r["scores"] | r["cost"]
        state = ", ".join(f"{key} = {values[key]}" for key in keys if key in values) or FINISHED
        lines.append(f"  {name}: {state if r['status'] == FINISHED else r['status'] + ': ' + r['reason']}")
    return lines


def _origin(record: Record, name: str) -> str | None:
    """Put a part of a record's provenance into words; None where there is none."""
    if name == "environment":
        e = record["environment"]
        names = ("python", "torch", "torchvision", "device", "gpu", "threads")
        return ", ".join(f"{k} {e[k]}" for k in names if e.get(k)) or None
    origin = record["provenance"]
    if name == "git_commit":
        return f"{origin[name] or 'unknown'}{' with uncommitted changes' if origin.get('git_dirty') else ''}"
    return None if origin.get(name) is None else str(origin[name])


def _reference(records: Records, table: str, cells: Cells, key: str) -> list[str]:
    """Return the scores that a paired difference subtracts."""
    other = cells.get(f"{key}.difference.reference")
    if not isinstance(other, str):
        return []
    model, variant = (cells["model"], other) if table == "test_time" else (other, records.variants[0])
    return [
        "",
        f"difference from {model}, {variant.replace('_', ' ')}, paired by seed:",
        *(f"  seed {seed}: {key} = {value}" for seed, value in records.scores(model, key, variant).items()),
    ]


def _listed(rows: Iterable[Cells]) -> list[str]:
    return ["  " + ", ".join(f"{k} = {v}" for k, v in row.items() if v is not None) for row in rows]
