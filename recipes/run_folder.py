"""The run folder holds what a training run leaves: its log, its checkpoints, and notes on what it could not use."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from loggers import Loggers
from presets import NETWORK, TrainConfig, with_defaults
from runtime import environment, log, log_own
from vovnet_zoo import FCOS
from vovnet_zoo.classifiers import SOURCES
from vovnet_zoo.commands import command_line, make_folder
from vovnet_zoo.data import CocoDataset, ImageError, Skipped
from vovnet_zoo.evaluation.runs import TRAINED, VALIDATED, decisive, describe_annotations, read_log, shown
from vovnet_zoo.files import hash_file, naming, sync, write_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- the lock -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path, rank: int = 0, wait: float = 10.0) -> Iterator[None]:
    """Hold the lock of a run folder, on rank 0, so that two runs do not mix their files. The folder is made.

    The operating system releases the lock when the process ends, however it ends; on a network file system that has
    locks, the lock holds between machines too. A run that was killed a moment ago may not have ended yet, so the lock
    is asked for `wait` seconds long. `ValueError` if another process holds it, naming that process, or if the folder
    cannot be written. Where an error ends a run before it has begun, the folder is left as it was before.
    """
    if rank > 0:
        yield
        return
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    make_folder(folder, f"--out {folder}")
    refuse_foreign(folder)
    before = {*os.listdir(folder)}
    with take_lock(folder, wait) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        try:
            yield
        except BaseException:
            if not (folder / "run.json").exists():
                if fcntl is None:
                    file.close()  # Windows removes no open file
                remove_prepared(folder, before, missing)
            raise


def take_lock(folder: Path, wait: float) -> IO:
    """Open and lock the file `lock` in a folder, see `locked`."""
    deadline = time.monotonic() + wait
    while True:
        folder.mkdir(parents=True, exist_ok=True)  # a run that had not begun may have removed it
        # A lock of lockf belongs to this process alone. One of flock would be shared by data loading workers, which may
        # outlive it; and opening this file once more in this process and closing it would release the lock.
        file = open(folder / "lock", "a+", encoding="utf-8")  # noqa: SIM115  (returned)
        if try_lock(file):
            if is_open_at(file, folder / "lock"):
                return file
            file.close()  # such a run has removed it meanwhile
            continue
        file.seek(0)
        other = file.read().strip() or "another process"
        file.close()
        if time.monotonic() > deadline:
            raise ValueError(f"{folder} is in use by {other}; wait for its end, or give another --out")
        log.warning("%s is in use by %s; waiting %.0f s for its end", folder, other, wait)
        time.sleep(wait / 5)


def is_open_at(file: IO, path: Path) -> bool:
    """Tell whether an open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


PREPARED = ("lock", "images.json", "split")  # what a run writes before its `run.json`


def remove_prepared(folder: Path, before: set[str], missing: list[Path]) -> None:
    """Remove what a run has written that did not begin, and the folders that it made, the innermost first."""
    for path in (folder / name for name in PREPARED if name not in before):
        with contextlib.suppress(OSError):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in missing:
        with contextlib.suppress(OSError):  # something else is in it
            path.rmdir()


WRITTEN = ("best", "last", "metrics.jsonl", "report.html", "curves.png", "detections.png")  # in every run folder
NAMES: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # names of files need not be UTF-8


def refuse_foreign(folder: Path) -> None:
    """Raise `ValueError` where a folder is not one of a run, and has files that a run would write over."""
    if (folder / "run.json").exists() or (folder / "checkpoints").exists():
        return
    if there := [name for name in WRITTEN if (folder / name).exists()]:
        raise ValueError(
            f"--out {folder} is no run folder, and a run would write over what is in it ({', '.join(there)}); give "
            "another --out"
        )


