"""Two lines that conditional norms and the statistics service share."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32 if it is half or bfloat16: what statistics are computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def over(x: Tensor, t: Tensor) -> Tensor:
    """t: [c] or [b, c], shaped to broadcast against x: [b, c, ...]."""
    return t.view(*t.shape, *[1] * (x.ndim - 2))
