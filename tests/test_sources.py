"""What `predict` can be pointed at: files, folders, patterns, lists of paths, and images in memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from vovnet_zoo.sources import Frame, frames, to_rgb


@pytest.fixture
def folder(tmp_path):
    """Write images in two folders, one of them hidden, and files that are no images."""
    for name in ("b.jpg", "a.PNG", "c.webp", "deep/d.jpg", "deep/.hidden/e.jpg", "._a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "notes.md").write_text("notes")
    (tmp_path / "folder.jpg").mkdir()
    return tmp_path


def names(source, folder, **options):
    return [frame.name.removeprefix(f"{folder}/") for frame in frames(source, **options)]


def test_files_folders_patterns_and_lists(folder, monkeypatch):
    here = ["a.PNG", "b.jpg", "c.webp"]
    assert names(folder, folder) == here == names(str(folder), folder)
    assert names(folder, folder, recursive=True) == [*here, "deep/d.jpg"]
    assert names(folder / "*.jpg", folder) == ["b.jpg"]
    assert names(folder / "**" / "*", folder) == [*here, "deep/d.jpg"]
    assert names([folder / "b.jpg", folder / "deep"], folder) == ["b.jpg", "deep/d.jpg"]
    assert names(folder / "no.jpg", folder) == ["no.jpg"]  # reading it will say that it is missing
    (folder / "list.txt").write_bytes(b"\xef\xbb\xbfdeep/d.jpg\r\n\r\n" + str(folder / "b.jpg").encode() + b"\n")
    monkeypatch.chdir("/")
    assert names(folder / "list.txt", folder) == ["deep/d.jpg", "b.jpg"]
    odd = folder / "[1]*.jpg"
    Image.new("RGB", (4, 4)).save(odd)
    assert names(odd, folder) == ["[1]*.jpg"]  # a file of this name is no pattern


@pytest.mark.parametrize(
    "source, message",
    [
        ("folder.jpg", "folder.jpg: no image in this folder .* recursive"),
        ("*.md", r"\*.md: no image matches this pattern \(1 other"),
        ("empty.txt", "empty.txt: the list of images is empty"),
        ("binary.txt", "binary.txt: the list of images is not UTF-8"),
        ("none.txt", "none.txt: cannot read the list of images"),
    ],
)
def test_nothing_there(folder, source, message):
    (folder / "empty.txt").write_text("\n\n")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=message):
        list(frames(folder / source))


def test_images_in_memory(folder):
    array, tensor = np.zeros((4, 5, 3), np.uint8), torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    mixed = [array, tensor, Image.open(folder / "b.jpg"), Frame("mine", array), (x for x in [array])]
    found = list(frames(mixed))
    assert [x.name for x in found] == ["image 0", "image 1", "image 2", str(folder / "b.jpg"), "mine", "image 5"]
    assert all(to_rgb(frame.image).shape[0] == 3 for frame in found)
    for wrong in (3, {"a": 1}, b"bytes", [None]):
        with pytest.raises(ValueError, match="an image must be a path, PIL image, uint8 array or tensor, not"):
            list(frames(wrong))
