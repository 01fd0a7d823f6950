"""Saving and loading: folders, and a server that speaks the Hub's protocol to the real huggingface_hub client."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from hub_server import TOKEN, HubServer, serve
from huggingface_hub import constants

import vovnet_zoo
from vovnet_zoo import cli, hub
from vovnet_zoo import weights as published

ROOT = Path(__file__).parents[1]
REPO = "someone/fcos-tiny"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = vovnet_zoo.create_detector(
        "fcos_vovnet27_slim_fpn", num_classes=2, class_names=["cat", "dog"], channels=64, num_convs=1, min_size=64
    )
    return model.eval()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The Hub, for clients in this process and in subprocesses."""
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
        monkeypatch.delenv("HF_TOKEN", raising=False)
        # read at import
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, huggingface_hub.file_download):  # the latter before huggingface_hub 1.0
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
        yield server


def run(code, **environment):
    """Python in a fresh process."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT.parent, capture_output=True, text=True, timeout=300
    )


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def cached(tmp_path):
    """Names of what the cache takes for whole files."""
    return {path.name for path in (tmp_path / "hf").rglob("snapshots/*/*")}


# ---- folders


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path / "deep" / "folder")
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"folder"}
    assert {path.name for path in (tmp_path / "deep" / "folder").iterdir()} == {hub.CONFIG, hub.WEIGHTS, hub.CARD}
    again = vovnet_zoo.FCOS.from_pretrained(tmp_path / "deep" / "folder")
    assert same(model, again) and again.config == model.config and not again.training
    assert json.loads((tmp_path / "deep" / "folder" / hub.CONFIG).read_text()) == model.config


def test_saving_again_replaces_files_and_keeps_the_readers_own(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / hub.CARD).write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / hub.WEIGHTS).write_bytes(b"old")
    model.save_pretrained(tmp_path)
    assert same(model, vovnet_zoo.FCOS.from_pretrained(tmp_path))
    assert (tmp_path / hub.CARD).read_text() == (tmp_path / "notes.txt").read_text() == "mine"


def test_saving_in_the_current_folder(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model.save_pretrained(".")
    assert same(model, vovnet_zoo.FCOS.from_pretrained("."))


def test_a_failed_save_leaves_nothing(model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(hub, "write_safetensors", fail)
    with pytest.raises(OSError, match="no space"):
        model.save_pretrained(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [hub.CONFIG, hub.WEIGHTS])
def test_folder_with_a_file_missing(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"has no {name}"):
        vovnet_zoo.FCOS.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not a JSON file"),
        ('{"backbone": "vovnet27_slim"', "not a JSON file"),
        ("[1]", "holds a JSON list"),
        ('{"backbone": "vovnet27_slim"}', "has no .'num_classes'"),
        ('{"backbone": "vovnet27_slim", "num_classes": 2, "new_thing": 1}', "has no .'new_thing'"),
        ('{"backbone": "vovnet27_slin", "num_classes": 2}', "did you mean vovnet27_slim"),
    ],
)
def test_folder_with_a_wrong_config(model, tmp_path, text, message):
    model.save_pretrained(tmp_path)
    (tmp_path / hub.CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message):
        vovnet_zoo.FCOS.from_pretrained(tmp_path)


def test_not_a_folder_nor_a_name(tmp_path):
    with pytest.raises(ValueError, match="no folder here"):
        vovnet_zoo.FCOS.from_pretrained(tmp_path / "not" / "there")


# ---- the Hub


def test_publish_and_load_in_a_fresh_process(model, server, tmp_path):
    url = model.push_to_hub(REPO, private=True, token=TOKEN)
    assert server.url in url and server.repos[REPO].private
    _, files, lfs = server.repos[REPO].files("main")
    assert files.keys() == {hub.CONFIG, hub.WEIGHTS, hub.CARD} and lfs == {hub.WEIGHTS}
    assert f'from_pretrained("{REPO}")' in files[hub.CARD].decode()

    model.save_pretrained(tmp_path / "expected")
    code = f"""
