"""Common options and error handling of `python -m sunets` and `python -m ablations`."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sunets.core.config import Suite, load
from sunets.core.failure import line_for_user
from sunets.core.process import Stopped, stop_on_signals
from sunets.core.version import __version__

Params = Annotated[Path, typer.Option("--params", help="Parameter file.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Change one parameter for this call; repeatable.")
]
GpuTflops = Annotated[
    float, typer.Option("--gpu-tflops", min=0.01, help="Rate that training sustains on your GPU, in 10^12 FLOP/s.")
]
GPU_TFLOPS = 10.0
"""Its default."""
PARAMS = Path("params.yaml")


def read_suite(params: Path, settings: list[str] | None, model: str | None = None) -> Suite:
    """Read the parameter file, and check that it has the model that a command is about.

    Raises:
        ConfigError: the file or a setting is not valid, or there is no such model; names those that there are.
    """
    suite = load(params, settings or [])
    if model is not None:
        suite.config(model, suite.seeds[0])
    return suite


def add_version(app: typer.Typer) -> None:
    """Give a command line the option --version."""
    app.callback()(_version_option)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sunets {__version__}")
        raise typer.Exit


def _version_option(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None: ...


def run(app: typer.Typer) -> None:
    """Run a command line.

    Invalid input and failures of the machine (disk, memory, permissions) print one line to standard error and exit
    with status 2; a bug raises a traceback. SIGINT and SIGTERM print one line and exit with status 130 or 143.
    SUNETS_DEBUG=1 shows the traceback of every error.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the locale lacks must not end a command
            stream.reconfigure(errors="backslashreplace")
    try:
        refuse_other_checkout()
        with stop_on_signals():
            app()
    except Stopped as stop:
        typer.echo("stopped; run again to go on", err=True)
        sys.exit(stop.status)
    except Exception as error:
        line = line_for_user(error)
        if line is None or os.environ.get("SUNETS_DEBUG"):
            raise
        typer.echo(f"error: {line}", err=True)
        sys.exit(2)


def refuse_other_checkout() -> None:
    """Refuse to run the code of another checkout, as happens in an environment shared between clones.

    Raises:
        ValueError: names both checkouts and the remedy.
    """
    current, imported = Path.cwd(), Path(__file__).resolve().parents[2]
    if (current / "sunets" / "__init__.py").is_file() and not current.samefile(imported):
        raise ValueError(
            f"this checkout is {current}, but the code that runs is that of {imported}; run `python -m sunets` or "
            "`python -m ablations` here, or `make env` for an environment that belongs to this checkout"
        )
