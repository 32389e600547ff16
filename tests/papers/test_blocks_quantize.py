"""What the paper says of vector quantisation with an affine codebook."""

import pytest
import torch
from torch import nn

from etude import blocks

F64 = torch.float64
AFFINES = ("learned", "running", "none")


def vq(codes=8, d=3, **knobs):
    torch.manual_seed(0)
    return blocks.affine_vq(d, codes, **knobs).double()


X = torch.randn(2, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(1))


def nearest(x, codes):
    return [min(range(len(codes)), key=lambda j: sum((a - b) ** 2 for a, b in zip(row, codes[j]))) for row in x]


@pytest.mark.parametrize("affine", AFFINES)
@pytest.mark.parametrize("nu", [0.0, 0.3])
def test_affine_vq_gives_the_nearest_code_and_nu_changes_no_value(affine, nu):
    layer = vq(affine=affine, nu=nu)
    y, loss, chosen = layer(X)
    codes = layer.eval().codes(X)
    want = nearest(X.flatten(0, 1).tolist(), codes.tolist())
    assert chosen.flatten().tolist() == want
    torch.testing.assert_close(y.flatten(0, 1), codes[want])
    assert loss.item() == pytest.approx((y - X).square().mean().item())


def test_affine_vq_is_a_plain_quantiser_with_straight_through_gradient_without_affine_and_nu():
    x = X.clone().requires_grad_()
    layer = vq(affine="none", nu=0.0)
    y, _, _ = layer(x)
    g = torch.randn_like(y)
    dx, dc = torch.autograd.grad(y, [x, layer.codebook], g, allow_unused=True)
    assert torch.equal(dx, g)
    assert dc is None or not dc.any()
    fresh = vq()  # scale and shift are born as nothing
    assert torch.equal(fresh(X)[0], y)


def test_affine_vq_shares_its_loss_by_beta():
    """β of it trains the codes, 1 − β commits the input (the other way round than in VQ-VAE)."""
    x = X.clone().requires_grad_()
    layer = vq(affine="none", beta=0.9)
    _, loss, chosen = layer(x)
    dx, dc = torch.autograd.grad(loss, [x, layer.codebook])
    gap = 2 * (x - layer.codebook[chosen]) / x.numel()
    torch.testing.assert_close(dx, 0.1 * gap)
    want = torch.zeros_like(dc).index_add(0, chosen.flatten(), -0.9 * gap.flatten(0, 1))
    torch.testing.assert_close(dc, want)


def test_affine_vq_synchronised_update_sends_nu_of_the_tasks_gradient_to_the_chosen_codes():
    x = X.clone().requires_grad_()
    layer = vq(affine="none", nu=0.3)
    y, _, chosen = layer(x)
    g = torch.randn_like(y)
    dx, dc = torch.autograd.grad(y, [x, layer.codebook], g)
    torch.testing.assert_close(dx, g)
    torch.testing.assert_close(dc, torch.zeros_like(dc).index_add(0, chosen.flatten(), 0.3 * g.flatten(0, 1)))


@pytest.mark.parametrize("groups", [1, 2])
def test_affine_vq_learned_form_is_one_plus_lr_scale_per_group(groups):
    layer = vq(affine_lr=10.0, groups=groups)
    assert layer.scale.shape == layer.shift.shape == (groups, 3)
    with torch.no_grad():
        layer.scale.normal_(std=0.1)
        layer.shift.normal_(std=0.1)
    for j, code in enumerate(layer.codes(X).tolist()):
        group = j * groups // 8
        want = [
            c * (1 + 10 * s) + 10 * t
            for c, s, t in zip(layer.codebook[j].tolist(), layer.scale[group].tolist(), layer.shift[group].tolist())
        ]
        assert code == pytest.approx(want, abs=1e-12)


def test_affine_vq_moves_codes_that_are_not_chosen():
    for affine, moves in (("learned", True), ("none", False)):
        layer = vq(codes=32, affine=affine)
        before = layer.codes(X).detach()
        opt = torch.optim.SGD(layer.parameters(), lr=0.1)
        _, loss, chosen = layer(X)
        loss.backward()
        opt.step()
        left = torch.ones(32, dtype=torch.bool).index_fill(0, chosen.flatten(), False)
        assert left.any()
        assert (layer.codes(X)[left] != before[left]).all() == moves


def test_affine_vq_running_form_carries_the_codebooks_statistics_to_the_inputs():
    layer = vq(affine="running")
    layer(5 * X + 3)
    codes = layer.eval().codes(X)
    want = (5 * X + 3).flatten(0, 1)
    torch.testing.assert_close(codes.mean(0), want.mean(0))
    torch.testing.assert_close(codes.var(0, correction=0), want.var(0, correction=0), rtol=1e-6, atol=0)
    before = layer.mean_x.clone()
    layer.train()(X - 1)
    torch.testing.assert_close(layer.mean_x, 0.9 * before + 0.1 * (X - 1).flatten(0, 1).mean(0))
    assert torch.equal(layer.eval().codes(X), layer.codes(X + 9)), "in eval they stand still"


def test_affine_vq_running_form_follows_a_shift_of_all_inputs():
    near, far = vq(affine="running"), vq(affine="running")
    assert torch.equal(near(X)[2], far(X + 100.0)[2])
    with_none = vq(affine="none")
    assert len(with_none(X + 100.0)[2].unique()) < len(with_none(X)[2].unique())


@pytest.mark.parametrize("affine", ["learned", "running"])
def test_affine_vq_uses_more_codes_where_the_inputs_drift(affine):
    def perplexity(affine):
        layer, random = vq(codes=16, affine=affine, nu=0.0, affine_lr=2.0), torch.Generator().manual_seed(0)
        opt = torch.optim.SGD(layer.parameters(), lr=0.3)
        for t in range(150):
            x = torch.randn(256, 3, dtype=F64, generator=random) + 0.05 * t
            opt.zero_grad()
            _, loss, chosen = layer(x)
            loss.backward()
            opt.step()
        p = torch.bincount(chosen, minlength=16) / 256
        return torch.special.entr(p).sum().exp().item()

    assert perplexity(affine) > 1.5 * perplexity("none")


def test_affine_vq_refuses_what_it_cannot_share():
    with pytest.raises(ValueError, match="8 codes do not divide into 3 groups"):
        vq(groups=3)
    with pytest.raises(ValueError, match=r"beta=1\.5 must be in"):
        vq(beta=1.5)
    with pytest.raises(ValueError, match="affine='ema' is none of learned, running, none"):
        vq(affine="ema")
    assert isinstance(vq(), nn.Module)
