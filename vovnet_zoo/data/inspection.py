"""`inspect_image` decodes an image and notes its facts or its problem; `run_parallel` does so in processes."""

import contextlib
import hashlib
import os
import signal
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .annotations import Annotations, Source
from .images import ImageError, ImageWarning, decode_image, open_image, read_image_bytes
from .near import thumbnail

CHUNK = 16  # images per message to a worker


def image_jobs(folder: Path, source: Source, names: list[str]) -> list[tuple[Callable[[str], bytes], str, str]]:
    """List (function that reads bytes, its argument, name in messages) of the images of a split, for `inspect_job`."""
    if isinstance(source, Annotations) and source.read_image is not None:
        return [(source.read_image, name, os.path.join(source.file, name)) for name in names]
    paths = [os.path.join(folder, os.path.normpath(name)) for name in names]
    return [(read_image_bytes, path, path) for path in paths]


class Inspection(NamedTuple):
    """An inspection holds the facts of one image file, or its problem."""

    digest: bytes = b""
    size: tuple[int, int] = (0, 0)  # height, width
    format: str = ""
    orientation: int = 1  # the EXIF orientation
    problem: str = ""
    kind: str = ""  # the kind of the problem, one of KINDS
    complaint: str = ""  # the decoder's message about pixels that it had to make up
    thumbnail: np.ndarray | None = None  # see `near.thumbnail`


def inspect_job(job: tuple[Callable[[str], bytes], str, str]) -> Inspection:
    """Inspect the image of a job of `image_jobs`. This function runs in worker processes."""
    read, name, shown = job
    return inspect_image(shown, lambda _: read(name))


def inspect_image(path: str, read: Callable[[str], bytes] = read_image_bytes) -> Inspection:
    """Read and decode one image; `path` is its name in messages, and is given to `read`."""
    with warnings.catch_warnings(record=True) as warned:  # most are about metadata; missing pixels are errors
        warnings.simplefilter("always")
        try:
            data = read(path)
            with _c_stderr() as written:
                pixels = decode_image(data, path)
        except ImageError as error:
            return Inspection(problem=str(error), kind=error.kind)
        with open_image(data) as image:
            format = "JPEG" if image.format == "MPO" else image.format
            digest, orientation = hashlib.blake2b(data, digest_size=16).digest(), _orientation(image)
        complaints = [line for line in written if "JPEG" in line]  # lines about TIFF concern metadata
        complaints += [str(x.message).removeprefix(f"{path}: ") for x in warned if x.category is ImageWarning]
        complaint = next(iter(complaints), "")
        height, width = pixels.shape[-2:]
        return Inspection(
            digest, (height, width), format or "", orientation, complaint=complaint, thumbnail=thumbnail(pixels)
        )


@contextlib.contextmanager
def _c_stderr() -> Iterator[list[str]]:
    """Collect the lines that C code writes to stderr: libjpeg reports damage in no other way.

    The list is empty until the context ends.
    """
    lines: list[str] = []
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata raises all kinds of errors
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def run_parallel(function: Callable, jobs: list, workers: int) -> Iterator[tuple[int, object]]:
    """Yield (position, `function(job)`) of each job as soon as it is done; None for a job that ends its process.

    A process that dies ends its whole pool, so the unfinished jobs of the pool are done again, one by one.
    `RuntimeError` where no process can be started.
    """
    if workers == 0:
        yield from ((i, function(job)) for i, job in enumerate(jobs))
        return
    todo = deque(range(start, min(start + CHUNK, len(jobs))) for start in range(0, len(jobs), CHUNK))
    while todo:
        running: dict[Future, range] = {}
        try:
            with _pool(min(workers, len(todo))) as pool:
                while todo or running:
                    while todo and len(running) < 2 * workers:
                        future = pool.submit(_map, function, [jobs[i] for i in todo[0]])
                        running[future] = todo.popleft()
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        results = future.result()
                        yield from zip(running.pop(future), results, strict=True)
        except BrokenProcessPool:
            suspects = deque(i for chunk in running.values() for i in chunk)
            while suspects:
                with _pool(1) as pool:
                    try:
                        while suspects:
                            result = pool.submit(function, jobs[suspects[0]]).result()
                            yield suspects.popleft(), result
                    except BrokenProcessPool:
                        yield suspects.popleft(), None


def _pool(workers: int) -> ProcessPoolExecutor:
    """Make a pool of processes, and see that one can start.

    Where Python does not fork, a process runs the user's script once more, and dies if that starts processes again.
    """
    pool = ProcessPoolExecutor(workers, initializer=_prepare_worker)
    try:
        pool.submit(int).result()
    except (BrokenProcessPool, OSError, EOFError) as error:
        pool.shutdown(cancel_futures=True)
        raise RuntimeError(
            f"no process to decode images could be started ({type(error).__name__}); in a script of your own, call "
            "this below `if __name__ == '__main__':`, or with workers=0"
        ) from error
    return pool


def _prepare_worker() -> None:
    """Let a process compute with one core, and leave Ctrl-C to the process that it works for."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _map(function: Callable, jobs: list) -> list:
    return [function(job) for job in jobs]


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
