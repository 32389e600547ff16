"""What the paper of quasi-Givens fine-tuning says."""

import math

import pytest
import torch
from torch import nn

from etude import weights

F64 = torch.float64


def adapted(map, into, out):
    """A layer with a map moved from its birth, the map, and what stood there before."""
    torch.manual_seed(3)
    layer = nn.Linear(into, out, dtype=F64)
    w0 = layer.weight.detach().clone()
    mine = weights.put(layer, map, on="weight").parametrizations.weight[0]
    with torch.no_grad():
        for p in mine.parameters():
            p.add_(0.4 * torch.randn_like(p))
    return layer, mine, w0


def planes(d):
    """(i, j) of the rotations, round by round."""
    stride = 1
    while stride < d:
        yield from ((i, i + stride) for i in range(0, d - stride, 2 * stride))
        stride *= 2


@pytest.mark.parametrize("d", [2, 5, 8, 37])
@pytest.mark.parametrize("scaling", [True, False])
def test_goft_is_a_product_of_d_minus_1_plane_rotations_of_the_input(d, scaling):
    layer, mine, w0 = adapted(weights.goft(scaling=scaling), d, 3)
    x = torch.randn(d, dtype=F64)
    turned = (x * mine.s if scaling else x).tolist()
    for (i, j), theta in zip(planes(d), mine.theta.tolist(), strict=True):
        angle = math.pi * math.tanh(theta)
        a, b = turned[i], turned[j]
        turned[i], turned[j] = a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)
    y = w0 @ torch.tensor(turned, dtype=F64)
    torch.testing.assert_close(layer.weight @ x, y, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(x) - layer.bias, y, rtol=1e-10, atol=1e-10)


def test_goft_takes_any_vector_to_the_first_axis():
    """Theorem 4.1 of the paper, as its proof does it."""
    d = 13
    x = torch.randn(d, dtype=F64)
    layer, mine, _ = adapted(weights.goft(), d, d)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.eye(d))
        left = x.tolist()
        for n, (i, j) in enumerate(planes(d)):
            mine.theta[n] = math.atanh(-math.atan2(left[j], left[i]) / math.pi)
            left[i], left[j] = math.hypot(left[i], left[j]), 0.0
    first = torch.zeros(d, dtype=F64)
    first[0] = x.norm()
    torch.testing.assert_close(layer.weight @ x, first, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("d", [2, 7, 16])
def test_qgoft_is_a_product_of_free_plane_maps(d):
    layer, mine, w0 = adapted(weights.qgoft(), d, 3)
    x = torch.randn(d, dtype=F64)
    mapped = x.tolist()
    for (i, j), g in zip(planes(d), mine.planes.tolist(), strict=True):
        a, b = mapped[i], mapped[j]
        mapped[i], mapped[j] = g[0][0] * a + g[0][1] * b, g[1][0] * a + g[1][1] * b
    torch.testing.assert_close(layer.weight @ x, w0 @ torch.tensor(mapped, dtype=F64), rtol=1e-10, atol=1e-10)


def test_qgoft_with_rotations_for_planes_is_goft():
    one, q, _ = adapted(weights.qgoft(), 11, 4)
    two, g, _ = adapted(weights.goft(), 11, 4)
    angle = math.pi * g.theta.detach().tanh()
    with torch.no_grad():
        q.planes.copy_(torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).view(-1, 2, 2))
    torch.testing.assert_close(one.weight, two.weight, rtol=1e-12, atol=1e-12)


def test_qgoft_has_the_penalty_of_its_paper():
    """Σ ⟨α, β⟩² over the columns of each plane, with no hold on their lengths."""
    layer, mine, _ = adapted(weights.qgoft(), 6, 4)
    with torch.no_grad():
        mine.planes.copy_(torch.tensor([[2.0, 0.0], [0.0, 3.0]]))
        assert weights.orthogonality(layer).item() == 0
        mine.planes[1] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        mine.planes[3] = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert weights.orthogonality(layer).item() == pytest.approx((1 * 2 + 3 * 4) ** 2 + 1)


def test_goft_does_not_reach_every_rotation():
    """The paper calls it as expressive as all of SO(d); d − 1 angles are fewer than the d (d − 1) / 2 of SO(d)."""
    target = torch.linalg.qr(torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(1)))[0]
    target[:, 0] *= torch.linalg.det(target)
    layer, _, _ = adapted(weights.goft(), 4, 4)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(torch.eye(4))
    opt = torch.optim.Adam(layer.parametrizations.weight[0].parameters(), lr=0.05)
    for _ in range(300):
        opt.zero_grad()
        loss = (layer.weight - target).square().sum()
        loss.backward()
        opt.step()
    assert loss > 0.1
