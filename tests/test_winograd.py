"""Winograd convolutions against torch's own, which are computed in float64."""

import copy
import functools
import pickle
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vovnet_zoo import create_detector
from vovnet_zoo.kernels import library, winograd
from vovnet_zoo.kernels.winograd import FrozenWinogradConv2d, WinogradConv2d, conv3x3, conv3x3_frozen, transform_weight

if reason := library.load():
    pytest.skip(reason, allow_module_level=True)
needs_gain = pytest.mark.skipif(bool(winograd.why_not()), reason=winograd.why_not())

SHAPES = [  # B, C, H, W, O
    (1, 1, 1, 1, 1),
    (3, 1, 3, 7, 5),
    (1, 5, 4, 4, 1),
    (2, 16, 8, 5, 32),
    (1, 17, 9, 12, 33),
    (2, 64, 13, 2, 80),
    (1, 96, 41, 37, 40),
    (3, 256, 20, 20, 64),
    (1, 800, 6, 10, 31),
]
ids = ["x".join(map(str, shape)) for shape in SHAPES]


def make(shape, seed=0):
    batch, channels, height, width, outputs = shape
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, height, width, generator=generator).to(memory_format=torch.channels_last)
    weight = torch.randn(outputs, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    return x, weight, torch.randn(outputs, generator=generator)


def reference(x, weight, bias=None):
    return F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1)


def assert_near(found, wanted, tolerance):
    """Largest error, in units of the largest wanted value."""
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs().max() / wanted.abs().max().clamp_min(1e-9)
    assert error <= tolerance, f"{error:.1e}"


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_forward(shape, dtype, tolerance):
    x, weight, bias = make(shape)
    x = x.to(dtype)
    for b in (None, bias):
        wanted = reference(x, weight, b)
        y = conv3x3(x, weight, b)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert_near(y, wanted, tolerance)
        u = transform_weight(weight)
        assert torch.equal(conv3x3_frozen(x, u, shape[-1], b), y)
        assert torch.equal(conv3x3_frozen(x, u, shape[-1], b, relu=True), y.relu())


def test_strides():
    x, weight, bias = make((2, 32, 11, 14, 48))
    wanted = conv3x3(x, weight, bias)
    assert torch.equal(conv3x3(x.contiguous(), weight, bias), wanted)
    assert torch.equal(conv3x3(x, weight.to(memory_format=torch.channels_last), bias), wanted)
    wide = torch.randn(2, 70, 13, 30)
    view = wide[:, 3:67:2, 1:-1, ::2][..., :14]
    assert_near(conv3x3(view, weight, bias), reference(view, weight, bias), 1e-5)
    assert_near(conv3x3(x[:1].expand(3, -1, -1, -1), weight, bias), wanted[:1].expand(3, -1, -1, -1), 0)


