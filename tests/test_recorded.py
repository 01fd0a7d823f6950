"""A step as a CUDA graph: what can be tested without a GPU. `test_null_gpu.py` and `test_gpu_kernels.py` do more."""

import types

import torch

import recorded
from recorded import Passes, RecordedPasses


def run_of(weight: torch.nn.Parameter) -> types.SimpleNamespace:
    """What passes need of a run."""
    optimizer = torch.optim.SGD([weight, torch.nn.Parameter(torch.zeros(2))], lr=1.0)
    gradients = types.SimpleNamespace(start=lambda: starts.append(1))
    starts: list[int] = []
    config = types.SimpleNamespace(precision="float32")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run = types.SimpleNamespace(optimizer=optimizer, gradients=gradients, config=config, scaler=scaler, starts=starts)
    run.model = run.criterion = run.device = None
    return run


def inputs_of(height: int) -> tuple:
    images = torch.full((1, 3, height, 4), 2, dtype=torch.uint8)
    targets = recorded.Targets(torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5, 4), torch.ones(1, 5))
    return images, torch.tensor([[height, 4]]), targets, torch.ones(3)


def test_gradients_are_those_of_single_kernels(monkeypatch):
    """Whatever is recorded or not, each step's gradients begin at zero, and a parameter without one has none."""
    weight = torch.nn.Parameter(torch.ones(1))

    def compute(model, criterion, images, sizes, targets, normalizers, precision):
        return {"loss_cls": (weight * images.float()).sum()}

    replayed = []

    class Graph:
        def replay(self):
            replayed.append(1)

    def record(self, inputs):
        """As the real one, but the graph does nothing."""
        room = self.room_for(inputs)
        images, sizes, *targets, normalizers = inputs
        for times in (1, 2):  # what the graph does each time
            self.add_gradients(images, sizes, recorded.Targets(*targets), normalizers)
            assert weight.grad is self.gradients[weight] and weight.grad.item() == times * 24 * images.shape[2]
        weight.grad.zero_()
        return recorded.Recorded(Graph(), room, {"loss_cls": torch.zeros(())})

    monkeypatch.setattr(RecordedPasses, "record", record)
    monkeypatch.setattr(RecordedPasses, "has_room", lambda self: True)
    run = run_of(weight)
    passes = RecordedPasses(run, compute)
    heights = [8, 16, 8, 8, 24, 16]
    for height, expected in zip(heights, [192, 384, 0, 0, 576, 0], strict=True):  # a graph that does nothing gives 0
        passes.begin()
        losses = passes(*inputs_of(height), last=True)
        assert weight.grad.item() == expected and not losses["loss_cls"].requires_grad
        assert run.optimizer.param_groups[0]["params"][1].grad is None
        run.optimizer.zero_grad(set_to_none=True)
    assert len(replayed) == 3 and len(passes.graphs) == 2 and not run.starts
    # nothing is recorded within the first step, whose gradients are in other memory
    passes = RecordedPasses(run, compute)
    passes.begin()
    for _ in range(3):
        passes(*inputs_of(8), last=False)
    assert weight.grad.item() == 3 * 192 and not passes.graphs
    plain = Passes(run, compute)
    run.optimizer.zero_grad(set_to_none=True)
    plain.begin()
    plain(*inputs_of(8), last=False)
    assert not run.starts and plain(*inputs_of(8), last=True) and run.starts == [1] and weight.grad.item() == 2 * 192


def test_inputs_of_all_sizes_share_memory():
    passes = RecordedPasses(run_of(torch.nn.Parameter(torch.ones(1))), None)
    places = []
    for height in (16, 8, 32, 24):
        images, sizes, targets, normalizers = inputs_of(height)
        given = (images, sizes, *targets, normalizers)
        found = passes.room_for(given)
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in given]
        for x, value in zip(found, given, strict=True):
            assert torch.equal(x.copy_(value), value)
        places.append([x.data_ptr() for x in found])
    assert places[0] == places[1] and places[2] == places[3]  # only a larger one needs another memory
    assert places[0][0] != places[2][0] and places[0][1:] == places[2][1:]


def test_no_more_is_recorded_without_room(monkeypatch, caplog):
    passes = RecordedPasses(run_of(torch.nn.Parameter(torch.ones(1))), None)
    free = [20 * 2**30]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 * 2**30))
    monkeypatch.setattr(recorded.log, "propagate", True)
    with caplog.at_level("INFO"):
        assert passes.has_room() and not caplog.records
        free[0] = 10 * 2**30
        assert (
            not passes.has_room()
            and "steps of 0 sizes of images are recorded" in caplog.text
            and "10.0 GiB" in caplog.text
        )
        free[0] = 70 * 2**30
        assert not passes.has_room() and len(caplog.records) == 1
