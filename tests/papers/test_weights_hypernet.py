"""What the paper says of magnitude invariant hypernetworks."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from etude import weights

F64 = torch.float64


def main():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def encoded(hyper, gamma):
    """What the first layer gets."""
    seen = []
    hook = hyper.hidden[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    hyper(gamma)
    hook.remove()
    return seen[0]


def test_magnitude_invariant_hypernetwork_encodes_every_input_at_one_length():
    hyper = weights.magnitude_invariant_hypernetwork(main(), inputs=3)
    gamma = torch.rand(50, 3)
    e = encoded(hyper, gamma)
    torch.testing.assert_close(e.norm(dim=1), torch.full((50,), 3**0.5))
    assert e[0].tolist() == pytest.approx(
        [f(math.pi / 2 * g) for f in (math.cos, math.sin) for g in gamma[0].tolist()], abs=1e-6
    )
    assert encoded(hyper, torch.zeros(3)).tolist() == pytest.approx([1, 1, 1, 0, 0, 0])


def test_magnitude_invariant_hypernetwork_adds_to_parameters_that_it_learns():
    """θ = θ₀ + W h: where the last weight is zero, the main network itself."""
    model = main()
    hyper = weights.magnitude_invariant_hypernetwork(model)
    nn.init.zeros_(hyper.out.weight)
    x = torch.randn(5, 4)
    theta = hyper(torch.tensor([0.3]))
    assert list(theta) == [n for n, _ in model.named_parameters()]
    assert torch.equal(functional_call(model, theta, (x,)), model(x))
    theta["0.weight"].sum().backward()
    assert (hyper.out.bias.grad[: 4 * 16] == 1).all()


def test_magnitude_invariant_hypernetwork_predicts_for_many_inputs_at_once():
    model = main()
    hyper = weights.magnitude_invariant_hypernetwork(model, inputs=2, hidden=(8,))
    gamma = torch.rand(6, 2)
    many = hyper(gamma)
    for i, g in enumerate(gamma):
        for name, p in hyper(g).items():
            assert p.shape == model.get_parameter(name).shape
            torch.testing.assert_close(many[name][i], p)


def test_magnitude_invariant_hypernetwork_is_born_as_the_authors_code():
    torch.manual_seed(0)
    hyper = weights.magnitude_invariant_hypernetwork(main(), hidden=(400, 300))
    n = sum(p.numel() for p in main().parameters())
    slope = 2 / (1 + 0.01**2)
    for layer, want in ((hyper.hidden[0], slope / 400), (hyper.hidden[2], slope / 300), (hyper.out, 1 / n)):
        assert layer.weight.var().item() == pytest.approx(want, rel=0.1)
    assert all((m.bias == 0).all() for m in hyper.hidden if isinstance(m, nn.Linear))
    assert isinstance(hyper.hidden[1], nn.LeakyReLU)


def test_magnitude_invariant_hypernetwork_cures_the_proportionality_that_the_paper_finds():
    """Without biases a network of leaky ReLUs of γ itself makes what is proportional to γ; ours does not feel its size."""
    hyper = weights.magnitude_invariant_hypernetwork(main()).double()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(1, 16, bias=False), nn.LeakyReLU(), nn.Linear(16, 50, bias=False)).double()
    gamma = torch.linspace(0.01, 1, 25, dtype=F64)[:, None]
    size = plain(gamma).norm(dim=1)
    torch.testing.assert_close(size / gamma[:, 0], (size / gamma[:, 0])[-1].expand(25))
    offset = torch.cat([p.flatten(1) for p in hyper(gamma).values()], 1) - hyper.out.bias
    assert offset.norm(dim=1).max() < 3 * offset.norm(dim=1).min()
    assert size.max() > 50 * size.min()


def test_magnitude_invariant_hypernetwork_refuses_another_number_of_inputs():
    hyper = weights.magnitude_invariant_hypernetwork(main(), inputs=2)
    with pytest.raises(ValueError, match=r"has 2 inputs, but gamma has shape \[3\]"):
        hyper(torch.rand(3))
    with pytest.raises(ValueError, match="inputs of at least 1"):
        weights.magnitude_invariant_hypernetwork(main(), inputs=0)
