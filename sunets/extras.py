"""Name the extra of pyproject.toml that a command needs, where it is not installed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import typer

EXTRAS = {
    "suite": (
        "segmentation_models_pytorch", "dvc", "mlflow", "optuna", "pandas", "seaborn", "matplotlib", "jinja2",
        "markdown_it", "tabulate", "sklearn", "psutil",
    ),
    "cluster": ("distributed", "dask_jobqueue", "psycopg", "grpc"),
    "coco": ("pycocotools",),
}  # fmt: skip
"""Extra -> the modules that its packages install."""


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """Say which extra installs a module that could not be imported; None for a module of no extra."""
    module = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if module in modules), None)
    if extra is None:
        return None
    return f"{module} is not installed; run `make env`, or `pip install '.[{extra}]'` in the checkout"


@contextlib.contextmanager
def extras_named() -> Iterator[None]:
    """Print one line and exit with status 2 where a module of an extra is missing.

    SUNETS_DEBUG=1 shows the traceback.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        line = missing_extra(error)
        if line is None or os.environ.get("SUNETS_DEBUG"):
            raise
        typer.echo(f"error: {line}", err=True)
        sys.exit(2)
