"""What the papers of the norms with gains of their own say, in plain floats and closed forms."""

import math

import pytest
import torch
from torch import nn

from etude import norms

D = torch.float64


def rms(row, eps):
    root = math.sqrt(sum(v * v for v in row) / len(row) + eps)
    return [v / root for v in row]


def drawn(norm):
    torch.manual_seed(1)
    norm = norm.double()
    for p in norm.parameters():
        nn.init.normal_(p)
    return norm


def test_seed_norm_gain_is_a_tanh_of_the_product_of_raw_x_with_beta():
    norm = drawn(norms.seed_norm(4, eps=1e-3))
    x = torch.randn(3, 4, dtype=D)
    g, a, b = (norm.get_parameter(n).tolist() for n in ("weight", "alpha", "beta"))
    for got, row in zip(norm(x).tolist(), x.tolist(), strict=True):
        t = math.tanh(sum(v * c for v, c in zip(row, b)))
        assert got == pytest.approx([y * (t * ai + gi) for y, ai, gi in zip(rms(row, 1e-3), a, g)], rel=1e-12)


def test_seed_norm_heads_have_a_tanh_each_over_one_root_mean_square():
    norm = drawn(norms.seed_norm(6, heads=2, eps=0.0))
    x = torch.randn(1, 6, dtype=D)
    [row] = x.tolist()
    g, a, b = (norm.get_parameter(n).tolist() for n in ("weight", "alpha", "beta"))
    t = [math.tanh(sum(v * c for v, c in zip(row[s:][:3], b[s:][:3]))) for s in (0, 3)]
    want = [y * (t[i // 3] * a[i] + g[i]) for i, y in enumerate(rms(row, 0.0))]
    assert norm(x)[0].tolist() == pytest.approx(want, rel=1e-12)
    with pytest.raises(ValueError, match="6 features do not divide into 4 heads"):
        norms.seed_norm(6, heads=4)


def test_seed_norm_starts_as_rms_norm_adds_two_d_and_learns_beta_at_once():
    norm = norms.seed_norm(8).double()
    x = torch.randn(5, 8, dtype=D)
    torch.testing.assert_close(norm(x), nn.RMSNorm(8, eps=1e-6).double()(x))
    assert sum(p.numel() for p in norm.parameters()) == 3 * 8
    norm(x).square().sum().backward()
    assert norm.beta.grad.abs().min() > 0


def test_gated_norm_gates_each_channel_of_rms_norm_by_a_bottleneck_without_biases():
    norm = drawn(norms.gated_norm(5, rank=2))
    x = torch.randn(4, 5, dtype=D)
    w, down, up = (norm.get_parameter(n).tolist() for n in ("weight", "down", "up"))
    for got, row in zip(norm(x).tolist(), x.tolist(), strict=True):
        y = [v * c for v, c in zip(rms(row, 1e-6), w)]
        inner = [sum(a * b for a, b in zip(y, line)) for line in down]
        inner = [v / (1 + math.exp(-v)) for v in inner]
        gate = [1 / (1 + math.exp(-sum(a * b for a, b in zip(inner, line)))) for line in up]
        assert got == pytest.approx([v * s for v, s in zip(y, gate)], rel=1e-10)
    assert {n: tuple(p.shape) for n, p in norm.named_parameters()} == {"weight": (5,), "down": (2, 5), "up": (5, 2)}


def test_gated_norm_halves_rms_norm_where_the_gate_says_nothing():
    norm = norms.gated_norm(6).double()
    norm.up.data.zero_()
    x = torch.randn(3, 6, dtype=D)
    torch.testing.assert_close(norm(x), nn.RMSNorm(6, eps=1e-6).double()(x) / 2)


def test_pre_affine_scales_before_the_statistics():
    norm = drawn(norms.pre_affine(4))
    x = torch.randn(3, 4, dtype=D)
    scaled = (x * norm.pre_weight).tolist()
    for got, row in zip(norm(x).tolist(), scaled, strict=True):
        assert got == pytest.approx([v * c for v, c in zip(rms(row, 1e-6), norm.weight.tolist())], rel=1e-12)


def test_pre_affine_can_rescale_a_token_without_an_outlier_in_it():
    """One huge channel shrinks the others by √d / |outlier|: here the learned scale makes the channel huge."""
    norm = norms.pre_affine(9, eps=0.0).double()
    norm.pre_weight.data[0] = 1e6
    y = norm(torch.ones(1, 9, dtype=D))
    assert y[0, 1].item() == pytest.approx(3 / 1e6, rel=1e-9)


def test_ada_rms_norm_follows_the_length_of_x_as_far_as_alpha_says():
    norm = drawn(norms.ada_rms_norm(4))
    x = torch.randn(3, 4, dtype=D)
    a, b = norm.alpha.tolist(), norm.beta.tolist()
    for got, row in zip(norm(x).tolist(), x.tolist(), strict=True):
        new = math.sqrt(sum((c * v + o) ** 2 for c, v, o in zip(a, row, b)) / 4 + 1e-6)
        assert got == pytest.approx([new * v for v in rms(row, 1e-6)], rel=1e-12)
    assert not torch.allclose(norm(2 * x), norm(x))


def test_ada_rms_norm_is_rms_norm_at_its_start_and_a_multiple_of_x_without_beta():
    norm = norms.ada_rms_norm(8).double()
    x = torch.randn(5, 8, dtype=D)
    torch.testing.assert_close(norm(x), nn.RMSNorm(8, eps=1e-6, elementwise_affine=False)(x), rtol=1e-5, atol=1e-6)
    norm.alpha.data.fill_(1.7)
    norm.beta.data.zero_()
    torch.testing.assert_close(norm(x), 1.7 * x, rtol=1e-5, atol=1e-6)


def test_gating_logit_norm_makes_gates_free_of_the_scale_and_shift_of_the_logits():
    z = torch.randn(7, 16, dtype=D)
    norm = norms.gating_logit_norm(16, eps=0.0).double()
    torch.testing.assert_close(norm(5 * z - 3).softmax(-1), norm(z).softmax(-1))
    assert not list(norm.parameters())


@pytest.mark.parametrize("lam", [1.0, 2.0])
def test_gating_logit_norm_standard_deviation_is_lambda(lam):
    z = norms.gating_logit_norm(16, lam=lam, eps=0.0).double()(torch.randn(7, 16, dtype=D))
    torch.testing.assert_close(z.std(-1, correction=0), torch.full((7,), lam, dtype=D))
    torch.testing.assert_close(z.mean(-1), torch.zeros(7, dtype=D), rtol=0, atol=1e-12)
