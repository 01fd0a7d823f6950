"""Published weights are fetched and read whole or not at all, and without running their code."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from .files import hash_file, known_mistake, read_safetensors, temporary
from .ledger import ORGANISATION_VARIABLE as ORGANISATION_VARIABLE
from .ledger import Weights as Weights
from .ledger import available as available
from .ledger import find as find
from .ledger import instead
from .web import is_loopback, opener, receive
from .words import counted

ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, OSError)
MAX_BYTES = 8 << 30  # of a checkpoint; the largest that is published has less than 1 GiB, its optimizer included
MAX_SECONDS = 2 * 3600  # of a download
MAX_FREE_BYTES, MAX_RATIO = 256 << 20, 20  # a zip may unpack to the former, or to the latter times its own size


def fetch_row(key: str, table: Mapping[str, Weights], how_to_make: str, cache_dir: str | Path | None = None) -> Path:
    """Fetch the checkpoint of a row of `table`; see `fetch`. An error says what there is instead.

    Args:
        how_to_make: how a user gets such weights otherwise, for the error message.
    """
    try:
        row = table[key]
        return fetch(row.url, row.sha1, cache_dir, sha256=row.sha256)
    except (ConnectionError, ValueError) as error:
        raise type(error)(f"{key}: {error}; {instead(key, table, how_to_make)}") from error


def fetch(url: str, sha1: str = "", cache_dir: str | Path | None = None, *, sha256: str = "") -> Path:
    """Download the checkpoint at `url`, or in the zip there, to the cache, and return the file.

    Every call checks the file in the cache, by its hash or else by the checksums of its parts, and downloads a
    damaged file again. Neither torch.hub nor pooch serves: torch.hub keeps a truncated body as if it were whole, and
    pooch knows one hash of the downloaded file, while these hashes are of the .pth in the zip and most rows have none.

    Args:
        sha1, sha256: hashes of the checkpoint itself, outside its zip; "" for one that is not known.
        cache_dir: None is the cache of torch.hub.

    Raises:
        OSError: the cache cannot be written.
        ConnectionError: the server cannot be reached, refuses, breaks off, or sends too much or too slowly.
        ValueError: the address is not https://, or the file is damaged, wants to run code, or has another hash;
            nothing is kept.
    """
    hashes = {name: value for name, value in (("sha1", sha1), ("sha256", sha256)) if value}
    folder = Path(cache_dir or Path(torch.hub.get_dir()) / "checkpoints")
    base = Path(urlparse(url).path).name.removesuffix(".zip").removesuffix(".tar").removesuffix(".pth")
    target = folder / f"{base}.{hashlib.sha256(url.encode()).hexdigest()[:8]}.pth"
    if target.exists():
        with contextlib.suppress(ValueError):
            _check(target, hashes, url)
            return target
    _make_cache(folder, is_default=not cache_dir)
    with temporary(target) as body:
        _http_get(url, body)
        with unwrapped(body, url) as whole:
            _check(whole, hashes, url)
            read_checkpoint(whole, url)
            os.replace(whole, target)
    return target


def _make_cache(folder: Path, is_default: bool) -> None:
    """Make the folder for downloads. Raises `OSError`, which says how to name another, where it cannot be written."""
    try:
        if is_default and str(folder).startswith("~"):
            raise OSError(errno.ENOENT, "this user has no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OSError(
            f"{folder}: weights cannot be downloaded to this folder ({error.strerror}); name another one in the "
            "environment variable TORCH_HOME, or as cache_dir= where a function has it"
        ) from error


def _check(path: Path, hashes: Mapping[str, str], source: str) -> None:
    if not hashes:
        check_parts(path, source)
    for kind, wanted in hashes.items():
        if (found := hash_file(path, kind)) != wanted:
            raise ValueError(
                f"{source}: the checkpoint's {kind} is {found}, expected {wanted}; nothing was kept, try again"
            )


def _http_get(url: str, path: Path) -> None:
    with open(path, "wb") as file:
        receive(url, file, MAX_BYTES, MAX_SECONDS, check=check_url, open=urlopen)


def check_url(url: str) -> None:
    """Refuse an address with ValueError unless it begins with https://, or with http:// on this machine itself."""
    parts = urlparse(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(parts.hostname or "")):
        raise ValueError(f"{url}: weights are downloaded through https:// only")


