"""Models are saved and loaded, in folders and on a server that speaks the Hub's protocol to the real client."""

import contextlib
import copy
import json

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from checkpoints import same
from hub_server import TOKEN
from launch import run_python

import vovnet_zoo
from vovnet_zoo import hub, publish
from vovnet_zoo import weights as published
from vovnet_zoo.fcos import SWITCHES

REPO = "someone/fcos-tiny"


def cached(tmp_path):
    """List the names of the files that the cache takes for whole."""
    return {path.name for path in (tmp_path / "hf").rglob("snapshots/*/*")}


# ---- folders


def test_save_and_load(tiny_detector, tmp_path):
    tiny_detector.save_pretrained(tmp_path / "deep" / "folder")
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"folder"}
    assert {path.name for path in (tmp_path / "deep" / "folder").iterdir()} == {hub.CONFIG, hub.WEIGHTS, hub.CARD}
    again = vovnet_zoo.FCOS.from_pretrained(tmp_path / "deep" / "folder")
    assert same(tiny_detector, again) and again.config == tiny_detector.config and not again.training
    assert json.loads((tmp_path / "deep" / "folder" / hub.CONFIG).read_text()) == tiny_detector.config


def test_saving_again_replaces_files_and_keeps_the_readers_own(tiny_detector, tmp_path):
    tiny_detector.save_pretrained(tmp_path)
    (tmp_path / hub.CARD).write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / hub.WEIGHTS).write_bytes(b"old")
    tiny_detector.save_pretrained(tmp_path)
    assert same(tiny_detector, vovnet_zoo.FCOS.from_pretrained(tmp_path))
    assert (tmp_path / hub.CARD).read_text() == (tmp_path / "notes.txt").read_text() == "mine"


def test_saving_in_the_current_folder(tiny_detector, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tiny_detector.save_pretrained(".")
    assert same(tiny_detector, vovnet_zoo.FCOS.from_pretrained("."))


def test_a_failed_save_leaves_nothing(tiny_detector, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(hub, "write_safetensors", fail)
    with pytest.raises(OSError, match="no space"):
        tiny_detector.save_pretrained(tmp_path / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [hub.CONFIG, hub.WEIGHTS])
def test_folder_with_a_file_missing(tiny_detector, tmp_path, name):
    tiny_detector.save_pretrained(tmp_path)
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
        ('{"backbone": "vovnet27_slim", "num_classes": 2, "new_thing": 1}', "has no .'new_thing'.*by a newer"),
        ('{"model_type": "detr"}', "has no .'backbone', 'num_classes'.: is it the config of a detector of vovnet_zoo"),
        ('{"architecture": "resnet18", "num_classes": 2}', "it is the config of a classifier"),
        ('{"backbone": "vovnet27_slin", "num_classes": 2}', "did you mean vovnet27_slim"),
    ],
)
def test_folder_with_a_wrong_config(tiny_detector, tmp_path, text, message):
    tiny_detector.save_pretrained(tmp_path)
    (tmp_path / hub.CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message):
        vovnet_zoo.FCOS.from_pretrained(tmp_path)


def test_not_a_folder_nor_a_name(tmp_path):
    with pytest.raises(ValueError, match="no folder here"):
        vovnet_zoo.FCOS.from_pretrained(tmp_path / "not" / "there")


@pytest.mark.parametrize(
    "source, message",
    [
        ("fcos_resnet50_fpn", "create_detector.'fcos_resnet50_fpn', pretrained=True"),
        ("fcos_resnet50_fpn.tv_coco", "is a name of the library's table"),
        ("~/model", "Python does not replace ~"),
    ],
)
def test_a_name_for_another_function(source, message):
    with pytest.raises(ValueError, match=message):
        vovnet_zoo.FCOS.from_pretrained(source)


