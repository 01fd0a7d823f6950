"""The bounds of near.py hold and fail where they should."""

import pytest
import torch
from near import UNIT, assert_near, sum_roundings

wanted = torch.tensor([-8.0, 1.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("dtype", UNIT)
def test_roundings_of_the_largest_value(dtype):
    for place in range(3):
        found = wanted.clone()
        found[place] += 8 * 3 * UNIT[dtype]
        assert_near(found, wanted, 3, dtype=dtype)
        with pytest.raises(AssertionError, match="here: 1 of 3 values .* is 3.0 roundings away, allowed are 2.5"):
            assert_near(found, wanted, 2.5, dtype=dtype, what="here")


def test_each_value_by_its_own_size():
    assert_near(wanted * (1 + UNIT[torch.float32]), wanted, 1, wanted.abs())
    with pytest.raises(AssertionError, match="1 of 3"):
        assert_near(wanted + torch.tensor([0, 2 * UNIT[torch.float32], 0]), wanted, 1, wanted.abs())
    with pytest.raises(AssertionError, match="inf roundings"):
        assert_near(wanted + torch.tensor([0, 0, 1e-30]), wanted, 1, wanted.abs())


def test_another_shape_and_what_is_no_number():
    with pytest.raises(AssertionError, match=r"\[1, 3\] instead of \[3\]"):
        assert_near(wanted[None], wanted, 1)
    for value in (float("nan"), float("inf")):
        with pytest.raises(AssertionError, match="1 of 3"):
            assert_near(torch.where(wanted == 1, value, wanted), wanted, 1e9)
    assert_near(wanted[:0], wanted[:0], 1)


def test_sum_roundings():
    conv, linear = torch.nn.Conv2d(4, 8, 3, groups=2), torch.nn.Linear(46, 5)
    assert sum_roundings(torch.nn.Sequential(conv, torch.nn.ReLU()), linear) == (2 * 9 + 46) ** 0.5
