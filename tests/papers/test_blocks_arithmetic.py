"""What the paper of neural arithmetic units says."""

import itertools
import math

import pytest
import torch
from torch import nn

from etude import blocks

D = torch.float64


def test_nau_is_a_sum_with_weights_clipped_to_one():
    layer = blocks.nau(3, 2).double()
    layer.weight.data = torch.tensor([[2.0, -0.5, -7.0], [1.0, 0.0, 0.25]], dtype=D)
    assert layer(torch.tensor([3.0, 4.0, 5.0], dtype=D)).tolist() == [3 - 2 - 5, 3 + 1.25]


def test_nau_and_nmu_are_born_in_the_papers_ranges():
    for d, out in ((100, 50), (3, 2)):
        w, bound = blocks.nau(d, out).weight, min(0.5, math.sqrt(6 / (d + out)))
        assert w.abs().max() <= bound
    w = blocks.nau(100, 50).weight
    assert w.var().item() == pytest.approx(2 / 150, rel=0.05)
    w = blocks.nmu(100, 50).weight
    assert 0.25 <= w.min() <= 0.251
    assert 0.749 <= w.max() <= 0.75
    assert [n for n, _ in blocks.nmu(2).named_parameters()] == ["weight"]


def test_nmu_is_the_papers_product_and_at_zero_and_one_that_of_a_subset():
    layer, x = blocks.nmu(3, 1).double(), torch.tensor([-2.0, 0.0, 0.3], dtype=D)
    layer.weight.data = torch.tensor([[0.2, 0.9, 0.5]], dtype=D)
    want = (0.2 * -2 + 0.8) * (0.9 * 0 + 0.1) * (0.5 * 0.3 + 0.5)
    assert layer(x).item() == pytest.approx(want, abs=1e-15)
    for chosen in itertools.product([0.0, 1.0], repeat=3):
        layer.weight.data = torch.tensor([chosen], dtype=D)
        assert layer(x).item() == math.prod(v for v, w in zip(x.tolist(), chosen) if w)
    layer.weight.data = torch.tensor([[5.0, -3.0, 1.0]], dtype=D)  # clipped to 1, 0, 1
    assert layer(x).item() == -2.0 * 0.3


def test_nmu_has_the_right_gradient_at_zeros_and_negatives():
    layer = blocks.nmu(4, 2).double()
    for x in ([0.0, 0.0, -1.0, 2.0], [-3.0, 0.5, 0.0, 1.0]):
        assert torch.autograd.gradcheck(layer, torch.tensor([x], dtype=D, requires_grad=True))


def test_nau_has_the_papers_sparsity_zero_only_at_whole_weights():
    layer = blocks.nau(3, 1).double()
    for w, want in (([0.0, 1.0, -1.0], 0), ([0.5, -0.25, 0.9], (0.5 + 0.25 + 0.1) / 3), ([1.3, 0.0, 0.0], 0.1)):
        layer.weight.data = torch.tensor([w], dtype=D)
        assert layer.sparsity().item() == pytest.approx(want, abs=1e-12)


def test_nmu_has_the_papers_sparsity_that_grows_in_from_start_to_end():
    model = nn.Sequential(blocks.nau(2, 2), nn.Tanh(), blocks.nmu(2, 1)).double()
    model[0].weight.data = torch.tensor([[0.25, 1.0], [0.0, 0.5]], dtype=D)
    model[2].weight.data = torch.tensor([[0.75, 0.0]], dtype=D)
    whole = 0.75 / 4 + 0.25 / 2
    terms = [
        blocks.arithmetic_sparsity(model, t, factor=2.0, start=100, end=200).item() for t in (0, 100, 150, 200, 999)
    ]
    assert terms == pytest.approx([0, 0, whole, 2 * whole, 2 * whole])


def test_nau_clips_its_weights_after_a_step_when_asked_to():
    layer = blocks.nau(2, 1)
    layer.weight.data = torch.tensor([[3.0, -0.5]])
    layer.clip_()
    assert layer.weight.tolist() == [[1.0, -0.5]]
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, 1.0]]


def test_nmu_learns_a_product_that_holds_far_outside_its_training_range():
    """x₁ x₂ of three numbers in [1, 2], then on [2, 6]; a shorter course than the paper's, at ten times its lr."""
    torch.manual_seed(0)
    layer = blocks.nmu(3, 1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for t in range(600):
        x = torch.rand(128, 3) + 1
        loss = (layer(x) - x[:, :1] * x[:, 1:2]).square().mean()
        loss = loss + blocks.arithmetic_sparsity(layer, t, factor=0.1, start=200, end=400)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.clip_()
    x = 4 * torch.rand(500, 3) + 2
    assert (layer(x) - x[:, :1] * x[:, 1:2]).abs().max() < 1e-4
