"""What the paper of partial convolutions says."""

import pytest
import torch
from torch import nn

from etude import blocks

D = torch.float64


def holed(p=0.4, shape=(2, 1, 9, 8)):
    return (torch.rand(shape) > p).double()


@pytest.mark.parametrize("channels", [1, 2])
def test_partial_convolution_is_the_papers_formula_window_by_window(channels):
    layer = blocks.partial_convolution(2, 3, stride=2, padding=1, dilation=2).double()
    x, mask = torch.randn(2, 2, 9, 8, dtype=D), holed(0.6, (2, channels, 9, 8))
    mask[:, :, :6, :6] = 0
    y, after = layer(x, mask)
    wx = nn.functional.pad((x * mask), (1, 1, 1, 1))
    wm = nn.functional.pad(mask, (1, 1, 1, 1))
    for b in range(2):
        for i in range(y.shape[2]):
            for j in range(y.shape[3]):
                rows, cols = slice(2 * i, 2 * i + 5, 2), slice(2 * j, 2 * j + 5, 2)
                m = wm[b, :, rows, cols]
                assert after[b, 0, i, j] == (m.sum() > 0)
                for o in range(3):
                    want = torch.tensor(0.0, dtype=D)
                    if m.sum() > 0:
                        total = (layer.conv.weight[o] * wx[b, :, rows, cols]).sum()
                        want = total * m.numel() / m.sum() + layer.conv.bias[o]
                    torch.testing.assert_close(y[b, o, i, j], want)


def test_partial_convolution_without_a_hole_is_torchs_convolution():
    layer, x = blocks.partial_convolution(3, 4).double(), torch.randn(2, 3, 7, 7, dtype=D)
    y, after = layer(x, torch.ones(2, 1, 7, 7))
    torch.testing.assert_close(y, layer.conv(x))
    assert (after == 1).all()
    assert torch.equal(layer(x)[0], y)


def test_partial_convolution_does_not_see_what_is_under_the_hole():
    layer, x, mask = blocks.partial_convolution(3, padding=1).double(), torch.randn(2, 3, 9, 8, dtype=D), holed()
    assert torch.equal(layer(x, mask)[0], layer(x + 100 * (1 - mask) * torch.randn_like(x), mask)[0])


def test_partial_convolution_of_a_constant_by_an_average_is_the_constant_whatever_the_mask():
    layer, mask = blocks.partial_convolution(1, padding=1).double(), holed(0.7)
    nn.init.constant_(layer.conv.weight, 1 / 9)
    nn.init.zeros_(layer.conv.bias)
    y, after = layer(torch.full((2, 1, 9, 8), 3.0, dtype=D), mask)
    torch.testing.assert_close(y, 3 * after)


def test_partial_convolution_shrinks_the_hole_by_the_radius_of_the_kernel():
    mask = torch.ones(1, 1, 15, 15)
    mask[:, :, 4:11, 4:11] = 0
    layer, x = blocks.partial_convolution(2, padding=1), torch.randn(1, 2, 15, 15)
    sides = []
    for _ in range(4):
        x, mask = layer(x, mask)
        sides.append(int((mask == 0).sum()))
        assert (x[(mask == 0).expand_as(x)] == 0).all()
    assert sides == [25, 9, 1, 0]
    assert not mask.requires_grad


def test_partial_convolution_with_a_mask_per_channel_makes_one_per_output_channel():
    layer = blocks.partial_convolution(2, 5, padding=1)
    _, after = layer(torch.randn(1, 2, 6, 6), holed(0.5, (1, 2, 6, 6)))
    assert after.shape == (1, 5, 6, 6)
    blocks.partial_convolution(5, padding=1)(torch.randn(1, 5, 6, 6), after)
