"""The optimizer that a configuration names: its groups are tested in test_training.py and test_golden.py."""

import dataclasses

import pytest
import timm.optim.muon
import torch
from torch import nn

import optim
from optim import Float32Muon, create_optimizer
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
        assert (type(optimizer) is Float32Muon) != native and isinstance(optimizer, timm.optim.Muon)
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