def try_lock(file: IO) -> bool:
    """Lock a file unless another process holds its lock. Where there are no locks, a warning says so."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOLCK, "this system has no such locks")
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        log.warning("%s cannot be locked (%s); see that no other run uses this folder", file.name, error.strerror)
    return True


# ---- the log --------------------------------------------------------------------------------------------------------


class RunLog:
    """The log of a run consists of `run.json` (the configuration; command and versions of each start), `metrics.jsonl`
    (a JSON object a line), and what the loggers keep: TensorBoard, where it is installed, and `config.loggers`. Only
    rank 0 writes. A step's number is how many steps were done with it: the first is 1.

    Args:
        start_step: a run that was stopped goes on after this many steps; rows of later steps are dropped, since these
            steps are done again.
        scored: the last evaluation that counts was made after this many steps; rows of later evaluations are dropped.
        identity: what decides the result of the run, see `describe_run`; `run.json` holds what is said of the data.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        rank: int,
        start_step: int = 0,
        scored: int = 0,
        identity: Mapping[str, str] | None = None,
    ):
        self.folder, self.active = folder, rank == 0
        if not self.active:
            return
        folder.mkdir(parents=True, exist_ok=True)
        rows, before = self.rows(), read_run(folder / "run.json") if start_step else {}
        if before and "first_step" not in before:  # of earlier checkpoints, whose runs counted from 0
            rows = [{**row, "step": row["step"] + 1} for row in rows]
        starts = [*before.get("starts", []), {"step": start_step, **environment()}]
        data = {name: text for name, text in (identity or {}).items() if name in (TRAINED, VALIDATED)}
        about = {"config": dataclasses.asdict(config), "data": data, "starts": starts, "first_step": 1}
        write_whole(folder / "run.json", json.dumps(about, indent=2, default=str).encode())
        kept = [row for row in rows if row["step"] <= (start_step if "loss" in row else scored)]
        write_whole(folder / "metrics.jsonl", "".join(write_json(row) + "\n" for row in kept).encode())
        self.file = open(folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115  (closed by close)
        self.loggers = Loggers(["tensorboard", *config.loggers])
        self.loggers.on_start(folder, json.loads(json.dumps(about["config"], default=str)), start_step)

    def write(self, step: int, **values) -> None:
        """Add a row of values for `step`, the number of steps done."""
        if not self.active:
            return
        with naming(self.file.name):
            self.file.write(write_json({"step": step, **values}) + "\n")
            self.file.flush()
        self.loggers.on_metrics(step, {k: v for k, v in values.items() if isinstance(v, (int, float))})

    def rows(self) -> list[dict]:
        """Read all rows so far. A damaged line, like the last one of a killed run, is left out."""
        return read_log(self.folder / "metrics.jsonl")

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.loggers.on_end()


def write_json(value: Any) -> str:
    """Write a value as JSON, which has no number that is not finite: such a number becomes null."""
    return json.dumps(finite(value), allow_nan=False)


def finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, in dicts and lists too."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_run(path: Path) -> dict:
    """Read a `run.json`. A damaged file is reported, and an empty one returned."""
    try:
        about = json.loads(path.read_bytes()) if path.is_file() else {}
        return {**about, "starts": [*about["starts"]]} if about != {} else {}
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%r) and is written anew; earlier starts of this run are not listed", path, error)
        return {}


# ---- notes ----------------------------------------------------------------------------------------------------------


def note_skipped(folder: Path, step: int, skipped: list[Skipped]) -> None:
    """Log each image that could not be read, and list it in `skipped.txt`, to which all ranks add."""
    for image in skipped:
        log_own.warning("step %d: image %d skipped: %s", step, image.image_id, image.reason)
    if skipped:
        folder.mkdir(parents=True, exist_ok=True)  # on another machine than rank 0's it may not be there
        with open(folder / "skipped.txt", "a", **NAMES) as file:
            file.writelines(f"step {step}, image {image.image_id}: {image.reason}\n" for image in skipped)


def note_bad_image(folder: Path, step: int, error: Exception) -> None:
    """List the image that stopped a run in `skipped.txt`, so that the run goes on when the image is repaired."""
    if isinstance(error, ImageError):
        with open(folder / "skipped.txt", "a", **NAMES) as file:
            file.write(f"stopped after step {step}: {str(error).splitlines()[-1]}\n")


def was_bad(folder: Path, image: Path) -> bool:
    """Say whether `skipped.txt` names an image."""
    path = folder / "skipped.txt"
    return path.is_file() and f" {image}: " in path.read_text(**NAMES)


def note_not_finite(
    folder: Path, step: int, rank: int, parts: list[dict[str, Tensor]], losses: dict[str, float], grad_norm: float
) -> Path:
    """Write down this rank's image ids and boxes of a step that is not finite; returns the path of the file."""
    path = folder / "not_finite" / f"step{step:08d}-rank{rank}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = [
        {name: x.tolist() for name, x in part.items() if name != "images"} | {"shape": list(part["images"].shape)}
        for part in parts
    ]
    path.write_text(write_json({"losses": losses, "grad_norm": grad_norm, "batch": batch}), encoding="utf-8")
    log_own.warning("step %d skipped: losses %s, gradient norm %s; its batch is in %s", step, losses, grad_norm, path)
    return path


