"""A call of MLflow: how long it is tried again, and what its failure means.

No waiting cures a refusal, by MLflow or whatever stands before it, so that it is told apart everywhere from a server
that is away.
"""

import os
import re
from collections.abc import Callable
from typing import TypeVar

from minilm.data.storage.retry import RetryPolicy, TransientError
from minilm.orchestrator.errors import InfrastructureError, UserError
from minilm.orchestrator.system.text import one_line, shown
from minilm.orchestrator.tracking.client import MlflowException

# isort: split
from mlflow.utils.credentials import read_mlflow_creds

Result = TypeVar("Result")
_INVALID = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
_IN_TEXT = re.compile(
    r"\b(401|403) Client Error"
)  # of threads that download, whose errors MLflow joins to one
_BUCKET_REFUSALS = (
    "(403)",
    "(401)",
    "AccessDenied",
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "credentials",
)
_SET = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN)"


def patiently(uri: str, attempt: Callable[[], Result], patience_seconds: float) -> Result:
    """Calls until it works; UserError once MLflow refuses, InfrastructureError if it never answers for so long."""
    where = f"MLflow at {shown(uri)}"

    def once() -> Result:
        try:
            return attempt()
        except ImportError as error:
            raise UserError(
                f"{where} keeps its files where package {error.name!r} is needed: install it here, or start the "
                "server with --serve-artifacts"
            ) from error
        except Exception as error:
            if not (isinstance(error, MlflowException | OSError) or _of_bucket(error)):
                raise
            if words := refusal(error):
                raise UserError(f"{where} {words}") from error
            raise TransientError(one_line(error)) from error

    try:
        return RetryPolicy(tries=None, longest_wait_seconds=10.0, total_seconds=patience_seconds).call(
            where, once
        )
    except TransientError as error:
        raise InfrastructureError(
            f"{where} does not answer ({error.__cause__}): start it and run the same command again"
        ) from error


def refusal(error: Exception) -> str | None:
    """`refused …`, in one line with what to do; None for an error that may pass."""
    if _of_bucket(error):
        if not any(word in str(error) for word in _BUCKET_REFUSALS):
            return None
        return (
            f"keeps its files in a bucket that refused ({one_line(error, keep_end=True)}): set that bucket's "
            "credentials, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    status = _status(error)
    if status == 401:
        return f"refused {_who()} (401, not authenticated): set {_SET} to what it knows"
    if status == 403 and "Host header" in str(error):
        return (
            "refused the host name of this address (403): start it with --allowed-hosts, or "
            "MLFLOW_SERVER_ALLOWED_HOSTS, naming this host"
        )
    if status == 403:
        return (
            f"refused {_who()} (403, {_detail(error)}): have the right granted there, or set {_SET} to "
            "those of somebody who has it"
        )
    if isinstance(error, MlflowException) and error.error_code in _INVALID:
        return f"refused: {one_line(error)}"
    return None


def _of_bucket(error: Exception) -> bool:
    """Whether it comes from the client of S3, whose errors are of a kind of their own."""
    return type(error).__module__.partition(".")[0] in ("boto3", "botocore")


def _status(error: Exception) -> int | None:
    """The HTTP status of a refusal. Files go by `requests`, all else by MLflow, which names the status."""
    response = getattr(error, "response", None)
    if isinstance(code := getattr(response, "status_code", None), int):
        return code
    if isinstance(error, MlflowException) and (status := error.get_http_status_code()) in (401, 403):
        return int(status)
    found = _IN_TEXT.search(str(error))
    return int(found[1]) if found else None


def _who() -> str:
    if user := read_mlflow_creds().username:
        return f"user {user!r}"
    return "the token given" if os.environ.get("MLFLOW_TRACKING_TOKEN") else "to talk without credentials"


def _detail(error: Exception) -> str:
    """What was asked for: the end of the address."""
    found = re.search(r"(?:endpoint |url: \S*?)/api/\d\.\d/(?:preview/)?(mlflow[\w-]*/[\w/-]+)", str(error))
    return f"permission denied for {found[1]}" if found else "permission denied"
