"""`ImageNotes` notices images that were replaced while a run was stopped."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime import log
from vovnet_zoo.data import CocoDataset
from vovnet_zoo.data.annotations import Annotations
from vovnet_zoo.files import hash_file, write_whole
from vovnet_zoo.words import counted

SAVE_S = 60.0


class ImageNotes:
    """The notes of a run hold the size, the time stamp and the SHA-256 of every image file, or file of a table.

    The start of a run reads sizes and time stamps only; a thread reads the contents while the run trains. A run that
    goes on compares the content of the images whose size or time stamp is another, as it is of all copied files.

    Args:
        path: JSON file of the notes.
        datasets: by the name of the split.
        goes_on: compare with the notes that are there; otherwise they are written anew.
    """

    def __init__(self, path: Path, datasets: Mapping[str, CocoDataset], goes_on: bool):
        self.path, self.places = path, {}
        for split, dataset in datasets.items():
            self.places |= {f"{split}/{name}": dataset.images_dir / name for name in image_files(dataset)}
        with ThreadPoolExecutor(8) as pool:
            self.notes = dict(zip(self.places, pool.map(size_and_time, self.places.values()), strict=True))
        self.before = read_notes(path) if goes_on else {}
        self.ended, self.thread = threading.Event(), threading.Thread(target=self._read_contents, daemon=True)

    def changed(self) -> list[str]:
        """List the images that are others than before, by the name of their split and file."""
        same = {name for name, old in self.before.items() if self.notes.get(name, [])[:2] == old[:2]}
        doubtful = [name for name in self.notes if name in self.before and name not in same]
        if doubtful:
            log.info(
                "comparing the content of %s, whose size or time stamp has changed", counted(len(doubtful), "image")
            )
        with ThreadPoolExecutor(8) as pool:
            digests = dict(zip(doubtful, pool.map(content, map(self.places.get, doubtful)), strict=True))
        changed, unknown = [], []
        for name, digest in digests.items():
            size, _, old = self.before[name]
            if size < 0 or digest is None:  # it was missing, or it is: the run stops there, or skips it
                continue
            if size != self.notes[name][0] or (old is not None and old != digest):
                changed.append(name)
            elif old is None:
                unknown.append(name)
        if unknown:
            log.warning(
                "%s another time stamp, and the run was stopped before it had read all contents: %s",
                counted(len(unknown), "image has", "images have"),
                unknown[:3],
            )
        for name, digest in [*digests.items(), *((name, self.before[name][2]) for name in same)]:
            self.notes[name][2] = digest
        return changed

    def start(self) -> None:
        """Write the notes, and begin to read the contents."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._save()
        self.thread.start()

    def close(self, wait: float = 5.0) -> None:
        """End the reading, which gets `wait` seconds more, and write the notes."""
        if self.thread.is_alive():
            self.thread.join(wait)
        self.ended.set()
        if self.thread.ident is not None:
            self.thread.join()

    def _read_contents(self) -> None:
        saved = time.monotonic()
        for name, note in self.notes.items():
            if self.ended.is_set():
                break
            if note[2] is None:
                note[2] = content(self.places[name])
            if time.monotonic() - saved > SAVE_S:
                self._save()
                saved = time.monotonic()
        self._save()

    def _save(self) -> None:
        try:
            write_whole(self.path, json.dumps(self.notes).encode())
        except OSError as error:
            log.warning("%s cannot be written: %s; replaced images would not be noticed", self.path, error.strerror)


def image_files(dataset: CocoDataset) -> list[str]:
    """List the files that hold the images, relative to the folder of the images."""
    source = dataset.annotations
    if isinstance(source, Annotations) and source.read_image is not None:
        return [os.path.relpath(path, dataset.images_dir) for path in source.image_files]
    return dataset.file_names.tolist()


def size_and_time(path: Path) -> list:
    """Return [size in bytes, time stamp in ns, None]; the size is -1 where there is no such file."""
    try:
        about = path.stat()
    except OSError:
        return [-1, 0, None]
    if not stat.S_ISREG(about.st_mode):  # to read a pipe or a device might have no end
        return [-1, 0, None]
    return [about.st_size, about.st_mtime_ns, None]


def content(path: Path) -> str | None:
    """Return the SHA-256 of a file; None where it cannot be read."""
    try:
        return hash_file(path) if path.is_file() else None
    except OSError:
        return None


def read_notes(path: Path) -> dict[str, list]:
    """Read the notes of a run; none where they are damaged, or where the run is older than notes are."""
    try:
        notes = json.loads(path.read_bytes())
        return {name: [int(size), int(stamp), digest] for name, (size, stamp, digest) in notes.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%r); replaced images are not noticed", path, error)
        return {}
