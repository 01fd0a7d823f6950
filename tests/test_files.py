"""Files are whole or refused, and folders appear at once."""

import contextlib
import errno
import os
import types
from pathlib import Path

import pytest
import torch
from launch import run_python

from vovnet_zoo import files
from vovnet_zoo.commands import describe


def test_safetensors_come_back(tmp_path):
    weights = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.tensor(3), "none": torch.zeros(0, 4)}
    files.write_safetensors(weights, tmp_path / "w.safetensors", license="mit")
    found = files.read_safetensors(tmp_path / "w.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)
    metadata = files.read_metadata(tmp_path / "w.safetensors")
    assert metadata == {"format": "pt", "license": "mit", "sha256": files.fingerprint(weights)}


@pytest.mark.parametrize("write", [files.write_whole, files.write_safetensors])
def test_a_file_for_which_there_is_no_room_is_named(tmp_path, write):
    """The library of safetensors raises an error of its own, which is no OSError; an error of a write names no file."""
    resource = pytest.importorskip("resource", reason="not on Windows")
    path, before = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    content = ({"x": torch.zeros(10_000)}, path) if write is files.write_safetensors else (path, bytes(40_000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError) as error:
            write(*content)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(path) in describe(error.value) and "large" in describe(error.value)


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_saved_files_have_the_mode_of_the_umask(tiny_detector, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        tiny_detector.save_pretrained(tmp_path / "model")
        files.write_whole(tmp_path / "model" / "detections.json", b"[]")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert len(modes) == 4 and set(modes.values()) == {mode}, modes


def test_any_changed_tensor_changes_the_fingerprint():
    weights = {"a": torch.zeros(2), "b": torch.zeros(2)}
    others = [
        {"a": torch.zeros(2)},
        {**weights, "b": torch.tensor([0.0, 1e-45])},
        {**weights, "b": torch.zeros(1, 2)},
        {**weights, "b": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.zeros(2), "c": torch.zeros(2)},
    ]
    assert files.fingerprint(weights) == files.fingerprint(dict(reversed(weights.items())))
    assert len({files.fingerprint(x) for x in [weights, *others]}) == 6


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    files.write_safetensors({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:4], b"", whole[:-1] + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="w.safetensors"):
            files.read_safetensors(path)
    with pytest.raises(ValueError, match="none.safetensors"):
        files.read_safetensors(tmp_path / "none.safetensors")


def test_staged_folder_appears_at_once(tmp_path):
    with files.staged(tmp_path / "new") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new" / "a").read_text() == "1"
    with files.staged(tmp_path / "new", keep=["mine"]) as folder:
        for name in ("a", "b", "mine"):
            (folder / name).write_text("2")
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {"a": "2", "b": "2", "mine": "2"}
    with files.staged(tmp_path / "new", keep=["mine"]) as folder:
        for name in ("a", "mine"):
            (folder / name).write_text("3")
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {"a": "3", "b": "2", "mine": "2"}
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_staged_folder_of_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("old")
    for name in ("old", "new"):
        with pytest.raises(OSError, match="no space"), files.staged(tmp_path / name) as folder:
            (folder / "a").write_text("half")
            raise OSError("no space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old" / "a").read_text() == "old"


@pytest.mark.parametrize("content", [None, "old"])
def test_staged_into_a_mount_point(tmp_path, monkeypatch, content):
    """A folder that exists may be a disk of its own, as `docker run -v out:/out` makes it."""
    mount = tmp_path / "out"
    mount.mkdir()
    if content:
        (mount / "a").write_text(content)

    def on_one_disk(move):
        def checked(source, target):
            if (mount in Path(source).parents) != (mount in Path(target).parents):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            return move(source, target)

        return checked

    monkeypatch.setattr(os, "replace", on_one_disk(os.replace))
    monkeypatch.setattr(os, "rename", on_one_disk(os.rename))
    with files.staged(mount) as folder:
        (folder / "a").write_text("new")
        assert content is None or (mount / "a").read_text() == content
    assert (mount / "a").read_text() == "new" and [path.name for path in mount.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["x" * 230, "\u5199" * 80, "x" * 255])
def test_long_names(tmp_path, name):
    for text in ("1", "2"):
        with files.staged(tmp_path / name) as folder:
            (folder / name).write_text(text)
        files.write_whole(tmp_path / name / f"y{name[1:]}", text.encode())
    assert {path.name: path.read_text() for path in (tmp_path / name).iterdir()} == {name: "2", f"y{name[1:]}": "2"}


KILLED = """
import os, signal
from pathlib import Path
from vovnet_zoo import files
with files.{call} as path:
    {write}
    print("ready", flush=True)
    os.kill(os.getpid(), signal.{signal})
"""


@pytest.mark.parametrize("existing", [False, True])
def test_left_overs_of_killed_processes_are_removed(tmp_path, existing):
    """Only the next one who writes the same target removes them, and only when their process has died."""
    target = tmp_path / "model"
    if existing:
        target.mkdir()
    code = KILLED.format(call=f"staged({str(target)!r})", write="(path / 'a').write_text('half')", signal="SIGKILL")
    assert "ready" in run_python(code).stdout
    assert len(list(tmp_path.rglob("*.partial"))) == 1
    with files.staged(tmp_path / "other") as folder:
        (folder / "a").write_text("1")
    assert len(list(tmp_path.rglob("*.partial"))) == 1
    with files.staged(target) as first, files.staged(target) as second:  # the first is alive
        (first / "a").write_text("1")
        (second / "a").write_text("2")
        assert len(list(tmp_path.rglob("*.partial"))) == 2
    assert (target / "a").read_text() == "1" and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_sync(tmp_path, monkeypatch, number):
    """Files and folders are synced; EINVAL for a folder (CIFS, sshfs, Ceph) is no failure, but EIO is one."""
    synced, whole = [], os.fsync

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append(path)
        if os.path.isdir(path):
            raise OSError(number, os.strerror(number))
        whole(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with contextlib.nullcontext() if number == errno.EINVAL else pytest.raises(OSError, match="Input/output"):
        with files.staged(tmp_path / "new") as folder:
            (folder / "a").write_text("1")
        assert (tmp_path / "new" / "a").read_text() == "1" and str(tmp_path) in synced
    assert any(path.endswith("/a") for path in synced)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EINVAL, "file")))
    with pytest.raises(OSError, match="file"):
        files.write_whole(tmp_path / "x", b"1")
    assert not (tmp_path / "x").exists()


def test_windows_flushes_only_what_may_be_written(tmp_path, monkeypatch):
    """A stand-in for Windows: it flushes no file that was opened for reading, opens no folder, and has no fcntl."""
    fcntl = pytest.importorskip("fcntl", reason="this is Windows")
    flushed = []

    def fsync(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flushed.append(descriptor)

    monkeypatch.setattr(files, "os", types.SimpleNamespace(**{**vars(os), "name": "nt", "fsync": fsync}))
    monkeypatch.setattr(files, "fcntl", None)
    files.write_whole(tmp_path / "a", b"1")
    for text in ("1", "2"):
        with files.staged(tmp_path / "new") as folder:
            (folder / "b").write_text(text)
    assert (tmp_path / "a").read_text() == "1" and (tmp_path / "new" / "b").read_text() == "2" and len(flushed) == 3


def test_read_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"12345")
    assert files.read_bytes(tmp_path / "x", "image", limit=5) == b"12345"
    with pytest.raises(ValueError, match="x: cannot read the image: it has 5 bytes"):
        files.read_bytes(tmp_path / "x", "image", limit=4)
    with pytest.raises(ValueError, match="cannot read the image: No such file") as error:
        files.read_bytes(tmp_path / "y", "image")
    assert isinstance(error.value.__cause__, FileNotFoundError)
    with pytest.raises(ValueError, match="cannot read the image"):
        files.read_bytes(tmp_path / "a\0b", "image")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a pipe or device"):
        files.read_bytes(tmp_path / "pipe", "image")


@pytest.mark.parametrize("text, message", [("{", "not a JSON file"), ("[1]", "a JSON list")])
def test_read_json_refuses(tmp_path, text, message):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=f"c.json .*{message}"):
        files.read_json(tmp_path / "c.json")
