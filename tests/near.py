"""Bounds of floating point results that hold on every CPU: they are counted in roundings of the values' own size.

CPUs add the same products in different orders, so results differ by roundings, and an absolute bound holds only where
the size of the values and the CPU are known.
"""

import torch
from torch import Tensor, nn

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}  # the largest relative error of one rounding


def assert_near(
    found: Tensor,
    wanted: Tensor,
    roundings: float,
    size: float | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    what: str = "",
) -> None:
    """Two tensors of one shape differ by at most `roundings` roundings of numbers of `size`.

    Args:
        found, wanted: of any floating point dtype; compared in float64.
        roundings: a count, which a comment or `sum_roundings` should explain.
        size: a number, or a tensor that broadcasts to `wanted`; None takes the largest absolute value of `wanted`.
            With `wanted` itself, each value is bounded by its own size.
        dtype: the format whose roundings are counted.

    Raises:
        AssertionError: another shape, or a difference above the bound, or one that is not a number.
    """
    assert found.shape == wanted.shape, f"{what}: {list(found.shape)} instead of {list(wanted.shape)}"
    if not wanted.numel():
        return
    found, wanted = found.detach().double(), wanted.detach().double()
    size = wanted.abs().max() if size is None else torch.as_tensor(size, dtype=torch.float64).abs()
    error, unit = (found - wanted).abs(), (size * UNIT[dtype]).expand_as(wanted)
    wrong = ~(error <= roundings * unit)  # so that NaN is wrong
    if wrong.any():
        counted = torch.where(error > 0, error / unit, error)
        at = counted.nan_to_num(nan=float("inf")).argmax()
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} values are too far away: {found.flatten()[at]:.9g} instead "
            f"of {wanted.flatten()[at]:.9g} is {counted.flatten()[at]:.1f} roundings away, allowed are {roundings:.1f}"
        )


def sum_roundings(*modules: nn.Module) -> float:
    """The roundings of a result that passes all convolutions and linear layers of `modules`, one after another.

    A sum of n products rounds n times. These errors have random signs, so together they are as large as sqrt(n)
    roundings. The n of all layers add up under the root, since layers follow one another, and the norms between them
    keep the size of the values. Layers side by side are counted as if they were in a row.
    """
    layers = [m for module in modules for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return sum(layer.weight[0].numel() for layer in layers) ** 0.5


def assert_same_detections(ours: dict, theirs: dict, size: int) -> None:
    """Each detection of the one is near a detection of the other: to 1e-4 in the score, and of the size in the box."""
    assert ours["boxes"].shape == theirs["boxes"].shape and len(ours["scores"]) == len(theirs["scores"])
    if len(ours["scores"]) == 0:
        return
    distance = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(-1) / size  # [N,N]
    distance = distance.maximum((ours["scores"][:, None] - theirs["scores"]).abs())
    distance = torch.where(ours["labels"][:, None] == theirs["labels"], distance, 1.0)
    nearest = distance.argmin(1)
    assert sorted(nearest.tolist()) == list(range(len(nearest)))
    assert distance.amin(1).max() <= 1e-4
