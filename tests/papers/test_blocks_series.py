"""What the paper of polynomial, trigonometric and tropical activations says."""

import math

import numpy as np
import pytest
import torch

from etude import blocks

D = torch.float64
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(120)
Z, P = torch.tensor(NODES), torch.tensor(WEIGHTS / WEIGHTS.sum())


def powers(f):
    """E F² and E F′² for x ~ N(0, 1)."""
    x = Z.clone().requires_grad_()
    y = f(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return (P * y.detach() ** 2).sum().item(), (P * slope**2).sum().item()


@pytest.mark.parametrize("degree", [1, 2, 5, 8])
def test_hermite_is_the_series_of_numpy(degree):
    f = blocks.hermite(degree).double()
    torch.nn.init.normal_(f.a)
    coefficients = [a / math.factorial(k) for k, a in enumerate(f.a.tolist())]
    x = torch.linspace(-3, 3, 31, dtype=D).view(1, 31)
    want = np.polynomial.hermite_e.hermeval(x.numpy(), coefficients)
    torch.testing.assert_close(f(x), torch.tensor(want))


@pytest.mark.parametrize("degree", [3, 4, 6])
def test_hermite_starts_with_equal_power_in_value_and_derivative(degree):
    want = math.exp(-1) * sum(1 / math.factorial(j) for j in range(degree))
    assert powers(blocks.hermite(degree).double()) == pytest.approx((want, want), rel=1e-6)


def test_hermite_has_the_power_of_its_coefficients():
    f = blocks.hermite(5).double()
    torch.nn.init.normal_(f.a)
    a = f.a.tolist()
    value = sum(v**2 / math.factorial(k) for k, v in enumerate(a))
    slope = sum(v**2 / math.factorial(k - 1) for k, v in enumerate(a) if k)
    assert powers(f) == pytest.approx((value, slope), rel=1e-9)


def test_fourier_is_the_papers_sum_in_plain_floats():
    f = blocks.fourier(3).double()
    for p in f.parameters():
        torch.nn.init.normal_(p)
    a0, a, w, phi = f.a0.item(), f.a.tolist(), f.w.tolist(), f.phi.tolist()
    x = [-2.3, 0.0, 0.4, 9.0]
    want = [a0 + sum(a[k] * math.cos(w[k] * v - phi[k]) / math.factorial(k + 1) for k in range(3)) for v in x]
    assert f(torch.tensor(x, dtype=D)).tolist() == pytest.approx(want, abs=1e-13)


def test_fourier_starts_at_the_papers_values_and_has_gain_1_backward_only():
    f = blocks.fourier(6).double()
    scale = 0.66232645879  # I₀(2)^(−1/2)
    assert f.w.tolist() == [1, 2, 3, 4, 5, 6]
    assert f.phi.tolist() == pytest.approx([math.pi / 4] * 6)
    assert f.a.tolist() == pytest.approx([scale] * 6)
    assert f.a0.item() == pytest.approx(scale * math.sqrt(1 - 1 / math.factorial(6) ** 2))
    assert powers(f) == pytest.approx((1.31, 0.96), abs=0.01)


def test_fourier_is_periodic_at_birth():
    f, x = blocks.fourier(4).double(), torch.linspace(-1, 1, 9, dtype=D)
    torch.testing.assert_close(f(x + 2 * math.pi), f(x), rtol=1e-6, atol=1e-6)


def test_tropical_is_the_papers_maximum_in_plain_floats():
    f = blocks.tropical(3).double()
    torch.nn.init.normal_(f.a)
    a, x = f.a.tolist(), [-2.0, -0.1, 0.3, 5.0]
    want = [math.sqrt(2) / 3 * max(k * v + a[k] for k in range(4)) for v in x]
    assert f(torch.tensor(x, dtype=D)).tolist() == pytest.approx(want, abs=1e-14)


def test_tropical_is_convex_and_piecewise_linear_with_unit_backward_gain():
    f = blocks.tropical(4).double()
    x = torch.linspace(-2, 2, 401, dtype=D)
    bends = f(x).diff().diff()
    assert (bends > -1e-12).all()
    assert (bends > 1e-9).sum() <= 2  # one kink, at 0, where at birth all lines meet
    assert powers(f)[1] == pytest.approx(1, abs=1e-6)


def test_tropical_rational_is_a_difference_of_two_maxima():
    f = blocks.tropical_rational(2).double()
    (s, t), (a, b) = f.slopes.tolist(), f.a.tolist()
    x = [-3.0, 0.0, 0.2, 4.0]
    want = [max(p * v + q for p, q in zip(s, a)) - max(p * v + q for p, q in zip(t, b)) for v in x]
    assert f(torch.tensor(x, dtype=D)).tolist() == pytest.approx(want, abs=1e-13)


def test_tropical_rational_can_be_a_clip():
    f = blocks.tropical_rational(1).double()
    f.slopes.data, f.a.data = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[-1.0, 0.0], [0.0, -1.0]])
    x = torch.linspace(-3, 3, 25, dtype=D)
    torch.testing.assert_close(f(x), x.clamp(-1, 1))
