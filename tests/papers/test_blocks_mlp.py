"""What the papers say of networks of two layers."""

import math

import pytest
import torch
from torch import nn

from etude import blocks

D = torch.float64


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_mlp_is_the_feed_forward_network_of_torchs_encoder_layer():
    theirs = nn.TransformerEncoderLayer(8, 2, 32, dropout=0.0, dtype=D)
    ours, x = blocks.mlp(8).double(), torch.randn(3, 5, 8, dtype=D)
    ours.up.load_state_dict(theirs.linear1.state_dict())
    ours.down.load_state_dict(theirs.linear2.state_dict())
    torch.testing.assert_close(ours(x), theirs.linear2(theirs.linear1(x).relu()))
    assert count(ours) == 2 * 8 * 32 + 32 + 8


def test_swiglu_in_plain_floats():
    block, x = blocks.swiglu(3, hidden=2).double(), torch.randn(3, dtype=D)
    w, v, out, xs = (t.tolist() for t in (block.gate.weight, block.up.weight, block.down.weight, x))
    dot = lambda a, b: sum(s * t for s, t in zip(a, b, strict=True))
    hidden = [dot(w[i], xs) / (1 + math.exp(-dot(w[i], xs))) * dot(v[i], xs) for i in range(2)]
    torch.testing.assert_close(block(x), torch.tensor([dot(row, hidden) for row in out], dtype=D))


def test_swiglu_has_as_many_parameters_as_the_mlp_that_it_replaces():
    assert count(blocks.swiglu(96)) == count(blocks.mlp(96, bias=False))


@pytest.mark.parametrize("gate", [nn.GELU, nn.ReLU, nn.Sigmoid, nn.Identity])
def test_swiglu_has_its_siblings_in_the_same_class(gate):
    block, x = blocks.GatedMlp(6, activation=gate).double(), torch.randn(4, 6, dtype=D)
    w, v, out = (m.weight.T for m in (block.gate, block.up, block.down))
    torch.testing.assert_close(block(x), (gate()(x @ w) * (x @ v)) @ out)


def test_normalized_mlp_scales_both_halves_by_the_root_of_d_as_its_authors_do():
    block, x = blocks.normalized_mlp(9, hidden=4, s_uv=0.5).double(), torch.randn(5, 9, dtype=D)
    nn.init.normal_(block.s_u.p)
    nn.init.normal_(block.s_v.p)
    u, v = x @ block.up.weight.T * block.s_u.p * 0.5 * 3, x @ block.gate.weight.T * block.s_v.p * 0.5 * 3
    torch.testing.assert_close(block(x), (u * v / (1 + (-v).exp())) @ block.down.weight.T)


def test_normalized_mlp_brings_unit_vectors_to_unit_variance():
    block, x = blocks.normalized_mlp(64), nn.functional.normalize(torch.randn(200, 64), dim=-1)
    block.gate.weight.data = nn.functional.normalize(torch.randn(256, 64), dim=-1)
    seen = []
    block.down.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    block.up.weight.data = block.gate.weight.data
    block(x)
    v = 8 * x @ block.gate.weight.T
    assert v.var().item() == pytest.approx(1, rel=0.05)
    torch.testing.assert_close(seen[0], v * nn.functional.silu(v))
    assert torch.equal(block.s_v(), torch.ones(256))
