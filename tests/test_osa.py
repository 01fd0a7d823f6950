import copy
import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch import nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import vovnet_zoo  # noqa: F401  (registers the backbones)
from vovnet_zoo.kernels import osa
from vovnet_zoo.kernels.freeze import freeze
from vovnet_zoo.kernels.osa import FrozenOsaBlock, aggregate, fuse_for_training
from vovnet_zoo.kernels.winograd import use_winograd, why_not

needs_winograd = pytest.mark.skipif(bool(why_not()), reason=why_not())


def frozen(name):
    """A backbone whose frozen batch norms do something."""
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True).train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
    model(torch.randn(4, 3, 64, 64))  # sets running statistics
    return freeze_batch_norm_2d(model)


def run(model, images, precision="float32"):
    """Output, gradients, and the tensors kept for the backward pass that are no parameters."""
    kept, weights = {}, {p.data_ptr() for p in model.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda x: kept.update({x.data_ptr(): x}) or x, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"),
    ):
        ys = model(images)
    sum(y.float().square().mean() if y.dtype != torch.float64 else y.square().mean() for y in ys).backward()
    return ys, [p.grad for p in model.parameters()], [x for pointer, x in kept.items() if pointer not in weights]


def count_flop(model, images):
    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def relative_error(found, wanted):
    return max(((a - b).norm() / b.norm().clamp_min(1e-12)).item() for a, b in zip(found, wanted, strict=True))


BLOCKS = {"vovnet39": 6, "vovnetv2_39": 6, "vovnetv2_19_dw": 4, "vovnet27_slim": 4}
PRECISIONS = ["float32", "bf16", "bf16 with float32 arithmetic"]
# A CPU without products of bfloat16 takes seconds for the larger networks in bfloat16.
CASES = [
    pytest.param(*case, marks=pytest.mark.slow) if case[1] == "bf16" and case[0].endswith("39") else case
    for case in itertools.product(BLOCKS, PRECISIONS)
]


@pytest.mark.parametrize("name, precision", CASES)
def test_same_results_less_kept(name, precision):
    torch.manual_seed(0)
    plain = timm.create_model(name, features_only=True).train()
    if precision.endswith("arithmetic"):
        use_winograd(plain)
    fused = copy.deepcopy(plain)
    assert fuse_for_training(fused) == BLOCKS[name]
    assert list(fused.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)
    (ys, gradients, kept), (fused_ys, fused_gradients, fused_kept) = (run(m, images, precision) for m in (plain, fused))
    torch.testing.assert_close(fused_ys, ys, rtol=0, atol=0)
    torch.testing.assert_close(fused_gradients, gradients, rtol=1e-4, atol=1e-4 if precision == "float32" else 1e-2)
    assert sum(x.nbytes for x in fused_kept) < 0.98 * sum(x.nbytes for x in kept)


