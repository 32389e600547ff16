import math

import pytest
import torch

from etude import init


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (6, 2, 5), (4, 3, 3, 3), (40, 2, 3, 3)])
def test_orthogonal_is_exactly_orthonormal_on_its_short_side(shape):
    w = init.orthogonal(torch.empty(shape, dtype=torch.float64), gain=1.5).flatten(1)
    short = w @ w.mT if w.shape[0] <= w.shape[1] else w.mT @ w
    torch.testing.assert_close(short, 1.5**2 * torch.eye(len(short), dtype=torch.float64), rtol=0, atol=1e-13)


def test_orthogonal_is_uniform_over_the_orthogonal_group():
    """Haar on O(4): E tr Q = 0, E tr² Q = 1, half of all determinants negative. QR without its signs has E tr Q ≠ 0."""
    q = torch.stack([init.orthogonal(torch.empty(4, 4, dtype=torch.float64)) for _ in range(3000)])
    trace = q.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(trace.mean()) < 4 / math.sqrt(3000)
    assert trace.square().mean() == pytest.approx(1, abs=4 * math.sqrt(2 / 3000))
    assert (torch.linalg.det(q) < 0).double().mean() == pytest.approx(0.5, abs=0.04)


def test_orthogonal_keeps_a_deep_linear_network_an_isometry():
    """Section 3: every singular value of 100 layers is one; Gaussian layers of the same scale spread over decades."""
    deep = torch.linalg.multi_dot([init.orthogonal(torch.empty(16, 16, dtype=torch.float64)) for _ in range(100)])
    torch.testing.assert_close(torch.linalg.svdvals(deep), torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-12)
    gauss = torch.linalg.multi_dot([torch.randn(16, 16, dtype=torch.float64) / 4 for _ in range(100)])
    assert torch.linalg.cond(gauss) > 1e6


def test_orthogonal_start_learns_each_mode_along_the_logistic_curve():
    """Equation 12: from W1 = R √a₀ Vᵀ, W2 = U √a₀ Rᵀ each strength follows a(t) = s e^{2st} / (e^{2st} − 1 + s/a₀)."""
    s, a0, dt, steps = torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64), 0.01, 1e-4, 20_000
    u, v, r = (init.orthogonal(torch.empty(4, 4, dtype=torch.float64)) for _ in range(3))
    w1, w2, teacher = math.sqrt(a0) * r @ v.mT, math.sqrt(a0) * u @ r.mT, u @ s.diag() @ v.mT
    for _ in range(steps):
        error = teacher - w2 @ w1
        w1, w2 = w1 + dt * w2.mT @ error, w2 + dt * error @ w1.mT
    strength = u.mT @ w2 @ w1 @ v
    grown = torch.exp(2 * s * dt * steps)
    torch.testing.assert_close(strength, (s * grown / (grown - 1 + s / a0)).diag(), rtol=0, atol=2e-3)
