"""Kernels for a training step on a GPU, against torch's operators: in Triton's interpreter, and on a GPU."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from launch import TINY, run_in_interpreter
from safetensors.torch import load_file
from torch import nn
from torchvision.ops import FeaturePyramidNetwork, sigmoid_focal_loss

import train_coco
from build import build_loss
from calibration import read_rows
from presets import parse
from step import compile_step, compute_losses, find_targets
from vovnet_zoo import FCOSLoss, create_detector, fused, kernels
from vovnet_zoo.data import normalize
from vovnet_zoo.fcos import FCOSHead, Tower, make_points
from vovnet_zoo.fused import FusedHead, FusedLoss, FusedPyramid, FusedTower, use_gpu_kernels
from vovnet_zoo.kernels.max_pool import FusedMaxPool2d, pooled_size
from vovnet_zoo.kernels.osa import fuse_for_training
from vovnet_zoo.kernels.surgery import plain_class, restore
from vovnet_zoo.loss import assign_targets

CHANNELS_LAST = torch.channels_last
PYRAMID = ((20, 30), (10, 15), (5, 8), (3, 4), (2, 2))


def test_the_shape_that_a_compiler_is_told():
    """`pooled_size` is the size that torch gives, for each map that torch pools."""
    for padding in (0, 1):
        for ceil_mode in (0, 1):
            for size in range(3 - padding, 20):
                x = torch.zeros(1, 1, size, 9)
                wanted = F.max_pool2d(x, 3, 2, padding, ceil_mode=bool(ceil_mode)).shape[2]
                assert pooled_size(size, padding, ceil_mode) == wanted


def test_which_max_poolings_suit():
    for options in (dict(kernel_size=3, stride=2, ceil_mode=True), dict(kernel_size=(3, 3), stride=2, padding=1)):
        assert FusedMaxPool2d.suits(nn.MaxPool2d(**options))
    others = dict(kernel_size=2), dict(kernel_size=3), dict(kernel_size=3, stride=2, dilation=2)
    for options in (*others, dict(kernel_size=3, stride=(2, 1)), dict(kernel_size=3, stride=2, return_indices=True)):
        assert not FusedMaxPool2d.suits(nn.MaxPool2d(**options))
    assert not FusedMaxPool2d.suits(nn.AvgPool2d(3, 2))


def test_which_towers_suit():
    assert FusedTower.suits(Tower(64, 2))
    for i, layer in ((0, nn.Conv2d(64, 64, 3, bias=False)), (4, nn.BatchNorm2d(64)), (5, nn.GELU())):
        tower = Tower(64, 2)
        tower[i] = layer
        assert not FusedTower.suits(tower)


def test_without_a_gpu_nothing_changes(monkeypatch):
    """The classes of a GPU compute on a CPU what the others do, bit by bit, and `restore` takes them away."""
    model = create_detector("fcos", backbone="vovnet27_slim", num_classes=3, channels=64, num_convs=1).train()
    use_gpu_kernels(model, torch.device("cpu"))
    assert all(plain_class(module) is type(module) for module in model.modules())
    changed = copy.deepcopy(model)
    monkeypatch.setattr(fused, "has_triton", lambda device: True)
    use_gpu_kernels(changed, torch.device("cuda"))
    count = {cls: sum(type(x) is cls for x in changed.modules()) for cls in (FusedPyramid, FusedHead, FusedTower)}
    assert count == {FusedPyramid: 1, FusedHead: 1, FusedTower: 2}
    assert sum(type(x) is FusedMaxPool2d for x in changed.modules()) == 3
    assert list(changed.state_dict()) == list(model.state_dict())
    x = torch.randn(2, 3, 64, 96)
    for a, b in zip(changed(x), model(x), strict=True):
        assert torch.equal(a, b)
    assert all(type(a) is type(b) for a, b in zip(restore(changed).modules(), model.modules(), strict=True))
    criterion = FCOSLoss()
    inputs = torch.randn(2, 5, 3), torch.tensor([[0, 1, -1, 2, -1]] * 2)
    wanted = criterion._add_class_losses(*inputs)
    use_gpu_kernels(criterion, torch.device("cuda"))
    assert type(criterion) is FusedLoss and torch.equal(criterion._add_class_losses(*inputs), wanted)


@pytest.mark.parametrize("variant", ["improved", "published"])
def test_one_convolution_for_centerness_too(variant):
    """The convolution of the boxes or of the classes computes it too, and gives what two convolutions give."""
    head = create_detector(
        "fcos", backbone="test_resnet", num_classes=5, channels=64, num_convs=1, variant=variant
    ).head
    nn.init.normal_(head.centerness.bias)
    conv = head.box_distances if head.centerness_on == "box" else head.cls_logits
    assert (variant == "published") == (conv is head.cls_logits)
    maps = [torch.randn(2, 64, *size) for size in PYRAMID]
    for map_, found, ctr in zip(maps, *FusedHead.with_centerness(head, conv, maps), strict=True):
        torch.testing.assert_close(found, conv(map_))
        torch.testing.assert_close(ctr, head.centerness(map_))


def test_why_triton_cannot_be_used(monkeypatch):
    device = torch.device("cuda")
    why = kernels.why_no_triton.__wrapped__
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    assert why(device) == "the package triton is not installed"
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P40")
    assert why(device) == "Tesla P40 is older than what Triton compiles for"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("CC", "no-such-compiler")
    assert why(device) == "Triton needs a C compiler, and there is none; install gcc"
    monkeypatch.setenv("CC", sys.executable)
    assert why(device) == ""
    assert not kernels.has_triton(torch.device("cpu"))


# ---- the numbers of each kernel -------------------------------------------------------------------------------------


def check_group_norm(device: str, dtype: torch.dtype, tolerance: float) -> None:
    from vovnet_zoo.kernels.group_norm_triton import group_norm_relu

    torch.manual_seed(0)
    one = ((17, 19), (4, 4), (2, 2), (1, 2), (2, 1))  # in the last ones a group is a few numbers
    for channels, groups, sizes, batch in ((64, 32, PYRAMID, 2), (96, 32, one, 1)):
        small = [torch.randn(channels, device=device).requires_grad_() for _ in range(3)]
        maps = [(torch.randn(batch, channels, *size, device=device) + 5).to(dtype) for size in sizes]
        maps = [x.contiguous(memory_format=CHANNELS_LAST).requires_grad_() for x in maps]
        found = group_norm_relu(maps, *small, groups, 1e-5)
        assert all(y.dtype == dtype and y.is_contiguous(memory_format=CHANNELS_LAST) for y in found)
        shift, weight, bias, *xs = exact = [x.detach().double().requires_grad_() for x in (*small, *maps)]
        wanted = [F.relu(F.group_norm(x + shift[:, None, None], groups, weight, bias, 1e-5)) for x in xs]
        compare(found, wanted, [*small, *maps], exact, tolerance)


def check_max_pool(device: str, dtype: torch.dtype) -> None:
    from vovnet_zoo.kernels import max_pool_triton

    torch.manual_seed(0)
    for h, w, padding, ceil_mode in (
        (7, 9, 0, True),
        (8, 10, 0, True),
        (8, 11, 1, False),
        (2, 2, 0, True),
        (5, 4, 1, True),
    ):
        x = torch.randn(2, 5, h, w, device=device).round().to(dtype)  # with equal values
        x[0, 0, 1, 1] = torch.nan
        x = x.contiguous(memory_format=CHANNELS_LAST).requires_grad_()
        wanted = F.max_pool2d(x, 3, 2, padding, ceil_mode=ceil_mode)
        dy = torch.randn_like(wanted)
        found, place = max_pool_triton.max_pool(x.detach(), *wanted.shape[2:], padding)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        dx = max_pool_triton.max_pool_backward(dy, place, h, w, padding)
        (exact,) = torch.autograd.grad(wanted, x, dy)
        error = 1e-6 if dtype == torch.float32 else 2e-2  # gradients of several windows are added up in another order
        torch.testing.assert_close(dx, exact, rtol=error, atol=error * exact.abs().max().item())


def check_aggregation(device: str, dtype: torch.dtype, tolerance: float) -> None:
    from vovnet_zoo.kernels.osa_triton import aggregate

    torch.manual_seed(0)
    inputs, middle, outputs, layers = 24, 40, 72, 3
    shapes = [(middle, inputs if i == 0 else middle, 3, 3) for i in range(layers)]
    shapes.append((outputs, inputs + layers * middle, 1, 1))
    tensors = [torch.randn(2, inputs, 7, 9).to(dtype), *(torch.randn(shape) / 10 for shape in shapes)]
    tensors = [x.to(device) for x in tensors]
    scales, shifts = ([torch.randn(len(weight), device=device) for weight in tensors[1:]] for _ in range(2))
    geometry = [((1, 1), (1, 1), (1, 1), 1)] * layers + [((1, 1), (0, 0), (1, 1), 1)]
    for needed in ("11111", "01111", "00001", "00100", "10000", "10001"):
        leaves = [x.detach().requires_grad_(need == "1") for x, need in zip(tensors, needed, strict=True)]
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]
        maps = [exact[0]]
        pairs = zip(exact[1:], scales, strict=True)
        *weights, last = [(weight * scale[:, None, None, None]) for weight, scale in pairs]
        for weight, shift in zip(weights, shifts, strict=False):
            maps.append(F.relu(F.conv2d(maps[-1], weight, padding=1) + shift[:, None, None]))
        wanted = F.relu(F.conv2d(torch.cat(maps, 1), last) + shifts[-1][:, None, None])
        found = aggregate(leaves[0], leaves[1:], scales, shifts, geometry)
        compare([found], [wanted], *([x for x in xs if x.requires_grad] for xs in (leaves, exact)), tolerance)


def check_shift_relu(device: str, dtype: torch.dtype) -> None:
    from vovnet_zoo.kernels.osa_triton import shift_relu

    torch.manual_seed(0)
    weight, shift = torch.randn(16, 24, 3, 3, device=device).to(dtype).requires_grad_(), torch.randn(16, device=device)
    for memory_format in (CHANNELS_LAST, torch.contiguous_format):
        x = torch.randn(2, 24, 5, 6, device=device).to(dtype).contiguous(memory_format=memory_format)
        found = shift_relu(F.conv2d(x, weight, padding=1), shift)
        wanted = F.relu(F.conv2d(x, weight, padding=1).float() + shift[:, None, None]).to(dtype)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        dw, exact = (torch.autograd.grad(y.square().sum(), weight)[0] for y in (found, wanted))
        torch.testing.assert_close(dw, exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item())


def check_upsampling(device: str, dtype: torch.dtype) -> None:
    from vovnet_zoo.kernels import upsample_triton

    torch.manual_seed(0)
    x, small = (torch.randn(2, 20, *size, device=device).to(dtype) for size in ((6, 10), (3, 5)))
    x, small = (y.contiguous(memory_format=CHANNELS_LAST) for y in (x, small))
    wanted = x.float() + F.interpolate(small.float(), size=(6, 10), mode="nearest")
    torch.testing.assert_close(upsample_triton.add_upsampled(x, small), wanted.to(dtype), rtol=0, atol=0)
    sums = F.avg_pool2d(x.double(), 2) * 4
    torch.testing.assert_close(upsample_triton.sum_fours(x).double(), sums, rtol=1e-2, atol=1e-5)


def check_focal_loss(device: str, dtype: torch.dtype) -> None:
    """Sum and gradients, for logits that are far from 0 too; the gradient is that of the sum times a number."""
    from vovnet_zoo.kernels.focal_triton import focal_loss

    torch.manual_seed(0)
    for shape, alpha, gamma in (
        ((2, 700, 3), 0.25, 2.0),
        ((1, 5, 1), 1.0, 0.0),
        ((3, 90, 20), 0.4, 1.5),
        ((0, 9, 4), 0.25, 1.0),
    ):
        logits = (torch.randn(shape, device=device) * 12).to(dtype).requires_grad_()
        labels = torch.randint(-1, shape[-1], shape[:-1], device=device)
        exact = logits.detach().double().requires_grad_()
        one_hot = (labels[..., None] == torch.arange(shape[-1], device=device)).double()
        wanted = sigmoid_focal_loss(exact, one_hot, alpha, gamma, reduction="sum")
        found = focal_loss(logits, labels, alpha, gamma)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
        (3 * found).backward(), (3 * wanted).backward()
        assert logits.grad.dtype == dtype
        error = max(2e-5, torch.finfo(dtype).eps)
        torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=error, atol=1e-6)
    logits = torch.zeros(1, 1, 2, device=device)
    logits[..., 1] = torch.nan
    assert focal_loss(logits, torch.zeros(1, 1, dtype=torch.int64, device=device), 0.25, 2.0).isnan()


def check_assigning(device: str) -> None:
    """Bit by bit what torch computes, with equal boxes, boxes on the limits of a level, and none at all."""
    from vovnet_zoo.kernels.assign_triton import assign

    torch.manual_seed(0)
    points, strides = make_points(PYRAMID, (8, 16, 32, 64, 128), device)
    boxes = torch.randint(0, 240, (3, 9, 4), device=device).float().sort(-1)[0]
    boxes[0, 3], boxes[1, :2] = boxes[0, 2], torch.tensor([20.0, 20.0, 84.0, 84.0])
    boxes[..., 2:] += 0.3 * (torch.arange(9, device=device) > 4)[:, None]
    labels = torch.randint(0, 5, (3, 9), device=device)
    labels[1, 6:], labels[2] = -1, -1
    for radius, plus_one, matching in ((1.5, False, "paper"), (None, True, "paper"), (1.5, False, "torchvision")):
        for count in (9, 0):
            given = points, strides, boxes[:, :count], labels[:, :count]
            wanted = assign_targets(*given, center_radius=radius, plus_one=plus_one, matching=matching)
            found = assign(*given, radius, plus_one, matching == "torchvision")
            rounding = 0 if device == "cuda" else 2e-7  # torch's square root on a CPU is not always the nearest number
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=rounding * (b is wanted.centerness), atol=0)
            assert (wanted.labels >= 0).any() == bool(count)


def check_normalizing(device: str) -> None:
    """Bit by bit what torch computes; on a CPU, torch divides, and on a GPU it multiplies."""
    from vovnet_zoo.kernels.normalize_triton import normalize as normalize_at_once

    torch.manual_seed(0)
    images, sizes = torch.randint(0, 256, (2, 3, 37, 45), dtype=torch.uint8, device=device), [[37, 40], [20, 45]]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    sizes = torch.tensor(sizes, device=device)
    found = normalize_at_once(images, sizes, mean, std)
    assert found.is_contiguous(memory_format=CHANNELS_LAST)
    rounding = 0 if device == "cuda" else 3e-7
    torch.testing.assert_close(found, normalize(images, sizes, mean, std), rtol=rounding, atol=0)


def compare(found, wanted, leaves, exact, tolerance: float) -> None:
    """Hold results and gradients of the leaves against exact ones, by the norm of the difference."""
    dys = [torch.randn_like(y) for y in found]
    gradients = torch.autograd.grad(found, leaves, dys)
    wanted = [*wanted, *torch.autograd.grad(wanted, exact, [dy.double() for dy in dys])]
    for a, b in zip([*found, *gradients], wanted, strict=True):
        assert a.shape == b.shape
        error = ((a.double() - b).norm() / b.norm().clamp(min=1)).item()
        assert error <= tolerance, f"{list(b.shape)}: {error:.1e}"


IN_THE_INTERPRETER = """
import contextlib, torch
import test_gpu_kernels as tests
torch.cuda.device_of = lambda x: contextlib.nullcontext()
tests.check_group_norm("cpu", torch.float32, 1e-5)
tests.check_max_pool("cpu", torch.float32)
tests.check_aggregation("cpu", torch.float32, 1e-5)
tests.check_shift_relu("cpu", torch.float32)
tests.check_upsampling("cpu", torch.float32)
tests.check_focal_loss("cpu", torch.float32)
tests.check_focal_loss("cpu", torch.float16)
tests.check_normalizing("cpu")
tests.check_assigning("cpu")
"""


def test_kernels_in_the_interpreter():
    """The GPU's kernels, run by Triton's interpreter on the CPU."""
    run_in_interpreter(IN_THE_INTERPRETER)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_on_a_gpu(dtype):
    torch.backends.cudnn.allow_tf32 = False
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    check_group_norm("cuda", dtype, tolerance)
    check_max_pool("cuda", dtype)
    check_aggregation("cuda", dtype, max(1e-5, 20 * torch.finfo(dtype).eps))  # four layers, each rounded
    check_shift_relu("cuda", dtype)
    check_upsampling("cuda", dtype)
    check_focal_loss("cuda", dtype)
    check_normalizing("cuda")
    check_assigning("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["improved", "published"])
@pytest.mark.parametrize("how", ["eager", "checkpointing", "live norms", "compiled"])
def test_a_training_step_on_a_gpu(variant, how):
    """Losses and gradients of a detector are those that torch's operators compute, in float32; two steps of the same
    weights are equal bit by bit."""
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = False, True
    torch.manual_seed(0)
    options = dict(num_classes=3, channels=64, num_convs=2, variant=variant, frozen_norm=how != "live norms")
    plain = create_detector("fcos", backbone="vovnet27_slim", **options).cuda().train()
    model, criterion = copy.deepcopy(plain), FCOSLoss.of(plain)
    fused_criterion = build_loss(plain, torch.device("cuda"))
    assert type(fused_criterion) is FusedLoss
    fuse_for_training(model)
    use_gpu_kernels(model, torch.device("cuda"))
    assert isinstance(model.head, FCOSHead) and type(model.fpn) is not FeaturePyramidNetwork
    if how == "checkpointing":
        model.set_grad_checkpointing()
    functions = compile_step(model) if how == "compiled" else (find_targets, compute_losses)
    model.to(memory_format=CHANNELS_LAST)
    images = torch.randint(0, 256, (2, 3, 192, 256), dtype=torch.uint8, device="cuda")
    sizes = torch.tensor([[192, 256], [160, 200]], device="cuda")
    boxes = torch.tensor([[[10.0, 12, 90, 80], [100, 40, 180, 150]]], device="cuda").expand(2, 2, 4)
    labels = torch.tensor([[0, 2], [1, -1]], device="cuda")

    def step(model, criterion, find, compute):
        model.zero_grad()
        targets, normalizers = find(model, criterion, boxes, labels, 192, 256)
        losses = compute(model, criterion, images, sizes, targets, normalizers, "float32")
        sum(losses.values()).backward()
        return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    losses, gradients = step(plain, criterion, find_targets, compute_losses)
    found, found_gradients = step(model, fused_criterion, *functions)
    torch.testing.assert_close(found, losses, rtol=1e-4, atol=0)
    assert found_gradients.keys() == gradients.keys()
    for name, wanted in gradients.items():
        error = (found_gradients[name] - wanted).norm() / wanted.norm()
        assert error < (0.05 if how == "live norms" else 5e-3), f"{name}: {error:.1e}"  # single ReLUs decide otherwise
    if how in ("eager", "checkpointing"):
        again, again_gradients = step(model, fused_criterion, *functions)
        assert all(torch.equal(again[name], x) for name, x in found.items())
        assert all(torch.equal(again_gradients[name], x) for name, x in found_gradients.items())


@pytest.mark.gpu
@pytest.mark.parametrize("options", ["", "--accum 2", "--precision bf16 --ema 0.9", "--compile"])
def test_recorded_steps_are_the_same_steps(tiny_coco, tmp_path, options):
    """With CUDA graphs and without, losses and weights of a run are equal bit by bit."""
    torch.backends.cudnn.deterministic = True
    tiny = TINY.replace("test_resnet", "vovnet27_slim").replace("--precision float32", "").split()
    line = ["v39_1x", "--data", str(tiny_coco), *tiny, "--workers", "0", "--batch-size", "4", "--steps", "10"]
    line += ["--no-pretrained-backbone", "--eval-every", "1000", *options.split()]
    rows, weights = [], []
    for how in ("--cuda-graphs", "--no-cuda-graphs"):
        out = tmp_path / how
        train_coco.main(parse([*line, "--out", str(out), how]))
        rows.append([[row["loss"], row["grad_norm"]] for row in read_rows(out / "metrics.jsonl") if "grad_norm" in row])
        weights.append(load_file(out / "last" / "model.safetensors"))
    assert len(rows[0]) == 10 and rows[0] == rows[1]
    assert all(torch.equal(x, weights[1][name]) for name, x in weights[0].items())
