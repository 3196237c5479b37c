"""Checkpoints on object storage: s3:// and gs:// through fsspec, credentials and endpoint from the environment alone.

    URL/step-000000120-1f3a5b7c/NAME.safetensors    a folder of its own for each save: two never mix
    URL/step-000000120-1f3a5b7c/checkpoint.json     put last: this one small object is the commit
    URL/owner.json                                  the attempt that may write

A put of one object is atomic on these stores, and a listing shows it at once. Every request is retried; what still
fails at the last try is `StoreUnavailable`, and a later save may succeed. A refusal (credentials, no such bucket) is
final. Files pass through a folder on this machine, which needs room for one checkpoint while it is written or read.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from minilm.data.errors import DataError, one_line
from minilm.data.storage.client import ObjectClient, RefusedError
from minilm.data.storage.retry import RetryPolicy, TransientError
from minilm.orchestrator.checkpoint.store import (
    META,
    NAME,
    OWNER,
    StoreUnavailable,
    staging_folder,
    step_of,
    sweep_staging_folders,
)
from minilm.orchestrator.errors import InfrastructureError, UserError

DAMAGED = "damaged.json"


class ObjectStore:
    """The checkpoints under `url`; files pass through `folder`, on this machine."""

    def __init__(self, url: str, folder: Path, *, retry: RetryPolicy | None = None):
        self.folder = folder
        try:
            # a listing must be today's, and a forked process must not share its parent's connections
            self._client = ObjectClient(
                url,
                retry or RetryPolicy(first_wait_seconds=1.0),
                use_listings_cache=False,
                skip_instance_cache=True,
            )
        except DataError as error:
            raise UserError(f"compute.checkpoints {error}") from error
        self.where = self._client.shown

    def names(self) -> list[str]:
        return sorted(folder for folder, files in self._list().items() if META in files)

    def staged(self, step: int) -> AbstractContextManager[Path]:
        return staging_folder(self.folder, step)

    def commit(self, folder: Path, guard: Callable[[], None]) -> str:
        name = f"{folder.name.split('.')[1]}-{uuid.uuid4().hex[:8]}"
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != META}
        for file, size in sizes.items():
            path = self._client.path(f"{name}/{file}")
            self._call("put", f"{name}/{file}", "put_file", str(folder / file), path, num_bytes=size)
        if (arrived := self._list().get(name, {})) != sizes:
            raise StoreUnavailable(f"{self.where}/{name}: {sizes} bytes were put, {arrived} are there")
        guard()
        self._put(f"{name}/{META}", (folder / META).read_bytes())
        return name

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        with staging_folder(self.folder, step_of(name)) as folder:
            for file, size in self._list().get(name, {}).items():
                path = self._client.path(f"{name}/{file}")
                self._call("get", f"{name}/{file}", "get_file", path, str(folder / file), num_bytes=size)
            yield folder

    def read_meta(self, name: str) -> bytes:
        return self._get(f"{name}/{META}")

    def remove(self, name: str) -> None:
        self._remove(f"{name}/{META}")
        for file in self._list().get(name, {}):
            self._remove(f"{name}/{file}")

    def set_aside(self, name: str) -> None:
        step = step_of(name)
        for folder, files in self._list().items():
            if DAMAGED in files and step_of(folder) == step:
                for file in files:
                    self._remove(f"{folder}/{file}")
        with suppress(FileNotFoundError):
            self._put(f"{name}/{DAMAGED}", self.read_meta(name))
        self._remove(f"{name}/{META}")

    def sweep(self) -> None:
        sweep_staging_folders(self.folder)
        for folder, files in self._list().items():
            if META not in files and DAMAGED not in files:
                for file in files:
                    self._remove(f"{folder}/{file}")

    def claim(self, attempt: str) -> None:
        self._put(OWNER, json.dumps({"attempt": attempt}).encode())

    def owner(self) -> str | None:
        try:
            return str(json.loads(self._get(OWNER))["attempt"])
        except FileNotFoundError:
            return None

    def _list(self) -> dict[str, dict[str, int]]:
        """Sizes of files by folder and name, for every folder that is named like a checkpoint, committed or not."""
        found: dict[str, dict[str, int]] = {}
        root = self._client.fs._strip_protocol(self._client.url)
        with suppress(FileNotFoundError):  # some stores answer so for a prefix without objects
            for path, info in self._call("list", "", "find", self._client.path(""), detail=True).items():
                folder, _, file = path.removeprefix(f"{root}/").partition("/")
                if NAME.fullmatch(folder):
                    found.setdefault(folder, {})[file] = info["size"]
        return found

    def _put(self, name: str, content: bytes) -> None:
        self._call("put", name, "pipe_file", self._client.path(name), content)

    def _get(self, name: str) -> bytes:
        return bytes(self._call("get", name, "cat_file", self._client.path(name)))

    def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self._call("delete", name, "rm_file", self._client.path(name))

    def _call(self, what: str, name: str, method: str, *arguments: Any, **options: Any) -> Any:
        """The answer to a request (see `ObjectClient.request`) for the object `name`, with retries.

        Raises `FileNotFoundError` when there is no such object, `OSError` when this machine's disk is full,
        `InfrastructureError` when the store refuses, `StoreUnavailable` after the last try.
        """
        title = f"{what} {self.where}/{name}".rstrip("/")
        try:
            return self._client.retry.call(title, lambda: self._client.request(method, *arguments, **options))
        except FileNotFoundError as error:
            if what != "put":
                raise
            raise refused(title, error) from error
        except RefusedError as error:
            raise refused(title, error) from error
        except TransientError as error:
            raise StoreUnavailable(
                f"{error}; check the store and run the same command again, it goes on from the last checkpoint"
            ) from error


def refused(title: str, error: Exception) -> InfrastructureError:
    return InfrastructureError(
        f"{title}: the store refuses ({one_line(error)}); check compute.checkpoints and the credentials in the "
        f"environment, then run the same command again"
    )
