"""What the papers of activations say."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from etude import blocks

D = torch.float64
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(200)
Z, P = torch.tensor(NODES), torch.tensor(WEIGHTS / WEIGHTS.sum())


def test_elu_is_the_papers_formula_and_its_derivative_is_elu_plus_alpha_below_zero():
    x = torch.tensor([-4.0, -0.7, -1e-9, 0.0, 1e-9, 2.5], dtype=D, requires_grad=True)
    y = blocks.elu(alpha=1.5)(x)
    assert y.tolist() == [1.5 * math.expm1(v) if v <= 0 else v for v in x.tolist()]
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope[:3], y[:3] + 1.5)
    assert slope[-2:].tolist() == [1, 1]


def test_elu_is_smooth_at_zero_for_alpha_one_only():
    def jump(alpha):
        x = torch.tensor([-1e-12, 1e-12], dtype=D, requires_grad=True)
        below, above = torch.autograd.grad(blocks.elu(alpha)(x).sum(), x)[0]
        return (above - below).item()

    assert jump(1.0) == pytest.approx(0, abs=1e-9)
    assert jump(0.5) == pytest.approx(0.5)


def test_elu_brings_the_mean_nearer_zero_than_relu():
    x = torch.linspace(-9, 9, 20001, dtype=D)
    density = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    means = [torch.trapezoid(f(x) * density, x).item() for f in (blocks.elu(), nn.ReLU())]
    assert means == pytest.approx([0.1605, 0.3989], abs=1e-4)


def selu_moments(mean, var):
    """Of selu(z), z ~ N(mean, var), by quadrature on each side of the kink."""
    x = torch.linspace(-12, 12, 240001, dtype=D) * math.sqrt(var) + mean
    density = torch.exp(-(x - mean).square() / (2 * var)) / math.sqrt(2 * math.pi * var)
    y = blocks.selu()(x)
    first = torch.trapezoid(y * density, x).item()
    return first, torch.trapezoid(y.square() * density, x).item() - first**2


def test_selu_has_mean_0_and_variance_1_as_a_fixed_point_that_attracts():
    assert selu_moments(0.0, 1.0) == pytest.approx((0, 1), abs=1e-6)
    for start in ((0.1, 1.5), (-0.1, 0.8), (0.05, 0.8)):
        mean, var = start
        for _ in range(20):
            # Weights of mean 0 and variance 1 / n: the next pre-activation has mean 0 and variance E y².
            first, spread = selu_moments(mean, var)
            mean, var = 0.0, spread + first**2
        assert var == pytest.approx(1, abs=0.02)


def test_selu_keeps_a_deep_net_at_unit_variance_with_lecuns_weights_and_relu_does_not():
    def deep(act):
        x = torch.randn(256, 256)
        for _ in range(64):
            x = act(x @ (torch.randn(256, 256) / 16))
        return x

    assert deep(blocks.selu()).var().item() == pytest.approx(1, abs=0.3)
    assert deep(blocks.selu()).mean().abs() < 0.2
    assert deep(torch.relu).var() < 1e-6


def test_alpha_dropout_drops_to_the_floor_of_selu_and_keeps_mean_and_variance():
    torch.manual_seed(0)
    x = blocks.selu()(torch.randn(1_000_000, dtype=D))
    drop = blocks.alpha_dropout(p=0.2)
    y = drop(x)
    assert y.mean().item() == pytest.approx(0, abs=5e-3)
    assert y.var().item() == pytest.approx(1, abs=5e-3)
    q, floor = 0.8, -1.0507009873554805 * 1.6732632423543772
    a = (q + floor**2 * q * (1 - q)) ** -0.5
    b = -a * (1 - q) * floor
    dropped = (y - (a * floor + b)).abs() < 1e-9
    assert dropped.double().mean().item() == pytest.approx(0.2, abs=2e-3)
    torch.testing.assert_close(y[~dropped], a * x[~dropped] + b)
    assert torch.equal(drop.eval()(x), x)


def test_siren_is_the_papers_formula():
    layer = blocks.siren(3, 2, w0=7.0).double()
    w, b, x = layer.linear.weight.tolist(), layer.linear.bias.tolist(), [0.3, -1.2, 0.05]
    want = [math.sin(7 * (sum(p * v for p, v in zip(row, x)) + c)) for row, c in zip(w, b)]
    assert layer(torch.tensor(x, dtype=D)).tolist() == pytest.approx(want, abs=1e-14)


def test_siren_draws_its_weights_from_the_papers_ranges():
    first, hidden = blocks.siren(100, 400, first=True).linear.weight, blocks.siren(100, 400, w0=20.0).linear.weight
    for w, bound in ((first, 1 / 100), (hidden, math.sqrt(6 / 100) / 20)):
        assert w.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert w.abs().max() <= bound
        assert w.var().item() == pytest.approx(bound**2 / 3, rel=0.02)


def test_siren_keeps_the_distribution_through_depth():
    """Theorem 1.8: pre-activations are N(0, 1), activations arcsine on [−1, 1] (variance ½), whatever the depth."""
    torch.manual_seed(0)
    x = 2 * torch.rand(512, 1) - 1
    x = blocks.siren(1, 256, first=True)(x)
    for _ in range(12):
        layer = blocks.siren(256)
        before = layer.w0 * nn.functional.linear(x, layer.linear.weight)
        x = layer(x)
    assert before.var().item() == pytest.approx(1, abs=0.15)
    assert x.var().item() == pytest.approx(0.5, abs=0.05)


def test_siren_has_derivatives_that_are_sirens_again():
    net = nn.Sequential(blocks.siren(1, 64, first=True), blocks.siren(64), nn.Linear(64, 1)).double()
    x = torch.linspace(-1, 1, 50, dtype=D)[:, None].requires_grad_()
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    assert bend.abs().mean() > 1  # a relu network's is 0
