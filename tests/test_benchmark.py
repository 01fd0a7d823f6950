"""The benchmarks run, and measure what they say; times are theirs to tell."""

import functools
import json

import pytest
import torch

import benchmark
import profile_blocks
from vovnet_zoo import compile_detector


@pytest.fixture(autouse=True)
def without_inductor(monkeypatch):
    torch._dynamo.reset()
    traced = functools.partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(benchmark, "compiled", traced)
    monkeypatch.setattr(profile_blocks, "compiled", traced)
    monkeypatch.setattr(benchmark, "compile_detector", functools.partial(compile_detector, backend="eager"))


def test_benchmark(tmp_path, capsys):
    config = benchmark.BenchmarkConfig(
        model="fcos_vovnet27_slim_fpn", size=(64, 96), train_batch=2, precisions=("float32",), rounds=2,
        others=False, device="cpu", out=tmp_path,
    )  # fmt: skip
    rows = benchmark.main(config)
    names = [row.name for row in rows]
    peer = "torchvision FCOS on vovnet27_slim, eager"
    assert names == [
        peer,
        "ours, eager",
        "ours, compiled",
        peer,
        "ours, eager",
        "ours, eager, checkpointing",
        "ours, compiled",
    ]
    assert rows[0].ratio == rows[3].ratio == 1
    assert all(row.fastest <= row.seconds <= row.slowest and row.gflop > 0 for row in rows)
    assert [row.kept_mib > 0 for row in rows] == [False] * 3 + [True] * 4
    assert rows[5].kept_mib < rows[4].kept_mib  # torchvision's keeps more where images outweigh the weights
    table = capsys.readouterr().out
    assert all(name in table for name in names)
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert len(record["rows"]) == len(rows) and record["peak_gflops"]["float32"] > 0
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


def test_kept_by():
    weight = torch.ones(100, requires_grad=True)
    x = torch.ones(100)
    assert benchmark.kept_by(lambda: ((x * weight) * weight).sum()) == 2 * 400 / 2**20  # x and x * weight, not weight


def test_profile_blocks(tmp_path):
    config = profile_blocks.ProfileConfig(
        backbone="vovnet27_slim", size=(64, 96), batch=1, precisions=("float32",), rounds=1, device="cpu",
        out=tmp_path / "profile.json",
    )  # fmt: skip
    rows = profile_blocks.main(config)
    assert [row["blocks"] for row in rows] == ["timm's, eager", "ours, eager", "timm's, compiled", "ours, compiled"]
    for row in rows:
        for name in ("forward", "backward"):
            groups = sum(row[f"{name}, {group}"] for group in profile_blocks.GROUPS)
            assert 0 < groups < row[f"{name}, all"]
        assert row["forward, concatenation"] > 0  # all of them eager here
    assert json.loads(config.out.read_text())["rows"] == rows
