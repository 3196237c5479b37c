"""An iterator worked out ahead of its consumer, by one thread that ends when the consumer stops."""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
_END = object()


def prefetch(items: Iterator[Item], depth: int) -> Generator[Item, None, None]:
    """The items, in order, with up to `depth` of them worked out ahead.

    Close the generator (or exhaust it) and the thread is gone, at the latest when the item that it works on is done.
    An error of `items` is raised here, after all items before it.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="minilm-prefetch")
    try:
        waiting: deque[Future[Any]] = deque(pool.submit(next, items, _END) for _ in range(depth))
        while (item := waiting.popleft().result()) is not _END:
            waiting.append(pool.submit(next, items, _END))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
