"""What the papers say of where norms, gates and scales stand in a residual block."""

import math

import pytest
import torch
from torch import nn

from etude import blocks
from tests.peers import timm

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


def gradients(block, x):
    y = block(x)
    return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]


def test_deep_norm_is_the_papers_pseudocode():
    block, x = blocks.deep_norm(8, nn.Linear(8, 8), layers=18).double(), torch.randn(4, 8, dtype=D)
    torch.testing.assert_close(block(x), nn.functional.layer_norm(x * 36**0.25 + block.f(x), (8,)))


def test_deep_norm_starts_all_matrices_but_queries_and_keys_smaller():
    attention, mlp = blocks.attention(8, heads=2), blocks.mlp(8)
    before = {k: p.clone() for f in (attention, mlp) for k, p in f.named_parameters()}
    blocks.deep_norm(8, attention, layers=18), blocks.deep_norm(8, mlp, layers=18)
    for name, p in [*attention.named_parameters(), *mlp.named_parameters()]:
        smaller = name in ("v.weight", "out.weight", "up.weight", "down.weight")
        torch.testing.assert_close(p, before[name] / (144**0.25 if smaller else 1))


def test_layernorm_scaling_is_a_gain_that_falls_with_the_square_root_of_the_layer():
    scaled = blocks.layernorm_scaling(8, nn.Tanh(), layer=9).double()
    folded = blocks.pre_ln(8, nn.Tanh()).double()
    for p, q in zip(scaled.norm_in.parameters(), folded.norm_in.parameters(), strict=True):
        q.data.copy_(nn.init.normal_(p) / 3)
    x = torch.randn(4, 8, dtype=D)
    torch.testing.assert_close(scaled(x), folded(x))


def test_layernorm_scaling_slows_the_growth_of_variance_with_depth():
    x = torch.randn(64, 32)

    def final(make):
        torch.manual_seed(1)
        return nn.Sequential(*(make(32, Mlp(32, 64), i + 1) for i in range(64)))(x).var().item()

    pre, scaled = final(lambda d, f, i: blocks.pre_ln(d, f)), final(blocks.layernorm_scaling)
    assert scaled - 1 < 0.2 * (pre - 1)  # one gains what 1 + 1/2 + … + 1/64 is to 64 of the other


def test_gpas_shrinks_the_sum_but_not_its_gradient():
    block, plain = blocks.gpas(8, nn.Tanh()).double(), blocks.pre_ln(8, nn.Tanh()).double()
    nn.init.constant_(block.gate_sum.a, 1.3)
    x = torch.randn(5, 8, dtype=D, requires_grad=True)
    (y, g), (want, unscaled) = gradients(block, x), gradients(plain, x)
    torch.testing.assert_close(y, (1 - 1.3 / (1 + math.exp(-1.3))) * want)
    assert torch.equal(g, unscaled)


def test_gpas_starts_as_pre_ln_and_its_gate_learns():
    block, x = blocks.gpas(8, nn.Tanh()).double(), torch.randn(5, 8, dtype=D)
    y = block(x)
    assert torch.equal(y, blocks.pre_ln(8, nn.Tanh()).double()(x))
    c = torch.randn_like(y)
    (y * c).sum().backward()
    torch.testing.assert_close(block.gate_sum.a.grad, -0.5 * (y.detach() * c).sum())  # SiLU′(0) = 1/2


def test_gpas_damps_the_variance_of_a_deep_stack_without_a_loss_of_gradient():
    x, found = torch.randn(64, 32, requires_grad=True), {}
    for a in (0.0, 1.0):
        torch.manual_seed(1)
        net = stack(blocks.gpas, 12)
        for block in net:
            nn.init.constant_(block.gate_sum.a, a)
        y, g = gradients(net, x)
        found[a] = y.var().item(), g.norm().item()
    assert found[1.0][0] < 0.1 * found[0.0][0]
    assert found[1.0][1] > found[0.0][1]


def test_gpas_has_one_gate_for_both_blocks_of_a_layer():
    first = blocks.gpas(8, nn.Tanh())
    layer = blocks.Layer(first, blocks.gpas(8, nn.Tanh(), gate=first.gate_sum))
    assert [n for n, p in layer.named_parameters() if p.ndim == 0] == ["attention.gate_sum.a"]


