"""An iterator worked out ahead of its consumer, on one thread that is gone when the consumer stops."""

import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(chunks: Iterator[Sequence[Item]], room: int) -> Generator[Item, None, None]:
    """The items of all chunks, in order. The thread begins the next chunk when fewer than `room` items wait.

    Close the generator (or exhaust it) and the thread is gone, at the latest when the chunk that it works on is done.
    An error of `chunks` is raised here, behind all items before it.
    """
    waiting: deque[Item] = deque()
    changed = threading.Condition()
    failed: list[BaseException] = []
    stopped = ended = False

    def work() -> None:
        nonlocal ended
        try:
            for chunk in chunks:
                with changed:
                    waiting.extend(chunk)
                    changed.notify()
                    changed.wait_for(lambda: stopped or len(waiting) < room)
                    if stopped:
                        return
        except BaseException as error:  # handed to the consumer, whatever it is
            failed.append(error)
        finally:
            with changed:
                ended = True
                changed.notify()

    thread = threading.Thread(target=work, name="minilm-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or ended)
                if not waiting:
                    break
                item = waiting.popleft()
                changed.notify()
            yield item
        if failed:
            raise failed[0]
    finally:
        with changed:
            stopped = True
            changed.notify()
        thread.join()
