"""What the paper of the Kolmogorov-Arnold transformer says of its rational layer."""

import math

import pytest
import torch
import torch.nn.functional as F

from etude import blocks

D = torch.float64


def test_group_rational_is_the_papers_quotient_group_by_group_in_plain_floats():
    f = blocks.group_rational(6, groups=3).double()
    for p in f.parameters():
        torch.nn.init.normal_(p)
    a, b, x = f.numerator.tolist(), f.denominator.tolist(), [0.3, -1.1, 2.0, -0.4, 1.7, -2.2]
    want = []
    for i, v in enumerate(x):
        q = sum(c * v ** (j + 1) for j, c in enumerate(b[i // 2]))
        want.append(sum(c * v**k for k, c in enumerate(a)) / (1 + abs(q)))
    assert f(torch.tensor(x, dtype=D)).tolist() == pytest.approx(want, rel=1e-12)


def test_group_rational_starts_as_the_function_it_is_fitted_to():
    x = torch.linspace(-3, 3, 601, dtype=D)[:, None].expand(-1, 4)
    for start, f, error in (("identity", lambda x: x, 0), ("gelu", F.gelu, 3e-3), ("swish", F.silu, 2e-6)):
        assert (blocks.group_rational(4, groups=2, start=start).double()(x) - f(x)).abs().max() <= error


@pytest.mark.parametrize("start", ["identity", "gelu", "swish"])
def test_group_rational_starts_alike_in_the_paper_and_in_the_authors_kernels(start):
    f = blocks.group_rational(1, groups=1, start=start).double()
    x = torch.linspace(-5, 5, 101, dtype=D)[:, None]
    p = sum(c * x**k for k, c in enumerate(f.numerator))
    q = sum(c.abs() * x.abs() ** (j + 1) for j, c in enumerate(f.denominator[0]))
    torch.testing.assert_close(f(x), p / (1 + q))


def test_group_rational_shares_the_numerator_and_not_the_denominator():
    f = blocks.group_rational(16)
    assert {n: tuple(p.shape) for n, p in f.named_parameters()} == {"numerator": (6,), "denominator": (8, 4)}


def test_group_rational_learns_its_denominator_even_from_the_identity():
    f = blocks.group_rational(8, start="identity")
    f(torch.randn(5, 8)).square().sum().backward()
    assert (f.denominator.grad != 0).all()


def test_gr_kan_with_identity_coefficients_is_its_linear_layer():
    layer, x = blocks.gr_kan(8, 5, start="identity"), torch.randn(3, 8)
    assert torch.equal(layer(x), layer[1](x))


@pytest.mark.parametrize(
    "start, gain2", [("identity", 1.0), ("gelu", 2.3567850379928976), ("swish", 2.8178205270359653)]
)
def test_gr_kan_draws_weights_that_preserve_the_variance(start, gain2):
    torch.manual_seed(0)
    layer = blocks.gr_kan(512, 512, start=start)
    assert layer[1].weight.var().item() == pytest.approx(gain2 / 512, rel=0.02)  # the authors' table
    y = layer(torch.randn(512, 512)) - layer[1].bias
    assert y.square().mean().item() == pytest.approx(1, abs=0.03)


def test_gr_kan_measures_its_second_moment():
    x = torch.linspace(-12, 12, 100001, dtype=D)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    want = torch.trapezoid(F.silu(x).square() * density, x).item()
    assert blocks.gr_kan(8)[0].second_moment() == pytest.approx(want, rel=1e-4)
