"""The sum of gradients over processes: the same whatever the buckets, and sent while the backward pass runs."""

import pytest
import torch
import torch.distributed as dist
from launch import fork
from torch import nn

from gradients import GradientSum, limit_norm, split_into_buckets

BUCKETS = (1, 3000, 1 << 30)  # bytes: one parameter a bucket, some, the single message


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.GroupNorm(4, 24),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5),
    ).to(memory_format=torch.channels_last)  # fmt: skip


def gradients(rank: int, bucket_bytes: int, parts: int = 1, whole_numbers: bool = False) -> list[torch.Tensor]:
    """Gradients of the network, summed over processes that each have other inputs."""
    model, generator = network(), torch.Generator().manual_seed(1 + rank)
    if whole_numbers:  # of a size that sums of float32 hold exactly
        for parameter in model.parameters():
            parameter.register_hook(lambda g: (g * 1000).round())
    total = GradientSum(model, bucket_bytes)
    for part in range(parts):
        if part == parts - 1:
            total.start()
        model(torch.randn(2, 3, 8, 8, generator=generator)).square().sum().backward()
    total.finish()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("world_size", [4, 2, 1])
def test_in_processes(world_size):
    """The checks below, in a group of processes."""
    fork(world_size, check_all, world_size)


def check_all(rank: int, world_size: int) -> None:
    dist.init_process_group("gloo")
    check_buckets(rank, world_size)
    check_overlap(rank, world_size)
    check_buckets_stay(rank, world_size)
    check_missing_gradient(rank, world_size)
    if world_size == 2:
        check_compiled(rank, world_size)
    dist.destroy_process_group()


def check_buckets(rank: int, world_size: int) -> None:
    """Bitwise the gradients of the single message, and the same in all processes.

    gloo adds more than two numbers in an order that depends on their place in the message, so that with 4 processes
    only numbers whose sums are exact can be compared to the bit, and others to a rounding.
    """
    for parts in (1, 2):
        for exact in (False, True):
            small, medium, single = (gradients(rank, size, parts, exact) for size in BUCKETS)
            bitwise = exact or world_size <= 2
            torch.testing.assert_close(small, single, rtol=0 if bitwise else 1e-5, atol=0 if bitwise else 1e-4)
            torch.testing.assert_close(medium, single, rtol=0 if bitwise else 1e-5, atol=0 if bitwise else 1e-4)
            assert all(g.is_contiguous(memory_format=torch.channels_last) for g in medium if g.ndim == 4)
            for gradient in medium:
                first = gradient.clone()
                dist.broadcast(first, src=0)
                assert torch.equal(gradient, first)
    again = gradients(rank, BUCKETS[1], 2, True)
    assert all(map(torch.equal, again, medium))
    expected = [torch.zeros_like(g) for g in medium]
    for other in range(world_size):
        model, generator = network(), torch.Generator().manual_seed(1 + other)
        for _ in range(2):
            inputs = torch.randn(2, 3, 8, 8, generator=generator)
            found = torch.autograd.grad(model(inputs).square().sum(), list(model.parameters()))
            expected = [e + (1000 * f).round() for e, f in zip(expected, found, strict=True)]
    assert all(map(torch.equal, medium, expected))


def check_overlap(rank: int, world_size: int) -> None:
    """When the first layer's gradient arrives, all other buckets are on their way; before the last part, none is."""
    model, sent = network(), []
    model[0].weight.register_post_accumulate_grad_hook(lambda _: sent.append(len(total._messages)))
    total = GradientSum(model, bucket_bytes=1)
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    total.start()
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    total.finish()
    others = len(list(model.parameters())) - 2
    assert sent[0] == 0 and sent[1] >= others


def check_buckets_stay(rank: int, world_size: int) -> None:
    """The buckets are as for a new model after any number of steps, in whatever order gradients arrive."""
    model = network()
    total = GradientSum(model, bucket_bytes=3000)
    before = [list(bucket) for bucket in total.buckets]
    order = [name for name, _ in reversed(list(model.named_parameters()))]
    assert len(before) > 2 and sum(before, []) == order
    for _ in range(3):
        total.start()
        late = sum(p.sum() for p in reversed(list(model.parameters())))  # another order than the network's
        (late + model(torch.ones(1, 3, 8, 8)).sum()).backward()
        total.finish()
    assert [list(bucket) for bucket in total.buckets] == before
    assert [list(bucket) for bucket in GradientSum(network(seed=5), bucket_bytes=3000).buckets] == before


def check_missing_gradient(rank: int, world_size: int) -> None:
    """All processes raise, naming the parameter that some of them lack; one that all lack is none of these."""
    for bucket_bytes in BUCKETS:
        model = network()
        total = GradientSum(model, bucket_bytes)
        inputs = torch.ones(2, 3, 8, 8)
        total.start()
        model[:3](inputs).sum().backward()  # the rest has no gradient in any process
        total.check(torch.cat(total.finish()).tolist())
        assert model[3].weight.grad is None and model[6].bias.grad is None
        total.start()
        outputs = model(inputs) if rank == 0 else model[:6](inputs) @ model[6].weight.T  # without its bias
        outputs.sum().backward()
        if world_size == 1:
            assert total.check([0.5, *torch.cat(total.finish()).tolist()]) == [0.5]
        else:
            message = rf"only some of the {world_size} processes have a gradient of 6.bias \(1\); every"
            with pytest.raises(RuntimeError, match=message):
                total.check([0.5, *torch.cat(total.finish()).tolist()])


def check_compiled(rank: int, world_size: int) -> None:
    """A compiled network stays one graph, and its gradients are summed too."""
    found = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager", fullgraph=True)):
        model = network()
        total, call = GradientSum(model, bucket_bytes=3000), wrap(model)
        for seed in (1, 2):
            total.start()
            generator = torch.Generator().manual_seed(10 * seed + rank)
            call(torch.randn(2, 3, 8, 8, generator=generator)).square().sum().backward()
            total.finish()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


def test_without_processes():
    """Nothing is done, and nothing is needed."""
    model = network()
    total = GradientSum(model)
    total.start()
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    assert total.finish() == [] and total.check([0.5]) == [0.5]
    assert not total.buckets and all(map(torch.equal, before, [p.grad for p in model.parameters()]))


def test_buckets_are_of_one_kind_and_of_trainable_parameters():
    model = network()
    model[3].to(torch.float64)
    model[2].weight.requires_grad = False
    buckets = [list(bucket) for bucket in split_into_buckets(model, 1 << 30)]
    assert buckets == [["6.bias", "6.weight"], ["3.bias", "3.weight"], ["2.bias", "0.bias", "0.weight"]]


@pytest.mark.parametrize("most", [None, 2.0, 100.0])
def test_the_norm_is_limited_if_there_is_a_limit(most):
    """The norm is torch's, and without a limit no gradient is written."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for parameter in list(model.parameters())[1:]:  # one has none
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.grad._version for parameter in list(model.parameters())[1:]]
    norm = limit_norm(model, most)
    assert norm.item() == pytest.approx(14**0.5)
    assert model[1].bias.grad[0].item() == pytest.approx(2 / 14**0.5 if most == 2.0 else 1)
    if most is None:
        assert [parameter.grad._version for parameter in list(model.parameters())[1:]] == before
