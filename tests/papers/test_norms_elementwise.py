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


def test_derf_is_a_shifted_erf_by_the_papers_formula():
    norm = norms.derf(3).double()
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    norm.bias.data = torch.tensor([0.1, 0.0, -3.0], dtype=D)
    norm.s.data = torch.tensor(0.3, dtype=D)
    x = [[0.3, -1.7, 40.0], [-2.0, 0.0, -1e-3]]
    want = [[w * math.erf(0.5 * v + 0.3) + b for v, w, b in zip(row, [1.0, -2.0, 0.5], [0.1, 0.0, -3.0])] for row in x]
    for got, row in zip(norm(torch.tensor(x, dtype=D)).tolist(), want, strict=True):
        assert got == pytest.approx(row, abs=1e-15)


def test_derf_starts_at_alpha_one_half_without_a_shift_and_with_slope_two_alpha_over_root_pi():
    norm = norms.derf(7).double()
    shapes = {"alpha": (), "s": (), "weight": (7,), "bias": (7,)}
    assert {n: tuple(p.shape) for n, p in norm.named_parameters()} == shapes
    assert (norm.alpha.item(), norm.s.item()) == (0.5, 0.0)
    x = 1e-5 * torch.randn(9, 7, dtype=D)
    torch.testing.assert_close(norm(x), x / math.sqrt(math.pi), rtol=1e-8, atol=1e-14)
    assert torch.equal(norm(torch.full((1, 7), -1e9, dtype=D)), -torch.ones(1, 7, dtype=D))


def test_derf_gradients_by_hand_are_those_of_torch_erf():
    norm = norms.derf(6, alpha=0.7).double()
    leaves = (torch.randn(5, 6), torch.tensor(0.7), torch.tensor(-0.2), *torch.randn(2, 6))
    x, alpha, s, w, b = (t.double().requires_grad_() for t in leaves)

    def ours(x, alpha, s, w, b):
        return torch.func.functional_call(norm, {"alpha": alpha, "s": s, "weight": w, "bias": b}, (x,))

    pulled = torch.randn(5, 6, dtype=D)
    for one, two in zip(
        torch.autograd.grad(ours(x, alpha, s, w, b), (x, alpha, s, w, b), pulled),
        torch.autograd.grad(w * torch.erf(alpha * x + s) + b, (x, alpha, s, w, b), pulled),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(ours, (x, alpha, s, w, b))


def test_elementwise_layer_norm_is_layer_norm_as_a_function_of_one_coordinate():
    """The paper's identity: hold the other coordinates; z = x_i − their mean, beta = S N / (N − 1)."""
    others = torch.randn(8, dtype=D)
    n, spread = 9, (others - others.mean()).square().sum()
    norm = norms.elementwise_layer_norm(n, beta=float(spread * n / (n - 1))).double()
    for x in torch.linspace(-5, 5, 11, dtype=D):
        token = torch.cat([x[None], others])
        z = torch.zeros(n, dtype=D)
        z[0] = x - others.mean()
        want = torch.nn.functional.layer_norm(token, (n,), eps=0.0)[0]
        torch.testing.assert_close(norm(z)[0], want, rtol=1e-6, atol=1e-9)  # beta is kept in float32


def test_elementwise_layer_norm_stays_within_root_n_minus_one_and_beta_stays_positive():
    norm = norms.elementwise_layer_norm(5).double()
    far = norm(torch.full((1, 5), 1e9, dtype=D))
    torch.testing.assert_close(far, torch.full((1, 5), 2.0, dtype=D))
    assert norm.log_beta.exp().item() == pytest.approx(5)
    assert {n: p.numel() for n, p in norm.named_parameters()} == {"weight": 5, "bias": 5, "log_beta": 1}
    with pytest.raises(ValueError, match="beta must be positive"):
        norms.elementwise_layer_norm(5, beta=0.0)
