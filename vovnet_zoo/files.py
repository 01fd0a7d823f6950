"""Files are read whole or refused, and folders appear at once: JSON, safetensors with a checksum, hashes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Read the state dict of a safetensors file, on the CPU.

    The format has no checksum of its own, so the one that `write_safetensors` leaves in the metadata is compared.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    try:
        expected = read_metadata(path).get("sha256")
        state_dict = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise _not_safetensors(path, error) from error
    if expected is not None and expected != fingerprint(state_dict):
        raise ValueError(f"{path} is damaged: its tensors are not those saved; download or save it again")
    return state_dict


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the texts that `write_safetensors` wrote beside the tensors."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_shapes(path: str | Path) -> dict[str, list[int]]:
    """Read the shape of each tensor of a safetensors file, without the tensors. Raises ValueError as above."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        raise _not_safetensors(path, error) from error


def _not_safetensors(path: str | Path, error: Exception) -> ValueError:
    reason = known_mistake(path) or error
    return ValueError(f"{path} is not a whole safetensors file ({reason}); download or save it again")


def known_mistake(path: str | Path) -> str:
    """Say what a file is that should hold something else, if its first bytes tell; "" otherwise."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError:
        return ""
    if not start:
        return "it is empty"
    if re.match(rb"\s*<(!doctype|html|head|body|\?xml)", start, re.IGNORECASE):
        return "it is a web page, as a download link gives that wants a login or a click"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs, not the file; run `git lfs pull`"
    return ""


def write_safetensors(state_dict: Mapping[str, Tensor], path: str | Path, **metadata: str) -> None:
    """Write a state dict, and a checksum of it among the metadata, with the permissions of any new file."""
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    metadata = {"format": "pt", **metadata, "sha256": fingerprint(state_dict)}
    Path(path).touch()
    mode = stat.S_IMODE(os.stat(path).st_mode)  # the library makes a file that only its owner can read
    try:
        safetensors.torch.save_file(state_dict, path, metadata=metadata)
    except safetensors.SafetensorError as error:  # such as that the disk is full
        raise OSError(f"{path} cannot be written: {error}") from error
    os.chmod(path, mode)


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """Compute the sha256 of the names, dtypes, shapes and bytes of all tensors, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state_dict.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Return the folder for what is kept between processes, and made anew if it is lost. It need not be there.

    Raises:
        OSError: the user has no home, and the environment variable XDG_CACHE_HOME names no folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vovnet_zoo"
    except RuntimeError as error:
        raise OSError(
            "this user has no home folder; name a folder for caches in the environment variable XDG_CACHE_HOME"
        ) from error


def hash_file(path: Path, algorithm: str = "sha256") -> str:
    """Compute the hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def read_json(path: Path, limit: int | None = None) -> dict:
    """Read the object in a JSON file of at most `limit` bytes.

    Raises:
        ValueError: the file cannot be read, is no JSON, or holds something else than an object; the message names it.
    """
    data = read_bytes(path, "JSON file", limit)
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = known_mistake(path) or error
        raise ValueError(f"{path} is not a JSON file ({reason}); download or save it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not settings")
    return content


def read_bytes(path: str | Path, kind: str, limit: int | None = None) -> bytes:
    """Read a regular file of at most `limit` bytes. The error message calls the file a `kind`.

    Raises:
        ValueError: the file is missing, unreadable, too large, or a pipe or device, which might never end.
    """
    try:
        status = os.stat(path)
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise OSError("it is a pipe or device, not a file")
        if limit is not None and status.st_size > limit:
            raise OSError(f"it has {status.st_size} bytes")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: the path has, for example, a null character in it
        raise ValueError(f"{path}: cannot read the {kind}: {getattr(error, 'strerror', None) or error}") from error


def free_to_write(targets: Iterable[Path], inputs: Iterable[Path], overwrite: bool) -> None:
    """Refuse outputs that would destroy a file of the user.

    Args:
        targets: the files to be written.
        inputs: the files that are read; none of them is ever written over.
        overwrite: other files may be written over.

    Raises:
        ValueError: a target is an input or a folder, or is there and `overwrite` is False; the message names it.
    """
    known = {(status.st_dev, status.st_ino): path for path in inputs if (status := _status(path))}
    for target in targets:
        status = _status(target)
        if status and (source := known.get((status.st_dev, status.st_ino))):
            raise ValueError(f"{target}: the result would be written over the input {source}; choose another folder")
        if target.is_dir():
            raise ValueError(f"{target} is a folder, and the result is a file; choose another folder")
        if not overwrite and os.path.lexists(target):
            raise ValueError(f"{target} is there already; choose another folder, or write over it with --overwrite")


def _status(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (OSError, ValueError):
        return None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole, or as it was before. A link at `path` is replaced, not followed."""
    with naming(path), temporary(path) as part:
        part.write_bytes(data)
        sync(part)
        os.replace(part, path)


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Within this context, an `OSError` that names no file, such as of a full disk, is raised with the name `path`."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def staged(target: str | Path, keep: Collection[str] = ()) -> Iterator[Path]:
    """Give a new folder to write into, and move its files to `target` at the end, when they are on the disk.

    A `target` that does not exist appears at once, with all its files. In a `target` that exists, each file is
    replaced as a whole, except that a file named in `keep` stays as it is. After an error `target` is unchanged.
    """
    target = Path(target).resolve()
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
    # a folder that exists may be on another disk than its parent, so its files are first written in it
    with temporary(target / "staged" if target.exists() else target) as folder:
        folder.mkdir()
        yield folder
        for path in [*folder.iterdir(), folder]:
            sync(path)
        if not target.exists():
            os.rename(folder, target)
            sync(target.parent)
            return
        for file in folder.iterdir():
            if file.name not in keep or not (target / file.name).exists():
                os.replace(file, target / file.name)
        sync(target)


@contextlib.contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """Give an unused path on the disk of `target`, and remove the file or folder that is there at the end.

    The path is in a folder beside `target`, which is locked as long as this process lives. Such folders of processes
    that were killed while they wrote `target` are removed first.
    """
    mine = f".vovnet_zoo.{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}."  # short, whatever the name is
    for folder in target.parent.glob(f"{mine}*.partial"):
        if _is_left_over(folder):
            shutil.rmtree(folder, ignore_errors=True)
    folder = target.parent / f"{mine}{uuid.uuid4().hex}.partial"
    folder.mkdir()
    try:
        with open(folder / "new_lock", "wb") as lock:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # some network disks have no locks: then left-overs stay
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.rename(lock.name, folder / "lock")  # from here on, an unlocked folder is a left-over
            yield folder / "content"
    finally:
        shutil.rmtree(folder)


def _is_left_over(folder: Path) -> bool:
    if fcntl is None:
        return False
    try:
        with open(folder / "lock", "rb+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is locked, or not yet locked, or gone
        return False
    return True


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk. A disk that can do that for files only is no failure."""
    is_folder = path.is_dir()
    if is_folder and os.name == "nt":
        return
    # Windows writes out only what was opened to be written
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
