"""What the paper of DyT says, in plain floats."""

import math

import pytest
import torch

from etude import norms

D = torch.float64


def test_dyt_is_a_scaled_tanh_by_the_papers_formula():
    norm = norms.dyt(3).double()
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    norm.bias.data = torch.tensor([0.1, 0.0, -3.0], dtype=D)
    x = [[0.3, -1.7, 40.0], [-2.0, 0.0, -1e-3]]
    want = [[w * math.tanh(0.5 * v) + b for v, w, b in zip(row, [1.0, -2.0, 0.5], [0.1, 0.0, -3.0])] for row in x]
    for got, row in zip(norm(torch.tensor(x, dtype=D)).tolist(), want, strict=True):
        assert got == pytest.approx(row, abs=1e-15)


def test_dyt_starts_at_alpha_one_half_with_one_alpha_per_layer():
    norm = norms.dyt(7)
    assert {n: tuple(p.shape) for n, p in norm.named_parameters()} == {"alpha": (), "weight": (7,), "bias": (7,)}
    assert norm.alpha.item() == 0.5
    assert norms.dyt(7, alpha=0.2).alpha.item() == pytest.approx(0.2)


def test_dyt_has_no_statistics():
    norm, x = norms.dyt(5).double(), torch.randn(4, 5, dtype=D)
    touched = x.clone()
    touched[1, 2] += 3
    assert ((norm(touched) != norm(x)).nonzero() == torch.tensor([[1, 2]])).all()


def test_dyt_is_linear_near_zero_and_bounded_far_away():
    norm = norms.dyt(4, alpha=0.75).double()
    x = 1e-5 * torch.randn(9, 4, dtype=D)
    torch.testing.assert_close(norm(x), 0.75 * x, rtol=1e-8, atol=1e-14)
    assert torch.equal(norm(torch.full((1, 4), 1e9, dtype=D)), torch.ones(1, 4, dtype=D))


def test_dyt_gradients_by_hand_are_those_of_torch_tanh():
    norm = norms.dyt(6, alpha=0.7).double()
    x, alpha, w, b = (t.double().requires_grad_() for t in (torch.randn(5, 6), torch.tensor(0.7), *torch.randn(2, 6)))

    def ours(x, alpha, w, b):
        return torch.func.functional_call(norm, {"alpha": alpha, "weight": w, "bias": b}, (x,))

    pulled = torch.randn(5, 6, dtype=D)
    for one, two in zip(
        torch.autograd.grad(ours(x, alpha, w, b), (x, alpha, w, b), pulled),
        torch.autograd.grad(w * torch.tanh(alpha * x) + b, (x, alpha, w, b), pulled),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (x, alpha, w, b))
    assert torch.autograd.gradgradcheck(ours, (x, alpha, w, b))


def test_dyt_channels_first_is_the_same_map_with_axes_moved():
    x = torch.randn(2, 5, 3, 4)
    first, last = norms.dyt(5, channels_last=False), norms.dyt(5)
    for norm in (first, last):
        norm.weight.data = torch.arange(5.0)
    assert torch.equal(first(x), last(x.movedim(1, -1)).movedim(-1, 1))
