"""The page to try a detector in works in a browser, and is what a Space serves."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from browsing import open_page
from hub_server import TOKEN
from launch import ROOT
from samples import RGB

import vovnet_zoo
from vovnet_zoo import demo, hub, publish, space
from vovnet_zoo.files import read_json
from vovnet_zoo.predict_files import as_lists
from vovnet_zoo.results import ImageDetections


@pytest.fixture(scope="module")
def served(detector_folder):
    """Serve the page of a detector, as a user does; yields its address."""
    pytest.importorskip("gradio", reason="needs the package gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "vovnet_zoo.cli", "demo", str(detector_folder), "--port", str(port)]
    process = subprocess.Popen(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=ROOT)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def test_page_in_a_browser(served, browser, detector_folder, tmp_path):
    """Upload a photo: boxes appear, the threshold of a class changes them, and so do tiles."""
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    RGB.resize((160, 120)).save(tmp_path / "photo.png")
    model = vovnet_zoo.FCOS.from_pretrained(detector_folder)
    open_page(browser, served, 1400)

    def wait(condition):
        return WebDriverWait(browser, 30).until(condition)

    def all_of(selector):
        return browser.find_elements("css selector", selector)

    def found():
        """The content of the JSON that can be downloaded; None where there is no link."""
        links = all_of("#json")
        data = links[0].get_attribute("href").removeprefix("data:application/json;base64,") if links else None
        return json.loads(base64.b64decode(data)) if data else None

    def pictures():
        return [source for x in all_of("img") if "/file=" in (source := str(x.get_attribute("src")))]

    def same(least):
        """Say whether the page shows what `predict` finds."""
        (expected,) = vovnet_zoo.predict(model, tmp_path / "photo.png", score_threshold=least)
        content = found() or {}
        return {key: content.get(key) for key in ("boxes", "scores", "labels", "names")} == as_lists(expected)

    wait(lambda _: all_of("input[type=file]"))
    assert found() is None
    all_of("input[type=file]")[0].send_keys(str(tmp_path / "photo.png"))
    wait(lambda _: same({"cat": 0.3, "dog": 0.3}))
    assert found()["thresholds"] == {"cat": 0.3, "dog": 0.3} and (found()["width"], found()["height"]) == (160, 120)
    wait(lambda _: [x for x in all_of("img[alt]") if x.is_displayed()] and all_of("#summary")[0].text)
    picture = wait(lambda _: pictures())
    summary = all_of("#summary")[0].text
    assert f"{len(found()['labels'])} detections above" in summary and "160 x 120 pixels; detected in" in summary

    # A threshold between the scores of the cats hides some of them.
    cats = sorted(s for s, name in zip(found()["scores"], found()["names"], strict=True) if name == "cat")
    least = round(cats[len(cats) // 2], 2)
    number = all_of("input[type=number][aria-label*=cat]")[0]
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys(str(least))
    number.send_keys(Keys.ENTER)
    wait(lambda _: same({"cat": least, "dog": 0.3}))
    kept = [name for name in found()["names"] if name == "cat"]
    assert 0 < len(kept) < len(cats)
    wait(lambda _: all_of("#summary")[0].text != summary)
    wait(
        lambda _: picture != [x.get_attribute("src") for x in all_of("img") if "/file=" in str(x.get_attribute("src"))]
    )

    # Tiles change what is found, and the threshold stays.
    all_of("input[type=checkbox]")[0].click()
    (whole,) = vovnet_zoo.predict(model, tmp_path / "photo.png", score_threshold=0.0, tiles=64)
    kept = whole["scores"] >= torch.tensor([least, 0.3])[whole["labels"]]
    wait(lambda _: found()["boxes"] == whole["boxes"][kept].tolist())

    # The slider of all classes moves the others.
    number = all_of("#every input[type=number]")[0]
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("0.95")
    number.send_keys(Keys.ENTER)
    wait(lambda _: (found() or {}).get("thresholds") == {"cat": 0.95, "dog": 0.95})

    # What is no image is told in words, without the place where the server keeps it, and the sliders stay.
    (tmp_path / "text.jpg").write_text("no image")
    wait(lambda _: all_of("button[aria-label='Remove Image']"))[0].click()
    wait(lambda _: all_of("input[type=file]"))[0].send_keys(str(tmp_path / "text.jpg"))
    said = wait(lambda _: [x.text for x in all_of(".toast-body") if "not an image" in x.text])[0]
    assert "text.jpg: not an image of a known format" in said and "/" not in said
    assert len(all_of("input[type=range]")) == 3 and not [x for x in all_of(".error") if x.is_displayed()]
    assert found() is None
    for width in (400, 1400):
        size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []


def test_what_is_shown(tiny_detector):
    """Without a browser: thresholds, the limit of detections, names with letters of HTML, sliders of many classes."""
    assert demo.title("runs/quickstart/best") == "quickstart/best" and demo.title("organisation/name") == "name"
    assert demo.first_thresholds(tiny_detector) == [0.3, 0.3]
    own = vovnet_zoo.create_detector("fcos", backbone="test_resnet", num_classes=2, class_names=["<b>", "dog"],
                                     channels=64, num_convs=0, thresholds={"dog": 0.4567})  # fmt: skip
    assert demo.first_thresholds(own) == [0.0, 0.457] and demo.class_names(own) == ["<b>", "dog"]
    boxes = torch.tensor([[0.0, 0, 9, 9], [5, 5, 20, 20], [1, 1, 30, 30], [2, 2, 8, 8]])
    tensors = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.5, 0.05]), "labels": torch.tensor([1, 0, 1, 0])}
    found = demo.Found(torch.zeros(3, 40, 50, dtype=torch.uint8), ImageDetections(tensors, "x", (40, 50)), 2, 0.5)
    picture, summary, link = demo.show(found, (0.85, 0.2), ["<b>", "dog"], "model")
    content = json.loads(base64.b64decode(link.split("base64,")[1].split('"')[0]))
    assert content["scores"] == pytest.approx([0.9, 0.5]) and content["labels"] == [1, 1] and picture.width > 50
    assert "2 detections" in summary and "2 dog" in summary and "50 x 40 pixels; detected in 0.50 s" in summary
    assert "1 &lt;b&gt;" in demo.show(found, (0.0, 0.2), ["<b>", "dog"], "model")[1]  # the limit is 2
    assert demo.show(None, (0.5, 0.5), ["a", "b"], "model") == (None, "", "")
    assert demo.seen(found, 2) == [True, True] and demo.seen(None, 11) == [False] * 11
    found.detections["scores"][1] = 0.05
    assert demo.seen(found, 11) == [False, True] + [False] * 9


def test_an_upload_is_one_image_whatever_its_name(tiny_detector, tmp_path):
    """A list of paths opens none of the server's files, and a video is not decoded; messages name the upload alone."""
    RGB.resize((50, 40)).save(tmp_path / "secret.png")
    (tmp_path / "list.txt").write_text(f"{tmp_path / 'secret.png'}\n")
    (tmp_path / "nosuch.txt").write_text(f"{tmp_path / 'nosuch.png'}\n")
    (tmp_path / "clip.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    whole = (tmp_path / "secret.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "0").write_text("no camera")
    for name in ("list.txt", "nosuch.txt", "clip.mp4", "half.png", "0"):
        with pytest.raises(ValueError, match=f"^{name}: (not an image|cannot decode)") as error:
            demo.detect(tiny_detector, str(tmp_path / name), None)
        assert "/" not in str(error.value) and "secret" not in str(error.value)
    found = demo.detect(tiny_detector, str(tmp_path / "secret.png"), 64)
    assert found.pixels.shape == (3, 40, 50) and found.detections.source == "secret.png"
    (tmp_path / "secret.png").rename(tmp_path / "photo.txt")
    assert torch.equal(demo.detect(tiny_detector, str(tmp_path / "photo.txt"), None).pixels, found.pixels)


