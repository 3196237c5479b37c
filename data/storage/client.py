"""Requests to the objects under a URL, for data that is read and for checkpoints that are kept: all use of fsspec.

Schemes are a closed list (file, http, https, s3, gs), and fsspec does the transport alone: no `pipe:`, no chained
URLs, no shell, no pickles. Every transport has exceptions of its own; here there are four:

    FileNotFoundError   there is no such object
    RefusedError        the server says no (credentials, permission, a bad request) and would say it again
    TransientError      another try may cure it: a server's 5xx or 429, a reset, no answer in time
    OSError             this machine's disk is full

A request is made once. How often it is tried, and what the error tells the user, is the caller's affair.
"""

from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from minilm.data.errors import DataError, one_line, shown
from minilm.data.format.files import NO_SPACE
from minilm.data.storage.retry import RetryPolicy, TransientError

SCHEMES = ("file", "http", "https", "s3", "gs")
LEAST_BYTES_A_SECOND = 1 << 20  # a request may take so much longer the more it carries
# what the transports, which fsspec alone imports, call an environment without credentials, or with half of them
NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "DefaultCredentialsError",
)
_MAY_PASS = (408, 416, 425, 429)  # of the statuses 400 to 499


class RefusedError(Exception):
    """The server refuses a request, and would again; the text is its reason."""


class ObjectClient:
    """The objects under `url`. `shown`: the URL for messages, without user and password.

    `options` go to fsspec's file system (endpoint, credentials); what is not given comes from the environment. Raises
    `DataError` for another scheme, and where the package for it is not installed.
    """

    def __init__(self, url: str, retry: RetryPolicy, **options: Any):
        scheme, _, path = url.partition("://")
        if "::" in url or scheme not in SCHEMES or not path:
            raise DataError(
                f"{shown(url)!r} cannot be read from; allowed are URLs of {', '.join(f'{s}://' for s in SCHEMES)}"
            )
        self.url, self.retry = url.rstrip("/"), retry
        self.shown = shown(self.url)
        try:
            self.fs = fsspec.filesystem(scheme, **options)
        except (ImportError, ValueError) as error:
            raise DataError(
                f"{self.shown!r}: {scheme}:// needs a package that is not installed ({one_line(error)}); "
                f"install minilm-distiller[remote]"
            ) from error

    def path(self, name: str) -> str:
        """What fsspec calls the object `name`, "" for all of them."""
        return f"{self.url}/{name}".rstrip("/")

    def request(self, method: str, *arguments: Any, num_bytes: int = 0, **options: Any) -> Any:
        """What `method` of the file system (such as `cat_file`) answers, once; see above for what it raises.

        It may take `retry.request_seconds`, and longer for the `num_bytes` of a large object; local files may take as
        long as they do.
        """
        seconds = self.retry.request_seconds + num_bytes / LEAST_BYTES_A_SECOND
        try:
            if not isinstance(self.fs, AsyncFileSystem):
                return getattr(self.fs, method)(*arguments, **options)
            return sync(self.fs.loop, getattr(self.fs, f"_{method}"), *arguments, timeout=seconds, **options)
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise RefusedError(one_line(error)) from error
        except TimeoutError as error:
            raise TransientError(f"no answer within {seconds:.3g} s") from error
        except Exception as error:  # every transport has its own
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise
            if type(error).__name__ in NO_CREDENTIALS:
                raise RefusedError(one_line(error)) from error
            status = getattr(error, "status", None)
            if isinstance(status, int) and 400 <= status < 500 and status not in _MAY_PASS:
                raise RefusedError(one_line(error)) from error
            raise TransientError(one_line(error)) from error
