"""The optimizer that a configuration names: its groups are tested in test_training.py and test_golden.py."""

import dataclasses

import pytest
import timm.optim.muon
import torch
from torch import nn

import optim
from optim import BatchedMuon, Float32Muon, create_optimizer
from presets import PRESETS


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(24, 16))


def test_muon_in_float32(monkeypatch):
    """Without bfloat16 instructions Muon's update has the precision of float32, with them of bfloat16."""
    config = dataclasses.replace(PRESETS["quickstart"][1], optimizer="muon", lr=1.0, weight_decay=0.0)
    gradient, updates = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)), {}
    original = timm.optim.muon.zeropower_via_newtonschulz
    for native in (False, True):
        monkeypatch.setattr(optim, "multiplies_bfloat16", lambda native=native: native)
        model = Tiny()
        optimizer = create_optimizer(model, config)
        assert type(optimizer) is (BatchedMuon if native else Float32Muon)
        weight = model.backbone[0].weight
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        optimizer.step()
        updates[native] = (before - weight.detach()).double()
        assert timm.optim.muon.zeropower_via_newtonschulz is original
    coefficients = timm.optim.muon.resolve_ns_coefficients("quintic", timm.optim.muon._COEFFICIENTS)
    exact = original(gradient.double(), 5, coefficients, dtype=torch.float64)
    wanted = exact * (updates[False].norm() / exact.norm())  # the step's length depends on options of Muon
    assert (updates[False] - wanted).norm() < 1e-5 * wanted.norm()
    assert 1e-3 * wanted.norm() < (updates[True] - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize("nesterov", [False, True])
def test_equal_shapes_in_one_product(monkeypatch, nesterov):
    """In float64 three steps are timm's: weights, momentum and the state dict, whatever the order of the memory."""
    ours, theirs, shapes = *optimizers(nesterov), []
    original = timm.optim.muon.zeropower_via_newtonschulz

    def count(stacked, *arguments, **options):
        shapes.append(tuple(stacked.shape))
        return original(stacked, *arguments, **options | {"dtype": torch.float64})

    for step in range(3):
        for optimizer in (ours, theirs):
            generator = torch.Generator().manual_seed(step)
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / (step + 1)
                for p in group["params"]:
                    p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", count)
        theirs.step()
        shapes.clear()
        ours.step()
        monkeypatch.setattr(timm.optim.muon, "zeropower_via_newtonschulz", original)
        assert sorted(shapes) == [(3, 8, 72), (16, 24), (24, 16)]  # of 5 matrices
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        assert (p - q).norm() <= 1e-12 * q.norm() and p.stride() == q.stride()
        for key, x in theirs.state[q].items():
            torch.testing.assert_close(ours.state[p][key], x, rtol=1e-12, atol=0)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def optimizers(nesterov: bool) -> list[timm.optim.Muon]:
    """Both kinds, of equal float64 weights: three convolutions, two of them channels last, two matrices and a bias."""
    made = []
    for kind in (BatchedMuon, timm.optim.Muon):
        generator = torch.Generator().manual_seed(7)
        shapes = [(8, 8, 3, 3)] * 3 + [(16, 24), (24, 16), (8,)]
        params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
        for p in params[:2]:
            p.data = p.data.to(memory_format=torch.channels_last)
        made.append(kind(params, lr=0.1, weight_decay=0.1, nesterov=nesterov))
    return made


def test_a_step_that_fails_leaves_timm_as_it_was():
    optimizer = torch.optim.Optimizer.__new__(Float32Muon)
    original = timm.optim.muon.zeropower_via_newtonschulz
    with pytest.raises(AttributeError):
        Float32Muon.step(optimizer)
    assert timm.optim.muon.zeropower_via_newtonschulz is original


@pytest.mark.parametrize(
    "capability, features, expected",
    [
        ("AVX512", {"avx2": True, "avx512_bf16": True}, True),
        ("AVX512", {"avx2": True, "amx_bf16": True}, True),
        ("AVX512", {"avx2": True, "avx512_bf16": False}, False),
        ("AVX2", {"avx2": True, "amx_bf16": True}, False),  # by ATEN_CPU_CAPABILITY
        ("AVX2", {"avx2": True}, False),
        ("DEFAULT", {"avx2": False}, False),
        ("DEFAULT", {"neon": True, "bf16": True}, True),
        ("SVE256", {"neon": True, "bf16": False}, False),
    ],
)
def test_which_cpus_multiply_bfloat16(monkeypatch, capability, features, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features)
    assert optim.multiplies_bfloat16() is expected
