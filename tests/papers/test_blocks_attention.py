"""What the papers of attention say."""

import cmath
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude import blocks

D = torch.float64


def softmaxed(logits):
    e = [math.exp(v - max(logits)) for v in logits]
    return [v / sum(e) for v in e]


def plain(module, x, logit, causal=False):
    """One head at a time in plain floats; ``logit`` turns a query and a key into a number."""
    q, k, v = (m(x).tolist() for m in (module.q, module.k, module.v))
    width, rows = x.shape[1] // module.heads, []
    for i in range(len(q)):
        row = []
        for h in range(module.heads):
            cut = slice(h * width, (h + 1) * width)
            seen = range(i + 1) if causal else range(len(k))
            share = softmaxed([logit(q[i][cut], k[j][cut]) for j in seen])
            row += [sum(p * v[j][cut][c] for p, j in zip(share, seen)) for c in range(width)]
        rows.append(row)
    return module.out(torch.tensor(rows, dtype=x.dtype))


def dot(a, b):
    return sum(s * t for s, t in zip(a, b, strict=True))


def loud(module):
    for p in module.double().parameters():
        nn.init.normal_(p, 0.1, 0.6) if p.ndim else None
    return module


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_papers_formula_in_plain_floats(causal):
    module, x = loud(blocks.attention(6, heads=2, causal=causal)), torch.randn(4, 6, dtype=D)
    want = plain(module, x, lambda q, k: dot(q, k) / math.sqrt(3), causal)
    torch.testing.assert_close(module(x[None])[0], want)


def test_attention_is_torchs_multihead_attention_to_itself_and_to_a_context():
    ours, theirs = blocks.attention(8, heads=2).double(), nn.MultiheadAttention(8, 2, batch_first=True, dtype=D)
    nn.init.normal_(theirs.in_proj_bias)
    chunks = zip((ours.q, ours.k, ours.v), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True)
    for linear, w, b in chunks:
        linear.load_state_dict({"weight": w, "bias": b})
    ours.out.load_state_dict(theirs.out_proj.state_dict())
    x, context = torch.randn(3, 5, 8, dtype=D), torch.randn(3, 7, 8, dtype=D)
    hidden = torch.rand(5, 7) < 0.4
    hidden[:, 0] = False
    torch.testing.assert_close(ours(x), theirs(x, x, x)[0])
    torch.testing.assert_close(ours(x, context, mask=~hidden), theirs(x, context, context, attn_mask=hidden)[0])


def test_attention_does_not_see_the_order_of_its_keys():
    module, x = loud(blocks.attention(8, heads=4)), torch.randn(2, 5, 8, dtype=D)
    torch.testing.assert_close(module(x, x.flip(1)), module(x))


@pytest.mark.parametrize("causal", [False, True])
def test_qk_norm_is_g_times_a_cosine_in_plain_floats(causal):
    module, x = loud(blocks.qk_norm(6, heads=2, length=9, causal=causal)), torch.randn(4, 6, dtype=D)
    g = math.log2(9 * 9 - 9)
    want = plain(module, x, lambda q, k: g * dot(q, k) / math.sqrt(dot(q, q) * dot(k, k)), causal)
    torch.testing.assert_close(module(x[None])[0], want, rtol=1e-6, atol=1e-6)  # g is kept in float32 until .double()


def test_qk_norm_is_torchs_attention_of_unit_vectors_scaled_by_g():
    module, x = loud(blocks.qk_norm(8, heads=2)), torch.randn(2, 5, 8, dtype=D)
    q, k, v = (m(x).view(2, 5, 2, 4).transpose(1, 2) for m in (module.q, module.k, module.v))
    y = F.scaled_dot_product_attention(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=module.qk.g.item())
    torch.testing.assert_close(module(x), module.out(y.transpose(1, 2).reshape(2, 5, 8)))


def test_qk_norm_starts_g_at_the_papers_value_and_learns_it():
    module = blocks.qk_norm(8, heads=2)
    assert module.qk.g.item() == pytest.approx(12.44, abs=0.01)  # log2(75² − 75)
    module(torch.randn(2, 5, 8)).square().sum().backward()
    assert module.qk.g.grad.abs() > 0
    assert [n for n, p in module.named_parameters() if p.ndim == 0] == ["qk.g"]


