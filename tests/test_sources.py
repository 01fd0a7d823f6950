"""What `predict` can be pointed at: files, folders, patterns, lists of paths, and images in memory."""

import io
import socket
import threading
import time
from urllib.request import Request

import numpy as np
import pytest
import torch
from PIL import Image
from test_weights import FileServer

from vovnet_zoo import predict, sources, web
from vovnet_zoo.sources import Frame, check_url, frames, to_rgb


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


def test_videos_in_a_folder_are_not_left_out_silently(folder, caplog):
    (folder / "deep" / "clip.MP4").write_bytes(b"")
    assert names(folder, folder) == ["a.PNG", "b.jpg", "c.webp"] and not caplog.records
    assert names(folder / "deep", folder) == ["deep/d.jpg"]
    assert [r.message for r in caplog.records] == [
        f"{folder / 'deep'}: 1 video is left out; name videos, or give a pattern: '{folder / 'deep'}/*'"
    ]
    (folder / "deep" / "d.jpg").unlink()
    with pytest.raises(ValueError, match="no image in this folder .* 1 video is left out"):
        names(folder / "deep", folder)


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


def test_a_name_that_is_too_long_is_an_image_that_cannot_be_read(folder, tiny_detector):
    bad = []
    found = predict(tiny_detector, ["x" * 300 + ".jpg", folder / "b.jpg"], on_error=lambda *x: bad.append(x))
    assert len(found) == 1 and "cannot read the image: File name too long" in str(bad[0][1])


def test_images_in_memory(folder):
    array, tensor = np.zeros((4, 5, 3), np.uint8), torch.zeros(2, 3, 4, 5, dtype=torch.uint8)
    mixed = [array, tensor, Image.open(folder / "b.jpg"), Frame("mine", array), (x for x in [array])]
    found = list(frames(mixed))
    assert [x.name for x in found] == ["image 0", "image 1", "image 2", str(folder / "b.jpg"), "mine", "image 5"]
    assert all(to_rgb(frame.image).shape[0] == 3 for frame in found)
    for wrong in (3, {"a": 1}, b"bytes", [None]):
        with pytest.raises(ValueError, match="an image must be a path, PIL image, uint8 array or tensor, not"):
            list(frames(wrong))


