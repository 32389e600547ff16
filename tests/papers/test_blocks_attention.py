"""What the papers of attention say."""

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
