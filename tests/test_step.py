"""One step of training: losses in parts, and float16 with loss scaling."""

import dataclasses
import functools

import pytest
import torch
from launch import losses
from timm.utils import ModelEmaV3

import train_coco
from presets import TrainConfig
from run_folder import list_checkpoints, load_checkpoint
from step import compute_losses, find_targets
from vovnet_zoo import FCOSLoss, create_detector, precision


@pytest.fixture
def config(tiny_coco, tmp_path) -> TrainConfig:
    return TrainConfig(
        data=tiny_coco, out=tmp_path / "run", model="fcos", backbone="test_resnet", channels=64, num_convs=1,
        min_size=(64, 64), max_size=96, test_size=64, batch_size=4, workers=0, steps=2, warmup_steps=0, device="cpu",
        precision="fp16", checkpoint_every=1,
    )  # fmt: skip


def test_parts_add_up_to_the_batch():
    """The losses and gradients of two halves, with the normalizers of both, add up to those that the whole gives."""
    torch.manual_seed(0)
    model = create_detector("fcos", backbone="test_resnet", channels=64, num_convs=1, num_classes=3, frozen_norm=True)
    criterion, model = FCOSLoss(), model.train()
    images = torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [60, 96], [64, 80], [50, 50]])
    corners = torch.rand(4, 2, 2) * 30
    boxes, labels = torch.cat([corners, corners + 20], dim=-1), torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 2]])
    whole, normalizers = find_targets(model, criterion, boxes, labels, 64, 96)
    halves = [find_targets(model, criterion, boxes[i : i + 2], labels[i : i + 2], 64, 96) for i in (0, 2)]
    torch.testing.assert_close(sum(n for _, n in halves), normalizers)

    losses = compute_losses(model, criterion, images, sizes, whole, normalizers, "float32")
    sum(losses.values()).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    totals = torch.zeros(3)
    for i, (targets, _) in zip((0, 2), halves, strict=True):
        part = compute_losses(model, criterion, images[i : i + 2], sizes[i : i + 2], targets, normalizers, "float32")
        sum(part.values()).backward()
        totals += torch.stack([x.detach() for x in part.values()])
    torch.testing.assert_close(totals, torch.stack(list(losses.values())).detach(), rtol=1e-5, atol=0)
    found = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-6)


def test_float16_leaves_out_a_step_that_overflows(config, monkeypatch, capsys):
    """Its weights stay and the loss scale is halved; the scale is part of the checkpoint, and training goes on.

    One line at the start says that float16 is slow on a CPU."""
    precision._warn_of_float16.cache_clear()
    real, steps = train_coco.compute_losses, []

    def compute_losses(*args):
        found = real(*args)
        steps.append(found)
        assert all(x.dtype == torch.float32 for x in found.values())
        return {name: x * 1e30 for name, x in found.items()} if len(steps) == 2 else found

    monkeypatch.setattr(train_coco, "compute_losses", compute_losses)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=1024.0))
    train_coco.main(config)
    start, rest = capsys.readouterr().err.split("step 1 of", 1)
    assert start.count("fp16 (float16) is slower on a CPU") == 1 and "is slower" not in rest
    first, second = (torch.load(path) for path in list_checkpoints(config.out / "checkpoints"))
    assert [first["scaler"]["scale"], second["scaler"]["scale"]] == [1024, 512]
    network = create_detector("fcos", backbone="test_resnet", channels=64, num_convs=1)
    names = dict(network.named_parameters())
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in names)
    assert second["progress"]["not_finite"] == 0 and not (config.out / "not_finite").exists()

    train_coco.main(dataclasses.replace(config, steps=3, allow_changes=True))
    third = load_checkpoint(config.out / "checkpoints")
    assert third["scaler"]["scale"] == 512 and third["progress"]["step"] == 3
    assert not any(torch.equal(second["model"][name], third["model"][name]) for name in names if "weight" in name)
    assert len(losses(config.out)) == 3 and all(loss > 0 for loss in losses(config.out))


def test_the_average_stays_where_the_scaler_skips_a_step(tiny_coco, tmp_path, monkeypatch):
    """With float16 a gradient that overflows leaves the weights as they are, so their average must not move either."""
    averaged, states = [], []
    real_update, real_clip, real_average = train_coco.update, train_coco.clip_gradients, ModelEmaV3.update

    def update(run, step, parts, losses, grad_norm):
        real_update(run, step, parts, losses, grad_norm)
        states.append([x.clone() for x in run.averaged.parameters()])

    def clip(run):
        if run.progress.step in (0, 2):
            next(run.model.parameters()).grad.fill_(float("inf"))
        return real_clip(run)

    def average(self, model, step):
        averaged.append(step)
        real_average(self, model, step=step)

    monkeypatch.setattr(train_coco, "update", update)
    monkeypatch.setattr(train_coco, "clip_gradients", clip)
    monkeypatch.setattr(ModelEmaV3, "update", average)
    config = TrainConfig(
        data=tiny_coco, out=tmp_path / "run", model="fcos", backbone="test_resnet", channels=64, num_convs=1,
        min_size=(64, 64), max_size=96, test_size=64, batch_size=4, workers=0, steps=4, warmup_steps=0, device="cpu",
        precision="fp16", ema=0.5, frozen_norm=True,
    )  # fmt: skip
    train_coco.main(config)
    assert averaged == [2, 4]
    assert all(map(torch.equal, states[1], states[2])) and not all(map(torch.equal, states[2], states[3]))
