"""The backbones behave as timm models, after timm's own tests/test_models.py, and compute what VoVNet computes."""

import pytest
import timm
import torch
from pytorchcv.model_provider import get_model
from timm.layers import EffectiveSEModule

import vovnet_zoo
from vovnet_zoo import convert, vovnet

V1 = ["vovnet27_slim", "vovnet39", "vovnet57", "vovnet75", "vovnet93"]
# parameters of convolutions and batch norms; of a norm's four tensors two are parameters (golden/meta_vovnetv2.json)
V2 = {
    "vovnetv2_19_slim_dw": 1_379_152 + 11_200 // 2,
    "vovnetv2_19_dw": 5_506_944 + 22_272 // 2,
    "vovnetv2_19_slim": 2_647_984 + 10_304 // 2,
    "vovnetv2_19": 10_170_560 + 19_712 // 2,
    "vovnetv2_39": 25_163_712 + 40_832 // 2,
    "vovnetv2_57": 41_423_296 + 63_232 // 2,
    "vovnetv2_99": 69_469_376 + 108_288 // 2,
}
NAMES = [*V1, *V2]
SMALL = 64  # pixels; timm's own tests take the smallest size they can, too


def test_listed():
    assert set(NAMES) <= set(timm.list_models("vovnet*")) and set(NAMES) == set(vovnet.model_cfgs)
    assert vovnet_zoo.__version__


@pytest.mark.parametrize(
    "name, parameters", [("vovnet27_slim", 3_525_736), ("vovnet39", 22_600_296), ("vovnet57", 36_640_296)]
)
def test_parameter_count(name, parameters):
    assert sum(p.numel() for p in timm.create_model(name).parameters()) == parameters


def test_parameter_count_75():
    assert sum(p.numel() for p in timm.create_model("vovnet75").parameters()) / 1e6 == pytest.approx(46.94, abs=0.005)


@pytest.mark.parametrize("name", V2)
def test_parameter_count_of_v2(name):
    assert sum(p.numel() for p in timm.create_model(name, num_classes=0).parameters()) == V2[name]


@pytest.mark.parametrize("name", V2)
def test_every_block_of_v2_has_attention(name):
    model = timm.create_model(name)
    blocks = [block for stage in model.stages for block in stage.blocks]
    assert all(type(block.attn) is EffectiveSEModule for block in blocks)
    scale = torch.stack([block.attn.fc.weight.std() * block.attn.fc.out_channels**0.5 for block in blocks])
    assert (scale - 2**0.5).abs().max() < 0.1  # all of them begin as timm's do


@pytest.mark.parametrize("name", V1)
def test_blocks_per_stage(name):
    blocks = {"27_slim": [1, 1, 1, 1], "39": [1, 1, 2, 2], "57": [1, 1, 4, 3], "75": [1, 2, 6, 3], "93": [1, 3, 8, 3]}
    model = timm.create_model(name)
    assert [len(stage.blocks) for stage in model.stages] == blocks[name.removeprefix("vovnet")]
    assert [[b.residual for b in stage.blocks] for stage in model.stages] == [
        [i > 0 for i in range(n)] for n in blocks[name.removeprefix("vovnet")]
    ]


@pytest.mark.parametrize(
    "name, peer", [("vovnet27_slim", "vovnet27s"), ("vovnet39", "vovnet39"), ("vovnet57", "vovnet57")]
)
def test_logits_equal_pytorchcv(name, peer):
    torch.manual_seed(0)
    theirs = get_model(peer).eval()
    for norm in (m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)):  # not the identity
        norm.running_mean.normal_(0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, 0, 0.1)
    ours = timm.create_model(name).eval()
    converted = convert.convert(theirs.state_dict(), {name: vovnet.layout(vovnet.model_cfgs[name])})
    assert converted.form == "pytorchcv"
    ours.load_state_dict(converted.state_dict, strict=True)
    images = torch.randn(1, 3, 224, 224)  # the only size pytorchcv's pooling takes
    with torch.inference_mode():
        wanted = theirs(images)
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(ours(images), wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward(name):
    model = timm.create_model(name, num_classes=7).train()
    out = model(torch.randn(2, 3, SMALL, SMALL))
    out.mean().backward()
    assert out.shape == (2, 7) and out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_default_cfg(name):
    model = timm.create_model(name).eval()
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (3, 224, 224) and cfg["num_classes"] == 1000
    state_dict = model.state_dict()
    assert cfg["first_conv"] + ".weight" in state_dict and cfg["classifier"] + ".weight" in state_dict
    assert all(f"{name}.weight" in state_dict for name in ("head.fc", "stem.0.conv"))
    images = torch.randn(1, *cfg["input_size"])
    with torch.inference_mode():
        features = model.forward_features(images)
        assert features.shape[1:] == (model.num_features, *cfg["pool_size"])
        assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
        model.reset_classifier(0)
        assert model(images).shape == (1, model.num_features)
        model.reset_classifier(0, "")
        assert model(images).shape == features.shape
        model.reset_classifier(11, "avg")
        assert model(images).shape == (1, 11)


@pytest.mark.parametrize("name", NAMES)
def test_num_classes_0_and_one_channel(name):
    model = timm.create_model(name, num_classes=0, in_chans=1).eval()
    with torch.inference_mode():
        assert model(torch.randn(1, 1, SMALL, SMALL)).shape == (1, model.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_features_only(name):
    model = timm.create_model(name, features_only=True).eval()
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    with torch.inference_mode():
        maps = model(torch.randn(1, 3, 96, 128))
    assert [tuple(x.shape) for x in maps] == [
        (1, c, 96 // r, 128 // r)
        for c, r in zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    ]
    some = timm.create_model(name, features_only=True, out_indices=(2, 4)).eval()
    assert some.feature_info.reduction() == [8, 32] and len(some(torch.randn(1, 3, SMALL, SMALL))) == 2


@pytest.mark.parametrize("name", NAMES)
def test_forward_intermediates(name):
    model = timm.create_model(name).eval()
    images = torch.randn(1, 3, SMALL, SMALL)
    with torch.inference_mode():
        out, maps = model.forward_intermediates(images)
        torch.testing.assert_close(out, model.forward_features(images))
        assert [x.shape[1] for x in maps] == [info["num_chs"] for info in model.feature_info]
        torch.testing.assert_close(maps[-1], out)
        only = model.forward_intermediates(images, indices=[1, 3], intermediates_only=True)
        torch.testing.assert_close(only[1], maps[3])


@pytest.mark.parametrize("name", NAMES)
def test_fx(name):
    from timm.models import FeatureGraphNet
    from torch.fx import symbolic_trace

    model = timm.create_model(name).eval()
    images = torch.randn(1, 3, SMALL, SMALL)
    with torch.inference_mode():
        torch.testing.assert_close(symbolic_trace(model)(images), model(images))
        graph = FeatureGraphNet(model, (2, 3, 4), out_map=None)
        torch.testing.assert_close(graph(images)[-1], model.forward_features(images))


@pytest.mark.parametrize("name", ["vovnet27_slim", "vovnet57", "vovnetv2_19_dw", "vovnetv2_57"])
def test_grad_checkpointing_changes_nothing(name):
    torch.manual_seed(0)
    model, images = timm.create_model(name).eval(), torch.randn(1, 3, SMALL, SMALL)  # batch norm fixed
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        assert all(stage.grad_checkpointing is enable for stage in model.stages)
        model(images).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)
