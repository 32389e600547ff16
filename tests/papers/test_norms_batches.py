"""What the papers of ghost batch norm and batch-channel norm say, against torch's own layers and in plain loops."""

import pytest
import torch
from torch import nn

from etude import norms

D = torch.float64
torch.manual_seed(0)
IMAGES = torch.randn(8, 6, 5, 3, dtype=D) * torch.arange(1, 7, dtype=D).view(6, 1, 1) + 2


def drawn(norm):
    rng = torch.Generator().manual_seed(9)
    for p in norm.double().parameters():
        p.data = torch.randn(p.shape, generator=rng, dtype=D)
    return norm


@pytest.mark.parametrize("size, chunks", [(4, 2), (3, 3), (2, 4), (8, 1), (99, 1)])
def test_ghost_batch_norm_is_batch_norm_of_each_chunk_with_one_running_step_for_each(size, chunks):
    ours, theirs = drawn(norms.ghost_batch_norm(6, size, momentum=0.3)), drawn(nn.BatchNorm2d(6, momentum=0.3))
    for i in (1, 2):
        x, pulled = IMAGES * i + i, IMAGES.sin()
        grads = []
        for layer in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = layer(leaf) if layer is ours else torch.cat([layer(part) for part in leaf.split(size)])
            grads.append((y, *torch.autograd.grad(y, [leaf, layer.weight, layer.bias], pulled)))
        for one, two in zip(*grads, strict=True):
            torch.testing.assert_close(one, two)
    assert ours.num_batches_tracked == 2 * chunks
    for one, two in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(ours.eval()(IMAGES), theirs.eval()(IMAGES))


def test_ghost_batch_norm_keeps_ghosts_apart():
    norm = norms.ghost_batch_norm(6, 4).double()
    other = IMAGES.clone()
    other[4:] *= 7
    assert torch.equal(norm(IMAGES)[:4], norm(other)[:4])
    assert not torch.allclose(norms.batch_norm(6).double()(IMAGES)[:4], norms.batch_norm(6).double()(other)[:4])


def test_ghost_batch_norm_starts_at_the_papers_128_and_refuses_an_empty_ghost():
    assert norms.ghost_batch_norm(6).ghost_batch_size == 128
    with pytest.raises(ValueError, match="ghost_batch_size=0; a ghost batch holds 1 example or more"):
        norms.ghost_batch_norm(6, 0)


def test_ghost_batch_norm_takes_the_place_of_torchs_batch_norm_in_a_model():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)).double()
    model(x := IMAGES[:, :3])
    want = model.eval()(x)
    assert norms.swap(model, norms.ghost_batch_norm) == ["1"]
    torch.testing.assert_close(model(x), want)


def by_group(y, groups, w, b, eps=1e-5):
    """Channel normalisation in loops: one mean and variance per image and group, one weight and bias per group."""
    out, share = torch.empty_like(y), y.shape[1] // groups
    for i in range(len(y)):
        for g in range(groups):
            part = y[i, g * share : (g + 1) * share]
            var = (part - part.mean()).square().mean()
            out[i, g * share : (g + 1) * share] = w[g] * (part - part.mean()) / (var + eps).sqrt() + b[g]
    return out


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_batch_channel_norm_is_batch_norm_then_groups_with_a_weight_and_bias_per_group(groups):
    ours, batch = drawn(norms.batch_channel_norm(6, groups)), nn.BatchNorm2d(6).double()
    assert ours.group_weight.shape == ours.group_bias.shape == (groups,)
    batch.weight, batch.bias = ours.weight, ours.bias
    for training in (True, True, False):
        y = ours.train(training)(IMAGES)
        torch.testing.assert_close(
            y, by_group(batch.train(training)(IMAGES), groups, ours.group_weight, ours.group_bias)
        )
    torch.testing.assert_close(ours(IMAGES[:1]), y[:1])  # in eval each image by itself
    assert norms.batch_channel_norm(64).groups == 32


def test_batch_channel_norm_by_estimates_moves_them_first_and_holds_them_constant():
    norm = drawn(norms.batch_channel_norm(6, 2, estimate=True, momentum=0.3))
    mu, var = torch.zeros(6, dtype=D), torch.ones(6, dtype=D)
    for i in (1, 2, 3):
        x, old = IMAGES[i : i + 1] + i, mu
        mu = 0.7 * mu + 0.3 * x.mean((0, 2, 3))
        var = 0.7 * var + 0.3 * (x - old.view(6, 1, 1)).square().mean((0, 2, 3))
        seen = []
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        hat = (leaves[1] - mu.view(6, 1, 1)) / (var.view(6, 1, 1) + 1e-5).sqrt()
        hat = hat * norm.weight.view(6, 1, 1) + norm.bias.view(6, 1, 1)
        for leaf, y in zip(
            leaves, (norm(leaves[0]), by_group(hat, 2, norm.group_weight, norm.group_bias)), strict=True
        ):
            seen.append((y, *torch.autograd.grad(y, [leaf, *norm.parameters()], x.sin())))
        for one, two in zip(*seen, strict=True):
            torch.testing.assert_close(one, two)
    torch.testing.assert_close(norm.running_mean, mu)
    torch.testing.assert_close(norm.running_var, var)
    y = norm(x)
    torch.testing.assert_close(norm(x[:, :, :1, :1]).shape, x[:, :, :1, :1].shape)
    y.sum().backward()  # two forwards before a backward: what it divided by has not moved


def test_batch_channel_norm_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="6 features do not divide into 4 groups"):
        norms.batch_channel_norm(6, 4)
