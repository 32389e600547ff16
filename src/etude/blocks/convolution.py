"""Convolutions that know which pixels are valid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method


class PartialConvolution(nn.Module):
    """A convolution of the valid pixels, scaled up by how many there should have been; makes the next mask too."""

    _reshapes = "without padding a window shrinks the image, as in torch's convolutions"

    def __init__(self, d: int, out: int, kernel_size: int, stride: int, padding: int, dilation: int):
        super().__init__()
        self.conv = nn.Conv2d(d, out, kernel_size, stride, padding, dilation)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        conv, many = self.conv, mask is not None and mask.shape[1] > 1
        mask = (x.new_ones(1, 1, *x.shape[2:]) if mask is None else mask).to(x.dtype)
        if mask.ndim != 4 or mask.shape[1] not in (1, x.shape[1]) or mask.shape[2:] != x.shape[2:]:
            shapes = f"x of {list(x.shape)} and a mask of {list(mask.shape)}"
            raise ValueError(f"partial_convolution takes a mask [b, 1, h, w], or one as large as x; got {shapes}")
        window = torch.ones(1, mask.shape[1], *conv.kernel_size, dtype=torch.float32, device=x.device)
        with torch.no_grad():
            valid = F.conv2d(mask.float(), window, None, conv.stride, conv.padding, conv.dilation)
            ratio = torch.where(valid > 0, window.numel() / valid.clamp(min=1e-8), 0.0).to(x.dtype)
            after = valid.clamp(0, 1).to(x.dtype)
        y = F.conv2d(x * mask, conv.weight, None, conv.stride, conv.padding, conv.dilation) * ratio
        if conv.bias is not None:
            y = (y + conv.bias[:, None, None]) * after
        return y, after.expand(-1, conv.out_channels, -1, -1) if many else after


@method("Liu et al. 2018, Image Inpainting for Irregular Holes Using Partial Convolutions, arXiv:1804.07723")
def partial_convolution(
    d: int, out: int | None = None, kernel_size: int = 3, stride: int = 1, padding: int = 0, dilation: int = 1
) -> PartialConvolution:
    """Wᵀ(x ⊙ m) · k / Σm + b where a window has a valid pixel, else 0; k: the pixels of a window. (x, m) → (y, m′).

    x: [b, d, h, w]; m, 1 where valid: [b, 1, h, w], or one per channel; no mask: all valid. m′ is 1 where a window saw
    a valid pixel, and carries no gradient. Padding counts as a hole, so borders are scaled up too. ``out`` is d unless
    given.
    """
    return PartialConvolution(d, out or d, kernel_size, stride, padding, dilation)
