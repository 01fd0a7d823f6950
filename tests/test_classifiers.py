"""A classifier is saved as timm reads it, and a detector starts from its folder or repository."""

import json
import shutil

import pytest
import timm
import torch
from checkpoints import open_with_timm, same
from hub_server import Repo

from vovnet_zoo import FCOS, create_detector, hub
from vovnet_zoo.classifiers import load_classifier, save_classifier

SMALL = dict(channels=64, num_convs=1, num_classes=2)
CFG = dict(mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], input_size=[3, 64, 64])


def save(name: str, folder, **options):
    """Save a classifier in which no two tensors have the same values."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=7, **options).eval()
    for x in net.state_dict().values():
        if x.is_floating_point():
            x.add_(0.01 * torch.rand_like(x))
    save_classifier(net, name, folder, class_names=list("abcdefg"), cfg=CFG)
    return net


@pytest.mark.parametrize("name", ["vovnet27_slim", "test_resnet", "ese_vovnet19b_dw", "convnext_atto"])
def test_a_detector_starts_from_a_folder(name, tmp_path):
    """By each of the two ways; it records the name of the architecture, and needs the folder no more."""
    net = save(name, tmp_path / "net")
    loaded, known_as, cfg = load_classifier(tmp_path / "net")
    assert same(loaded, net) and known_as == name and cfg["mean"] == CFG["mean"]
    stock = open_with_timm(tmp_path / "net", features_only=True).eval()
    x = torch.randn(1, 3, 64, 96)
    for source in (dict(pretrained_backbone=tmp_path / "net"), dict(backbone=f"local-dir:{tmp_path / 'net'}")):
        detector = create_detector("fcos", **source, **SMALL).eval()
        assert detector.config["backbone"] == name and detector.config["image_std"] == CFG["std"]
        with torch.no_grad():
            maps, expected = detector.backbone(x), stock(x)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(maps, expected, strict=True))
    detector.save_pretrained(tmp_path / "detector")
    shutil.rmtree(tmp_path / "net")
    assert same(FCOS.from_pretrained(tmp_path / "detector"), detector)
    assert str(tmp_path) not in (tmp_path / "detector" / hub.CONFIG).read_text()


@pytest.mark.parametrize("frozen_norm", [False, True])
def test_a_named_detector_starts_from_its_own_backbone_only(tmp_path, frozen_norm):
    net = save("vovnet27_slim", tmp_path / "net")
    detector = create_detector(
        "fcos_vovnet27_slim_fpn", pretrained_backbone=str(tmp_path / "net"), frozen_norm=frozen_norm, **SMALL
    )
    assert torch.equal(detector.backbone.state_dict()["stem_0.bn.weight"], net.state_dict()["stem.0.bn.weight"])
    with pytest.raises(ValueError, match="holds a vovnet27_slim, not a vovnet39"):
        create_detector("fcos_vovnet39_fpn", pretrained_backbone=tmp_path / "net")
    own = create_detector("fcos", pretrained_backbone=tmp_path / "net", image_mean=[0.5] * 3, **SMALL)
    assert own.config["image_mean"] == [0.5] * 3  # what is asked for wins


def test_a_detector_starts_from_a_repository(hub_on_loopback, tmp_path):
    net = save("test_resnet", tmp_path / "net")
    files = {name: (tmp_path / "net" / name).read_bytes() for name in (hub.CONFIG, hub.WEIGHTS)}
    repo = Repo(private=False, branches={"main": "1" * 40})
    repo.commits.append(("1" * 40, files, {hub.WEIGHTS}))
    hub_on_loopback.repos["someone/net"] = repo
    for source in (dict(pretrained_backbone="hf-hub:someone/net"), dict(backbone="hf_hub:someone/net")):
        detector = create_detector("fcos", **source, **SMALL)
        assert detector.config["backbone"] == "test_resnet" and "someone" not in json.dumps(detector.config)
        assert torch.equal(detector.backbone.state_dict()["conv1.0.weight"], net.state_dict()["conv1.0.weight"])


CATAVGMAX = {"global_pool": "catavgmax"}


@pytest.mark.parametrize(
    "name, given",
    [
        ("vovnet27_slim", CATAVGMAX),
        ("vovnetv2_19_slim_dw", CATAVGMAX),
        ("test_resnet", CATAVGMAX),
        ("test_vit", {"img_size": [96, 96]}),
    ],
)
def test_a_folder_that_timm_saved(name, given, tmp_path):
    """timm 1.0.31 writes these arguments for every model, and beside the arguments of a published backbone."""
    net = save(name, tmp_path / "net", **given)
    config = json.loads((tmp_path / "net" / hub.CONFIG).read_text())
    usual = {"num_classes": 7, "in_chans": 3, **given}
    for architecture, args in ((name, usual), (config["architecture"], {**config.get("model_args", {}), **usual})):
        saved = {**config, "architecture": architecture, "model_args": args}
        (tmp_path / "net" / hub.CONFIG).write_text(json.dumps(saved))
        loaded, known_as, _ = load_classifier(tmp_path / "net")
        assert same(loaded, net) and known_as == name


def test_a_classifier_with_fixed_norms_is_whole(tmp_path):
    """A fixed batch norm does not count batches, while timm's model does."""
    net = timm.layers.freeze_batch_norm_2d(timm.create_model("test_resnet", num_classes=7))
    save_classifier(net, "test_resnet", tmp_path / "net")
    loaded = load_classifier(tmp_path / "net")[0].state_dict()
    assert all(torch.equal(loaded[key], x) for key, x in net.state_dict().items())
    assert all(not x.any() for key, x in loaded.items() if key not in net.state_dict())


