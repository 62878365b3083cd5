"""Say which of the tools that the suite is built around have a newer minor release than requirements.lock pins.

Reads `pip list --outdated --format=json` from standard input. Never an error: an update is a decision, and needs a run
of the benchmark.
"""

from __future__ import annotations

import json
import sys

TOOLS = ("dvc", "mlflow", "optuna", "torch")


def minor(version: str) -> tuple[int, ...]:
    """Return major and minor release."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def main() -> None:
    """Print a line for each tool whose pin is behind."""
    for package in json.load(sys.stdin):
        name, pinned, latest = package["name"], package["version"], package["latest_version"]
        if name in TOOLS and minor(pinned) < minor(latest):
            print(f"note: {name} is pinned at {pinned}, and {latest} is out")


if __name__ == "__main__":
    main()