import torch, vovnet_zoo
model = vovnet_zoo.FCOS.from_pretrained("{REPO}")
expected = vovnet_zoo.FCOS.from_pretrained("{tmp_path / "expected"}")
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))
print(model.config["class_names"], vovnet_zoo.predict(model, torch.zeros(3, 64, 64, dtype=torch.uint8))[0].keys())
"""
    result = run(code, HF_HOME=str(tmp_path / "other"), HF_TOKEN=TOKEN)
    assert result.returncode == 0 and "['cat', 'dog']" in result.stdout, result.stderr
    server.down = True
    empty = f'vovnet_zoo.FCOS.from_pretrained("{REPO}", cache_dir="{tmp_path / "empty"}")'
    result = run(code + empty, HF_HOME=str(tmp_path / "other"), HF_HUB_OFFLINE="1")
    assert "['cat', 'dog']" in result.stdout and "LocalEntryNotFoundError" in result.stderr, result.stderr


def test_revisions(model, server):
    model.push_to_hub(REPO, token=TOKEN)
    first = server.repos[REPO].branches["main"]
    changed = vovnet_zoo.FCOS(**model.config)
    changed.push_to_hub(REPO, token=TOKEN)
    changed.push_to_hub(REPO, token=TOKEN, branch="v2")
    for revision, expected in [(first, model), (None, changed), ("v2", changed), ("main", changed)]:
        assert same(vovnet_zoo.FCOS.from_pretrained(REPO, revision=revision), expected)
    with pytest.raises(huggingface_hub.errors.RevisionNotFoundError):
        vovnet_zoo.FCOS.from_pretrained(REPO, revision="v3")


def test_both_files_are_of_one_commit(model, server, monkeypatch):
    model.push_to_hub(REPO, token=TOKEN)
    whole = hub.download

    def push_between(repo_id, filename, **options):
        path = whole(repo_id, filename, **options)
        if filename == hub.CONFIG:
            vovnet_zoo.FCOS(**model.config).push_to_hub(REPO, token=TOKEN)
        return path

    monkeypatch.setattr(hub, "download", push_between)
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO), model)


def test_wrong_token_and_missing_things(model, server):
    with pytest.raises(OSError, match="401"):
        model.push_to_hub(REPO, token="hf_wrong")
    assert not server.repos
    with pytest.raises(OSError, match="401"):
        vovnet_zoo.FCOS.from_pretrained("someone/nothing")
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError, match="someone/nothing"):
        vovnet_zoo.FCOS.from_pretrained("someone/nothing", token=TOKEN)
    model.push_to_hub(REPO, token=TOKEN, private=True)
    with pytest.raises(OSError, match="401"):
        vovnet_zoo.FCOS.from_pretrained(REPO, token="hf_wrong")
    for name in (hub.CONFIG, hub.WEIGHTS):
        _, files, _ = server.repos[REPO].files("main")
        content = files.pop(name)
        with pytest.raises(huggingface_hub.errors.EntryNotFoundError, match=name):
            vovnet_zoo.FCOS.from_pretrained(REPO, token=TOKEN)
        files[name] = content
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO, token=TOKEN), model)


@pytest.mark.parametrize("name", [hub.CONFIG, hub.WEIGHTS])
@pytest.mark.parametrize(
    "fault, error, message",
    [("short", OSError, "could not get"), ("corrupt", ValueError, "hash"), ("gone", OSError, "could not get")],
)
def test_faulty_download(model, server, tmp_path, monkeypatch, name, fault, error, message):
    """A clear error, no broken cache, and the next try succeeds."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its own retries
    model.push_to_hub(REPO, token=TOKEN)
    server.faults[name] = [fault]
    with pytest.raises(error, match=f"{REPO}: .*{name}.*") as raised:
        vovnet_zoo.FCOS.from_pretrained(REPO)
    assert message in str(raised.value)
    assert name not in cached(tmp_path)
    server.down = False
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO), model)


def test_interrupted_download_goes_on(model, server, monkeypatch):
    """By itself or, before huggingface_hub 2, when asked again."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    model.push_to_hub(REPO, token=TOKEN)
    server.faults[hub.WEIGHTS] = ["truncate"]
    with contextlib.suppress(OSError):
        vovnet_zoo.FCOS.from_pretrained(REPO)
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO), model)


def test_damage_in_the_cache_is_found(model, server, tmp_path):
    model.push_to_hub(REPO, token=TOKEN)
    vovnet_zoo.FCOS.from_pretrained(REPO)
    (blob,) = (p for p in (tmp_path / "hf" / "hub").rglob("blobs/*") if p.stat().st_size > 1e5)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ValueError, match="hash"):
        vovnet_zoo.FCOS.from_pretrained(REPO)
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO), model)


def test_published_backbone_loads_in_stock_timm(server, tmp_path):
    """With a `vovnet_zoo` that cannot be imported."""
    torch.manual_seed(0)
    net = timm.create_model("vovnet27_slim", num_classes=7).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    x = torch.randn(1, 3, 64, 64)
    torch.save((x, net(x).detach()), tmp_path / "expected.pt")
    publish = f"""