def test_qk_norm_ignores_the_length_of_queries_and_keys():
    module, x = loud(blocks.qk_norm(8, heads=2, bias=False)), torch.randn(2, 5, 8, dtype=D)
    want = module(x)
    module.q.weight.data.mul_(7)
    module.k.weight.data.mul_(0.2)
    torch.testing.assert_close(module(x), want)
    module.v.weight.data.mul_(2)
    torch.testing.assert_close(module(x), 2 * want)


def test_grouped_query_attention_is_full_attention_with_repeated_keys_and_values():
    grouped, full = loud(blocks.grouped_query_attention(8, 4, kv_heads=2)), loud(blocks.attention(8, 4))
    for name in ("q", "out"):
        getattr(full, name).load_state_dict(getattr(grouped, name).state_dict())
    for name in ("k", "v"):
        w, b = getattr(grouped, name).weight, getattr(grouped, name).bias
        repeated = {
            "weight": w.view(2, 2, 8).repeat_interleave(2, 0).view(8, 8),
            "bias": b.view(2, 2).repeat_interleave(2, 0).flatten(),
        }
        getattr(full, name).load_state_dict(repeated)
    x = torch.randn(2, 5, 8, dtype=D)
    torch.testing.assert_close(grouped(x), full(x))


def test_grouped_query_attention_keeps_as_many_keys_and_values_as_groups():
    one, two = blocks.grouped_query_attention(64, 8, kv_heads=1), blocks.grouped_query_attention(64, 8, kv_heads=2)
    assert [one.k.out_features, two.k.out_features, two.v.out_features, two.q.out_features] == [8, 16, 16, 64]


def turned(v, t, base=10000.0):
    """A head's entries as complex numbers, turned by position, in plain floats."""
    pairs = [complex(v[i], v[i + 1]) * cmath.exp(1j * t * base ** (-i / len(v))) for i in range(0, len(v), 2)]
    return [part for z in pairs for part in (z.real, z.imag)]


@pytest.mark.parametrize("causal", [False, True])
def test_rotary_attention_turns_queries_and_keys_in_plain_floats(causal):
    module, x = loud(blocks.rotary_attention(8, heads=2, base=50.0, causal=causal)), torch.randn(4, 8, dtype=D)
    q, k = ([dict(enumerate(row)) for row in m(x).tolist()] for m in (module.q, module.k))
    where = {tuple(r[i] for i in range(h, h + 4)): t for t in range(4) for r in (q[t], k[t]) for h in (0, 4)}

    def logit(a, b):
        return dot(turned(a, where[tuple(a)], 50.0), turned(b, where[tuple(b)], 50.0)) / 2

    torch.testing.assert_close(module(x[None])[0], plain(module, x, logit, causal))


def test_rotary_attention_sees_differences_of_positions_alone():
    q, k = torch.randn(2, 8, dtype=D), torch.randn(2, 8, dtype=D)
    a, b = blocks.Rotary()(q[:, None, None].expand(2, 1, 9, 8), k[:, None, None].expand(2, 1, 9, 8))
    logits = (a @ b.mT)[:, 0]
    for diagonal in range(-8, 9):
        along = logits.diagonal(diagonal, 1, 2)
        torch.testing.assert_close(along, along[:, :1].expand_as(along))
    torch.testing.assert_close(a.norm(dim=-1), q.norm(dim=-1)[:, None, None].expand(2, 1, 9))
    assert not torch.allclose(logits[:, 0, 0], logits[:, 0, 1])


@pytest.mark.parametrize("causal", [False, True])
def test_sl2_attention_weighs_by_squared_distance_in_plain_floats(causal):
    module, x = loud(blocks.sl2_attention(6, heads=2, causal=causal)), torch.randn(4, 6, dtype=D)
    far = lambda q, k: -sum((s - t) ** 2 for s, t in zip(q, k, strict=True)) / (2 * math.sqrt(3))
    torch.testing.assert_close(module(x[None])[0], plain(module, x, far, causal))


def test_sl2_attention_prefers_the_nearest_key_and_not_the_longest():
    q, k = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [9.0, 0.0]])
    near, far = (lambda a, b: (a @ b.mT)[0])(*blocks.sl2_attention(2, heads=1).qk(q, k)).tolist()
    assert near > far
    assert near - far == pytest.approx(64 / (2 * math.sqrt(2)))


def weights_of(module, x, mask=None):
    """The matrix that attention multiplies v with, read off by feeding it unit values."""
    t, heads = x.shape[1], module.heads
    q, k = (m(x).view(1, t, heads, -1).transpose(1, 2) for m in (module.q, module.k))
    v = torch.eye(t, dtype=x.dtype).expand(1, heads, t, t)
    return module.attend(x, q, k, v, mask)[0]


