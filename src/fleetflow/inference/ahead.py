"""Frames decoded ahead of their use, so that a GPU does not wait for them."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

COUNT = 2  # frames; more only take memory, as decoding one takes about as long as the next
LOOK = 0.1  # seconds between two looks at whether anybody still wants them


def ahead(items: Iterable[T], count: int = COUNT) -> Iterator[T]:
    """Yields the items as they come, from a thread that makes up to `count` of them before they are asked for.

    What making them raises is raised here, in its turn. The thread ends with the iterator.
    """
    ready: queue.Queue = queue.Queue(count)
    unwanted = threading.Event()

    def put(kind: str, value) -> bool:
        while not unwanted.is_set():
            try:
                ready.put((kind, value), timeout=LOOK)
                return True
            except queue.Full:
                pass
        return False

    def make() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
        except BaseException as error:
            put("error", error)
        else:
            put("end", None)

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while (found := ready.get())[0] == "item":
            yield found[1]
        if found[0] == "error":
            raise found[1]
    finally:
        unwanted.set()
        thread.join()
