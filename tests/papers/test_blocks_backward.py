"""What the paper says of randomised gradients of linear layers."""

import pytest
import torch
from scipy.fft import dct
from torch import nn

from etude import blocks
from etude.blocks import backward

F64 = torch.float64
SKETCHES = ("gaussian", "rademacher", "dct", "dft")
every_sketch = pytest.mark.parametrize("sketch", SKETCHES)


def pair(sketch, ratio=0.5):
    torch.manual_seed(0)
    ours = blocks.randomized_linear(5, 4, ratio=ratio, sketch=sketch).double()
    theirs = nn.Linear(5, 4, dtype=F64)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(2, 6, 5, dtype=F64), torch.randn(2, 6, 4, dtype=F64)


def grads(layer, x, g):
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, layer.bias, layer.weight], g)]


@every_sketch
def test_randomized_linear_is_exact_but_for_the_gradient_of_its_weight(sketch):
    ours, theirs, x, g = pair(sketch)
    (y, dx, db, dw), (want, dx_, db_, dw_) = grads(ours, x, g), grads(theirs, x, g)
    assert torch.equal(y, want)
    torch.testing.assert_close(dx, dx_, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(db, db_, rtol=1e-13, atol=1e-13)
    assert (dw - dw_).norm() > 0.1
    assert torch.equal(grads(ours.eval(), x, g)[3], grads(theirs, x, g)[3])


@every_sketch
def test_randomized_linear_gradient_is_right_on_average(sketch):
    ours, theirs, x, g = pair(sketch, ratio=0.25)
    exact, n = grads(theirs, x, g)[3], 4000
    draws = torch.stack([grads(ours, x, g)[3] for _ in range(n)])
    error = (draws.mean(0) - exact).abs()
    assert (error < 5 * draws.std(0) / n**0.5).all()
    assert (draws.mean(0) - exact).norm() < 0.1 * exact.norm()


def test_randomized_linear_gaussian_has_the_variance_of_its_closed_form():
    """Var dW_ij = (‖y_i‖² ‖x_j‖² + (y_i · x_j)²) / k over the columns of dY and X."""
    ours, _, x, g = pair("gaussian", ratio=0.25)
    draws = torch.stack([grads(ours, x, g)[3] for _ in range(4000)])
    x, g = x.flatten(0, 1), g.flatten(0, 1)
    want = (torch.outer(g.square().sum(0), x.square().sum(0)) + (g.mT @ x).square()) / 3
    torch.testing.assert_close(draws.var(0), want, rtol=0.15, atol=0)


@every_sketch
def test_randomized_linear_sketch_has_the_identity_for_its_mean(sketch):
    eye = torch.eye(6, dtype=F64)
    mean = torch.stack([(p.mH @ p).real for s in range(3000) for p in [backward.project(eye, 3, sketch, s)]]).mean(0)
    torch.testing.assert_close(mean, eye, rtol=0, atol=0.12)
    assert torch.equal(backward.project(eye, 3, sketch, 5), backward.project(eye, 3, sketch, 5))


def test_randomized_linear_transform_is_the_orthonormal_dct():
    for n in (1, 2, 7, 8):
        x = torch.randn(n, 3, dtype=F64)
        want = torch.from_numpy(dct(x.numpy(), axis=0, norm="ortho"))
        torch.testing.assert_close(backward._dct(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.01])
def test_randomized_linear_keeps_that_share_of_its_input(ratio):
    layer, x = blocks.randomized_linear(64, 8, ratio=ratio), torch.randn(4, 25, 64)

    def saved(layer):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            layer(x)
        return sum(t.numel() for t in kept if t.shape[-1] == 64 and t.shape != layer.weight.shape)

    assert saved(nn.Linear(64, 8)) == 100 * 64
    assert saved(layer) == max(1, int(ratio * 100)) * 64


def test_randomized_linear_draws_anew_at_each_use_and_as_the_seed_says():
    ours, _, x, g = pair("gaussian")
    torch.manual_seed(3)
    one, two = grads(ours, x, g)[3], grads(ours, x, g)[3]
    torch.manual_seed(3)
    assert torch.equal(grads(ours, x, g)[3], one)
    assert not torch.equal(one, two)


def test_randomized_linear_refuses_what_keeps_nothing():
    with pytest.raises(ValueError, match="ratio=0 must be in"):
        blocks.randomized_linear(3, ratio=0)
    with pytest.raises(ValueError, match="sketch='fft' is none of gaussian"):
        blocks.randomized_linear(3, sketch="fft")
