"""The moving average of the weights is timm's, and is made without new lists of tensors."""

import torch
from timm.utils import ModelEmaV3
from torch import nn

from average import MovingAverage


def test_equal_to_timms_to_the_bit(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    ours, theirs = MovingAverage(model, 0.9), ModelEmaV3(model, decay=0.9, use_warmup=True)
    start = {name: x + 1 for name, x in model.state_dict().items()}
    for ema in (ours, theirs):
        ema.module.load_state_dict(start)  # as a run that goes on does
    for step in range(1, 30):
        with torch.no_grad():
            for x in model.parameters():
                x += torch.randn_like(x) / 10
        model(torch.randn(2, 3, 8, 8))
        theirs.update(model, step=step)
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "state_dict", None)
            ours.update(model, step=step)
        for (name, x), y in zip(ours.module.state_dict().items(), theirs.module.state_dict().values(), strict=True):
            assert torch.equal(x, y), name
    assert ours.module[1].num_batches_tracked == 29
