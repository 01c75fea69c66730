import math

import pytest
import torch

from efficientllava.runtime.errors import CHUNK, NotFiniteError, UserError, require_finite


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_number_anywhere_is_told(dtype, value):
    tensor = torch.zeros(7, 11, dtype=dtype)
    tensor[6, 10] = value
    with pytest.raises(NotFiniteError, match=r"layer 3: the Gram matrix: not finite, 1 (NaN|infinite) of 77; drop it"):
        require_finite(tensor.T, "layer 3: the Gram matrix", "drop it")


def test_kinds_are_counted_over_all_chunks():
    tensor = torch.zeros(CHUNK + 3)
    tensor[0], tensor[1], tensor[-1] = math.nan, math.inf, math.nan
    with pytest.raises(UserError, match=r"2 NaN and 1 infinite of 16,777,219$"):
        require_finite(tensor, "scores")


def test_what_has_no_bad_number_passes():
    largest = torch.finfo(torch.float16).max
    for tensor in (
        torch.full((3, 3), largest, dtype=torch.float16),
        torch.empty(0),
        torch.zeros((), requires_grad=True),
        torch.arange(3),
        torch.full((2, 2), math.nan, device="meta"),
    ):
        require_finite(tensor, "fine")