import sys; sys.argv = ["vovnet-zoo", "publish", "{tmp_path / "net.pth"}", "someone/slim", "--license", "mit"]
from vovnet_zoo.cli import main; main()
"""
    result = run(publish, HF_TOKEN=TOKEN)
    assert result.returncode == 0 and "/commit/" in result.stdout, result.stderr
    card = server.repos["someone/slim"].files("main")[1][hub.CARD].decode()
    assert "license: mit" in card and 'create_model("hf-hub:someone/slim", pretrained=True)' in card
    assert "3,016,327" in card and "sha256" in card and "GFLOPs" in card
    code = f"""
import sys; sys.modules["vovnet_zoo"] = None
import timm, torch
x, expected = torch.load("{tmp_path / "expected.pt"}")
net = timm.create_model("hf-hub:someone/slim", pretrained=True).eval()
assert (net(x) - expected).abs().max() < 1e-5 * expected.abs().max()
print(timm.create_model("hf-hub:someone/slim", pretrained=True, features_only=True)(x)[-1].shape)
"""
    result = run(code, HF_HOME=str(tmp_path / "other"))
    assert result.returncode == 0 and "512" in result.stdout, result.stderr


def test_publish_a_training(model, server, tmp_path, monkeypatch, capsys):
    """The card has what the run folder knows; a damaged model is not pushed."""
    model.save_pretrained(tmp_path / "run" / "best")
    about = dict(command=["train_coco.py", "finetune"], versions={"torch": "2.15"}, machine="x86, 2 cores")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"starts": [about]}))
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(dict(step=1, AP=0.25, AP50=0.5)) + "\n")
    arguments = ["vovnet-zoo", "publish", str(tmp_path / "run" / "best"), REPO, "--private", "--token", TOKEN]
    monkeypatch.setattr("sys.argv", arguments)
    cli.main()
    assert "/commit/" in capsys.readouterr().out
    card = server.repos[REPO].files("main")[1][hub.CARD].decode()
    for fact in ("AP 0.250", "train_coco.py finetune", "GMACs) at", "license: apache-2.0", "sha256", "2 cores"):
        assert fact in card
    assert str(tmp_path) not in card and same(vovnet_zoo.FCOS.from_pretrained(REPO, token=TOKEN), model)

    weights = {**model.state_dict()}
    weights["head.scales"] = weights["head.scales"] * torch.nan
    hub.write_safetensors(weights, tmp_path / "run" / "best" / hub.WEIGHTS)
    with pytest.raises(SystemExit):
        cli.main()
    assert "not all its outputs are finite" in capsys.readouterr().err and len(server.repos[REPO].commits) == 1


def test_weights_of_ones_own_organisation(model, server, monkeypatch, tmp_path):
    """What the tables name is taken from there, and the error where it is not says so."""
    full = vovnet_zoo.create_detector("fcos_vovnet27_slim_fpn", variant="published")
    monkeypatch.setenv(published.ORGANISATION_VARIABLE, "someone")
    with pytest.raises(OSError, match="someone/fcos_vovnet27_slim_fpn.fcos_1x_coco"):
        vovnet_zoo.create_detector("fcos_vovnet27_slim_fpn", pretrained=True)
    full.push_to_hub("someone/fcos_vovnet27_slim_fpn.fcos_1x_coco", token=TOKEN)
    assert same(vovnet_zoo.create_detector("fcos_vovnet27_slim_fpn", pretrained=True), full)
    assert "fcos_vovnet27_slim_fpn.fcos_1x_coco" in vovnet_zoo.list_detectors(pretrained=True)
    with pytest.raises(ValueError, match="num_classes=80, not 3"):
        vovnet_zoo.create_detector("fcos_vovnet27_slim_fpn", pretrained=True, num_classes=3)

    net = timm.create_model("vovnet27_slim")
    safetensors.torch.save_file(net.state_dict(), tmp_path / hub.WEIGHTS)
    (tmp_path / hub.CONFIG).write_text("{}")
    hub.push("someone/vovnet27_slim.pytorchcv_in1k", tmp_path, huggingface_hub.ModelCard(""), token=TOKEN)
    assert same(timm.create_model("vovnet27_slim", pretrained=True), net)