@pytest.mark.parametrize("causal", [False, True])
def test_affine_scaled_attention_by_equations_6_to_9(causal):
    module, x = loud(blocks.affine_scaled_attention(6, heads=2, rho=0.8, causal=causal)), torch.randn(1, 4, 6, dtype=D)
    nn.init.normal_(module.alpha.weight, 0, 2)
    nn.init.constant_(module.alpha_ma, 0.3)
    alpha = [[min(max(0.1 * s + 0.5, 0), 1) for s in row] for row in module.alpha(x)[0].tolist()]  # [t][heads]
    running = [0.8 * 0.3 + 0.2 * sum(a[h] for a in alpha) / 4 for h in range(2)]
    got = weights_of(module, x)
    q, k = (m(x)[0].tolist() for m in (module.q, module.k))
    for h in range(2):
        cut = slice(3 * h, 3 * h + 3)
        for i in range(4):
            n = i + 1 if causal else 4
            share = softmaxed([dot(q[i][cut], k[j][cut]) / math.sqrt(3) for j in range(n)])
            beta = (running[h] - alpha[i][h]) / n
            want = [alpha[i][h] * s + beta for s in share] + [0.0] * (4 - n)
            torch.testing.assert_close(got[h, i], torch.tensor(want, dtype=D))
    torch.testing.assert_close(module.alpha_ma, torch.tensor(running, dtype=D))


def test_affine_scaled_attention_rows_sum_to_the_running_mean_also_under_a_mask():
    module, x = loud(blocks.affine_scaled_attention(6, heads=2)).eval(), torch.randn(1, 4, 6, dtype=D)
    nn.init.constant_(module.alpha_ma, 0.7)
    seen = torch.tensor([[1, 1, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]]).bool()
    for mask in (seen, torch.zeros(4, 4, dtype=D).masked_fill(~seen, -math.inf)):
        rows = weights_of(module, x, mask)
        torch.testing.assert_close(rows.sum(-1), torch.full((2, 4), 0.7, dtype=D))
        assert not rows[:, ~seen].any()


def test_affine_scaled_attention_rests_in_eval_and_clips_linearly():
    module, x = loud(blocks.affine_scaled_attention(6, heads=2)), torch.randn(3, 4, 6, dtype=D)
    assert torch.equal(module.alpha_ma, torch.zeros(2, dtype=D))
    module.eval()(x)
    assert torch.equal(module.alpha_ma, torch.zeros(2, dtype=D))
    nn.init.constant_(module.alpha.weight, 1e3)
    module.train()(x.abs())
    torch.testing.assert_close(module.alpha_ma, torch.full((2,), 0.1, dtype=D))  # α = 1 everywhere, rho = 0.9


def test_normalized_attention_is_a_scaled_cosine_of_turned_queries_and_keys_in_plain_floats():
    module, x = blocks.normalized_attention(8, heads=2, s_qk=0.7, causal=True).double(), torch.randn(4, 8, dtype=D)
    nn.init.normal_(module.qk.s.p)
    s = (module.qk.s.p * 0.7 * 8**0.5).tolist()
    q, k = ([dict(enumerate(row)) for row in m(x).tolist()] for m in (module.q, module.k))
    where = {tuple(r[i] for i in range(h, h + 4)): (t, h) for t in range(4) for r in (q[t], k[t]) for h in (0, 4)}

    def hat(v):
        t, h = where[tuple(v)]
        return [g * e / math.sqrt(dot(v, v)) for g, e in zip(s[h : h + 4], turned(v, t), strict=True)]

    want = plain(module, x, lambda a, b: 2 * dot(hat(a), hat(b)), causal=True)  # √c = 2
    torch.testing.assert_close(module(x[None])[0], want, rtol=1e-6, atol=1e-6)  # p starts in float32


def test_normalized_attention_starts_with_logits_within_the_root_of_the_head_width():
    module, x = blocks.normalized_attention(16, heads=4), 100 * torch.randn(2, 5, 16)
    q, k = (m(x).view(2, 5, 4, 4).transpose(1, 2) for m in (module.q, module.k))
    a, b = module.qk(q, k)
    assert (a @ b.mT).abs().max() <= 2 + 1e-5
    torch.testing.assert_close(b.norm(dim=-1), torch.ones(2, 4, 5))
    assert module.q.bias is None
