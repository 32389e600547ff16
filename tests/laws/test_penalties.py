"""What is true of every penalty on weights."""

import copy

import pytest
import torch
from torch import nn

from etude._method import methods

METHODS = [m for m in methods().values() if m.room == "penalties"]
each = pytest.mark.parametrize("m", METHODS, ids=lambda m: m.name)


def model():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_penalty_is_one_finite_number_that_leaves_the_weights_alone(m, dtype):
    net = model().to(dtype)
    before = copy.deepcopy(net.state_dict())
    value = m.fn(net)
    value.backward()
    assert value.shape == ()
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert value > 0
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert grads
    assert all(g.isfinite().all() and g.dtype == dtype for g in grads)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@each
def test_a_module_and_its_named_weights_are_the_same_thing(m):
    net = model()
    assert torch.equal(m.fn(net), m.fn(dict(net.named_parameters())))


@each
def test_a_tied_weight_counts_once(m):
    a = nn.Linear(4, 4)
    b = nn.Linear(4, 4)
    b.weight = a.weight
    assert torch.equal(m.fn(nn.Sequential(a, b)), m.fn(a))


@each
def test_weights_at_zero_have_a_finite_gradient(m):
    w = torch.zeros(3, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(m.fn({"w": w}), w)
    assert grad.isfinite().all()


@each
def test_the_order_of_the_units_does_not_matter(m):
    w = torch.randn(5, 4, dtype=torch.float64)
    torch.testing.assert_close(m.fn({"w": w}), m.fn({"w": w[torch.randperm(5)][:, torch.randperm(4)]}))


@each
def test_nothing_to_penalise_is_an_error(m):
    for empty in (nn.LayerNorm(4), nn.ReLU(), {}):
        with pytest.raises(ValueError, match=f"{m.name} found no weight"):
            m.fn(empty)


def test_every_penalty_compiles_into_one_graph():
    weights = {"a": torch.randn(3, 4), "b": torch.randn(3, 4, 2)}
    compiled = torch.compile(lambda w: [m.fn(w) for m in METHODS], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weights), [m.fn(weights) for m in METHODS])