# ---- pictures -------------------------------------------------------------------------------------------------------


def import_pictures() -> ModuleType | None:
    """Import `pictures`; None, with a warning, where it cannot be imported, since a run does not need it."""
    try:
        import pictures  # it needs matplotlib
    except Exception as error:  # a matplotlib that does not fit the other packages raises anything
        log.warning("no curves.png and detections.png at the end of this run: %r", error)
        return None
    return pictures


def draw_pictures(
    pictures: ModuleType | None, folder: Path, rows: list[dict], dataset: CocoDataset, device: torch.device
) -> None:
    """Draw `curves.png`, and what `best` detects in `detections.png`, at the end of a run.

    An error is logged, since the run is complete.
    """
    if pictures is None:
        return
    try:
        pictures.draw_curves(rows, folder / "curves.png")
        model = FCOS.from_pretrained(folder / "best").to(device)
        pictures.draw_comparison(model, dataset, folder / "detections.png")
        log.info("pictures: curves.png and detections.png in %s", folder)
    except Exception as error:
        log.warning("the run is complete, but its pictures could not be drawn: %r", error)


# ---- is the run in the folder the same as the one that starts? ------------------------------------------------------

# These fields of the configuration do not change the result of a run, apart from rounding.
# `skip_bad_images` is among them, since without it a run ends at the first image that it would change.
FREE = {"out", "data", "workers", "accum", "device", "compile", "cuda_graphs", "max_not_finite", "allow_changes"}
FREE |= {"skip_bad_images", "checkpoint_every", "checkpoint_minutes", "seeds", "loggers"}
FREE |= {"epochs", "evals"}  # `steps` and `eval_every` say more
FREE |= {"train", "train_images", "val", "val_images"}  # the hashes of the annotations say more
# These decide the network and its first weights.
FIXED = {*NETWORK, "init"}


def describe_run(config: TrainConfig, train_set: CocoDataset, val_set: CocoDataset) -> dict[str, str]:
    """Return what decides the result of a run: the fields of its configuration, and its annotations."""
    whole = with_defaults(config) if config.init is None else config
    about = {k: repr(v) for k, v in dataclasses.asdict(whole).items() if k not in FREE}
    if config.init is not None:  # then these say nothing that `init` does not say
        about = {k: v for k, v in about.items() if k not in NETWORK or k == "frozen_norm"}
    if not config.frozen_norm:
        about["accum"] = repr(config.accum)  # a live batch norm sees one part of the batch at a time
    for name, dataset in zip((TRAINED, VALIDATED), (train_set, val_set), strict=True):
        about[name] = describe_annotations(dataset)
    return about


def refuse_changes(saved: dict[str, str], asked: dict[str, str], config: TrainConfig) -> list[str]:
    """Raise a `ValueError` that names what differs between two runs' descriptions, unless `config.allow_changes`.

    Returns the names of what differs. A field that is newer than the checkpoint had its default value. The network
    cannot change while it is trained.
    """
    defaults = {field.name: repr(field.default) for field in dataclasses.fields(config)}
    defaults["accum"] = asked.get("accum")  # earlier checkpoints do not hold it
    free = FREE - asked.keys()
    if saved.get("init") == asked["init"] != repr(None):
        free = free | set(NETWORK) - {"frozen_norm"}  # these were ignored with --init, and checkpoints held them
    saved = {name: saved.get(name, defaults.get(name)) for name in (saved.keys() | asked.keys()) - free}
    changed = [name for name in sorted(saved) if decisive(saved[name]) != decisive(asked.get(name))]
    if not changed:
        return changed
    what = "; ".join(f"{name}: was {shown(saved[name])}, now {shown(asked.get(name))}" for name in changed)
    if fixed := FIXED.intersection(changed):
        raise ValueError(
            f"the checkpoints in {config.out} are of another network ({what}); {', '.join(sorted(fixed))} cannot "
            "change in a run that goes on: give another --out, with --init to start from that network's weights"
        )
    if config.allow_changes:
        log.warning("going on with changes: %s", what)
        return changed
    advice = f"; to train longer: {longer(config)}" if "steps" in changed else ""
    raise ValueError(
        f"the checkpoints in {config.out} are of another run ({what}); "
        f"give another --out, remove that folder, or go on all the same with --allow-changes{advice}"
    )