@pytest.mark.parametrize("over, axes", [("feature", (2,)), ("global", (1, 2))])
def test_orthogonal_residual_adds_what_is_orthogonal_to_x(over, axes):
    block = blocks.orthogonal_residual(8, nn.Linear(8, 8), over=over, eps=0.0).double()
    x = torch.randn(3, 5, 8, dtype=D)
    y, f = block(x), block.f(block.norm_in(x))
    torch.testing.assert_close(((y - x) * x).sum(axes), torch.zeros_like(x.sum(axes)), atol=1e-12, rtol=0)
    torch.testing.assert_close(y.square().sum(axes), (x.square() + (y - x).square()).sum(axes))  # Pythagoras
    parallel = (x * (f - (y - x)) / x.square().sum(axes, keepdim=True)).sum(axes, keepdim=True) * x
    torch.testing.assert_close(f - (y - x), parallel)  # what is left out lies along x


def test_orthogonal_residual_in_plain_floats_with_the_papers_eps():
    block = blocks.orthogonal_residual(2, nn.Identity(), norm=lambda d: nn.Linear(d, d, bias=False).double())
    block.norm_in.weight.data = torch.tensor([[0.0, 2.0], [1.0, 1.0]], dtype=D)
    share = (3e-3 * 8e-3 + 4e-3 * 7e-3) / (25e-6 + 1e-6)
    want = torch.tensor([3e-3 + 8e-3 - share * 3e-3, 4e-3 + 7e-3 - share * 4e-3], dtype=D)
    torch.testing.assert_close(block(torch.tensor([3e-3, 4e-3], dtype=D)), want)
    assert torch.equal(block(torch.zeros(2, dtype=D)), torch.zeros(2, dtype=D))


def test_orthogonal_residual_adds_nothing_of_what_is_parallel():
    block = blocks.orthogonal_residual(8, nn.Identity(), norm=nn.RMSNorm, eps=0.0).double()
    x = torch.randn(3, 5, 8, dtype=D)
    torch.testing.assert_close(block(x), x)
    images = blocks.orthogonal_residual(8, nn.Conv2d(8, 8, 1), norm=nn.BatchNorm2d, axis=1, eps=0.0).double()
    x = torch.randn(3, 8, 4, 4, dtype=D)
    torch.testing.assert_close(((images(x) - x) * x).sum(1), torch.zeros(3, 4, 4, dtype=D), atol=1e-12, rtol=0)


def test_rezero_starts_as_the_identity_and_only_its_scalar_learns_at_first():
    block, x = blocks.rezero(8, Mlp(8, 16)), torch.randn(4, 8)
    y = block(x)
    assert torch.equal(y, x)
    y.square().sum().backward()
    torch.testing.assert_close(block.gate_out.weight.grad, (2 * x * block.f(x)).sum())
    assert all(not p.grad.any() for p in block.f.parameters())


def test_rezero_is_alpha_times_the_branch_with_no_norm():
    block, x = blocks.rezero(8, Mlp(8, 16), alpha=0.25), torch.randn(4, 8)
    torch.testing.assert_close(block(x), x + 0.25 * block.f(x))
    assert not any(isinstance(m, nn.LayerNorm) for m in block.modules())


def test_layer_scale_is_timms_on_the_branch_of_pre_ln():
    block, theirs = blocks.layer_scale(8, Mlp(8, 16)), timm("layers.layer_scale").LayerScale(8)
    assert torch.equal(block.gate_out.weight, theirs.gamma)  # both start at 1e-5
    nn.init.normal_(theirs.gamma)
    block.gate_out.load_state_dict({"weight": theirs.gamma})
    x = torch.randn(4, 8)
    torch.testing.assert_close(block(x), x + theirs(block.f(block.norm_in(x))))


def test_parallel_transformer_block_is_the_sum_of_both_branches():
    x = torch.randn(2, 5, 8, dtype=D)
    attention, mlp = blocks.attention(8, heads=2), blocks.mlp(8)
    shared = blocks.parallel_transformer_block(8, attention, mlp).double()
    h = nn.functional.layer_norm(x, (8,))
    torch.testing.assert_close(shared(x), x + attention(h) + mlp(h))
    own = blocks.parallel_transformer_block(8, attention, mlp, shared=False).double()
    nn.init.normal_(own.f.norm_mlp.weight)
    torch.testing.assert_close(own(x), x + attention(h) + mlp(own.f.norm_mlp(x)))