def test_mistakes(tmp_path):
    save("test_resnet", tmp_path / "net")
    for source, message in {
        "nowhere": "nowhere has no config.json: give the folder of a saved classifier, or hf-hub:",
        "local-dir:nowhere": "nowhere has no config.json",
        "someone/net": "someone/net has no config.json.* or hf-hub:organisation/name",
    }.items():
        with pytest.raises(ValueError, match=message):
            create_detector("fcos", pretrained_backbone=source, **SMALL)
    for name, message in {
        "vovnet39": "name='vovnet39': the model is no vovnet39; one has a tensor ",
        "nowhere": "name='nowhere': timm has no such model",
    }.items():
        with pytest.raises(ValueError, match=message):
            save_classifier(timm.create_model("test_resnet", num_classes=7), name, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    with pytest.raises(ValueError, match="pretrained=True: .* leave pretrained_backbone out"):
        create_detector("fcos_vovnet39_fpn", pretrained=True, pretrained_backbone=tmp_path / "net")
    with pytest.raises(ValueError, match="give one of them"):
        create_detector("fcos", backbone="local-dir:a", pretrained_backbone="b", **SMALL)
    for backbone in ("local-dir:a", "hf-hub:a/b"):  # what FCOS records must be a name
        with pytest.raises(ValueError, match="is no name of timm's registry; create_detector"):
            FCOS(backbone, 2)
    with pytest.raises(ValueError, match=f"has no config.json: there is one in {tmp_path / 'net'}"):
        load_classifier(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="save with safetensors"):
        load_classifier(tmp_path)
    config = json.loads((tmp_path / "net" / hub.CONFIG).read_text())
    for change in (
        dict(architecture="hf-hub:evil/net"),
        dict(model_args={"checkpoint_path": "evil"}),
        dict(model_args={"in_chans": 1}),
        dict(model_args={"num_classes": 8}),
        dict(model_args={"img_size": [9999, 9999]}),
        dict(model_args=[1]),
        dict(num_classes=-1),
    ):
        (tmp_path / "net" / hub.CONFIG).write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match="describes no classifier of timm"):
            load_classifier(tmp_path / "net")
    (tmp_path / "net" / hub.CONFIG).write_text(json.dumps({**config, "model_args": {"global_pool": "evil"}}))
    with pytest.raises(ValueError, match="timm cannot build this test_resnet"):
        load_classifier(tmp_path / "net")
    (tmp_path / "net" / hub.CONFIG).write_text(json.dumps({**config, "num_classes": 9}))
    with pytest.raises(ValueError, match="shape: fc.weight"):
        load_classifier(tmp_path / "net")
