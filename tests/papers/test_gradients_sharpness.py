import copy

import pytest
import torch
from pytorch_optimizer import SAM
from torch import nn
from torch.nn import functional as F

from etude import gradients


def test_sam_gradient_of_a_quadratic_is_in_closed_form():
    """ℓ = ½ wᵀHw: g = H (w + rho H w / ‖H w‖), one norm over all parameters together."""
    a = torch.randn(6, 6, dtype=torch.float64)
    h, w = a @ a.mT, torch.randn(6, dtype=torch.float64)
    parts = [w[:4].clone().requires_grad_(), w[4:].clone().requires_grad_()]

    def loss_fn():
        whole = torch.cat(parts)
        return 0.5 * whole @ h @ whole

    loss, grads = gradients.sam(rho=0.3)(loss_fn, parts)
    torch.testing.assert_close(loss, 0.5 * w @ h @ w, rtol=1e-14, atol=0)
    expected = h @ (w + 0.3 * (h @ w) / (h @ w).norm())
    torch.testing.assert_close(torch.cat(grads), expected, rtol=1e-12, atol=1e-12)


def test_sam_looks_at_distance_rho_whatever_the_scale_of_the_loss():
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)
    start = torch.cat([w, b]).detach()
    for scale in (1.0, 1e6, 1e-6):
        seen = []

        def loss_fn(scale=scale, seen=seen):
            seen.append(torch.cat([w, b]).detach())
            return scale * (w.exp().sum() + b.sin().sum())

        gradients.sam(rho=0.05)(loss_fn, [w, b])
        here, there = seen
        assert torch.equal(here, start)
        assert (there - here).norm().item() == pytest.approx(0.05, rel=1e-12)
        assert torch.nn.functional.cosine_similarity(there - here, torch.cat([w.exp(), b.cos()]), dim=0) > 1 - 1e-12


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def test_sam_walks_the_trajectory_of_pytorch_optimizer():
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    ours, theirs = network(), network()
    opt = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    peer = SAM(theirs.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)

    def closure():
        peer.zero_grad()
        loss = F.cross_entropy(theirs(x), y)
        loss.backward()
        return loss

    for _ in range(30):
        gradients.backward(gradients.sam(rho=0.1), lambda: F.cross_entropy(ours(x), y), ours.parameters())
        opt.step()
        closure()
        peer.step(closure)
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8)  # the peer sums its norm in float32


def test_sam_keeps_the_batch_norm_state_of_the_first_pass():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    once = copy.deepcopy(model)
    x, y = torch.randn(16, 4), torch.randint(3, (16,))
    gradients.sam(rho=0.5)(lambda: F.cross_entropy(model(x), y), model.parameters(), buffers=model.buffers())
    once(x)
    for ours, expected in zip(model.buffers(), once.buffers()):
        assert torch.equal(ours, expected)
    assert model[1].num_batches_tracked == 1


def test_sam_sees_the_same_dropout_masks_in_both_passes():
    """The authors pass one random key to both; the generator then stands where one pass leaves it."""
    drop, w, masks = nn.Dropout(0.5), torch.ones(50, requires_grad=True), []

    def loss_fn():
        out = drop(w)
        masks.append(out.detach() != 0)
        return out.square().sum()

    torch.manual_seed(5)
    gradients.sam()(loss_fn, [w])
    after = torch.rand(3)
    assert masks[0].equal(masks[1])
    torch.manual_seed(5)
    drop(w)
    assert torch.equal(after, torch.rand(3))


def test_sam_sees_the_moved_weights_through_a_surrounding_autocast():
    """autocast keeps casts of the weights: kept over the step, the second pass would repeat the first."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(16, 4), torch.randint(3, (16,))

    def loss_fn():
        return F.cross_entropy(model(x).float(), y)

    with torch.autocast("cpu", torch.bfloat16):
        _, outside = gradients.sam(rho=1.0)(loss_fn, model.parameters())
        _, again = gradients.plain()(loss_fn, model.parameters())

    def inside():
        with torch.autocast("cpu", torch.bfloat16):
            return loss_fn()

    _, expected = gradients.sam(rho=1.0)(inside, model.parameters())
    _, clean = gradients.plain()(inside, model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(outside, expected))
    assert all(torch.equal(a, b) for a, b in zip(again, clean))
    assert not torch.equal(expected[0], clean[0])


def test_sam_takes_no_step_where_the_gradient_is_zero():
    w = torch.zeros(4, requires_grad=True)
    loss, (g,) = gradients.sam()(lambda: w.square().sum(), [w])
    assert loss == 0
    assert torch.equal(g, torch.zeros(4))


def test_sam_without_a_radius_takes_one_plain_pass():
    """As the authors' code does: rho = 0 is not a second look at the same point."""
    w, calls = torch.randn(4, requires_grad=True), []

    def loss_fn():
        calls.append(1)
        return w.exp().sum()

    _, (g,) = gradients.sam(rho=0.0)(loss_fn, [w])
    assert torch.equal(g, w.detach().exp())
    assert len(calls) == 1


def test_sam_norm_of_half_precision_does_not_overflow():
    w, seen = torch.zeros(4, dtype=torch.float16, requires_grad=True), []

    def loss_fn():
        seen.append(w.detach().clone())
        return (60_000 * w).sum()  # ‖g‖ = 120 000, above the largest float16

    gradients.sam(rho=0.05)(loss_fn, [w])
    torch.testing.assert_close(seen[1], torch.full((4,), 0.025, dtype=torch.float16))
