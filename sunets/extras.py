"""Name the extra of pyproject.toml that a command needs, where it is not installed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

EXTRAS = {
    "suite": (
        "segmentation_models_pytorch", "dvc", "mlflow", "optuna", "pandas", "seaborn", "matplotlib", "jinja2",
        "markdown_it", "tabulate", "sklearn", "psutil",
    ),
    "cluster": ("distributed", "dask_jobqueue", "psycopg", "grpc"),
    "coco": ("pycocotools",),
}  # fmt: skip
"""Extra -> the modules that its packages install."""


@contextlib.contextmanager
def extras_named() -> Iterator[None]:
    """Turn the missing module of an extra into an error that names the extra; any other is raised as it is.

    Raises:
        ValueError: names the module and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        for extra, modules in EXTRAS.items():
            if module in modules:
                remedy = f"run `make env`, or `pip install '.[{extra}]'` in the checkout"
                raise ValueError(f"{module} is not installed; {remedy}") from error
        raise
