"""What the papers say of where a norm stands in a residual block."""

import pytest
import torch
from torch import nn

from etude import blocks

D = torch.float64


class Mlp(nn.Sequential):
    def __init__(self, d, hidden):
        super().__init__(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, d))


def like_torchs_encoder_layer(placement, norm_first):
    """A torch encoder layer, and two of our blocks with its weights."""
    theirs = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, norm_first=norm_first, batch_first=True, dtype=D)
    for p in theirs.parameters():
        nn.init.normal_(p, 0.2, 0.3)
    first, second = placement(8, blocks.attention(8, heads=2)), placement(8, Mlp(8, 16))
    ours = nn.Sequential(first, second).double()
    rows = theirs.self_attn.in_proj_weight.chunk(3), theirs.self_attn.in_proj_bias.chunk(3)
    for linear, w, b in zip((first.f.q, first.f.k, first.f.v), *rows, strict=True):
        linear.load_state_dict({"weight": w, "bias": b})
    first.f.out.load_state_dict(theirs.self_attn.out_proj.state_dict())
    second.f[0].load_state_dict(theirs.linear1.state_dict())
    second.f[2].load_state_dict(theirs.linear2.state_dict())
    slot = "norm_in" if norm_first else "norm_sum"
    getattr(first, slot).load_state_dict(theirs.norm1.state_dict())
    getattr(second, slot).load_state_dict(theirs.norm2.state_dict())
    return ours, theirs


def stack(placement, depth, d=32, gain=1.0, **norms):
    made = nn.Sequential(*(placement(d, Mlp(d, 4 * d), **norms) for _ in range(depth)))
    for block in made:
        for layer in (block.f[0], block.f[2]):
            nn.init.xavier_uniform_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
    return made


def last_gradient(placement, depth):
    """Norm of the gradient of the last block's second matrix, at init, the mean over three seeds."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = stack(placement, depth)
        head = nn.LayerNorm(32) if placement is blocks.pre_ln else nn.Identity()
        head(net(torch.randn(64, 32))).mul(torch.randn(64, 32)).sum().div(64).backward()
        found.append(net[-1].f[2].weight.grad.norm())
    return sum(found).item() / 3


def test_pre_ln_is_torchs_encoder_layer_with_norm_first():
    ours, theirs = like_torchs_encoder_layer(blocks.pre_ln, norm_first=True)
    x = torch.randn(3, 5, 8, dtype=D)
    torch.testing.assert_close(ours(x), theirs(x))


def test_pre_ln_gradient_of_the_last_block_falls_with_depth():
    assert last_gradient(blocks.pre_ln, 24) < 0.6 * last_gradient(blocks.pre_ln, 2)


def test_pre_ln_leaves_the_residual_path_alone():
    block = blocks.pre_ln(8, nn.Linear(8, 8))
    nn.init.zeros_(block.f.weight)
    nn.init.zeros_(block.f.bias)
    x = torch.randn(4, 8)
    assert torch.equal(block(x), x)


def test_post_ln_is_torchs_encoder_layer_without_norm_first():
    ours, theirs = like_torchs_encoder_layer(blocks.post_ln, norm_first=False)
    x = torch.randn(3, 5, 8, dtype=D)
    torch.testing.assert_close(ours(x), theirs(x))


def test_post_ln_gradient_of_the_last_block_does_not_fall_with_depth():
    assert last_gradient(blocks.post_ln, 24) > 0.9 * last_gradient(blocks.post_ln, 2)


def test_peri_ln_adds_what_has_the_rms_of_the_output_gain():
    block = blocks.peri_ln(32, Mlp(32, 64), norm=nn.RMSNorm)
    nn.init.constant_(block.norm_out.weight, 0.7)
    x = 5 * torch.randn(6, 32)
    added = block(x) - x
    torch.testing.assert_close(added.square().mean(-1).sqrt(), torch.full((6,), 0.7), rtol=1e-3, atol=0)


def test_peri_ln_by_its_equation():
    block = blocks.peri_ln(8, nn.Linear(8, 8), norm=nn.LayerNorm, norm_out=nn.RMSNorm).double()
    for p in block.parameters():
        nn.init.normal_(p, 0.5)
    x = torch.randn(4, 8, dtype=D)
    inner = nn.functional.layer_norm(x, (8,), block.norm_in.weight, block.norm_in.bias)
    outer = nn.functional.rms_norm(block.f(inner), (8,), block.norm_out.weight)
    torch.testing.assert_close(block(x), x + outer)


def test_peri_ln_residual_variance_stays_bounded_when_weights_grow_and_pre_ln_does_not():
    x, grown = torch.randn(64, 32), {}
    for placement in (blocks.peri_ln, blocks.pre_ln):
        for gain in (1.0, 10.0):
            torch.manual_seed(1)
            grown[placement.__name__, gain] = stack(placement, 12, gain=gain)(x).var().item()
    assert grown["peri_ln", 10.0] < 2 * 13  # at most linear in depth: 12 blocks add variance 1 each
    assert grown["peri_ln", 10.0] == pytest.approx(grown["peri_ln", 1.0], rel=0.5)
    assert grown["pre_ln", 10.0] > 1000 * grown["pre_ln", 1.0]
