"""What a run needs that is no file on this machine, looked at before any text is tokenized: a device, buckets."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from minilm.data.errors import DataError, one_line
from minilm.data.format.manifest import MANIFEST
from minilm.data.storage.client import ObjectClient, RefusedError
from minilm.data.storage.remote import is_remote
from minilm.data.storage.retry import RetryPolicy, TransientError
from minilm.orchestrator.checkpoint.object_store import ObjectStore
from minilm.orchestrator.checkpoint.store import StoreUnavailable
from minilm.orchestrator.errors import UserError
from minilm.orchestrator.recipe.schema import Compute, Corpus
from minilm.orchestrator.train.distributed import pick_device

ONCE = RetryPolicy(tries=1, request_seconds=10.0)


def check_device(compute: Compute) -> None:
    """`UserError` where the recipe asks for a CUDA device and this machine has none."""
    pick_device(compute.device, 0)


def check_checkpoints(compute: Compute, folder: Path) -> None:
    """`UserError` where the package for the bucket is missing or a file stands in the folder's way,
    `InfrastructureError` where the bucket refuses.

    One that does not answer at once says nothing: the run asks again, with patience. folder: on this machine, for the
    store's files; none is written here.
    """
    if not compute.checkpoints:
        return
    place = compute.checkpoints.removeprefix("file://")
    if "://" not in place:
        there = next(path for path in (Path(place), *Path(place).parents) if os.path.exists(path))  # noqa: PTH110 (never raises)
        if not there.is_dir():
            raise UserError(
                f"compute.checkpoints: given {compute.checkpoints!r}, but {str(there)!r} is no folder; give another one"
            )
    else:
        store = ObjectStore(compute.checkpoints, folder, retry=ONCE)
        with suppress(StoreUnavailable):
            store.names()


def check_shards(corpus: Corpus) -> None:
    """`UserError` where the corpus lies behind a URL and there is no manifest to be had."""
    if corpus.shards is None or not is_remote(corpus.shards):
        return
    try:
        client = ObjectClient(corpus.shards, ONCE)
        client.request("cat_file", client.path(MANIFEST))
    except FileNotFoundError:
        raise UserError(f"{corpus.shards} holds no data set (no {MANIFEST}); give the URL of one") from None
    except RefusedError as error:
        raise UserError(
            f"{corpus.shards}: the server refuses ({one_line(error)}); check the URL and the credentials in the "
            "environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, …)"
        ) from error
    except (TransientError, DataError) as error:
        raise UserError(f"{corpus.shards} can't be read from here ({one_line(error)})") from error
