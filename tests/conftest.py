import copy
import json
import multiprocessing
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # one core per test process, so that they do not wait for each other

import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from browsing import start_browser  # noqa: E402
from hub_server import HubServer, serve  # noqa: E402
from huggingface_hub import constants  # noqa: E402
from PIL import Image  # noqa: E402
from samples import RGB  # noqa: E402

import vovnet_zoo.cli  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Find the folder of photos and published numbers, which is not part of a public clone."""
    return _shared(".")


@pytest.fixture(scope="session")
def bccd() -> Path:
    """Find photos of blood cells, with 3 classes, which are not part of a public clone."""
    return _shared("data/bccd")


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """Find 128 photos each of COCO train2017 and val2017, which are not part of a public clone."""
    return _shared("data/coco-mini")


def _shared(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"needs the shared data folder, {name}")
    return SHARED / name


@pytest.fixture(scope="session")
def browser():
    """Start a headless browser."""
    yield from start_browser()


@pytest.fixture
def start_method():
    """Set how Python starts processes: "fork" or "spawn"; None leaves it."""
    before = multiprocessing.get_start_method(allow_none=True)
    yield lambda method: method and multiprocessing.set_start_method(method, force=True)
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture
def forked(start_method):
    """Worker processes find what a test has replaced. From Python 3.14 on, and on macOS, forking is not the default."""
    start_method("fork")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `vovnet-zoo ARGS` and return (exit status, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["vovnet-zoo", *map(str, args)])
        status = 0
        try:
            vovnet_zoo.cli.main()
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def tiny_coco(tmp_path) -> Path:
    """Write a dataset of 8 training and 3 validation images of several sizes, with bright rectangles of two classes."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 3)):
        (tmp_path / split).mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(count):
            width, height = 64 + 16 * (i % 3), 64
            pixels = torch.randint(0, 60, (height, width, 3), dtype=torch.uint8, generator=generator)
            for label in range(0 if i == 1 else 2):  # the second image is without boxes
                x, y = 4 + 30 * label, 6 + 5 * i % 20
                pixels[y : y + 24, x : x + 20, label] = 255
                box = {"bbox": [x, y, 20, 24], "area": 480, "iscrowd": 0}
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": 10 + i, "category_id": 7 + 5 * label, **box}
                )
            Image.fromarray(pixels.numpy()).save(tmp_path / split / f"{i}.png")
            images.append({"id": 10 + i, "file_name": f"{i}.png", "width": width, "height": height})
        categories = [{"id": 7, "name": "red"}, {"id": 12, "name": "green"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def write_coco(tmp_path):
    """Write images 1.png, 2.png, ... and a COCO JSON, and return the arguments of CocoDataset."""
    for i in range(1, 8):
        RGB.save(tmp_path / f"{i}.png")

    def write(coco):
        file = tmp_path / "instances.json"
        file.write_text(coco if isinstance(coco, str) else json.dumps(coco))
        return tmp_path, file

    return write


@pytest.fixture(scope="session")
def tiny_detector() -> vovnet_zoo.FCOS:
    """Build a small detector of cats and dogs with random weights; no test may change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return vovnet_zoo.create_detector(
            "fcos_vovnet27_slim_fpn", num_classes=2, class_names=["cat", "dog"], channels=64, num_convs=1, min_size=64
        ).eval()


@pytest.fixture(scope="session")
def detector_folder(tiny_detector, tmp_path_factory) -> Path:
    """Save a detector that sees a cat or a dog everywhere; no test may change the folder."""
    model = copy.deepcopy(tiny_detector)
    torch.nn.init.constant_(model.head.cls_logits.bias, 2.0)
    torch.nn.init.constant_(model.head.centerness.bias, 2.0)
    torch.nn.init.constant_(model.head.box_distances.bias, 1.0)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def hub_on_loopback(monkeypatch, tmp_path):
    """Run a server that stands for the Hub, for clients in this process and in subprocesses."""
    with serve(HubServer()) as server:
        environment = {
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        for key in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(key, raising=False)
        # huggingface_hub has read these when it was imported
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, huggingface_hub.file_download):  # the latter before huggingface_hub 1.0
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        yield server