def longer(config: Any) -> str:
    """Say how a run that is complete is followed by another one, since its learning rate has come down to its end."""
    start = command_line(["--init", str(config.out / "best"), "--out", f"{config.out}-longer"])
    without = ["--pretrained-backbone"] if getattr(config, "pretrained_backbone", False) else []
    if (getattr(config, "backbone", None) or "").startswith(SOURCES):  # the detector knows it by another name
        without.append("--backbone")
    return f"the same command with {start}" + "".join(f" and without {name}" for name in without)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def save_checkpoint(folder: Path, step: int, state: dict, keep: int = 2) -> Path:
    """Write `state` (tensors, numbers, strings in dicts and lists) after `step` steps; keep the newest `keep` files.

    It is written as it is read, without a copy in memory. Only undamaged files count among those to keep; the others
    are removed. The file's name carries the first digits of its SHA-256, so that a damaged file is noticed. A file of
    the same step is replaced. `OSError` if the file cannot be written, on a full disk for instance; earlier ones are
    then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.pt.partial"):  # of runs that were killed while they wrote
        left.unlink()
    try:
        with synced(folder / f"{step:08d}.pt.partial") as file:
            writer = HashingWriter(file)
            torch.save(state, writer)
            path = folder / f"{step:08d}-{writer.digest()[:16]}.pt"
        move(Path(file.name), path)
    except OSError as error:
        newest = list_checkpoints(folder)
        intact = f"{newest[-1]} is intact" if newest else "there is no earlier one"
        text = f"checkpoint of step {step} not saved ({error.strerror}); {intact}"
        raise OSError(error.errno, text, folder) from error
    whole = [path]
    for old in reversed([other for other in list_checkpoints(folder) if other != path]):
        if old.name[:8] != path.name[:8] and len(whole) < keep and is_whole(old):
            whole.append(old)
        else:
            old.unlink()
    return path


def load_checkpoint(folder: Path) -> dict | None:
    """Load the newest undamaged checkpoint on the CPU; None if there is none. Rank 0 reads it and gives it to all.

    `ValueError`, in all processes, if all checkpoints are damaged.
    """
    state = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            state = [read_newest(folder)]
        except ValueError as error:
            state = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(state, src=0)
    if isinstance(state[0], ValueError):
        raise state[0]
    return state[0]


def read_newest(folder: Path) -> dict | None:
    """Read the newest checkpoint whose content has the hash in its name; None if there are no checkpoints.

    `ValueError` if all are damaged: the run is not begun again without being asked, since that would overwrite its log.
    """
    paths = list_checkpoints(folder)
    for path in reversed(paths):
        if is_whole(path):
            return torch.load(path, map_location="cpu", weights_only=True)
        log.warning("%s is damaged (its hash is not the one in its name); using the one before", path)
    if paths:
        raise ValueError(
            f"{folder}: all checkpoints are damaged ({', '.join(path.name for path in paths)}); put back a copy of "
            "one, or, to start the run over, remove this folder or give another --out"
        )
    return None


def is_whole(path: Path) -> bool:
    """Say whether a checkpoint can be read, and its content has the hash in its name."""
    try:
        return hash_file(path)[:16] == path.stem.partition("-")[2]
    except OSError as error:
        log.warning("%s cannot be read: %s", path, error.strerror)
        return False


def list_checkpoints(folder: Path) -> list[Path]:
    """List all checkpoints, the oldest first."""
    return sorted(folder.glob("????????-????????????????.pt"))


class HashingWriter:
    """A writer passes bytes on to a file and computes their SHA-256, so that they need not be in memory all at once.

    torch.save does not hand on the error of a `write`, so the first one is raised by `digest`.
    """

    def __init__(self, file: IO[bytes]):
        self._file, self._hash, self._error = file, hashlib.sha256(), None

    def write(self, content: bytes | memoryview) -> int:
        if self._error is None:
            try:
                self._file.write(content)
                self._hash.update(content)
            except OSError as error:
                self._error = error
        return len(content)

    def flush(self) -> None:
        """Do nothing: `synced` does it."""

    def digest(self) -> str:
        """Return the SHA-256 of what was written, in hexadecimal digits."""
        if self._error is not None:
            raise self._error
        return self._hash.hexdigest()


@contextlib.contextmanager
def synced(path: Path) -> Iterator[IO[bytes]]:
    """Open a file to write, which is on the disk at the end; after an error it is removed."""
    try:
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def move(source: Path, path: Path) -> None:
    """Give a file another name in its folder, where it replaces a file of this name."""
    source.replace(path)
    sync(path.parent)  # the new name, too