def test_what_could_not_be_loaded_is_not_saved(tiny_detector, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="save_directory='~/model': Python does not replace ~"):
        tiny_detector.save_pretrained("~/model")
    for save in (tiny_detector.save_pretrained, tiny_detector.push_to_hub):
        with pytest.raises(ValueError, match="the model's own is saved"):
            save("a/b", config={"mine": 1})
    other_classes, other_config, other_parts = (copy.deepcopy(tiny_detector) for _ in range(3))
    other_classes.head.cls_logits = torch.nn.Conv2d(64, 5, 3, padding=1)
    other_config.config["min_size"] = 0
    other_parts.extra = torch.nn.Linear(1, 1)
    for model, message in (
        (other_classes, r"nothing was saved.*\n.*cls_logits.bias is \[5\], a model of the config has \[2\]"),
        (other_config, "could not build the model from its config, so nothing was saved: min_size=0"),
        (other_parts, "unexpected: extra.bias"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained("model")
    assert not list(tmp_path.iterdir())


def test_sharded_weights_are_not_saved(tiny_detector, tmp_path):
    model = copy.deepcopy(tiny_detector)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="sharded.*get_model_state_dict.*full_state_dict=True"):
            model.save_pretrained(tmp_path / "model")
    finally:
        torch.distributed.destroy_process_group()
    assert not list(tmp_path.iterdir())


def test_models_that_the_meta_device_cannot_build():
    """Of timm 1.0.21 and torch 2.11 these are RegNet and EfficientViT; another error is the configuration's."""
    devices = []

    def build(message="aten::_unique2: attempted to run this operator with Meta tensors"):
        devices.append(torch.empty(1).device.type)
        if devices[-1] == "meta":
            raise ValueError(message)
        return "built"

    assert hub.build_empty(build) == "built" and devices == ["meta", "cpu"]
    with pytest.raises(ValueError, match="too many classes"):
        hub.build_empty(lambda: build("too many classes"))


# ---- the Hub


def test_publish_and_load_in_a_fresh_process(tiny_detector, hub_on_loopback, tmp_path):
    url = tiny_detector.push_to_hub(REPO, private=True, token=TOKEN)
    assert hub_on_loopback.url in url and hub_on_loopback.repos[REPO].private
    _, files, lfs = hub_on_loopback.repos[REPO].files("main")
    assert files.keys() == {hub.CONFIG, hub.WEIGHTS, hub.CARD} and lfs == {hub.WEIGHTS}
    assert f'from_pretrained("{REPO}")' in files[hub.CARD].decode()
    tiny_detector.save_pretrained(tmp_path / "other", push_to_hub=True, repo_id="someone/other", token=TOKEN)
    assert json.loads(hub_on_loopback.repos["someone/other"].files("main")[1][hub.CONFIG]) == tiny_detector.config

    tiny_detector.save_pretrained(tmp_path / "expected")
    code = f"""
import torch, vovnet_zoo
model = vovnet_zoo.FCOS.from_pretrained("{REPO}")
expected = vovnet_zoo.FCOS.from_pretrained("{tmp_path / "expected"}")
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True))
print(model.config["class_names"], vovnet_zoo.predict(model, torch.zeros(3, 64, 64, dtype=torch.uint8))[0].keys())
"""
    result = run_python(code, HF_HOME=str(tmp_path / "other"), HF_TOKEN=TOKEN)
    assert result.returncode == 0 and "['cat', 'dog']" in result.stdout, result.stderr
    hub_on_loopback.down = True
    empty = f'vovnet_zoo.FCOS.from_pretrained("{REPO}", cache_dir="{tmp_path / "empty"}")'
    result = run_python(code + empty, HF_HOME=str(tmp_path / "other"), HF_HUB_OFFLINE="1")
    assert "['cat', 'dog']" in result.stdout and "LocalEntryNotFoundError" in result.stderr, result.stderr


def test_revisions(tiny_detector, hub_on_loopback, tmp_path):
    tiny_detector.push_to_hub(REPO, token=TOKEN)
    first = hub_on_loopback.repos[REPO].branches["main"]
    changed = vovnet_zoo.FCOS(**tiny_detector.config)
    changed.push_to_hub(REPO, token=TOKEN)
    hub_on_loopback.repos[REPO].branches["v2"] = first
    changed.push_to_hub(REPO, token=TOKEN, branch="v2")
    for revision, expected in [(first, tiny_detector), (None, changed), ("v2", changed), ("main", changed)]:
        assert same(vovnet_zoo.FCOS.from_pretrained(REPO, revision=revision), expected)
        assert revision is None or same(vovnet_zoo.load_detector(f"{REPO}@{revision}"), expected)
        options = {"revision": revision, "token": TOKEN, "cache_dir": tmp_path}
        assert same(vovnet_zoo.load_detector(REPO, **options), expected) and any(tmp_path.iterdir())
    with pytest.raises(huggingface_hub.errors.RevisionNotFoundError):
        vovnet_zoo.FCOS.from_pretrained(REPO, revision="v3")
    with pytest.raises(ValueError, match="the name ends with @v2; leave one of them out"):
        vovnet_zoo.FCOS.from_pretrained(f"{REPO}@v2", revision="main")


def test_both_files_are_of_one_commit(tiny_detector, hub_on_loopback, monkeypatch):
    tiny_detector.push_to_hub(REPO, token=TOKEN)
    whole = hub.download

    def push_between(repo_id, filename, **options):
        path = whole(repo_id, filename, **options)
        if filename == hub.CONFIG:
            vovnet_zoo.FCOS(**tiny_detector.config).push_to_hub(REPO, token=TOKEN)
        return path

    monkeypatch.setattr(hub, "download", push_between)
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO), tiny_detector)


