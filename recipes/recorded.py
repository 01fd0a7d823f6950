"""`RecordedPasses` records the kernels of a forward and a backward pass as a CUDA graph, once for each size of images.

A host needs tens of milliseconds to start the kernels of a step one after the other, and a GPU may be done sooner. The
kernels of a graph are started together. They are the same kernels, so the numbers do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradients import GradientSum
from runtime import log
from vovnet_zoo.loss import Targets
from vovnet_zoo.words import counted

MOST = 128  # graphs; each takes some megabytes of the GPU's memory
# Of the most memory that a step has taken. The graphs share one memory, and steps of other sizes need theirs beside it.
ROOM = 2.2


class Trained(Protocol):
    """The passes need these things of a run, or of a trial."""

    config: Any
    model: Any
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    gradients: GradientSum


class Passes:
    """This does the forward and the backward pass of one part of a batch, kernel by kernel."""

    replayed = False  # the last pass was

    def __init__(self, run: Trained, compute: Callable[..., dict[str, Tensor]]):
        self.run, self.compute = run, compute

    def begin(self) -> None:
        """Begin a step, in which gradients are added up from zero."""

    def __call__(
        self, images: Tensor, sizes: Tensor, targets: Targets, normalizers: Tensor, last: bool
    ) -> dict[str, Tensor]:
        """Add the gradients of a part to the parameters' gradients, and return its losses; see `step.compute_losses`.

        `last` says that the gradients of the step are complete then, so that they can be sent as they arrive.
        """
        if last:
            self.run.gradients.start()
        return self.backward(images, sizes, targets, normalizers)

    def backward(self, images: Tensor, sizes: Tensor, targets: Targets, normalizers: Tensor) -> dict[str, Tensor]:
        """Do both passes, one kernel after the other."""
        run = self.run
        losses = self.compute(run.model, run.criterion, images, sizes, targets, normalizers, run.config.precision)
        run.scaler.scale(sum(losses.values())).backward()
        return {name: x.detach() for name, x in losses.items()}


@dataclass
class Recorded:
    """A graph reads these inputs and fills these losses."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    losses: dict[str, Tensor]


class RecordedPasses(Passes):
    """These passes are recorded when a size comes for the second time, and replayed from then on.

    Gradients are always in the same memory, where the graphs add to them. They are sent when all are there.
    """

    def __init__(self, run: Trained, compute: Callable[..., dict[str, Tensor]]):
        super().__init__(run, compute)
        self.seen: set[torch.Size] = set()
        self.graphs: dict[torch.Size, Recorded] = {}
        self.gradients: dict[torch.nn.Parameter, Tensor] = {}
        self.attached = False  # the parameters' gradients are those
        self.memory: list[Tensor] = []  # of each input, uint8
        self.pool, self.full = None, False

    def begin(self) -> None:
        self.attached = bool(self.gradients)
        if self.attached:
            torch._foreach_zero_(list(self.gradients.values()))
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient

    def __call__(
        self, images: Tensor, sizes: Tensor, targets: Targets, normalizers: Tensor, last: bool
    ) -> dict[str, Tensor]:
        inputs = (images, sizes, *targets, normalizers)
        self.replayed = images.shape in self.graphs
        if self.attached and images.shape in self.seen and images.shape not in self.graphs and self.has_room():
            self.graphs[images.shape] = self.record(inputs)
        if recorded := self.graphs.get(images.shape):
            for x, value in zip(recorded.inputs, inputs, strict=True):
                x.copy_(value)
            recorded.graph.replay()
            return recorded.losses
        self.seen.add(images.shape)
        losses = self.backward(images, sizes, targets, normalizers)
        if not self.gradients:
            trained = [x for group in self.run.optimizer.param_groups for x in group["params"] if x.grad is not None]
            self.gradients = {x: torch.zeros_like(x) for x in trained}
        return losses

    def record(self, inputs: tuple[Tensor, ...]) -> Recorded:
        """Record the passes for inputs of this size, which does not run them."""
        images, sizes, *targets, normalizers = inputs = self.room_for(inputs)
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # other threads may allocate pinned memory meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            losses = self.add_gradients(images, sizes, Targets(*targets), normalizers)
        return Recorded(graph, inputs, losses)

    def add_gradients(self, images: Tensor, sizes: Tensor, targets: Targets, normalizers: Tensor) -> dict[str, Tensor]:
        """Do both passes, and add all gradients in a few kernels, where autograd takes one for each parameter."""
        for parameter in self.gradients:
            parameter.grad = None
        losses = self.backward(images, sizes, targets, normalizers)
        given = {x for group in self.run.optimizer.param_groups for x in group["params"] if x.grad is not None}
        assert given == self.gradients.keys(), "another step gave other parameters gradients"
        torch._foreach_add_(list(self.gradients.values()), [x.grad for x in self.gradients])
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        return losses

    def room_for(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return memory for inputs like these, which graphs of other sizes use too."""
        found = []
        for i, x in enumerate(inputs):
            if i == len(self.memory) or self.memory[i].numel() < x.nbytes:
                self.memory[i : i + 1] = [torch.empty(x.nbytes, dtype=torch.uint8, device=x.device)]
            found.append(self.memory[i][: x.nbytes].view(x.dtype).view(x.shape))
        return tuple(found)

    def has_room(self) -> bool:
        """Say whether one more graph can be recorded; once it cannot, no more are."""
        if self.full:
            return False
        torch.cuda.empty_cache()
        free, needed = torch.cuda.mem_get_info(self.run.device)[0], ROOM * torch.cuda.max_memory_allocated()
        self.full = free < needed or len(self.graphs) == MOST
        if self.full:
            why = f"the GPU has {free / 2**30:.1f} GiB free" if free < needed else "they are so many"
            log.info(
                "steps of %s of images are recorded as CUDA graphs, and no more, since %s; the kernels of others are "
                "started one by one",
                *(counted(len(self.graphs), "size"), why),
            )
        return not self.full
