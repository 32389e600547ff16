"""What the paper says of Norm Tweaking."""

import copy
import statistics

import pytest
import torch
from torch import nn

from etude import weights

F64 = torch.float64


def blocks(n=3):
    torch.manual_seed(0)
    made = [
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True, dtype=F64)
        for _ in range(n)
    ]
    return [b.eval() for b in made]


def samples(n=4):
    return list(torch.randn(n, 1, 24, 8, dtype=F64, generator=torch.Generator().manual_seed(1)))


@torch.no_grad()
def two_bits(block):
    for p in block.parameters():
        if p.ndim > 1:
            step = p.abs().max() / 1.5
            p.copy_(((p / step - 0.5).round().clamp(-2, 1) + 0.5) * step)


def test_norm_tweaking_loss_is_the_papers_sum_over_channels():
    y, target = torch.randn(2, 5, 4, 3, dtype=F64)
    want = 0.0
    for c in range(3):
        a, b = y[..., c].flatten().tolist(), target[..., c].flatten().tolist()
        want += abs(statistics.mean(a) - statistics.mean(b)) + abs(statistics.variance(a) - statistics.variance(b))
    assert weights.channel_distance(y, target).item() == pytest.approx(want / 3, abs=1e-12)


def test_norm_tweaking_brings_each_block_nearer_and_changes_norms_alone():
    ours = blocks()
    plain = copy.deepcopy(ours)
    for block in plain:
        two_bits(block)
    found = weights.norm_tweaking(ours, samples(), two_bits, lr=1e-3, iters=3)
    assert len(found) == 3
    assert all(after < before for before, after in found)
    for block, want in zip(ours, plain):
        moved = {n for (n, p), q in zip(block.named_parameters(), want.parameters()) if not torch.equal(p, q)}
        assert moved == {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"}
        assert all(p.grad is None for p in block.parameters())


def test_norm_tweaking_is_algorithm_1_of_its_paper():
    ours, theirs, lr, scale = blocks(), blocks(), 1e-3, 2.0
    weights.norm_tweaking(ours, samples(), two_bits, lr=lr, lr_scale=scale)
    stream = samples()
    for i, block in enumerate(theirs):
        full = copy.deepcopy(block)  # the float block reads what the quantised one before it made
        two_bits(block)
        theta = [p for n, p in block.named_parameters() if n.startswith("norm")]
        rate = lr * (1 + scale * i / 3)
        m, v = [torch.zeros_like(p) for p in theta], [torch.zeros_like(p) for p in theta]
        for t, x in enumerate(stream, 1):
            target, y = full(x)[0], block(x)[0]
            gaps = (y.mean(0) - target.mean(0)).abs() + (y.var(0) - target.var(0)).abs()
            for j, g in enumerate(torch.autograd.grad(gaps.sum() / 8, theta)):
                m[j], v[j] = 0.9 * m[j] + 0.1 * g, 0.999 * v[j] + 0.001 * g * g
                theta[j].data -= rate * (m[j] / (1 - 0.9**t)) / ((v[j] / (1 - 0.999**t)).sqrt() + 1e-8)
        stream = [block(x).detach() for x in stream]
    for block, want in zip(ours, theirs):
        for p, q in zip(block.parameters(), want.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_norm_tweaking_leaves_a_model_that_loses_nothing():
    ours = blocks()
    found = weights.norm_tweaking(ours, samples(), lambda block: None)
    assert found == [(0.0, 0.0)] * 3
    assert all(torch.equal(p, q) for a, b in zip(ours, blocks()) for p, q in zip(a.parameters(), b.parameters()))


def test_norm_tweaking_narrows_the_gap_of_the_last_output():
    full, quantised, tweaked = blocks(), blocks(), blocks()
    for block in quantised:
        two_bits(block)
    weights.norm_tweaking(tweaked, samples(16), two_bits, lr=2e-3, iters=4)
    x = torch.randn(4, 24, 8, dtype=F64, generator=torch.Generator().manual_seed(5))

    def gap(model):
        y, want = x, x
        for block, other in zip(model, full):
            y, want = block(y), other(want)
        return (y - want).square().mean()

    assert gap(tweaked) < 0.95 * gap(quantised)


def test_norm_tweaking_says_what_it_needs():
    with pytest.raises(ValueError, match="has no layer norm"):
        weights.norm_tweaking([nn.Linear(8, 8, dtype=F64)], samples(), two_bits)
    with pytest.raises(ValueError, match="needs blocks and samples, got 3 and 0"):
        weights.norm_tweaking(blocks(), [], two_bits)
