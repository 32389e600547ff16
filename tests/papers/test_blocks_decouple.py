"""What the paper says of scale-distribution decoupling."""

import torch
from torch import nn

from etude import blocks

F64 = torch.float64


def test_sdd_is_the_authors_class():
    layer = blocks.sdd(6, 4, bias=True).double()
    theirs = nn.Sequential(nn.Linear(6, 4), nn.RMSNorm(4, eps=1e-6)).double()
    with torch.no_grad():
        layer.alpha.copy_(torch.rand(4))
    theirs.load_state_dict({"0.weight": layer.weight, "0.bias": layer.bias, "1.weight": layer.alpha})
    x = torch.randn(3, 5, 6, dtype=F64)
    torch.testing.assert_close(layer(x), theirs(x), rtol=1e-12, atol=1e-12)
    assert blocks.sdd(6).bias is None
    assert (blocks.sdd(6, alpha=0.25).alpha == 0.25).all()


def test_sdd_sets_the_scale_of_its_output_whatever_the_size_of_v():
    layer, x = blocks.sdd(8, 5, eps=0.0).double(), torch.randn(7, 8, dtype=F64)
    y = layer(x)
    torch.testing.assert_close(y.square().mean(1), torch.ones(7, dtype=F64))
    y.pow(3).sum().backward()
    assert layer.weight.grad.abs().max() > 1
    assert (layer.weight * layer.weight.grad).sum().abs() < 1e-10, "the gradient is orthogonal to V"
    with torch.no_grad():
        layer.weight.mul_(40.0)
    torch.testing.assert_close(layer(x), y)


def test_sdd_bounds_the_gradients_of_a_deep_post_norm_network():
    """Where plain linear layers lose them, or let them grow, by the size of their weights."""

    def ratio(linear, gain):
        torch.manual_seed(0)
        layers = [linear() for _ in range(24)]
        for m in layers:
            nn.init.normal_(m.weight, std=gain / 16**0.5)
        x = torch.randn(32, 16, dtype=F64)
        for m in layers:
            x = nn.functional.layer_norm(x + m(x), (16,))
        x[:, 0].square().sum().backward()
        sizes = [(m.weight.grad.norm() * m.weight.norm()).item() for m in layers]  # the effect of a relative change
        return max(sizes) / min(sizes)

    plain = [ratio(lambda: nn.Linear(16, 16, bias=False).double(), gain) for gain in (0.1, 1.0, 30.0)]
    ours = [ratio(lambda: blocks.sdd(16).double(), gain) for gain in (0.1, 1.0, 30.0)]
    assert max(ours) < 1.01 * min(ours), "the same for every size of V"
    assert max(plain) > 1.5 * min(plain)