def test_missing_package_is_one_line(run, detector_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    status, out, err = run("demo", detector_folder)
    assert (status, out) == (2, "") and err == "vovnet-zoo: the page needs gradio: pip install 'vovnet_zoo[demo]'\n"


def test_command_refuses_in_one_line(run, detector_folder):
    assert "--port 0: give a number" in run("demo", detector_folder, "--port", "0")[2]
    assert "nosuch' is no folder here" in run("demo", "nosuch")[2]
    pytest.importorskip("gradio", reason="needs the package gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, _, err = run("demo", detector_folder, "--port", taken.getsockname()[1])
        assert status == 2 and "port" in err and err.count("\n") == 1, err


def test_published_space_works_where_it_lies(run, detector_folder, hub_on_loopback, monkeypatch):
    """A Space has all it needs: the folder that is pushed detects objects without this checkout."""
    gradio = pytest.importorskip("gradio", reason="needs the package gradio")
    started, real = [], subprocess.run

    def record(*args, **options):
        started.append(real(*args, **options))
        started[-1].folder = options["cwd"]
        return started[-1]

    monkeypatch.setattr(space.subprocess, "run", record)
    status, out, err = run("publish", detector_folder, "me/cats", "--token", TOKEN, "--space", "--license", "mit")
    assert status == 0 and len(out.split()) == 2 and "/spaces/me/cats/commit/" in out.split()[1], err
    assert set(hub_on_loopback.repos) == {"me/cats", "spaces/me/cats"}
    _, files, lfs = hub_on_loopback.repos["spaces/me/cats"].files("main")
    assert lfs == {hub.WEIGHTS} and not any("__pycache__" in name for name in files)
    assert files["app.py"] == (ROOT / "vovnet_zoo" / "demo.py").read_bytes()
    assert {name for name in files if "/" not in name} == {
        "app.py",
        "requirements.txt",
        hub.CONFIG,
        hub.WEIGHTS,
        hub.CARD,
    }
    needed = files["requirements.txt"].decode().split()
    assert "numpy" in {line.split("==")[0] for line in needed} and all("==" in line for line in needed)
    card = files[hub.CARD].decode()
    for line in ("sdk: gradio", f"sdk_version: {gradio.__version__}", "app_file: app.py", "license: mit", "- me/cats"):
        assert line in card
    # what was pushed was started where it lay, with its own files only
    (result,) = started
    assert "2 classes" in result.stdout and f"the code is in {result.folder}" in result.stdout


def test_a_space_that_does_not_start_is_not_pushed(run, detector_folder, hub_on_loopback, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="needs the package gradio")
    monkeypatch.setattr(space.sys, "executable", "false")
    status, _, err = run("publish", detector_folder, "me/cats", "--token", TOKEN, "--space")
    assert status == 2 and "does not start; nothing was pushed" in err and not hub_on_loopback.repos


def test_a_space_is_of_a_detector(tmp_path, hub_on_loopback):
    (tmp_path / hub.CONFIG).write_text('{"architecture": "vovnet39a"}')
    with pytest.raises(ValueError, match="and this is a backbone"):
        publish.write_space(tmp_path / "space", tmp_path, "me/cats")
    assert read_json(tmp_path / hub.CONFIG) and not (tmp_path / "space").exists()