def test_wrong_token_and_missing_things(tiny_detector, hub_on_loopback):
    with pytest.raises(OSError, match="401"):
        tiny_detector.push_to_hub(REPO, token="hf_wrong")
    assert not hub_on_loopback.repos
    with pytest.raises(OSError, match="401"):
        vovnet_zoo.FCOS.from_pretrained("someone/nothing")
    with pytest.raises(huggingface_hub.errors.RepositoryNotFoundError, match="someone/nothing"):
        vovnet_zoo.FCOS.from_pretrained("someone/nothing", token=TOKEN)
    tiny_detector.push_to_hub(REPO, token=TOKEN, private=True)
    with pytest.raises(OSError, match="401"):
        vovnet_zoo.FCOS.from_pretrained(REPO, token="hf_wrong")
    for name in (hub.CONFIG, hub.WEIGHTS):
        _, files, _ = hub_on_loopback.repos[REPO].files("main")
        content = files.pop(name)
        with pytest.raises(huggingface_hub.errors.EntryNotFoundError, match=name):
            vovnet_zoo.FCOS.from_pretrained(REPO, token=TOKEN)
        files[name] = content
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO, token=TOKEN), tiny_detector)


@pytest.mark.parametrize("name", [hub.CONFIG, hub.WEIGHTS])
@pytest.mark.parametrize(
    "fault, error, message",
    [("short", OSError, "could not get"), ("corrupt", ValueError, "hash"), ("gone", OSError, "could not get")],
)
def test_faulty_download(tiny_detector, hub_on_loopback, tmp_path, monkeypatch, name, fault, error, message):
    """A fault gives a clear error and leaves no broken file in the cache, and the next try succeeds."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its own retries
    tiny_detector.push_to_hub(REPO, token=TOKEN)
    hub_on_loopback.faults[name] = [fault]
    with pytest.raises(error, match=f"{REPO}: .*{name}.*") as raised:
        vovnet_zoo.FCOS.from_pretrained(REPO)
    assert message in str(raised.value)
    assert name not in cached(tmp_path)
    hub_on_loopback.down = False
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO), tiny_detector)


def test_interrupted_download_goes_on(tiny_detector, hub_on_loopback, monkeypatch):
    """The download goes on by itself or, before huggingface_hub 2, at the next call."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    tiny_detector.push_to_hub(REPO, token=TOKEN)
    hub_on_loopback.faults[hub.WEIGHTS] = ["truncate"]
    with contextlib.suppress(OSError):
        vovnet_zoo.FCOS.from_pretrained(REPO)
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO), tiny_detector)


