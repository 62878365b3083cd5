"""The MLflow server or database at MLFLOW_TRACKING_URI, called with a time limit.

MLflow retries a database that does not answer for about 200 s, and a server for minutes. Here every call ends within
`LIMIT` seconds, and every failure of MLflow, its database driver or the system is a `TrackingError`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

T = TypeVar("T")

LIMIT = 10.0
"""Seconds per call of MLflow."""
CREATION_LIMIT = 60.0
"""Seconds for MLflow to create its tables in a database that answers."""


class TrackingError(ValueError):
    """Failure to reach or use MLflow; the message gives address and reason in one line."""


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI; the default is the file mlflow.db in the current directory, the checkout."""
    directory = Path.cwd()
    default = "mlflow.db" if "?" in str(directory) else directory / "mlflow.db"  # after ? an address has options
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{default}"


def failure(error: BaseException) -> TrackingError:
    """Convert an error of MLflow, a driver or the system to one line that starts with the address."""
    if isinstance(error, TrackingError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return TrackingError(f"{error.name} is not installed; `make env` installs it")
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    # The system's message is shorter and clearer than MLflow's.
    error = next((cause for cause in reversed(chain) if isinstance(cause, OSError)), error)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    address = re.sub(r"(://[^/@:]*:).*@", r"\1***@", tracking_uri())  # no password on a terminal or in a log
    return TrackingError(f"{address}: {text[:300].rstrip('.')}")


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Turn every exception of the block into a `TrackingError`."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        raise failure(error) from error


def within(seconds: float, call: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call a function in a thread with a time limit.

    Raises:
        TrackingError: the call failed or has not ended; its thread continues, and does not keep the process alive.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="mlflow call", daemon=True).start()
    with explained():
        if not wait([future], timeout=seconds).done:
            raise TimeoutError(f"no answer within {seconds:.0f} s")
        return future.result()


class Limited:
    """Proxy of an MLflow object that calls its methods by `within`."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

    def __getattr__(self, name: str) -> Any:
        return functools.partial(within, LIMIT, getattr(self._wrapped, name))


def database_file(uri: str) -> Path | None:
    """Return the file of an SQLite address, without options; None for all other addresses."""
    if not re.match(r"sqlite(\+\w+)?:", uri):
        return None
    from sqlalchemy.engine import make_url

    name = make_url(uri).database
    return None if not name or name == ":memory:" or name.startswith("file:") else Path(name)


def check_file(file: Path) -> bool:
    """Check that MLflow can use an SQLite file (it would retry for minutes), and return whether it has MLflow's tables.

    Raises:
        TrackingError: the file is not regular, is damaged, or belongs to another program.
    """
    if not file.exists():
        return False
    with explained():
        if not file.is_file():
            raise OSError("this is not a file")
        # Read-only, SQLite could not roll back a commit that a kill interrupted; nothing else is written.
        address = f"file:{quote(str(file.resolve()))}?mode=rw"
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=LIMIT)) as connection:
            tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
        if tables and "experiments" not in tables:
            raise OSError("this database belongs to another program; name another file")
    return bool(tables)


def check_server(uri: str) -> None:
    """Connect to a database server once.

    Raises:
        TrackingError: the server refuses, or does not answer within `LIMIT`.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    within(LIMIT, lambda: create_engine(uri, poolclass=NullPool).connect().close())