@pytest.fixture
def server():
    """Serve a PNG, a page, and an image file that ends too soon."""
    server, file = FileServer(), io.BytesIO()
    Image.new("RGB", (40, 30), (9, 8, 7)).save(file, "PNG")
    image = file.getvalue()
    server.files = {"/photo.png": image, "/page.html": b"<html>no image", "/half.png": image[: len(image) // 2]}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_addresses(server, tmp_path, tiny_detector):
    """Images come from a server, by a list too, if the user says so; nothing is asked of it otherwise."""
    url = f"{server.url}/photo.png?size=large"
    (tmp_path / "list.txt").write_text(f"{url}\nhere.png\n")
    Image.new("RGB", (40, 30)).save(tmp_path / "here.png")
    for source in (url, tmp_path / "list.txt", [url]):
        with pytest.raises(ValueError, match="photo.png.*: images come from a server only with urls=True"):
            list(frames(source))
    assert server.requests == 0
    found = list(frames(tmp_path / "list.txt", urls=True))
    assert [frame.name for frame in found] == [url, str(tmp_path / "here.png")] and server.requests == 0
    assert to_rgb(found[0].image()).tolist() == torch.tensor([9, 8, 7])[:, None, None].expand(3, 30, 40).tolist()
    assert [x.source for x in predict(tiny_detector, [url, url], urls=True)] == [url, url]


@pytest.mark.parametrize(
    ("path", "fault", "limits", "message"),
    [
        ("/nosuch.png", None, {}, "404"),
        ("/photo.png", "refuse", {}, "403"),
        ("/page.html", None, {}, "page.html: not an image"),
        ("/half.png", None, {}, "half.png: cannot decode"),
        ("/photo.png", "truncate", {}, "broke off"),
        ("/photo.png", None, dict(MAX_URL_BYTES=20), "more than 20"),
        ("/photo.png", "endless", dict(MAX_URL_BYTES=10_000), "goes on after 10000 bytes"),
        ("/photo.png", "endless", dict(MAX_URL_SECONDS=0.2), "not here after 0.2 seconds"),
        ("/photo.png", "ftp://127.0.0.1/photo.png", {}, "begins with http"),
        ("/photo.png", "file:///etc/passwd", {}, "not allowed|begins with http"),
    ],
)
def test_a_server_that_misbehaves(server, monkeypatch, tiny_detector, path, fault, limits, message):
    """The image is left out, and the next one is read."""
    server.faults[:] = [fault]
    for name, value in limits.items():
        monkeypatch.setattr(sources, name, value)
    with pytest.raises(ValueError, match=message) as error:
        predict(tiny_detector, server.url + path, urls=True)
    assert server.url in str(error.value) or fault in str(error.value)
    server.faults[:], errors = [fault], []
    images = [server.url + path, np.zeros((8, 8, 3), np.uint8)]
    found = predict(
        tiny_detector, images, urls=True, workers=0, on_error=lambda frame, error: errors.append(frame.name)
    )
    assert len(found) == 1 and errors == [server.url + path]


@pytest.mark.parametrize("faults", [["drip"], ["0.4 {url}"] * 4, ["0.7 {url}", "drip"]])
def test_the_limit_of_time_is_of_all_answers_together(server, monkeypatch, faults):
    """Neither headers that come one by one nor redirects make a transfer longer than its limit."""
    monkeypatch.setattr(sources, "MAX_URL_SECONDS", 1)
    url = f"{server.url}/photo.png"
    server.faults[:] = [fault.format(url=f"{url}?{i}") for i, fault in enumerate(faults)]
    begin = time.monotonic()
    with pytest.raises(ValueError, match="photo.png: it is not here after 1 seconds; nothing was kept"):
        sources.read_url(url)
    assert 0.9 < time.monotonic() - begin < 1.9
    server.faults[:] = [f"0.1 {url}"]
    assert sources.read_url(url).shape == (3, 30, 40)


def test_redirects_of_images(monkeypatch):
    """They lead neither to an unencrypted address from an encrypted one, nor to the machine itself."""
    known = {"trap.example": "127.0.0.1", "trap6.example": "::ffff:127.0.0.1", "link.example": "fe80::1%1"}
    known["localhost"] = "127.0.0.1"
    resolve = socket.getaddrinfo

    def look_up(host, port):
        """Ask no name server: names have the address that is meant here, and others that of a public server."""
        try:
            return resolve(host, port, flags=socket.AI_NUMERICHOST)  # which knows "127.1" too
        except OSError:
            return resolve(known.get(host, "93.184.215.14"), port, flags=socket.AI_NUMERICHOST)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    redirects = web.Redirects(check_url)
    for start, target, message in [
        ("https://example.com/a.png", "http://example.com/a.png", "not https"),
        ("http://example.com/a.png", "http://localhost/a.png", "on this machine itself"),
        ("http://example.com/a.png", "https://127.0.0.1/a.png", "on this machine itself"),
        ("http://example.com/a.png", "http://0.0.0.0/a.png", "on this machine itself"),
        ("http://example.com/a.png", "http://127.1:80/a.png", "on this machine itself"),
        ("http://example.com/a.png", "http://2130706433/a.png", "on this machine itself"),
        ("http://example.com/a.png", "http://[::]/a.png", "on this machine itself"),
        ("http://example.com/a.png", "http://[::ffff:7f00:1]/a.png", "on this machine itself"),
        ("http://example.com/a.png", "http://169.254.169.254/a.png", "on this machine itself"),
        ("http://example.com/a.png", "http://trap.example/a.png", "on this machine itself"),
        ("http://trap.example/a.png", "http://trap6.example/a.png", "on this machine itself"),
        ("http://example.com/a.png", "http://link.example/a.png", "on this machine itself"),
        ("http://127.0.0.1/a.png", "http://localhost/b.png", None),
        ("http://example.com/a.png", "https:///a.png", "begins with http"),
        ("http://example.com/a.png", "https://example.com/b.png", None),
        ("http://example.com/a.png", "http://example.org/b.png", None),
    ]:
        call = redirects.redirect_request, (Request(start), None, 302, "", {}, target)
        if message is None:
            assert call[0](*call[1]).full_url == target
        else:
            with pytest.raises(ValueError, match=message):
                call[0](*call[1])