def test_nan_and_infinity_stay():
    x, weight, _ = make((1, 16, 8, 8, 32))
    x[0, 0, 1, 1] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        y = conv3x3_frozen(x.to(dtype), transform_weight(weight), 32, None, relu=True)
        assert y[:, :, :3, :3].isnan().all() and y[:, :, 5:, 5:].isfinite().all()


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_gradients(shape, dtype, tolerance):
    x, weight, bias = make(shape)
    ours = [x.to(dtype).requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    wanted = reference(*theirs)
    dy = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    conv3x3(*ours).backward(dy)
    wanted.backward(dy.double())
    for found, want in zip(ours, theirs, strict=True):
        assert found.grad.dtype == found.dtype
        assert_near(found.grad, want.grad, tolerance if found.dtype == dtype else 1e-5)


def test_transposed():
    x, weight, bias = make((2, 20, 9, 6, 36))
    wanted = F.conv_transpose2d(x.double(), weight.transpose(0, 1).double(), bias.double(), padding=1)
    assert_near(conv3x3(x, weight.transpose(0, 1), bias, True), wanted, 1e-5)


def test_operators():
    x, weight, bias = make((1, 5, 6, 7, 3))
    transformed, operators = transform_weight(weight), torch.ops.vovnet_zoo
    for transposed in (False, True):
        w = weight.transpose(0, 1).contiguous() if transposed else weight
        arguments = [t.clone().requires_grad_() for t in (x, w, bias)]
        torch.library.opcheck(operators.conv3x3.default, (*arguments, transposed))
    torch.library.opcheck(operators.conv3x3_transform_weight.default, (weight,))
    torch.library.opcheck(operators.conv3x3_frozen.default, (x, transformed, 3, bias, True))
    torch.library.opcheck(operators.conv3x3_weight_gradient.default, (x, torch.randn(1, 3, 6, 7)))
    y = winograd.empty_output(x, 3).zero_()
    torch.library.opcheck(operators.conv3x3_out.default, (y, x, weight, bias, False, True, True, None))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(backend, dynamic):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(32, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.Conv2d(48, 32, 3, padding=1))
    winograd.use_winograd(net)
    frozen = nn.Sequential(FrozenWinogradConv2d(net[0], relu=True), FrozenWinogradConv2d(net[3]))
    compiled = torch.compile(net, fullgraph=True, backend=backend, dynamic=dynamic)
    compiled_frozen = torch.compile(frozen, fullgraph=True, backend=backend, dynamic=dynamic)
    for height, width in [(16, 20), (21, 18)] if dynamic else [(16, 20)]:
        x = torch.randn(4, 32, height, width)
        with torch.no_grad():
            torch.testing.assert_close(compiled_frozen(x), frozen(x))
        results = []
        for f in (net, compiled):
            net.zero_grad()
            input = x.clone().requires_grad_()
            y = f(input)
            y.square().sum().backward()
            results.append([y.detach(), input.grad] + [p.grad for p in net.parameters()])
        for wanted, found in zip(*results, strict=True):
            assert_near(found, wanted, 1e-5 if wanted.abs().max() > 1e-3 else 1)  # batch norm hides the bias before it


@needs_gain
def test_autocast():
    conv = nn.Conv2d(32, 32, 3, padding=1)
    ours = copy.deepcopy(conv)
    assert winograd.use_winograd(nn.Sequential(ours)) == 1
    x = torch.randn(4, 32, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        wanted, found = conv(x), ours(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert_near(found, wanted, 1e-2)
    for y in (wanted, found):
        y.float().square().sum().backward()
    assert ours.weight.grad.dtype == ours.bias.grad.dtype == torch.float32
    assert_near(ours.weight.grad, conv.weight.grad, 2e-2)
    assert_near(ours.bias.grad, conv.bias.grad, 2e-2)


@pytest.fixture(scope="module")
def detectors():
    """A detector, and its copy with Winograd convolutions.

    With few seeds an input of a ReLU is so near to zero that rounding changes the gradient, conv2d's too.
    """
    torch.manual_seed(1)
    detector = create_detector("fcos", backbone="resnet10t", channels=64, num_convs=1, num_classes=3)
    ours = copy.deepcopy(detector)
    assert winograd.use_winograd(ours) > 5
    return detector, ours


@needs_gain
def test_detector_keeps_its_predictions_and_gradients(detectors, monkeypatch):
    monkeypatch.setattr(winograd, "TRAINING_TILES", 0)
    x, results, kept = torch.randn(2, 3, 160, 128, generator=torch.Generator().manual_seed(0)), [], []
    for model in detectors:
        model.zero_grad()
        output = model(x)
        (output.logits.mean() + output.distances.mean() / 100 + output.centerness.square().mean()).backward()
        results.append([output.logits, output.distances, output.centerness])
        results[-1] += [p.grad for p in model.parameters()]
        kept.append(list(model.state_dict()))
    assert kept[0] == kept[1]
    for wanted, found in zip(*results, strict=True):
        assert_near(found.detach(), wanted.detach(), 2e-4)
    assert any(not torch.equal(*pair) for pair in zip(*results, strict=True)), "Winograd was not used"


@needs_gain
def test_layers_survive_copies(detectors):
    model = detectors[1]
    kinds = [type(m) for m in model.modules()]
    assert WinogradConv2d in kinds
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(m) for m in other.modules()] == kinds
        assert winograd.use_winograd(other) == 0
    conv = nn.Conv2d(32, 32, 3, padding=1)
    frozen = FrozenWinogradConv2d(conv, relu=True)
    for x in (torch.randn(1, 32, 40, 40), torch.randn(1, 32, 1, 1)):  # the second is too small to gain
        torch.testing.assert_close(copy.deepcopy(frozen)(x), conv(x).relu(), rtol=1e-4, atol=1e-5)


def test_what_is_not_eligible():
    convs = [
        nn.Conv2d(64, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 3),
        nn.Conv2d(64, 64, 3, padding=2, dilation=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(64, 64, 1),
        nn.Conv2d(256, 4, 3, padding=1),
    ]
    assert winograd.use_winograd(nn.ModuleList(convs)) == 0
    with pytest.raises(ValueError, match="stride 1"):
        FrozenWinogradConv2d(convs[0])


def test_wrong_arguments():
    x, weight, bias = make((1, 4, 6, 6, 8))
    y = winograd.empty_output(x, 8)
    for call, message in [
        (lambda: conv3x3(x.double(), weight), "x must be float32 or bfloat16"),
        (lambda: conv3x3(x[0], weight), r"x must be \[B,C,H,W\] on the CPU, is \[4, 6, 6\]"),
        (lambda: conv3x3(x, weight[..., :1]), r"weight must be \[O,C,3,3\]"),
        (lambda: conv3x3(x, weight[:, :3]), "x has 4 channels"),
        (lambda: conv3x3(x, weight, bias[:5]), r"bias must be \[8\], is \[5\]"),
        (lambda: conv3x3_frozen(x, transform_weight(weight), 40), "out_channels=40"),
        (lambda: winograd.weight_gradient(x, torch.zeros(1, 8, 6, 5)), r"dy must be \[B,O,H,W\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in [
        (lambda: winograd.convolve_into(y.contiguous(), x, weight), "y must be .* channels_last"),
        (lambda: winograd.convolve_into(y, x, weight, positive=x), "positive must be like y"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_the_rest_of_a_group_of_channels_is_zero():
    """The memory that the kernels keep holds NaN of the call before."""
    x, weight, _ = make((1, 16, 8, 8, 16))
    for run in (lambda x, w: conv3x3(x, w), winograd.weight_gradient):
        run(torch.full_like(x, torch.nan), weight if run is not winograd.weight_gradient else x)
        x1, weight1, _ = make((1, 3, 8, 8, 5))
        dy = torch.randn(1, 5, 8, 8)
        assert conv3x3(x1, weight1).isfinite().all() and winograd.weight_gradient(x1, dy).isfinite().all()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_change_nothing(two_threads):
    """Any number of threads gives the same output to the bit; of the weight gradient, only the sums' order changes."""
    x, weight, bias = make((2, 48, 30, 26, 80))
    dy, results = torch.randn(2, 80, 30, 26), []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((conv3x3(x, weight, bias), winograd.weight_gradient(x, dy)))
    for y, dw in results[1:]:
        assert torch.equal(y, results[0][0])
        assert_near(dw, results[0][1], 1e-5)


def test_a_smaller_instruction_set_is_declined_where_it_does_not_gain(monkeypatch, caplog):
    monkeypatch.setattr(library, "capability", lambda: "DEFAULT")
    monkeypatch.setattr(library.platform, "machine", lambda: "x86_64")
    conv = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1))
    assert winograd.use_winograd(conv) == 0 and type(conv[0]) is nn.Conv2d
    assert [record.getMessage() for record in caplog.records] == [
        "Winograd convolutions are not used: this CPU has no AVX2, or ATEN_CPU_CAPABILITY declines it"
    ]


def fastest(calls, rounds=12):
    """Seconds of the fastest of interleaved calls of each."""
    seconds = [[] for _ in calls]
    for _ in range(rounds):
        for call, times in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return list(map(min, seconds))


@pytest.mark.slow
@pytest.mark.parametrize("channels, side", [(64, 80), (128, 80), (256, 40), (256, 20), (256, 12)])
def test_winograd_is_faster_than_conv2d(channels, side, two_threads):
    """On this machine, wherever Winograd is used: forward with a frozen weight, and the two gradients."""
    x, weight, _ = make((1, channels, side, side, channels))
    conv = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False).to(memory_format=torch.channels_last)
    frozen, dy = FrozenWinogradConv2d(conv), torch.randn_like(x)
    assert frozen.gains(x)
    conv2d, ours = fastest([functools.partial(conv, x), functools.partial(frozen, x)])
    assert ours < conv2d
    if winograd.winograd_dtype(x) is None:
        return
    where = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]

    def gradients():
        conv3x3(dy, weight, None, True)
        winograd.weight_gradient(x, dy)

    conv2d, ours = fastest([lambda: torch.ops.aten.convolution_backward(dy, x, conv.weight, None, *where), gradients])
    assert ours < conv2d
