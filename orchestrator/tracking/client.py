"""The MLflow server or file: where it is, and a client for it.

Sets MLflow's switches when it is imported, so everything here that uses MLflow imports this first. MLflow is used
through MlflowClient only: nothing touches its process-wide current run or tracking URI, and nothing is logged by
itself (no autolog).
"""

import logging
import os
from pathlib import Path

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