@pytest.mark.parametrize("name, limit", [(hub.CONFIG, "MAX_CONFIG_BYTES"), (hub.WEIGHTS, "MAX_BYTES")])
def test_a_download_has_a_limit_of_size(tiny_detector, hub_on_loopback, tmp_path, monkeypatch, name, limit):
    """A file that is too large is refused before it is downloaded."""
    tiny_detector.push_to_hub(REPO, token=TOKEN)
    _, files, _ = hub_on_loopback.repos[REPO].files("main")
    with monkeypatch.context() as patch:
        patch.setattr(hub, limit, len(files[name]) - 1)
        with pytest.raises(ValueError, match=f"{REPO}: {name} has {len(files[name])} bytes, more than .*: refused"):
            vovnet_zoo.FCOS.from_pretrained(REPO)
        assert name not in cached(tmp_path)
        assert not [line for line in hub_on_loopback.log if line.startswith("GET") and line.endswith(name)]
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO), tiny_detector)


@pytest.mark.skipif(huggingface_hub.__version__ < "1", reason="before 1.0, huggingface_hub itself tries for 23 seconds")
def test_offline_the_cache_is_used_at_once(tiny_detector, hub_on_loopback, monkeypatch):
    tiny_detector.push_to_hub(REPO, token=TOKEN)
    vovnet_zoo.FCOS.from_pretrained(REPO)
    hub_on_loopback.down, waited = True, []
    monkeypatch.setattr("time.sleep", waited.append)
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO), tiny_detector) and sum(waited) < 3


def test_damage_in_the_cache_is_found(tiny_detector, hub_on_loopback, tmp_path):
    tiny_detector.push_to_hub(REPO, token=TOKEN)
    vovnet_zoo.FCOS.from_pretrained(REPO)
    (blob,) = (p for p in (tmp_path / "hf" / "hub").rglob("blobs/*") if p.stat().st_size > 1e5)
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    with pytest.raises(ValueError, match="hash"):
        vovnet_zoo.FCOS.from_pretrained(REPO)
    assert same(vovnet_zoo.FCOS.from_pretrained(REPO), tiny_detector)


def test_weights_of_ones_own_organisation(tiny_detector, hub_on_loopback, monkeypatch, tmp_path):
    """All weights of the tables come from this organisation, and an error names the repository that it lacks."""
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
    publish.push("someone/vovnet27_slim.pytorchcv_in1k", tmp_path, huggingface_hub.ModelCard(""), token=TOKEN)
    assert same(timm.create_model("vovnet27_slim", pretrained=True), net)


# ---- files that nobody vouches for


def hostile(tiny_detector, folder, **changes):
    """Save a detector, and change its config."""
    tiny_detector.save_pretrained(folder)
    (folder / hub.CONFIG).write_text(json.dumps({**tiny_detector.config, **changes}))
    return folder


@pytest.mark.parametrize("backbone", ["hf-hub:evil/model", "hf_hub:evil/model", "local-dir:/tmp", "HF-HUB:evil/model"])
def test_a_config_leads_to_no_second_repository(tiny_detector, hub_on_loopback, tmp_path, backbone):
    hostile(tiny_detector, tmp_path / "m", backbone=backbone)
    with pytest.raises(ValueError, match="no name of timm's registry"):
        vovnet_zoo.FCOS.from_pretrained(tmp_path / "m", token=TOKEN)
    assert hub_on_loopback.log == []
    own = vovnet_zoo.FCOS.from_pretrained(tmp_path / "m", backbone=tiny_detector.config["backbone"])
    assert same(own, tiny_detector)


LARGE = {
    "shape: fpn.inner_blocks.0.0.weight": dict(channels=8192),
    "missing: head.box_tower": dict(num_convs=64),
    "num_convs=1000000: give a whole number from 0 to 64": dict(num_convs=10**6),
    "channels=32000000: give a whole number": dict(channels=10**6 * 32),
    "num_classes=1000000000: give": dict(num_classes=10**9, class_names=None),
    "shape: head.cls_logits": dict(num_classes=100_000, class_names=None),
    "missing: backbone": dict(backbone="convnextv2_huge"),
}


