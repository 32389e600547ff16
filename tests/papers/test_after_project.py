"""Normalise-and-project (Lyle et al. 2024)."""

import math

import pytest
import torch
from plays.after import net, push
from torch import nn

from etude import after


def test_normalize_and_project_is_one_rescaling_in_plain_floats():
    model = net()
    start = model[0].weight.detach().flatten().tolist()
    bound = after.normalize_and_project().bind(model)
    push(model, 0)
    moved = model[0].weight.detach().flatten().tolist()
    scale, offset = model[1].weight.detach().tolist(), model[1].bias.detach().tolist()
    bound()
    factor = math.sqrt(sum(x * x for x in start)) / math.sqrt(sum(x * x for x in moved))
    assert model[0].weight.flatten().tolist() == pytest.approx([factor * x for x in moved], rel=1e-12)
    joint = math.sqrt(6 / (sum(x * x for x in scale) + sum(x * x for x in offset)))
    assert model[1].weight.tolist() == pytest.approx([joint * x for x in scale], rel=1e-12)
    assert model[1].bias.tolist() == pytest.approx([joint * x for x in offset], rel=1e-12)


def test_normalize_and_project_keeps_every_hidden_norm_while_training_and_leaves_biases_and_the_head_alone():
    model = net()
    frobenius = {n: model.get_parameter(n).norm() for n in ("0.weight", "3.weight")}
    bound = after.normalize_and_project().bind(model)
    for t in range(20):
        push(model, t)
        left = {n: model.get_parameter(n).clone() for n in ("0.bias", "3.bias", "6.weight", "6.bias")}
        bound()
        for n, w in left.items():
            assert torch.equal(model.get_parameter(n), w)
    for n, norm in frobenius.items():
        torch.testing.assert_close(model.get_parameter(n).norm(), norm, rtol=1e-12, atol=0)
    for layer, d in ((1, 6), (4, 5)):
        together = torch.cat([model[layer].weight, model[layer].bias]).norm()
        torch.testing.assert_close(together.item(), math.sqrt(d), rtol=1e-12, atol=0)


def test_normalize_and_project_leaves_the_function_alone_where_a_norm_follows():
    """Without biases and without affine norms every hidden layer is scale-invariant."""
    torch.manual_seed(0)
    norms = [nn.LayerNorm(8, eps=0.0, elementwise_affine=False) for _ in range(2)]
    hidden = [nn.Linear(8, 8, bias=False) for _ in range(2)]
    model = nn.Sequential(hidden[0], norms[0], nn.ReLU(), hidden[1], norms[1], nn.ReLU(), nn.Linear(8, 3)).double()
    bound = after.normalize_and_project().bind(model)
    with torch.no_grad():
        hidden[0].weight *= 7.0
        hidden[1].weight *= 0.2
    x = torch.randn(5, 8, dtype=torch.float64)
    grown = model(x)
    bound()
    torch.testing.assert_close(model(x), grown, rtol=0, atol=1e-12)


def test_normalize_and_project_stops_the_decay_of_the_effective_learning_rate():
    """Labels that are reset at random: the normed net's weights grow (lr/‖W‖² falls), the projected one's do not."""

    def run(project):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16, bias=False), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 2))
        opt = torch.optim.SGD(model.parameters(), lr=2.0)
        if project:
            after.attach(opt, model, after.normalize_and_project())
        start = model[0].weight.norm().item()
        x = torch.randn(64, 6)
        for _ in range(6):
            y = torch.randint(2, (64,))
            for _ in range(20):
                opt.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                opt.step()
        return model[0].weight.norm().item() / start

    assert run(project=False) > 1.3
    assert run(project=True) == pytest.approx(1.0, abs=1e-5)


def test_normalize_and_project_refuses_a_weight_that_it_would_hold_at_zero():
    model = net()
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ValueError, match=r"would hold 0.weight at its initial norm 0 for ever"):
        after.normalize_and_project().bind(model)