@pytest.mark.parametrize("name", ["vovnet27_slim", "ese_vovnet19b_dw", "vovnetv2_19_slim", "vovnetv2_19_slim_dw"])
def test_frozen_norms_go_into_weights(name):
    plain = frozen(name).double()
    fused = copy.deepcopy(plain)
    fuse_for_training(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    (ys, gradients, _), (fused_ys, fused_gradients, _) = run(plain, images), run(fused, images)
    assert relative_error(fused_ys, ys) < 1e-10 and relative_error(fused_gradients, gradients) < 1e-9


def test_frozen_norms_keep_low_precision():
    """timm's frozen norms turn bfloat16 maps into float32 ones, and both are kept."""
    model, images = frozen("vovnet27_slim"), torch.randn(2, 3, 64, 64)
    maps = [x for x in run(model, images, "bf16")[2] if x.ndim == 4 and len(x) == 2]
    assert any(x.dtype == torch.float32 for x in maps)
    fuse_for_training(model)
    fused_maps = [x for x in run(model, images, "bf16")[2] if x.ndim == 4 and len(x) == 2 and x.is_floating_point()]
    assert all(x.dtype == torch.bfloat16 for x in fused_maps)


def one_shot_aggregation(x, weights, shifts):
    maps = [x]
    for w, shift in zip(weights[:-1], shifts, strict=False):
        maps.append(F.conv2d(maps[-1], w, shift, padding=1).relu())
    return F.conv2d(torch.cat(maps, dim=1), weights[-1], shifts[-1]).relu()


def aggregate_arguments(batch, channels, height, width, layer, layers, outputs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(shape, generator=generator) * scale

    x = normal(batch, channels, height, width).to(memory_format=torch.channels_last).to(dtype)
    inputs = [channels] + [layer] * (layers - 1)
    weights = [normal(layer, c, 3, 3, scale=(9 * c / 2) ** -0.5) for c in inputs]
    total = channels + layers * layer
    weights.append(normal(outputs, total, 1, 1, scale=total**-0.5))
    return x, weights, [normal(len(w), scale=0.1) for w in weights]


@needs_winograd
@pytest.mark.parametrize("shape", [(1, 32, 9, 13, 48, 1, 40), (2, 40, 8, 8, 32, 3, 33), (1, 128, 70, 61, 64, 5, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_aggregate(shape, dtype):
    """As near to float64 as conv2d is in the same dtype: rounding turns some ReLUs."""
    x, weights, shifts = aggregate_arguments(*shape, dtype)
    results = {}
    for kind in ("ours", dtype, torch.float64):
        given = [t.to(t.dtype if kind == "ours" else kind, copy=True).requires_grad_() for t in (x, *weights)]
        if kind == "ours":
            y, maps = aggregate(given[0], given[1:], shifts)
            assert y.dtype == maps.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        else:
            y = one_shot_aggregation(given[0], given[1:], [s.to(kind) for s in shifts])
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(y.dtype))
        results[kind] = [y.detach(), *(t.grad for t in given)]
    assert [t.dtype for t in results["ours"]] == [dtype, dtype] + [torch.float32] * (shape[5] + 1)
    for i, (found, near, wanted) in enumerate(zip(*results.values(), strict=True)):
        error, theirs = (relative_error([t.double()], [wanted]) for t in (found, near))
        assert error < (max(1.1 * theirs, 2e-3 if i else 1e-5) if dtype == torch.float32 else 1.1 * theirs)


@needs_winograd
def test_operators():
    x, weights, shifts = aggregate_arguments(1, 32, 6, 5, 16, 2, 24)
    given = [t.requires_grad_() for t in (x, *weights)]
    torch.library.opcheck(aggregate, (given[0], given[1:], shifts))
    y, maps = aggregate(x, weights, shifts)
    given = [t.detach() for t in (torch.randn(y.shape), x, maps, y)]
    torch.library.opcheck(osa._aggregate_backward, (*given, [w.detach() for w in weights]))


@needs_winograd
@pytest.mark.parametrize("precision, outputs, tolerance", [("float32", 1e-5, 0.02), ("bf16", 0.05, 0.5)])
def test_one_memory(precision, outputs, tolerance):
    """With Winograd convolutions and frozen norms a block is one operator, and what is kept are its maps.

    Gradients differ by more than rounding: where the input of a ReLU is nearly 0, rounding turns it on or off.
    """
    plain = frozen("vovnet27_slim").to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    fuse_for_training(fused)
    use_winograd(fused)
    images = torch.randn(2, 3, 256, 192, generator=torch.Generator().manual_seed(1))  # enough for two of the blocks
    with profile() as trace:
        ys, gradients, kept = run(fused, images, precision)
    assert {row.key: row.count for row in trace.key_averages()}["vovnet_zoo::aggregate_backward"] == 2
    wanted_ys, wanted_gradients, _ = run(plain.double(), images.double())
    assert relative_error([y.double() for y in ys], wanted_ys) < outputs
    assert relative_error([g.double() for g in gradients], wanted_gradients) < tolerance
    widths = [x.shape[1] for x in kept if x.ndim == 4 and len(x) == 2]
    assert widths.count(5 * 64) == widths.count(5 * 80) == 1 and widths.count(80) == 0


@needs_winograd
@pytest.mark.parametrize(
    "name, blocks", [("vovnet39", 6), ("vovnetv2_39", 6), ("ese_vovnet39b", 6), ("vovnetv2_19_dw", 0)]
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_inference_in_one_memory(name, blocks, dtype, tolerance, monkeypatch):
    """Where maps are large enough a block is one operator; `dtype` is the dtype of the maps."""
    plain = frozen(name).eval().requires_grad_(False)
    fused = freeze(copy.deepcopy(plain), winograd=True).to(memory_format=torch.channels_last)
    assert sum(type(m) is FrozenOsaBlock for m in fused.modules()) == blocks
    images = torch.randn(2, 3, 160, 96, generator=torch.Generator().manual_seed(1))
    calls = []
    monkeypatch.setattr(osa, "aggregate", lambda x, *rest: calls.append(x.dtype) or aggregate(x, *rest))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ys = fused(images)
    assert calls == [dtype] * max(0, blocks - 2)  # not at 5x3
    assert count_flop(fused, images) == count_flop(plain, images)
    assert relative_error([y.double() for y in ys], plain.double()(images.double())) < tolerance


@pytest.mark.parametrize("winograd", [False, True])
def test_one_graph(winograd):
    model = frozen("vovnet27_slim")
    fuse_for_training(model)
    if winograd:
        use_winograd(model)
    images = torch.randn(2, 3, 256, 192)
    wanted, got = model(images), torch.compile(model, backend="aot_eager", fullgraph=True)(images)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    sum(x.sum() for x in got).backward()