def test_a_large_config_takes_no_memory(tiny_detector, tmp_path):
    folders = [str(hostile(tiny_detector, tmp_path / str(i), **changes)) for i, changes in enumerate(LARGE.values())]
    code = f"""
import vovnet_zoo
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) // 1024  # MiB
vovnet_zoo.FCOS
before = peak()
for folder in {folders}:
    try:
        vovnet_zoo.FCOS.from_pretrained(folder)
    except ValueError as error:
        print("refused", error)
print("MiB", peak() - before)
"""
    result = run_python(code)
    mib = int(result.stdout.split("MiB")[-1])
    refusals = result.stdout.split("refused ")[1:]
    for message, refusal in zip(LARGE, refusals, strict=True):
        assert message in refusal
    assert mib < 200


ODD = [
    None, True, -1, 0, 0.5, 7, 1e308, float("nan"), float("inf"), -float("inf"), 10**400, "", "x", "a\0b", "\ud800",
    [], [None], [1, 2], [0.5] * 3, [float("nan")] * 3, [1e308] * 3, ["a", "b"], ["a", 1], [[]], {}, {"a": 1}, {"a": {}},
]  # fmt: skip


def test_odd_configs_are_refused_or_right(tiny_detector, tmp_path, monkeypatch):
    """Any value of any argument gives a model with this argument, or a ValueError that names it."""
    monkeypatch.setattr(hub, "check_fit", lambda *args, **options: None)  # the skeleton alone, without weights
    monkeypatch.setattr(hub, "load_strict", lambda *args, **options: None)
    hostile(tiny_detector, tmp_path)
    for name in tiny_detector.config:
        for value in ODD:
            (tmp_path / hub.CONFIG).write_text(json.dumps({**tiny_detector.config, name: value}))
            try:
                with torch.device("meta"):
                    model = vovnet_zoo.FCOS.from_pretrained(tmp_path, map_location="meta")
            except ValueError as error:
                assert name in str(error) or name == "backbone", (name, value, error)
            else:
                assert model.config[name] == value or value is None, (name, value)
                assert not isinstance(value, bool) or name in SWITCHES, (name, value)


@pytest.mark.parametrize("name", ["image_mean", "image_std", "class_names", "min_size", "prior", "frozen_norm"])
def test_settings_that_loaded_silently(tiny_detector, tmp_path, name):
    wrong = dict(
        image_mean=[float("nan")] * 3, image_std=[0.2, 0.0, 0.2], class_names="ab", min_size=0, prior=1, frozen_norm=0
    )
    with pytest.raises(ValueError, match=f"config.json: {name}="):
        vovnet_zoo.FCOS.from_pretrained(hostile(tiny_detector, tmp_path, **{name: wrong[name]}))


@pytest.mark.parametrize(
    "content", ["[" * 99999, '{"a":' * 99999, "\xff", '{"num_classes": ' + "9" * 5000 + "}", "NaN"]
)
def test_odd_json(tiny_detector, tmp_path, content):
    hostile(tiny_detector, tmp_path)
    (tmp_path / hub.CONFIG).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=hub.CONFIG):
        vovnet_zoo.FCOS.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        dict(architecture="hf-hub:evil/model"),
        dict(architecture="resnet18"),
        dict(architecture=["vovnet39a"]),
        dict(model_args={"checkpoint_path": "evil.pth"}),
        dict(model_args=None),
        dict(num_classes=10**9),
        dict(num_classes="7"),
        dict(num_classes=8),
    ],
)
def test_an_untrusted_backbone_is_not_published(tmp_path, hub_on_loopback, changes):
    net = timm.create_model("vovnet27_slim", num_classes=7)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    publish.convert_file(tmp_path / "net.pth", tmp_path / "out")
    config = json.loads((tmp_path / "out" / hub.CONFIG).read_text())
    assert "vovnet27_slim" in str(publish.checked_card(tmp_path / "out"))
    (tmp_path / "out" / hub.CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match="out"):
        publish.checked_card(tmp_path / "out")
    assert hub_on_loopback.log == []
