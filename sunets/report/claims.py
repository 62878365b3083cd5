"""What the paper claims of SUNets, and what the records of all benchmarks say to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sunets.core.record import Record, RecordError, read_records
from sunets.report.records import Records, find_records


@dataclass(frozen=True)
class Results:
    """The records of all benchmarks below `results/`."""

    benchmarks: dict[str, Records]
    zoo: list[Record]
    """Cost records of `make zoo`."""
    unreadable: dict[str, str]
    """Name of a benchmark whose records cannot be read -> the error."""


def read_results(results: Path) -> Results:
    """Read the records of every benchmark; one that another version of the code left stops no report."""
    benchmarks, unreadable, zoo = {}, {}, []
    for directory in sorted(path.parent for path in results.glob("*/records")):
        try:
            benchmarks[directory.name] = find_records(results, directory.name)
        except FileNotFoundError:
            continue
        except RecordError as error:
            unreadable[directory.name] = str(error)
    path = results / "zoo" / "records.json"
    if path.exists():
        try:
            zoo = read_records(path, "cost")
        except RecordError as error:
            unreadable["zoo"] = str(error)
    return Results(benchmarks, zoo, unreadable)
