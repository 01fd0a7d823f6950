"""torch's convolutions in another layout: the same results, faster on a CPU with AVX2."""

import copy
import functools
import time

import pytest
import torch
from torch import nn

from vovnet_zoo.kernels import convolution, library
from vovnet_zoo.kernels.convolution import CpuConv2d, use_fast_layout
from vovnet_zoo.kernels.surgery import become, restore
from vovnet_zoo.kernels.winograd import WinogradConv2d


@pytest.fixture
def always(monkeypatch):
    monkeypatch.setattr(convolution, "CONTIGUOUS_IS_FASTER", True)
    monkeypatch.setattr(convolution, "CONTIGUOUS_PIXELS", 1)
    monkeypatch.setattr(convolution, "CONTIGUOUS_CHANNELS", 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride, padding, dilation", [(1, 1, 1), (2, 1, 1), (2, 0, 2), ((2, 1), (0, 2), (1, 2))])
def test_same_results(bias, stride, padding, dilation, always):
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, 3, stride, padding, dilation, bias=bias).double().to(memory_format=torch.channels_last)
    ours = copy.deepcopy(plain)
    use_fast_layout(nn.Sequential(ours))
    assert type(ours) is CpuConv2d
    results = []
    for conv in (plain, ours):
        x = torch.randn(2, 5, 12, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        y = conv(x)
        (y * y.detach().cos()).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in conv.parameters())])
    for found, wanted in zip(*reversed(results), strict=True):
        assert (found - wanted).abs().max() <= 1e-13 * wanted.abs().max()


def test_one_graph(always):
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2))
    use_fast_layout(net)
    x = torch.randn(2, 3, 16, 16)
    results = []
    for function in (net, torch.compile(net, backend="aot_eager", fullgraph=True)):
        net.zero_grad()
        function(x).square().sum().backward()
        results.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(*results)


def test_become_and_restore():
    conv = nn.Conv2d(32, 32, 3, padding=1)
    weight, net = conv.weight, nn.Sequential(conv)
    for cls in (CpuConv2d, WinogradConv2d, CpuConv2d):
        become(conv, cls)
        assert type(conv) is cls and conv.weight is weight
    assert restore(net) is net and type(conv) is nn.Conv2d
    with pytest.raises(AssertionError, match="BatchNorm2d cannot become CpuConv2d, which is for Conv2d"):
        become(nn.BatchNorm2d(3), CpuConv2d)


@pytest.mark.slow
@pytest.mark.skipif(library.capability() != "AVX2", reason="only AVX2 has the slow gradient")
def test_the_contiguous_gradient_is_faster():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for channels, side in [(128, 160), (256, 80)]:
        plain = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last)
        ours = copy.deepcopy(plain)
        become(ours, CpuConv2d)
        x = torch.randn(2, channels, side, side).to(memory_format=torch.channels_last)
        seconds = {}
        for _ in range(4):
            for conv in (plain, ours):
                y = conv(x)
                dy = torch.ones_like(y)
                backward = functools.partial(y.backward, dy)
                began = time.perf_counter()
                backward()
                seconds.setdefault(conv, []).append(time.perf_counter() - began)
        assert min(seconds[ours]) < min(seconds[plain])
    torch.set_num_threads(before)
