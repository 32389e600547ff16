"""What the papers of the conditional norms say, against torch's layers and numbers by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude import norms

D = torch.float64
torch.manual_seed(0)
X = torch.randn(3, 6, 4, 5, dtype=D) * 2 + torch.arange(6, dtype=D).view(6, 1, 1)
LABELS = F.one_hot(torch.randint(0, 3, (3, 4, 5)), 3).movedim(-1, 1).double()
MASK = (torch.rand(3, 1, 4, 5) > 0.4).double()


def moments(x):
    return x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)


@pytest.mark.parametrize("statistics, peer", [("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d)])
def test_spade_with_its_heads_at_zero_is_the_norm_without_affine(statistics, peer):
    ours, theirs = norms.spade(6, 3, statistics=statistics).double(), peer(6, affine=False).double()
    for head in (ours.supplier.gamma, ours.supplier.beta):
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    for training in (True, True, False):
        torch.testing.assert_close(ours.train(training)(X, LABELS), theirs.train(training)(X))


def test_spade_of_one_pixel_kernels_looks_scale_and_shift_up_by_label():
    norm = norms.spade(6, 3, hidden=3, kernel_size=1).double()
    shared, gamma, beta = norm.supplier.shared, norm.supplier.gamma, norm.supplier.beta
    shared.weight.data = torch.eye(3, dtype=D)[..., None, None]
    nn.init.zeros_(shared.bias)
    label = LABELS.argmax(1)
    by_label = [(h.weight[:, :, 0, 0].T + h.bias)[label].movedim(-1, 1) for h in (gamma, beta)]
    want = (1 + by_label[0]) * nn.BatchNorm2d(6, affine=False).double()(X) + by_label[1]
    torch.testing.assert_close(norm(X, LABELS), want)
    coarse = LABELS[:, :, ::2, :]  # [b, labels, 2, 5]: rows are repeated, not blended
    torch.testing.assert_close(norm(X, coarse), norm(X, coarse.repeat_interleave(2, 2)))


def test_spade_keeps_the_labels_that_a_norm_after_the_map_washes_out():
    norm = norms.spade(6, 3, statistics="instance").double()
    flat, one = torch.ones(1, 6, 9, 9, dtype=D), torch.zeros(1, 3, 9, 9, dtype=D)
    one[:, 0] = 1
    other = one.roll(1, 1)
    inner = (..., slice(2, -2), slice(2, -2))  # away from the zero padding
    a, b = norm(flat, one)[inner], norm(flat, other)[inner]
    assert a.std((2, 3)).max() < 1e-12
    assert (a - b).abs().min() > 1e-4


def test_adain_gives_x_the_mean_and_deviation_of_the_style():
    y = torch.randn(3, 6, 7, 2, dtype=D) * 3 - 1
    mean, var = moments(norms.adain(6)(X, y))
    for got, want in zip((mean, var), moments(y), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_adain_of_x_with_itself_is_x_and_ignores_an_affine_change_of_its_channels():
    norm = norms.adain(6, eps=0.01)
    torch.testing.assert_close(norm(X, X), X, rtol=1e-12, atol=1e-12)
    norm = norms.adain(6, eps=1e-14)
    y = torch.randn(3, 6, 7, dtype=D)
    torch.testing.assert_close(norm(5 * X - 3, y), norm(X, y))


def test_adain_with_a_standard_style_is_instance_norm():
    y = F.instance_norm(torch.randn(3, 6, 50, dtype=D), eps=0.0)
    torch.testing.assert_close(norms.adain(6, eps=1e-9)(X, y), F.instance_norm(X, eps=1e-9), rtol=1e-8, atol=1e-8)


def test_adain_refuses_a_style_of_other_channels():
    with pytest.raises(ValueError, match="must be the same"):
        norms.adain(6)(X, X[:, :5])


@pytest.mark.parametrize("rho, peer", [(1.0, nn.InstanceNorm2d(6)), (0.0, nn.GroupNorm(1, 6, affine=False))])
def test_adalin_goes_from_layer_norm_to_instance_norm_and_lin_too(rho, peer):
    gamma, beta = torch.randn(2, 3, 6, dtype=D)
    want = peer.double()(X) * gamma[..., None, None] + beta[..., None, None]
    torch.testing.assert_close(norms.adalin(6, rho=rho).double()(X, (gamma, beta)), want)
    torch.testing.assert_close(norms.lin(6, rho=rho).double()(X), peer(X))


def test_adalin_mixes_each_channel_by_its_own_rho():
    norm = norms.adalin(2).double()
    norm.norm.rho.data = torch.tensor([0.25, 1.0], dtype=D)
    x = torch.tensor([[[1.0, 3.0], [10.0, 30.0]]], dtype=D)
    eps, mean = 1e-5, 11.0
    var = (100 + 64 + 1 + 361) / 4
    first = [0.25 * s / (1 + eps) ** 0.5 + 0.75 * (v - mean) / (var + eps) ** 0.5 for s, v in ((-1, 1), (1, 3))]
    second = [s * 10 / (100 + eps) ** 0.5 for s in (-1, 1)]
    one = torch.ones(1, 2, dtype=D)
    want = torch.tensor([[[2 * v + 1 for v in first], [2 * v + 1 for v in second]]], dtype=D)
    torch.testing.assert_close(norm(x, (2 * one, one)), want)


def test_adalin_starts_at_point_nine_and_lin_at_layer_norm():
    assert norms.adalin(6).norm.rho.tolist() == pytest.approx([0.9] * 6)
    assert norms.lin(6).rho.tolist() == [0.0] * 6


def test_lin_rho_is_clipped_after_every_step_of_the_optimizer():
    norm = norms.lin(6, rho=0.5).double()
    free = torch.optim.SGD(norm.parameters(), lr=50.0)
    free.register_step_post_hook(lambda *_: norm.clip_())
    seen = []
    for sign in (1, -1):
        free.zero_grad()
        (sign * norm(X) * X).sum().backward()
        free.step()
        seen.append(norm.rho.detach().clone())
    assert all(((r >= 0) & (r <= 1)).all() for r in seen)
    assert {v for r in seen for v in r.tolist()} == {0.0, 1.0}


def test_coordinate_aware_modulation_at_its_start_is_layer_norm_without_affine():
    x, p = torch.randn(7, 6, dtype=D), torch.rand(7, 2, dtype=D) * 2 - 1
    norm = norms.coordinate_aware_modulation(6).double()
    torch.testing.assert_close(norm(x, p), F.layer_norm(x, (6,)))
    assert [*norm.supplier.scale.shape] == [32, 32]


def test_coordinate_aware_modulation_takes_the_grid_at_its_nodes_and_between_them():
    norm = norms.coordinate_aware_modulation(6, grid=(2, 3)).double()
    scale = norm.supplier.scale.data = torch.tensor([[1.0, 2.0, 4.0], [10.0, 20.0, 40.0]], dtype=D)
    shift = norm.supplier.shift.data = -scale
    at = {
        (-1.0, -1.0): 1.0, (0.0, -1.0): 2.0, (1.0, -1.0): 4.0, (-1.0, 1.0): 10.0, (1.0, 1.0): 40.0,
        (0.5, -1.0): 3.0, (-1.0, 0.0): 5.5, (0.5, 0.0): 16.5, (9.0, -9.0): 4.0,
    }  # fmt: skip
    x = torch.randn(len(at), 6, dtype=D)
    value = torch.tensor([*at.values()], dtype=D)[:, None]
    y = norm(x, torch.tensor([*at], dtype=D))
    torch.testing.assert_close(y, F.layer_norm(x, (6,)) * value - value)
    assert shift.shape == (2, 3)


def test_coordinate_aware_modulation_along_one_axis_and_wrong_coordinates():
    norm = norms.coordinate_aware_modulation(6, grid=(5,)).double()
    norm.supplier.shift.data = torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0], dtype=D)
    x, p = torch.randn(2, 3, 6, dtype=D), torch.tensor([[-1.0, -0.75, 0.0], [0.25, 0.9, 1.0]], dtype=D)[..., None]
    want = torch.tensor([[0.0, 0.5, 4.0], [6.5, 14.6, 16.0]], dtype=D)[..., None]
    torch.testing.assert_close(norm(x, p), F.layer_norm(x, (6,)) + want)
    with pytest.raises(ValueError, match=r"needs coordinates of shape \(2, 3, 1\)"):
        norm(x, p.expand(2, 3, 2))


@pytest.mark.parametrize("statistics, peer", [("batch", nn.BatchNorm2d), ("instance", nn.InstanceNorm2d)])
@pytest.mark.parametrize("inside", [0, 1])
def test_region_norm_of_one_region_is_the_plain_norm(statistics, peer, inside):
    norm = norms.region_norm(6, statistics=statistics).double()
    torch.testing.assert_close(norm(X, torch.full_like(MASK, inside)), peer(6).double()(X))


def test_region_norm_gives_each_region_mean_0_and_variance_1():
    y = norms.region_norm(6, eps=1e-12).double()(X, MASK)
    for region in (MASK == 1, MASK == 0):
        for channel in range(6):
            values = y[:, channel : channel + 1][region]
            assert values.mean().item() == pytest.approx(0, abs=1e-9)
            assert values.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)


def test_region_norm_keeps_what_is_in_the_hole_out_of_the_rest():
    norm, broken = norms.region_norm(6).double(), X + 100 * torch.randn_like(X) * (1 - MASK)
    valid = (MASK == 1).expand_as(X)
    assert torch.equal(norm(X, MASK)[valid], norm(broken, MASK)[valid])


def test_region_norm_modulates_each_region_by_its_own_and_resizes_the_mask():
    norm = norms.region_norm(6).double()
    plain = norm(X, MASK)
    for p in norm.parameters():
        nn.init.normal_(p)
    w, b = ([q[r].view(6, 1, 1) for r in (0, 1)] for q in (norm.weight, norm.bias))
    want = MASK * (plain * w[0] + b[0]) + (1 - MASK) * (plain * w[1] + b[1])
    torch.testing.assert_close(norm(X, MASK), want)
    fine = MASK.repeat_interleave(3, 2).repeat_interleave(2, 3)
    assert torch.equal(norm(X, fine), norm(X, MASK))


def test_region_norm_of_a_single_pixel_is_its_bias_and_of_none_is_finite():
    one = torch.zeros_like(MASK)
    one[0, 0, 1, 1] = 1
    y = norms.region_norm(6, statistics="instance").double()(X, one)
    assert y.isfinite().all()
    assert y[0, :, 1, 1].abs().max() < 1e-9


def test_learnable_region_norm_finds_its_mask_by_channel_mean_and_maximum():
    norm = norms.learnable_region_norm(6, threshold=0.6, kernel_size=3).double()
    nn.init.normal_(norm.importance.weight, std=0.1, generator=torch.Generator().manual_seed(4))
    for head in (norm.gamma, norm.beta):
        nn.init.constant_(head.weight, 0.1)
        nn.init.constant_(head.bias, 0.2)
    seen = torch.stack([X.mean(1), X.max(1).values], 1)
    soft = torch.sigmoid(F.conv2d(seen, norm.importance.weight, padding=1))
    mask = (soft >= 0.6).double()
    assert 0.1 < mask.mean() < 0.9
    modulation = 0.2 + 0.1 * 9 * F.avg_pool2d(soft, 3, 1, 1)
    want = norms.region_norm(6).double()(X, mask) * (1 + modulation) + modulation
    torch.testing.assert_close(norm(X), want)


def test_learnable_region_norm_trains_its_mask_through_gamma_and_beta_alone():
    norm = norms.learnable_region_norm(6).double()
    norm(X).square().sum().backward()
    assert norm.importance.weight.grad.abs().min() > 0
    for head in (norm.gamma, norm.beta):
        nn.init.zeros_(head.weight)
    norm.zero_grad()
    norm(X).square().sum().backward()
    assert norm.importance.weight.grad.abs().max() == 0
