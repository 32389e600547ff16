"""What the paper of mixed, gated and tree pooling says."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude import blocks

D = torch.float64
X = torch.randn(2, 3, 8, 7, dtype=D, generator=torch.Generator().manual_seed(0))


def windows(x, k, stride):
    """Each window of one channel as a list of its pixels with their place in it; beyond the border there are none."""
    h, w = len(x), len(x[0])
    tops = range(0, math.ceil((h - k) / stride) * stride + 1, stride)
    lefts = range(0, math.ceil((w - k) / stride) * stride + 1, stride)
    inside = [(i, j) for i in range(k) for j in range(k)]
    return [[[(x[t + i][s + j], i, j) for i, j in inside if t + i < h and s + j < w] for s in lefts] for t in tops]


def plain(x, k, stride, f):
    return [[[[f(w) for w in row] for row in windows(channel, k, stride)] for channel in image] for image in x.tolist()]


def dot(mask, window):
    return sum(mask[i][j] * v for v, i, j in window)


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def both(window):
    values = [v for v, _, _ in window]
    return max(values), sum(values) / len(values)


def same(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=D))


def test_mixed_pooling_is_max_pooling_at_1_and_average_pooling_at_0():
    pool = blocks.mixed_pooling(3, 2, a=1.0).double()
    assert torch.equal(pool(X), F.max_pool2d(X, 3, 2, ceil_mode=True))
    pool.a.data.zero_()
    assert torch.equal(pool(X), F.avg_pool2d(X, 3, 2, ceil_mode=True, count_include_pad=False))


def test_mixed_pooling_blends_by_one_number_per_layer():
    pool = blocks.mixed_pooling(3, 2, a=0.3).double()
    pool.a.data = pool.a.data.double().fill_(0.3)
    same(pool(X), plain(X, 3, 2, lambda w: 0.3 * both(w)[0] + 0.7 * both(w)[1]))
    assert [p.numel() for p in pool.parameters()] == [1]


@pytest.mark.parametrize("k, stride", [(3, 2), (2, 2), (3, 3)])
def test_gated_pooling_is_the_papers_gate_in_plain_floats(k, stride):
    pool = blocks.gated_pooling(k, stride).double()
    nn.init.normal_(pool.mask)
    mask = pool.mask[0].tolist()

    def gated(window):
        top, mean = both(window)
        a = sigmoid(dot(mask, window))
        return a * top + (1 - a) * mean

    same(pool(X), plain(X, k, stride, gated))


def test_gated_pooling_stays_between_average_and_maximum_with_nine_parameters():
    pool = blocks.gated_pooling().double()
    y = pool(X)
    assert (y <= F.max_pool2d(X, 3, 2, ceil_mode=True) + 1e-12).all()
    assert (y >= F.avg_pool2d(X, 3, 2, ceil_mode=True, count_include_pad=False) - 1e-12).all()
    assert sum(p.numel() for p in pool.parameters()) == 9


def test_tree_pooling_of_two_levels_is_the_papers_formula_in_plain_floats():
    pool = blocks.tree_pooling(3, 2).double()
    for p in pool.parameters():
        nn.init.normal_(p)
    gate, (left, right) = pool.gates[0].tolist(), pool.leaves.tolist()

    def tree(window):
        s = sigmoid(dot(gate, window))
        return s * dot(left, window) + (1 - s) * dot(right, window)

    same(pool(X), plain(X, 3, 2, tree))
    assert sum(p.numel() for p in pool.parameters()) == 27


def test_tree_pooling_of_three_levels_blends_blends():
    pool = blocks.tree_pooling(2, 2, levels=3).double()
    for p in pool.parameters():
        nn.init.normal_(p)
    gates, leaves = pool.gates.tolist(), pool.leaves.tolist()

    def node(window, i):
        if i >= 3:
            return dot(leaves[i - 3], window)
        s = sigmoid(dot(gates[i], window))
        return s * node(window, 2 * i + 1) + (1 - s) * node(window, 2 * i + 2)

    same(pool(X), plain(X, 2, 2, lambda w: node(w, 0)))


def test_tree_pooling_draws_small_masks():
    pool = blocks.tree_pooling(40, 40)
    assert pool.leaves.std().item() == pytest.approx(0.1, rel=0.05)
    assert pool.gates.std().item() == pytest.approx(0.1, rel=0.1)