urlopen = opener(check_url)


def read_checkpoint(path: str | Path, source: str | None = None) -> Any:
    """Read a file that `torch.save` wrote, or the only file in a zip, without running any code in it.

    Raises:
        ValueError: the file is damaged, or holds more than tensors and plain values; the message names `source`, or
            the file if that is None.
    """
    path, source = Path(path), source or str(path)
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    with unwrapped(path, source) as file:
        check_parts(file, source)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # on hostile bytes the unpickler raises anything
            # torch's own message would advise to run the code in the file
            reason = known_mistake(file) or "it is damaged, or torch.save did not write it"
            if wanted := re.search(r"GLOBAL (\S+)", str(error)):
                reason = f"it holds more than tensors: reading it would run {wanted[1]}, which is refused"
            raise ValueError(f"{source} is not a whole checkpoint of tensors ({reason}); get it anew") from error


@contextlib.contextmanager
def unwrapped(path: Path, source: str) -> Iterator[Path]:
    """Give the checkpoint at `path`, or the only file in the zip there, which is removed at the end."""
    if not path.is_file():
        raise ValueError(f"{source}: no such file")
    if not _is_wrapped(path, source):
        yield path
        return
    # beside the file, where there is room for another one of its size, unless nothing can be written there
    place = path if os.access(path.parent, os.W_OK) else Path(tempfile.gettempdir()) / path.name
    with temporary(place) as inner:
        unzip(path, inner, source)
        yield inner


def check_parts(path: Path, source: str) -> None:
    """Compare the checksum of every part of a checkpoint. Raises ValueError if one is wrong.

    torch.save has written these checksums since torch 1.6; torch.load does not look at them.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            _check_unpacked(path, archive, source)
            broken = archive.testzip()
    except UnpackedSizeError:
        raise
    except (*ZIP_ERRORS, ValueError) as error:
        raise ValueError(f"{source} is not a whole PyTorch checkpoint ({error}); download or save it again") from error
    if broken:
        raise ValueError(f"{source}: its part {broken} is damaged; download or save it again")


def _check_unpacked(path: Path, archive: zipfile.ZipFile, source: str) -> None:
    packed, unpacked = path.stat().st_size, sum(member.file_size for member in archive.infolist())
    if unpacked > min(MAX_BYTES, max(MAX_FREE_BYTES, MAX_RATIO * packed)):
        raise UnpackedSizeError(f"{source}: its {packed} bytes would unpack to {unpacked}: refused")


class UnpackedSizeError(ValueError):
    """A zip file would unpack to far more than weights do."""


def unzip(path: Path, target: Path, source: str) -> None:
    """Write the only file of a zip to `target`. Raises ValueError if there are more files, or its name is a path."""
    try:
        with zipfile.ZipFile(path) as archive:
            _check_unpacked(path, archive, source)
            members = archive.infolist()
            if len(members) != 1:
                raise ValueError(f"{source}: a zip of {counted(len(members), 'file')}; expected one checkpoint")
            name, mode = members[0].orig_filename, members[0].external_attr >> 16
            if re.search(r"[/\\:\0]", name) or name in ("", ".", "..") or stat.S_ISLNK(mode):
                raise ValueError(f"{source}: the zip's member {name!r} is a path or a link, not a plain file: refused")
            with archive.open(members[0]) as member, open(target, "wb") as file:
                shutil.copyfileobj(member, file)  # no more than the size it states; the checksum is compared at the end
    except ZIP_ERRORS as error:
        raise ValueError(f"{source} is not a whole zip file ({error}); download it again") from error


def _is_wrapped(path: Path, source: str) -> bool:
    """Tell whether the file is a zip around a checkpoint, and not a checkpoint, which is a zip of its own kind."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("/data.pkl") for name in archive.namelist())
    except (*ZIP_ERRORS, ValueError) as error:
        raise ValueError(f"{source} is not a whole file ({error}); download or save it again") from error
