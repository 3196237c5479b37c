"""Checkpoints on object storage: s3:// and gs:// through fsspec, credentials and endpoint from the environment alone.

    URL/step-000000120-1f3a5b7c/NAME.safetensors    a folder of its own for each save: two never mix
    URL/step-000000120-1f3a5b7c/checkpoint.json     put last: this one small object is the commit
    URL/owner.json                                  the attempt that may write

A put of one object is atomic on these stores, and a listing shows it at once. Every request is retried with
exponential back-off and jitter; what is still wrong after the last try is `StoreUnavailable`, which a later save may
find cured. A refusal (credentials, no such bucket) is final. Files travel through a folder on this machine, so that a
checkpoint needs its own size of room there while it is written or read.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

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
from minilm.orchestrator.system.text import one_line
from minilm.orchestrator.system.write_errors import NO_SPACE

DAMAGED = "damaged.json"
LEAST_BYTES_A_SECOND = 1 << 20  # a request may take so much longer the more it carries


class ObjectStore:
    """The checkpoints under `url`; files pass through `folder`, on this machine."""

    def __init__(self, url: str, folder: Path, *, patience: RetryPolicy | None = None):
        self.where = url.rstrip("/")
        self.folder = folder
        self.patience = patience or RetryPolicy(first_wait_seconds=1.0)
        scheme = url.partition("://")[0]
        try:
            # a listing must be today's, and a forked process must not share its parent's connections
            self._fs = fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"compute.checkpoints {url!r}: {scheme}:// needs a package that is not installed ({error}); "
                f"install minilm-distiller[remote]"
            ) from error

    def names(self) -> list[str]:
        return sorted(folder for folder, files in self._list().items() if META in files)

    def staged(self, step: int) -> AbstractContextManager[Path]:
        return staging_folder(self.folder, step)

    def commit(self, folder: Path, guard: Callable[[], None]) -> str:
        name = f"{folder.name.split('.')[1]}-{uuid.uuid4().hex[:8]}"
        sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != META}
        for file, size in sizes.items():
            self._put(folder / file, f"{name}/{file}", size)
        if (arrived := self._list().get(name, {})) != sizes:
            raise StoreUnavailable(f"{self.where}/{name}: {sizes} bytes were put, {arrived} are there")
        guard()
        self._call("put", f"{name}/{META}", self._fs._pipe_file, (folder / META).read_bytes())
        return name

    @contextmanager
    def opened(self, name: str) -> Iterator[Path]:
        with staging_folder(self.folder, step_of(name)) as folder:
            for file, size in self._list().get(name, {}).items():
                path = f"{name}/{file}"
                self._call("get", path, self._fs._get_file, str(folder / file), num_bytes=size)
            yield folder

    def read_meta(self, name: str) -> bytes:
        return bytes(self._call("get", f"{name}/{META}", self._fs._cat_file))

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
            self._call("put", f"{name}/{DAMAGED}", self._fs._pipe_file, self.read_meta(name))
        self._remove(f"{name}/{META}")

    def sweep(self) -> None:
        sweep_staging_folders(self.folder)
        for folder, files in self._list().items():
            if META not in files and DAMAGED not in files:
                for file in files:
                    self._remove(f"{folder}/{file}")

    def claim(self, attempt: str) -> None:
        self._call("put", OWNER, self._fs._pipe_file, json.dumps({"attempt": attempt}).encode())

    def owner(self) -> str | None:
        try:
            return str(json.loads(self._call("get", OWNER, self._fs._cat_file))["attempt"])
        except FileNotFoundError:
            return None

    def _list(self) -> dict[str, dict[str, int]]:
        """Sizes of the files by folder and name, of every folder that is named like a checkpoint, committed or not."""
        found: dict[str, dict[str, int]] = {}
        root = self._fs._strip_protocol(self.where)
        with suppress(FileNotFoundError):  # some stores say so of a prefix under which nothing lies
            for path, info in self._call("list", "", self._fs._find, detail=True).items():
                folder, _, file = path.removeprefix(f"{root}/").partition("/")
                if NAME.fullmatch(folder):
                    found.setdefault(folder, {})[file] = info["size"]
        return found

    def _put(self, source: Path, path: str, num_bytes: int) -> None:
        def put(url: str) -> Any:
            return self._fs._put_file(str(source), url)

        self._call("put", path, put, num_bytes=num_bytes)

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._call("delete", path, self._fs._rm_file)

    def _call(
        self,
        what: str,
        path: str,
        method: Callable[..., Any],
        *arguments: Any,
        num_bytes: int = 0,
        **options: Any,
    ) -> Any:
        """What the asynchronous `method` answers for `path`, tried again and again.

        Raises `FileNotFoundError` when there is no such object, `OSError` when this machine's disk is full,
        `InfrastructureError` when the store refuses, `StoreUnavailable` when patience ends.
        """
        url = f"{self.where}/{path}".rstrip("/")
        seconds = self.patience.request_seconds + num_bytes / LEAST_BYTES_A_SECOND

        def once() -> Any:
            try:
                return sync(self._fs.loop, method, url, *arguments, timeout=seconds, **options)
            except FileNotFoundError as error:
                if what != "put":
                    raise
                raise refused(url, what, error) from error
            except PermissionError as error:
                raise refused(url, what, error) from error
            except TimeoutError as error:
                raise TransientError(f"no answer within {seconds:.3g} s") from error
            except Exception as error:  # every transport has its own
                if isinstance(error, OSError) and error.errno in NO_SPACE:
                    raise
                raise TransientError(one_line(error)) from error

        try:
            return self.patience.persist(f"{what} {url}", once)
        except TransientError as stumble:
            raise StoreUnavailable(
                f"{stumble}; check the store and run the same command again, it goes on from the last checkpoint"
            ) from stumble


def refused(url: str, what: str, error: Exception) -> InfrastructureError:
    return InfrastructureError(
        f"{what} {url}: the store refuses ({one_line(error)}); check compute.checkpoints and the credentials in the "
        f"environment, then run the same command again"
    )
