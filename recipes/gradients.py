"""`GradientSum` adds up the gradients of all processes while the backward pass is still running."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 25 * 2**20  # the size that DistributedDataParallel uses: few messages, and still several of them


class GradientSum:
    """Sum each parameter's gradient over all processes, in buckets that are sent as soon as they are full.

        gradients = GradientSum(model)
        for part in parts:
            if part is parts[-1]:
                gradients.start()  # this backward pass completes the gradients: send them as they arrive
            loss(part).backward()
        counts = gradients.finish()
        losses = gradients.check(torch.cat([losses, *counts]).tolist())

    Without a process group nothing is done. torch's DistributedDataParallel would not do, for three reasons:

    - It averages. Here the loss of each process is divided by a normalizer of the global batch, so gradients add up.
    - It rebuilds its buckets after the first step, in the order in which gradients arrived. The order in which a
      collective adds several numbers depends on their place in the message, so the first step after a resume would
      round differently from the same step of a run that was never stopped. Here the buckets depend on the model and
      nothing else: a resumed run is equal to the last bit.
    - Under torch.compile it cuts the graph at its buckets, or else gives up sending during the backward pass. Here
      the graph stays whole; a compiled backward pass hands over all gradients at its end, and they are sent then.

    Buckets follow the parameters in reverse order, since the backward pass starts at the model's end.
    """

    def __init__(self, model: nn.Module, bucket_bytes: int = BUCKET_BYTES):
        self.buckets = split_into_buckets(model, bucket_bytes) if dist.is_initialized() else []
        self._waiting: list[set[nn.Parameter]] | None = None  # of each bucket, while gradients are sent as they arrive
        self._messages: list[tuple[Tensor, dist.Work]] = []  # of the first buckets
        for index, bucket in enumerate(self.buckets):
            for parameter in bucket.values():
                parameter.register_post_accumulate_grad_hook(functools.partial(self._arrived, index))

    def start(self) -> None:
        """Say that the next backward pass is the last of this step, so that each full bucket is sent at once."""
        self._waiting = [set(bucket.values()) for bucket in self.buckets]

    def _arrived(self, index: int, parameter: nn.Parameter) -> None:
        if self._waiting is None:
            return
        assert parameter in self._waiting[index], "one backward pass gave a parameter two gradients"
        self._waiting[index].remove(parameter)
        # every process sends the buckets in the same order, in whatever order its gradients arrive
        while len(self._messages) < len(self.buckets) and not self._waiting[len(self._messages)]:
            self._send()

    def _send(self) -> None:
        """Start the reduction of the next bucket: its gradients, and for each parameter a 1 if it has a gradient."""
        parameters = list(self.buckets[len(self._messages)].values())
        first, flags = parameters[0], [p.grad is not None for p in parameters]
        # from pinned memory, since a GPU would have to be waited for otherwise
        has_gradient = torch.tensor(flags, dtype=first.dtype, pin_memory=first.is_cuda)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), has_gradient.to(first.device, non_blocking=first.is_cuda)])
        self._messages.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> list[Tensor]:
        """Make each parameter's gradient the sum over all processes.

        A parameter that no process has a gradient of keeps none.

        Returns how many processes have a gradient of each parameter, for `check`. They are not looked at here: a GPU
        has to be waited for then, so that they are best read with all else that is read in a step.
        """
        while len(self._messages) < len(self.buckets):  # what `start` did not send: a process may lack a gradient
            self._send()
        messages, self._messages, self._waiting = self._messages, [], None
        counts = []
        for bucket, (flat, message) in zip(self.buckets, messages, strict=True):
            message.wait()
            *sums, has_gradient = flat.split([*(p.numel() for p in bucket.values()), len(bucket)])
            for parameter, total in zip(bucket.values(), sums, strict=True):
                if parameter.grad is not None:
                    parameter.grad.copy_(total.view_as(parameter))
            counts.append(has_gradient)
        return counts

    def check(self, numbers: list[float]) -> list[float]:
        """Return numbers without the counts at their end, which `finish` returned.

        `RuntimeError`, in all processes, where some processes have a gradient of a parameter and others do not.
        """
        names = [name for bucket in self.buckets for name in bucket]
        rest = len(numbers) - len(names)
        world_size = dist.get_world_size() if names else 1
        counts = zip(names, numbers[rest:], strict=True)
        if partly := [f"{name} ({count:.0f})" for name, count in counts if 0 < count < world_size]:
            raise RuntimeError(
                f"only some of the {world_size} processes have a gradient of {', '.join(partly)}; "
                "every process must use the same parameters in a step"
            )
        return numbers[:rest]


def split_into_buckets(model: nn.Module, bucket_bytes: int) -> list[dict[str, nn.Parameter]]:
    """Split the trainable parameters, by name and the last first, into buckets of at most `bucket_bytes` bytes.

    A parameter that is larger has a bucket of its own.
    """
    buckets = []
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.requires_grad:
            if not buckets or not fits(parameter, list(buckets[-1].values()), bucket_bytes):
                buckets.append({})
            buckets[-1][name] = parameter
    return buckets


def fits(parameter: nn.Parameter, bucket: list[nn.Parameter], bucket_bytes: int) -> bool:
    """Say whether a bucket has room for one more parameter, and has its dtype and its device."""
    same_kind = (parameter.dtype, parameter.device) == (bucket[0].dtype, bucket[0].device)
    return same_kind and sum(p.nbytes for p in bucket) + parameter.nbytes <= bucket_bytes


def limit_norm(model: nn.Module, most: float | None, foreach: bool | None = None) -> Tensor:
    """Scale all gradients down where their norm is above `most`, if that is given; returns the norm before.

    Args:
        foreach: as of torch's functions.
    """
    if most:
        return nn.utils.clip_grad_norm_(model.parameters(), most, foreach=foreach)
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], foreach=foreach)
