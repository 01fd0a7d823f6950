"""Weights come from a URL, past faulty downloads and hostile files."""

import contextlib
import dataclasses
import hashlib
import http.server
import io
import pickle
import random
import socket
import sys
import threading
import time
import urllib.error
import zipfile
from pathlib import Path
from urllib.request import Request

import pytest
import pytorchcv.models.vovnet
import timm
import torch
from checkpoints import same
from near import assert_near, sum_roundings
from torchvision_models import make_torchvision

import vovnet_zoo
from build import load_start
from presets import TrainConfig
from vovnet_zoo import detectors, hub, publish, vovnet, web
from vovnet_zoo import weights as published
from vovnet_zoo.files import hash_file
from vovnet_zoo.weights import Weights


class FileServer(http.server.ThreadingHTTPServer):
    """This server sends `files`, a map of paths to contents; each of `faults` spoils one answer.

    A fault is "truncate", "refuse", "corrupt", "endless", "drip" (a header every fifth of a second, without end), or an
    address to redirect to, after a pause of so many seconds as stand before a space.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FileHandler)
        self.url, self.files, self.faults, self.requests = f"http://127.0.0.1:{self.server_port}", {}, [], 0


class FileHandler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        content = self.server.files.get(self.path.partition("?")[0])
        fault = self.server.faults.pop(0) if self.server.faults else None
        if content is None or fault == "refuse":
            return self.send_error(404 if content is None else 403)
        if fault and "://" in fault:
            pause, _, address = fault.rpartition(" ")
            time.sleep(float(pause or 0))
            self.send_response(302)
            self.send_header("Location", address)
            return self.end_headers()
        self.send_response(200)
        if fault == "drip":
            with contextlib.suppress(OSError):
                for number in range(90):
                    self.send_header(f"X-{number}", "1")
                    self.flush_headers()
                    time.sleep(0.2)
            return
        if fault == "endless":
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(content[:1000])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "corrupt":
            content = (
                content[: len(content) // 2]
                + bytes([content[len(content) // 2] ^ 1])
                + content[len(content) // 2 + 1 :]
            )
        self.wfile.write(content[: len(content) // 2] if fault == "truncate" else content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv(published.ORGANISATION_VARIABLE, raising=False)
    server = FileServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(tmp_path):
    return lambda: [path.name for path in tmp_path.glob("torch/hub/checkpoints/*")]


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def drawn(net):
    """Draw the weights of norms as after some training, so that a slip in their order shows."""
    torch.manual_seed(0)
    for name, x in [*net.named_parameters(), *net.named_buffers()]:
        if "running_var" in name or ("bn" in name and "weight" in name):
            torch.nn.init.uniform_(x, 0.5, 1.5)
        elif x.ndim == 1:
            torch.nn.init.normal_(x, std=0.1)
    return net.eval()


# ---- the table


def test_default_tag_is_one_that_can_be_had():
    for name in ("vovnet27_slim", "vovnet39", "vovnet57"):
        assert timm.get_pretrained_cfg(name).tag == "pytorchcv_in1k" and timm.is_model_pretrained(name)
    for name in ("vovnet75", "vovnet93"):
        assert not timm.is_model_pretrained(name)


# ---- downloads


@pytest.mark.parametrize("name, theirs", [("vovnet27_slim", "vovnet27s"), ("vovnet39", "vovnet39")])
def test_pytorchcv_zip_through_timm(server, name, theirs):
    """A zip as upstream makes it gives the same logits, loads as features, and with another number of classes."""
    net = drawn(getattr(pytorchcv.models.vovnet, theirs)())
    server.files["/w-0564-63bfa613.pth.zip"] = zipped(**{"w-0564-63bfa613.pth": saved(net.state_dict())})
    overlay = dict(url=f"{server.url}/w-0564-63bfa613.pth.zip")
    ours = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(1, 3, 224, 224)  # pytorchcv's classifier takes no other size
    with torch.inference_mode():
        expected, found = net(x), ours(x)
    assert_near(found, expected, sum_roundings(ours))
    timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    features = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(features(x)[-1], ours.forward_features(x))
    assert server.requests == 1  # then from the cache


@pytest.fixture
def slim(monkeypatch, server):
    """Put a row with a known sha1 into the table, for a zip on the server."""
    content = saved(timm.create_model("vovnet27_slim").state_dict())
    server.files["/slim.pth.zip"] = zipped(**{"slim.pth": content})
    (path := Path(torch.hub.get_dir()) / "x").parent.mkdir(parents=True)
    path.write_bytes(content)
    row = Weights("url", f"{server.url}/slim.pth.zip", hash_file(path, "sha1"))
    monkeypatch.setitem(vovnet.WEIGHTS, "vovnet27_slim.pytorchcv_in1k", row)
    return row


def load_slim():
    url = vovnet.WEIGHTS["vovnet27_slim.pytorchcv_in1k"].url
    return timm.create_model("vovnet27_slim", pretrained=True, pretrained_cfg_overlay=dict(url=url))


def test_table_row(slim, server):
    load_slim()
    load_slim()
    assert server.requests == 1
    with pytest.raises(ValueError, match="expected " + "0" * 40):
        published.fetch(slim.url, "0" * 40)


@pytest.mark.parametrize(
    "fault, error, message",
    [("truncate", OSError, "broke off"), ("refuse", OSError, "403"), ("corrupt", ValueError, "slim.pth.zip")],
)
def test_faulty_download(slim, server, cache, fault, error, message):
    server.faults = [fault]
    with pytest.raises(error, match=message):
        load_slim()
    assert not cache()
    load_slim()
    assert len(cache()) == 1


def test_wrong_hash(slim, server, cache):
    good = server.files["/slim.pth.zip"]
    server.files["/slim.pth.zip"] = zipped(**{"slim.pth": saved(timm.create_model("vovnet27_slim").state_dict())})
    with pytest.raises(ValueError, match="sha1"):
        load_slim()
    assert not cache()
    server.files["/slim.pth.zip"] = good
    load_slim()


def test_server_not_there(slim, server, cache, monkeypatch):
    monkeypatch.setattr(
        published, "urlopen", lambda *args, **kwargs: (_ for _ in ()).throw(urllib.error.URLError("refused"))
    )
    with pytest.raises(ConnectionError, match="slim.pth.zip.*refused"):
        load_slim()
    assert not cache()


@pytest.mark.parametrize("url", ["http://example.com/w.pth", "ftp://127.0.0.1/w.pth", "file:///etc/passwd", "w.pth"])
def test_weights_come_through_https_only(slim, server, cache, url, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="https:// only"):
        patch.setattr(socket, "create_connection", lambda *args, **options: pytest.fail("connected"))
        published.fetch(url)
    server.faults[:] = [url]
    if "://" in url:
        with pytest.raises((ValueError, ConnectionError), match="https:// only|Redirection to url 'file"):
            published.fetch(f"{server.url}/slim.pth.zip")
    assert not cache()


def test_a_cache_that_cannot_be_written_is_named(slim, tmp_path, monkeypatch):
    """A user without a home gets no folder that is called "~"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))
    with pytest.raises(OSError, match="file/hub/checkpoints: weights cannot be downloaded .*TORCH_HOME.*cache_dir="):
        load_slim()
    with pytest.raises(OSError, match=r"file/x: weights cannot be downloaded to this folder \(Not a directory\)"):
        published.fetch(slim.url, cache_dir=tmp_path / "file" / "x")
    monkeypatch.setenv("TORCH_HOME", "~nosuchuser/torch")
    with pytest.raises(OSError, match=r"~nosuchuser/torch/hub/checkpoints: .*\(this user has no home folder\)"):
        load_slim()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "closed"))
    (tmp_path / "closed" / "hub" / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(published.os, "access", lambda *_: False)
    with pytest.raises(OSError, match=r"closed/hub/checkpoints: .*\(Permission denied\)"):
        load_slim()
    assert not list(tmp_path.glob("~*"))


def test_a_redirect_leads_to_no_server_of_ones_own(monkeypatch):
    """A public server cannot send the client to a server on its own machine."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [(0, 0, 0, "", ("93.184.215.14", 0))])
    redirects = web.Redirects(published.check_url)
    ask = Request("https://example.com/w.pth")
    with pytest.raises(ValueError, match="not https"):
        redirects.redirect_request(ask, None, 302, "", {}, "http://127.0.0.1/w.pth")
    assert (
        redirects.redirect_request(ask, None, 302, "", {}, "https://example.org/w").full_url == "https://example.org/w"
    )


@pytest.mark.parametrize(
    "limits, fault, message",
    [
        (dict(MAX_BYTES=1000), None, "more than 1000"),
        (dict(MAX_BYTES=10**6), "endless", "goes on after 1000000 bytes"),
        (dict(MAX_SECONDS=0.1), "endless", "not here after 0.1 seconds"),
    ],
)
def test_a_download_has_limits(slim, server, cache, monkeypatch, limits, fault, message):
    for name, value in limits.items():
        monkeypatch.setattr(published, name, value)
    server.faults[:] = [fault]
    with pytest.raises(ConnectionError, match=message):
        load_slim()
    assert not cache()


@pytest.mark.parametrize("kind", ["zip", "pth"])
def test_a_small_file_unpacks_to_no_large_one(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(published, "MAX_FREE_BYTES", 1 << 20)
    content = saved({"a": torch.zeros(1 << 20)})
    if kind == "pth":  # torch reads compressed parts too, although it writes none
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            content = zipped(**{name: archive.read(name) for name in archive.namelist()})
    else:
        content = zipped(**{"w.pth": content})
    (tmp_path / "w.pth").write_bytes(content)
    assert len(content) < 1 << 16
    with pytest.raises(ValueError, match=r"w.pth: its \d+ bytes would unpack to 41"):
        published.read_checkpoint(tmp_path / "w.pth")
    monkeypatch.setattr(published, "MAX_FREE_BYTES", 1 << 23)
    assert published.read_checkpoint(tmp_path / "w.pth")["a"].shape == (1 << 20,)


def test_damage_in_the_cache_is_downloaded_again(slim, server, tmp_path, cache):
    load_slim()
    (name,) = cache()
    path = tmp_path / "torch" / "hub" / "checkpoints" / name
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:5000] + b"x" + whole[5001:], b""):
        path.write_bytes(damaged)
        load_slim()
        assert path.read_bytes() == whole
    assert server.requests == 4


def test_detector_at_a_url(server, monkeypatch):
    """A detector is found by its full name, and converted."""
    sys.path.insert(0, str(Path(__file__).parent / "golden"))
    from deterministic_weights import load_table, state_dict_from_table

    published = state_dict_from_table(load_table(Path(__file__).parent / "golden" / "keys_fcos_v27.json"))
    server.files["/d.pth"] = saved({"model": {f"module.{key}": x for key, x in published.items()}})
    key = "fcos_vovnet27_slim_fpn.fcos_1x_coco"
    monkeypatch.setitem(detectors.WEIGHTS, key, Weights("gone", f"{server.url}/d.pth?dl=1"))
    with pytest.raises(ValueError, match=f"can be had .{key}: reported gone, and still tried"):
        vovnet_zoo.create_detector("fcos_vovnet27_slim_fpn", pretrained=True)
    for fault, error in (("refuse", ConnectionError), ("truncate", ConnectionError)):
        server.faults = [fault]
        with pytest.raises(error, match=f"^{key}: http.*d.pth.* convert a checkpoint .*train a preset") as found:
            vovnet_zoo.create_detector(key, pretrained=True)
        assert len(str(found.value).splitlines()) == 1
    model = vovnet_zoo.create_detector(key, pretrained=True)
    assert model.config["centerness_on"] == "cls" and model.config["class_names"][0] == "person"
    with pytest.raises(ValueError, match="distance='exp', not 'relu'"):
        vovnet_zoo.create_detector(key, pretrained=True, variant="improved")


@pytest.fixture(scope="module")
def torchvision_file():
    return saved(make_torchvision(trained=False).state_dict())


@pytest.fixture
def resnet(monkeypatch, server, torchvision_file):
    """Put a file of torchvision's FCOS on the server, and its hash into the table."""
    server.files["/fcos.pth"] = torchvision_file
    key = "fcos_resnet50_fpn.tv_coco"
    row = dataclasses.replace(
        detectors.WEIGHTS[key], url=f"{server.url}/fcos.pth", sha256=hashlib.sha256(torchvision_file).hexdigest()
    )
    monkeypatch.setitem(detectors.WEIGHTS, key, row)


def test_torchvisions_detector_at_a_url(resnet, server, cache, tmp_path):
    """It is downloaded, checked, converted and kept; the name without its tag is enough."""
    assert "fcos_resnet50_fpn.tv_coco" in vovnet_zoo.list_detectors(pretrained=True)
    assert vovnet_zoo.list_detectors("*resnet50*", pretrained=True) == ["fcos_resnet50_fpn.tv_coco"]
    assert vovnet_zoo.list_detectors("*_resnet*") == ["fcos_resnet101_fpn", "fcos_resnet50_fpn"]
    model = vovnet_zoo.create_detector("fcos_resnet50_fpn", pretrained=True)
    again = detectors.load_detector("fcos_resnet50_fpn.tv_coco", map_location="cpu", token=None)
    with pytest.raises(ValueError, match="a name in the table of weights, for which there is no revision; leave it"):
        detectors.load_detector("fcos_resnet50_fpn.tv_coco", revision="v2")
    assert same(model, again) and server.requests == 1 and len(cache()) == 1
    assert model.config["resize"] == "torchvision" and model.config["class_names"][79] == "toothbrush"
    config = TrainConfig(data=tmp_path, out=tmp_path, init="fcos_resnet50_fpn.tv_coco")
    assert same(load_start(config), model)
    with pytest.raises(ValueError, match="trained with num_classes=80, not 3; .*reset_classifier"):
        vovnet_zoo.create_detector("fcos_resnet50_fpn", pretrained=True, num_classes=3)
    publish.convert_file(next((tmp_path / "torch/hub/checkpoints").iterdir()), tmp_path / "out")
    card = (tmp_path / "out" / hub.CARD).read_text()
    assert "license: bsd-3-clause" in card and "fcos_resnet50_fpn.tv_coco" in card and "AP 39.2" in card


@pytest.mark.parametrize(
    "fault, error, message",
    [
        ("truncate", ConnectionError, "broke off after"),
        ("refuse", ConnectionError, "403"),
        ("corrupt", ValueError, "the checkpoint's sha256 is"),
        ("another file", ValueError, "the checkpoint's sha256 is"),
        ("not there", ConnectionError, "404"),
    ],
)
def test_a_faulty_download_of_torchvisions_detector(resnet, server, cache, torchvision_file, fault, error, message):
    """Nothing is kept, and one line says what was wrong and how the weights can be had otherwise."""
    if fault == "another file":
        server.files["/fcos.pth"] = saved({"model": {}})
    elif fault == "not there":
        server.files.clear()
    else:
        server.faults = [fault]
    with pytest.raises(error, match=message) as caught:
        vovnet_zoo.create_detector("fcos_resnet50_fpn", pretrained=True)
    assert "\n" not in str(caught.value) and "vovnet-zoo convert FILE.pth FOLDER" in str(caught.value)
    assert not cache()
    server.files["/fcos.pth"] = torchvision_file
    vovnet_zoo.create_detector("fcos_resnet50_fpn", pretrained=True)
    assert len(cache()) == 1


# ---- hostile files


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("old_format", [False, True])
def test_pickle_that_wants_code_is_refused(server, tmp_path, cache, old_format):
    state_dict = {**timm.create_model("vovnet27_slim").state_dict(), "x": Evil(str(tmp_path / "ran"))}
    content = saved(state_dict, _use_new_zipfile_serialization=not old_format)
    (tmp_path / "evil.pth").write_bytes(content)
    server.files["/evil.pth"], server.files["/evil.zip"] = content, zipped(**{"evil.pth": content})
    for load in (
        lambda: published.read_checkpoint(tmp_path / "evil.pth"),
        lambda: publish.convert_file(tmp_path / "evil.pth", tmp_path / "out"),
        lambda: timm.create_model(
            "vovnet27_slim", pretrained=True, pretrained_cfg_overlay=dict(url=f"{server.url}/evil.pth")
        ),
        lambda: timm.create_model(
            "vovnet27_slim", pretrained=True, pretrained_cfg_overlay=dict(url=f"{server.url}/evil.zip")
        ),
    ):
        with pytest.raises(ValueError, match="would run (io|_io|builtins|__builtin__).open, which is refused"):
            load()
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists() and not cache()


def test_plain_pickle_that_wants_code_is_refused(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"x": Evil(str(tmp_path / "ran"))}))
    with pytest.raises(ValueError, match="evil.pth"):
        published.read_checkpoint(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


MISTAKEN = {
    "web page": (b"<!DOCTYPE html><html><title>Sign in</title></html>", "it is a web page"),
    "web page with spaces": (b"\n\n <html lang=en>" + bytes(9), "it is a web page"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
    "empty": (b"", "it is empty"),
    "start of an old checkpoint": (
        saved({"a": torch.zeros(9)}, _use_new_zipfile_serialization=False)[:40],
        "it is damaged",
    ),
    "text": (b"key: value\n" * 9, "torch.save did not write it"),
    "whole model": (saved(torch.nn.Linear(1, 1)), "would run torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("name", MISTAKEN)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_message_for_a_mistaken_file(tmp_path, name, suffix):
    """It says what the file is, and never relays torch's advice to run the code in it."""
    content, reason = MISTAKEN[name]
    (tmp_path / f"w.{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"w.{suffix}") as error:
        published.read_checkpoint(tmp_path / f"w.{suffix}")
    message = str(error.value)
    assert reason in message or (
        suffix == "safetensors" and name in ("start of an old checkpoint", "text", "whole model")
    )
    assert "weights_only" not in message and "PyTorch 2.6" not in message and len(message.splitlines()) == 1


@pytest.mark.parametrize("name", ["../w.pth", "/tmp/w.pth", "a/w.pth", "..\\w.pth", "C:w.pth", ".."])
def test_path_in_a_zip_is_refused(server, tmp_path, cache, name):
    content = zipped(**{name: saved({"a": torch.zeros(1)})})
    server.files["/w.zip"] = content
    with pytest.raises(ValueError, match="refused"):
        published.fetch(f"{server.url}/w.zip")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "w.zip").write_bytes(content)
    with pytest.raises(ValueError, match="refused"):
        published.read_checkpoint(tmp_path / "inner" / "w.zip")
    assert not cache() and [path.name for path in (tmp_path / "inner").iterdir()] == ["w.zip"]
    assert not (tmp_path / "w.pth").exists() and not Path("/tmp/w.pth").exists()


def test_a_zip_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "w.zip").write_bytes(zipped(**{"w.pth": saved({"a": torch.zeros(1)})}))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(published.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.setattr(published.os, "access", lambda path, mode: Path(path) != tmp_path)
    with published.unwrapped(tmp_path / "w.zip", "w.zip") as file:
        assert file.is_relative_to(tmp_path / "temporary")
    assert published.read_checkpoint(tmp_path / "w.zip")["a"].tolist() == [0]


def test_link_and_several_files_in_a_zip_are_refused(tmp_path):
    info = zipfile.ZipInfo("w.pth")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(ValueError, match="link"):
        published.read_checkpoint(tmp_path / "link.zip")
    (tmp_path / "two.zip").write_bytes(zipped(a=b"1", b=b"2"))
    with pytest.raises(ValueError, match="a zip of 2 files"):
        published.read_checkpoint(tmp_path / "two.zip")


@pytest.fixture(scope="module")
def tiny():
    """Build a very small detector, and take its weights."""
    model = vovnet_zoo.create_detector("fcos_vovnet27_slim_fpn", num_classes=1, channels=64, num_convs=1)
    weights = {name: x for name, x in model.state_dict().items()}
    return model, weights


def mutations(content, seed, count):
    """Yield copies of the content that are cut, overwritten or lengthened, or have a bit flipped."""
    draw = random.Random(seed)
    for _ in range(count):
        data, kind = bytearray(content), draw.choice(["cut", "flip", "flip", "header", "zero", "more"])
        at = draw.randrange(len(data))
        if kind == "cut":
            del data[at:]
        elif kind == "flip":
            data[at] ^= 1 << draw.randrange(8)
        elif kind == "header":
            data[draw.randrange(min(4000, len(data)))] ^= 1 << draw.randrange(8)
        elif kind == "zero":
            data[at : at + 64] = bytes(len(data[at : at + 64]))
        else:
            data += draw.randbytes(draw.randrange(1, 300))
        yield kind, bytes(data)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("form", ["folder", "pth", "zip"])
def test_fuzz(tiny, tmp_path, form):
    """A damaged file is refused, or holds what was saved; it never loads otherwise, and never runs code."""
    model, weights = tiny
    if form == "folder":
        model.save_pretrained(tmp_path)
        file, load = tmp_path / hub.WEIGHTS, lambda: vovnet_zoo.FCOS.from_pretrained(tmp_path).state_dict()
    else:
        weights = {name: x for name, x in weights.items() if x.numel() < 5000}
        file, load = tmp_path / "w.pth", lambda: published.read_checkpoint(tmp_path / "w.pth")
        torch.save(weights, file)
        if form == "zip":
            file.write_bytes(zipped(**{"w.pth": file.read_bytes()}))
    content, refused = file.read_bytes(), 0
    for kind, damaged in mutations(content, seed=0, count=30 if form == "folder" else 150):
        file.write_bytes(damaged)
        try:
            found = load()
        except ValueError as error:
            assert str(tmp_path) in str(error) and len(str(error)) < 5000
            refused += 1
        else:
            assert equal(found, weights), f"{kind}: loaded otherwise"
    assert refused > 15


def test_fuzz_tensors(tiny):
    """The error names the tensor that has a wrong dtype, shape or name."""
    model, weights = tiny
    draw, names = random.Random(0), list(weights)
    for _ in range(100):
        name = draw.choice(names)
        x = weights[name]
        kind, key = draw.choice(["dtype", "shape", "extra"]), name
        if kind == "extra":
            key, changed = f"{name}.{draw.randrange(9)}", x
        elif kind == "dtype":
            changed = x.to(draw.choice([torch.float16, torch.float64, torch.int32, torch.complex64, torch.bool]))
        else:
            changed = draw.choice([x[None], x.reshape(-1)[: max(1, x.numel() - 1)]])
        if key == name and (changed.shape, changed.dtype) == (x.shape, x.dtype):
            continue
        with pytest.raises(ValueError, match="nothing was loaded") as error:
            hub.load_strict(model, {**weights, key: changed}, "fuzzed")
        assert key in str(error.value)


def test_no_pickle_is_written_and_none_read_with_code():
    """The sources of the library show it."""
    sources = "\n".join(path.read_text() for path in Path(hub.__file__).parent.rglob("*.py"))
    assert "torch.save(" not in sources and "import pickle" not in sources and "weights_only=False" not in sources
    assert sources.count("torch.load(") == sources.count("weights_only=True") == 1