def test_parallel_transformer_block_is_near_the_sequential_layer_to_second_order():
    x, apart = torch.randn(2, 5, 8, dtype=D), []
    attention, mlp = blocks.attention(8, heads=2).double(), blocks.mlp(8, activation=nn.GELU).double()
    nn.init.zeros_(attention.out.bias)
    parallel = blocks.parallel_transformer_block(8, attention, mlp).double()
    for h in (1e-3, 5e-4):
        for linear in (attention.out, mlp.down):
            linear.weight.data *= h / linear.weight.norm()
            nn.init.zeros_(linear.bias)
        norm = nn.functional.layer_norm
        middle = x + attention(norm(x, (8,)))
        apart.append((middle + mlp(norm(middle, (8,))) - parallel(x)).norm().item())
    assert apart[0] / apart[1] == pytest.approx(4, rel=0.02)


def test_normformer_is_pre_ln_with_its_three_extra_operations():
    layer = blocks.normformer(8, heads=2, res_scale=True).double()
    for p in layer.parameters():
        nn.init.normal_(p, 0.3, 0.5)
    first, second, x = layer.attention, layer.mlp, torch.randn(3, 5, 8, dtype=D)
    attention, mlp = first.f, second.f
    plain = blocks.attention(8, heads=2).double()
    plain.load_state_dict({k: v for k, v in attention.state_dict().items() if "gamma" not in k})
    plain.out.weight.data *= attention.gate.gamma.repeat_interleave(4)  # (1) heads are scaled before W_O
    h = x + first.norm_out(plain(first.norm_in(x)))  # (2)
    inner = mlp.norm(nn.functional.gelu(mlp.up(second.norm_in(h))))  # (3)
    torch.testing.assert_close(layer(x), second.skip.weight * h + mlp.down(inner))


def test_normformer_adds_as_many_parameters_as_the_paper_counts_and_starts_neutral():
    layer, d, heads = blocks.normformer(16, heads=4), 16, 4
    bare = nn.TransformerEncoderLayer(d, heads, 4 * d)
    count = [sum(p.numel() for p in m.parameters()) for m in (layer, bare)]
    assert count[0] - count[1] == heads + 2 * d + 2 * 4 * d
    assert torch.equal(layer.attention.f.gate.gamma, torch.ones(heads))


def test_normalized_residual_is_algorithm_step_2_of_its_paper():
    block, x = blocks.normalized_residual(8, nn.Linear(8, 8), alpha=0.2).double(), torch.randn(4, 8, dtype=D)
    nn.init.normal_(block.join.a.p)
    a = (block.join.a.p * 0.2 * 8**0.5).abs()  # stored p, from 1/√d, counts as alpha · p √d
    unit = lambda t: t / t.norm(dim=-1, keepdim=True)
    want = unit(unit(x) + a * (unit(block.f(x)) - unit(x)))
    torch.testing.assert_close(block(x), want)
    torch.testing.assert_close(block(x).norm(dim=-1), torch.ones(4, dtype=D))


def test_normalized_residual_goes_from_x_to_f_as_alpha_goes_from_0_to_1():
    x, f = nn.functional.normalize(torch.randn(4, 8, dtype=D), dim=-1), nn.Linear(8, 8)
    for alpha, want in ((1.0, lambda y: nn.functional.normalize(y, dim=-1)), (1e-9, lambda y: x)):
        block = blocks.normalized_residual(8, f, alpha=alpha).double()
        torch.testing.assert_close(block(x), want(block.f(x)), atol=1e-6, rtol=0)
        torch.testing.assert_close(block.join.a(), torch.full((8,), alpha, dtype=D), rtol=1e-6, atol=0)


def test_nf_residual_keeps_the_variance_that_the_paper_predicts_and_shows_f_a_unit_variance():
    """Var(x_i) = 1 + i α²: x + α f(x / β_i), β_i² = 1 + i α², where f keeps variance 1 and forgets its input."""
    torch.manual_seed(0)
    alpha, seen = 0.5, []

    class Fresh(nn.Module):
        def forward(self, x):
            seen.append(x.var().item())
            return torch.randn_like(x)

    x = torch.randn(64, 512)
    for i in range(12):
        x = blocks.nf_residual(512, Fresh(), alpha, beta=(1 + i * alpha**2) ** 0.5)(x)
        assert x.var().item() == pytest.approx(1 + (i + 1) * alpha**2, rel=0.05)
    assert seen == pytest.approx([1.0] * 12, rel=0.05)


def test_nf_residual_by_hand():
    x, f = torch.tensor([[1.0, -2.0]]), nn.Tanh()
    y = blocks.nf_residual(2, f, alpha=0.2, beta=4.0)(x)
    assert y.tolist()[0] == pytest.approx([1 + 0.2 * math.tanh(0.25), -2 - 0.2 * math.tanh(0.5)])
    with pytest.raises(ValueError, match="beta=0 must be above 0"):
        blocks.nf_residual(2, f, beta=0)
