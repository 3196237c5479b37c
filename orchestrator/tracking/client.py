"""The MLflow server or file: where it is, a client for it, and how long a call is tried again.

Sets MLflow's switches when it is imported, so everything here that uses MLflow imports this first. MLflow is used
through MlflowClient only: nothing touches its process-wide current run or tracking URI, and nothing is logged by
itself (no autolog).
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

# Read by MLflow when it is imported or called; what the user has set stays, but for the last two.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the default blocks for minutes; we retry ourselves
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}.items():
    os.environ.setdefault(_name, _value)
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"

from mlflow import MlflowClient  # noqa: E402  (after its switches)
from mlflow.exceptions import MlflowException  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402

from minilm.data.storage.retry import RetryPolicy, TransientError  # noqa: E402
from minilm.orchestrator.errors import InfrastructureError, UserError  # noqa: E402
from minilm.orchestrator.system.text import one_line, shown  # noqa: E402

Result = TypeVar("Result")
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "PERMISSION_DENIED", "UNAUTHENTICATED")


def tracking_uri(workdir: Path) -> str:
    """MLFLOW_TRACKING_URI if it is set, else the SQLite file of this work directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{workdir.resolve() / 'mlflow.db'}"


def is_missing(store: str) -> bool:
    """Is the store a file that is not there? MLflow would make an empty one."""
    return store.startswith("sqlite:///") and not Path(store.removeprefix("sqlite:///")).exists()


def connect(uri: str) -> MlflowClient:
    """A client for tracking and registry at `uri`; makes no call yet, except that SQLite tables are made.

    MlflowException where that can't be, for example because another process has the file, stopped while it wrote.
    """
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # "Creating initial tables…"
    logging.getLogger("alembic").setLevel(logging.WARNING)
    try:
        return MlflowClient(tracking_uri=uri, registry_uri=uri)
    except SQLAlchemyError as error:
        raise MlflowException(str(error)) from error


def patiently(uri: str, attempt: Callable[[], Result], patience_seconds: float) -> Result:
    """Calls until it works; UserError once MLflow refuses, InfrastructureError if it never answers for so long."""
    where = f"MLflow at {shown(uri)}"

    def once() -> Result:
        try:
            return attempt()
        except MlflowException as error:
            if error.error_code in _REFUSALS:
                raise UserError(f"{where} refused: {one_line(error)}") from error
            raise TransientError(one_line(error)) from error
        except OSError as error:
            raise TransientError(one_line(error)) from error

    try:
        return RetryPolicy(tries=None, longest_wait_seconds=10.0, total_seconds=patience_seconds).call(
            where, once
        )
    except TransientError as error:
        raise InfrastructureError(
            f"{where} does not answer ({error.__cause__}): start it and run the same command again"
        ) from error
