"""What the papers of attention without softmax say."""

import math

import pytest
import torch
from torch import nn

from etude import blocks

D = torch.float64


def loud(module):
    for p in module.double().parameters():
        nn.init.normal_(p, 0.1, 0.6)
    return module


def head_norm(x, norm, h):
    return nn.functional.layer_norm(x, x.shape[-1:], norm.weight[h, 0], norm.bias[h, 0], norm.eps)


def head_by_head(module, x, kind, lead=None):
    """One head at a time, with the whole matrix of n × n scores."""
    c, n, found = x.shape[-1] // module.heads, x.shape[0], []
    for h in range(module.heads):
        q, k, v = (m(x)[:, h * c : h * c + c] for m in (module.q, module.k, module.v))
        k = head_norm(k, module.norm_k, h)
        q = head_norm(q, module.norm_other, h) if kind == "fourier" else q
        v = head_norm(v, module.norm_other, h) if kind == "galerkin" else v
        q, k, v = (t if lead is None else torch.cat([lead, t], -1) for t in (q, k, v))
        scale = math.sqrt(q.shape[-1]) if kind == "fourier" else 1
        found.append((q @ k.T) @ v / n / scale)
    return torch.cat(found, -1)


def test_galerkin_attention_is_the_explicit_product_head_by_head():
    module, x = loud(blocks.galerkin_attention(12, heads=3)), torch.randn(7, 12, dtype=D)
    torch.testing.assert_close(module(x[None])[0], head_by_head(module, x, "galerkin"))


def test_fourier_attention_is_the_explicit_product_head_by_head():
    module, x = loud(blocks.fourier_attention(12, heads=3)), torch.randn(7, 12, dtype=D)
    torch.testing.assert_close(module(x[None])[0], head_by_head(module, x, "fourier"))


@pytest.mark.parametrize("kind", ["galerkin", "fourier"])
def test_galerkin_attention_takes_coordinates_in_front_of_each_head(kind):
    module, x = loud(blocks.IntegralAttention(12, 3, kind, coordinates=2)), torch.randn(7, 12, dtype=D)
    at = torch.rand(7, 2, dtype=D)
    torch.testing.assert_close(module(x[None], at[None])[0], module.out(head_by_head(module, x, kind, at)))


@pytest.mark.parametrize("make", [blocks.galerkin_attention, blocks.fourier_attention], ids=lambda m: m.__name__)
def test_galerkin_attention_is_an_integral_unchanged_by_doubled_tokens(make):
    module, x = loud(make(12, heads=3)), torch.randn(2, 7, 12, dtype=D)
    torch.testing.assert_close(module(x.repeat_interleave(2, 1)), module(x).repeat_interleave(2, 1))


def test_galerkin_attention_starts_near_a_hundredth_of_the_identity_and_ends_without_a_matrix():
    module = blocks.galerkin_attention(64)
    bound = 0.01 * math.sqrt(6 / 128)
    for linear in (module.q, module.k, module.v):
        rest = linear.weight - 0.01 * torch.eye(64)
        assert 0.95 * bound < rest.abs().max() <= bound + 1e-9
        assert not linear.bias.any()
    assert module.out is None


def test_fourier_attention_drops_scores_of_pairs_where_galerkin_drops_those_of_channels():
    x = torch.randn(1, 1, 8, dtype=D).expand(1, 6, 8)  # the same token six times
    fourier, galerkin = loud(blocks.fourier_attention(8, dropout=0.5)), loud(blocks.galerkin_attention(8, dropout=0.5))
    y, z = fourier(x), galerkin(x)
    assert not torch.allclose(y[:, :1], y)
    torch.testing.assert_close(z[:, :1].expand_as(z), z)
    assert not torch.allclose(z, galerkin.eval()(x))
    mean = torch.stack([fourier(x) for _ in range(600)]).mean((0, 2))
    torch.testing.assert_close(mean, fourier.eval()(x)[:, 0], rtol=0.1, atol=0.02)


