"""`read_ahead` prepares the items of a stream in threads, and `group_alike` makes groups of those that are alike."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier, Lock
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")
STARTING = Lock()  # one pool starts at a time


def read_ahead(items: Iterable[T], prepare: Callable[[T], R], workers: int, ahead: int) -> Iterator[R]:
    """Yield `prepare(item)` of each item, in order, while threads prepare the next items.

    Args:
        items: are taken in the calling thread, at most `ahead` before their turn.
        prepare: runs in the threads; what it raises is raised here, at the item's turn.
        workers: number of threads; with 0, each item is prepared at its turn, in the calling thread.
    """
    if workers == 0:
        yield from map(prepare, items)
        return
    items, waiting = iter(items), deque[Future[R]]()
    pool = single_threads(workers)
    try:
        for item in itertools.islice(items, ahead):
            waiting.append(pool.submit(prepare, item))
        while waiting:
            result = waiting.popleft().result()
            for item in itertools.islice(items, 1):
                waiting.append(pool.submit(prepare, item))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def single_threads(workers: int) -> ThreadPoolExecutor:
    """Start threads that each use one core for tensor operations, since each works on an image of its own.

    torch sets the number for the thread that asks, and for all threads that use torch for the first time later. So all
    threads start here at once, ask for it, and the number is put back.
    """
    pool, started = ThreadPoolExecutor(workers, initializer=use_one_core), Barrier(workers + 1)
    with STARTING:
        count = torch.get_num_threads()
        try:
            for _ in range(workers):
                pool.submit(started.wait)
            started.wait()
        except BaseException:  # the machine has no more threads, or Ctrl-C
            started.abort()
            raise
        finally:
            torch.set_num_threads(count)
    return pool


def use_one_core() -> None:
    """Let tensor operations of this thread use one core."""
    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread takes the number of the process when it first asks, so it has to ask now


def group_alike(
    items: Iterable[tuple[int, T]], key: Callable[[T], Hashable], size: int, window: int
) -> Iterator[list[tuple[int, T]]]:
    """Yield groups of at most `size` items with the same key.

    A group is full, unless one of its items would otherwise wait longer than for `window` items that come after it, or
    the items end.

    Args:
        items: pairs (number, item), with ascending numbers.
    """
    groups: dict[Hashable, list[tuple[int, T]]] = {}  # in the order of their first items
    for number, item in items:
        group = groups.setdefault(key(item), [])
        group.append((number, item))
        if len(group) == size:
            yield groups.pop(key(item))
        while groups and number - _first_number(groups) >= window:
            yield groups.pop(next(iter(groups)))
    yield from groups.values()


def _first_number(groups: dict[Hashable, list[tuple[int, T]]]) -> int:
    return next(iter(groups.values()))[0][0]
