import math

import torch
from torch import nn

from etude import gradients


def test_plain_is_the_chain_rule_written_out():
    """One tanh unit: ℓ = ½ (v tanh(w x) − y)²."""
    w, v = (torch.tensor(a, dtype=torch.float64, requires_grad=True) for a in (0.7, -1.3))
    x, y = 0.9, 0.4
    loss, (gw, gv) = gradients.plain()(lambda: 0.5 * (v * torch.tanh(w * x) - y).square(), [w, v])
    h = math.tanh(0.7 * x)
    error = -1.3 * h - y
    assert abs(loss.item() - 0.5 * error**2) < 1e-15
    assert abs(gv.item() - error * h) < 1e-15
    assert abs(gw.item() - error * -1.3 * (1 - h * h) * x) < 1e-15


def test_plain_equals_torch_backward():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    x, y = torch.randn(7, 3), torch.randint(2, (7,))
    loss, grads = gradients.plain()(lambda: nn.functional.cross_entropy(model(x), y), model.parameters())
    theirs = nn.functional.cross_entropy(model(x), y)
    theirs.backward()
    assert torch.equal(loss, theirs)
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters()))