def scores(module, q, k):
    p, r = module.features(q, k)
    return (p @ r.mT) / (p @ r.mT).sum(-1, keepdim=True)


def test_norm_aware_linear_attention_features_in_plain_floats():
    module = blocks.norm_aware_linear_attention(4, heads=1)
    q, k = [0.5, -1.0, 0.25, 2.0], [-0.5, 2.0, 1.0, -3.0]
    length = math.sqrt(sum(v * v for v in q))
    power = 3 * (0.5 + math.tanh(length))
    want_q = [max(s * v / length, 0) ** power for s in (1, -1) for v in q]
    want_k = [max(s * v, 0) ** 3 for s in (1, -1) for v in k]
    p, r = module.features(torch.tensor([q], dtype=D), torch.tensor([k], dtype=D))
    torch.testing.assert_close(p[0], torch.tensor(want_q, dtype=D))
    torch.testing.assert_close(r[0], torch.tensor(want_k, dtype=D))


def test_norm_aware_linear_attention_is_the_explicit_matrix_turned_in_the_numerator_alone():
    module = blocks.norm_aware_linear_attention(24, heads=2).double()
    h, w, c = 3, 4, 12
    q, k, v = (torch.randn(1, 2, h * w, c, dtype=D) for _ in range(3))
    p, r = module.features(q, k)
    rates = [10000 ** (-i / 2) for i in range(3)]  # from 1 to 1/10000, both ends included

    def turned(z):
        z = torch.view_as_complex(z.reshape(1, 2, h, w, 2, 2, 3, 2))  # sign, row or column, rate, pair
        row = torch.tensor([[cell * f for f in rates] for cell in range(h)], dtype=D)[:, None].expand(h, w, 3)
        column = torch.tensor([[cell * f for f in rates] for cell in range(w)], dtype=D)[None].expand(h, w, 3)
        angle = torch.stack([row, column], 2)[:, :, None]
        return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).reshape(1, 2, h * w, 2 * c)

    # 1e-6 is added to the mean over keys, so to a 12th of the sum
    want = (turned(p) @ turned(r).mT) @ v / ((p @ r.mT).sum(-1, keepdim=True) + 12e-6)
    torch.testing.assert_close(module.attend(q, k, v, (h, w)), want)


def test_norm_aware_linear_attention_rows_are_non_negative_and_sharpen_with_the_norm_of_the_query():
    module = blocks.norm_aware_linear_attention(24, heads=2)
    q, k = torch.randn(1, 2, 1, 12, dtype=D), torch.randn(1, 2, 9, 12, dtype=D)
    entropy = []
    for length in (0.1, 0.5, 1.0, 2.0):
        rows = scores(module, length * q / q.norm(dim=-1, keepdim=True), k)
        assert (rows >= 0).all()
        entropy.append(-(rows * rows.log()).sum(-1).mean().item())
    assert entropy == sorted(entropy, reverse=True)
    assert entropy[0] - entropy[-1] > 0.1


def test_norm_aware_linear_attention_adds_a_local_convolution_then_norm_gate_and_matrix():
    module, x = blocks.norm_aware_linear_attention(24, heads=2).double(), torch.randn(2, 3, 4, 24, dtype=D)
    q, k, v = (m(x).view(2, 12, 2, 12).transpose(1, 2) for m in (module.q, module.k, module.v))
    y = module.attend(q, k, v, (3, 4)).transpose(1, 2).reshape(2, 3, 4, 24)
    local = nn.functional.conv2d(
        module.v(x).movedim(-1, 1), module.local.weight, module.local.bias, padding=2, groups=24
    )
    want = module.out(module.norm(y + local.movedim(1, -1)) * nn.functional.silu(module.g(x)))
    torch.testing.assert_close(module(x), want)


def test_norm_aware_linear_attention_survives_a_query_of_zeros():
    module = blocks.norm_aware_linear_attention(24, heads=2)
    nn.init.zeros_(module.q.weight)
    nn.init.zeros_(module.q.bias)
    module(torch.randn(1, 3, 4, 24)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
