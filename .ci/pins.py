"""Say which of the tools that the suite is built around have a newer minor release than requirements.lock pins.

Reads `pip list --outdated --format=json` from standard input. Never an error: an update is a decision, and needs a run
of the benchmark.
"""

from __future__ import annotations

import json
import sys

from packaging.version import Version

TOOLS = ("dvc", "mlflow", "optuna", "torch")


def main() -> None:
    """Print a line for each tool whose pin is behind."""
    for package in json.load(sys.stdin):
        name, pinned, latest = package["name"], package["version"], package["latest_version"]
        if name in TOOLS and Version(pinned).release[:2] < Version(latest).release[:2]:
            print(f"note: {name} is pinned at {pinned}, and {latest} is out")


if __name__ == "__main__":
    main()
