"""What the papers of orthogonal parametrisations say; torch's own three as references."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from etude import weights

F64 = torch.float64
MAPS = {"householder": weights.householder, "cayley": weights.cayley, "matrix_exp": weights.matrix_exp}
SHAPES = [(5, 5), (7, 4), (4, 7), (1, 3), (3, 1), (70, 70), (130, 70)]  # the last two in more than one block
every = pytest.mark.parametrize("make", MAPS.values(), ids=MAPS.keys())


def mapped(make, out, into, std=0.0):
    """A layer with a map, moved by noise of this size, and the orthogonal weight nearest to what stood there."""
    torch.manual_seed(2)
    layer = nn.Linear(into, out, dtype=F64)
    u, _, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    weights.put(layer, make(), on="weight")
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(std * torch.randn(out, into, dtype=F64))
    return layer, u @ vh


def off_identity(w):
    gram = w @ w.mT if w.shape[0] <= w.shape[1] else w.mT @ w
    return (gram - torch.eye(len(gram), dtype=F64)).abs().max()


@every
@pytest.mark.parametrize("out, into", SHAPES)
def test_householder_and_the_others_start_at_the_nearest_orthogonal_weight(make, out, into):
    layer, nearest = mapped(make, out, into)
    torch.testing.assert_close(layer.weight, nearest, rtol=1e-11, atol=1e-11)


@every
@pytest.mark.parametrize("out, into", SHAPES)
def test_householder_and_the_others_are_orthogonal_whatever_theta(make, out, into):
    layer, nearest = mapped(make, out, into, std=0.5)
    assert off_identity(layer.weight) < 1e-10
    if out * into > 3:
        assert (layer.weight - nearest).norm() > 0.1


@every
def test_householder_and_the_others_stay_orthogonal_along_100_steps_and_go_down(make):
    layer, _ = mapped(make, 6, 4)
    target = torch.linalg.qr(torch.randn(6, 4, dtype=F64))[0]
    opt = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(100):
        opt.zero_grad()
        loss = (layer.weight - target).square().sum()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert off_identity(layer.weight) < 1e-12
    assert losses[-1] < 0.1 * losses[0]


@every
@pytest.mark.parametrize("special", ["identity", "minus identity", "permutation", "turned"])
def test_householder_and_the_others_reach_weights_with_eigenvalue_minus_1(make, special):
    """The signs: without them, the Cayley map reaches no weight with the eigenvalue −1."""
    eye = torch.eye(6, dtype=F64)
    turn = eye.clone()
    turn[0, 0] = turn[1, 1] = -1
    w = {"identity": eye, "minus identity": -eye, "permutation": eye.roll(1, 0), "turned": turn}[special]
    layer = nn.Linear(6, 6, dtype=F64)
    layer.weight.data.copy_(w)
    weights.put(layer, make(), on="weight")
    torch.testing.assert_close(layer.weight, w, rtol=1e-12, atol=1e-12)
    layer.weight.sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


@every
@pytest.mark.parametrize("out, into", SHAPES)
def test_householder_and_the_others_multiply_few_rows_without_the_weight(make, out, into):
    layer, _ = mapped(make, out, into, std=0.3)
    chain = layer.parametrizations.weight
    x = torch.randn(1, into, dtype=F64, requires_grad=True)
    theta = chain.original
    one, two = chain[0].product(theta, x), F.linear(x, layer.weight)
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer(x), two + layer.bias, rtol=1e-10, atol=1e-10)
    found = [torch.autograd.grad(y.pow(3).sum(), [x, theta]) for y in (one, two)]
    for g, h in zip(*found, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-8, atol=1e-9)
    many = torch.randn(out + 1, 2, into, dtype=F64)
    torch.testing.assert_close(layer(many), F.linear(many, layer.weight, layer.bias), rtol=1e-10, atol=1e-10)


def test_householder_is_a_product_of_reflections_in_plain_floats():
    layer, _ = mapped(weights.householder, 4, 3, std=0.5)
    v = layer.parametrizations.weight.original.tolist()
    sign = layer.parametrizations.weight[0].sign.tolist()
    columns = []
    for j in range(3):
        x = [sign[j] * (i == j) for i in range(4)]
        for k in reversed(range(3)):
            u = [v[i][k] if i >= k else 0.0 for i in range(4)]
            along = 2 * sum(a * b for a, b in zip(u, x)) / sum(a * a for a in u)
            x = [a - along * b for a, b in zip(x, u)]
        columns.append(x)
    torch.testing.assert_close(layer.weight, torch.tensor(columns, dtype=F64).mT, rtol=1e-12, atol=1e-12)


def test_householder_does_not_feel_the_lengths_of_its_vectors():
    layer, _ = mapped(weights.householder, 7, 5, std=0.5)
    w, theta = layer.weight.detach().clone(), layer.parametrizations.weight.original
    (g,) = torch.autograd.grad(layer.weight.pow(3).sum(), theta)
    assert (g * theta).tril().sum(0).abs().max() < 1e-12
    with torch.no_grad():
        theta.mul_(torch.rand(5, dtype=F64) + 0.5)
    torch.testing.assert_close(layer.weight, w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("out, into", [(6, 6), (9, 5), (5, 9)])
def test_householder_equals_torch(out, into):
    layer, nearest = mapped(weights.householder, out, into)
    theirs = nn.Linear(into, out, dtype=F64)
    parametrizations.orthogonal(theirs, orthogonal_map="householder", use_trivialization=False)
    theirs.weight = nearest
    ours, reference = layer.parametrizations.weight.original, theirs.parametrizations.weight.original
    noise = torch.randn(out, into, dtype=F64) * 0.3
    noise = noise.tril(-1) if out >= into else noise.triu(1)  # torch holds the diagonal at one
    with torch.no_grad():
        ours.add_(noise)
        reference.add_(noise)
    torch.testing.assert_close(layer.weight, theirs.weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["cayley", "matrix_exp"])
@pytest.mark.parametrize("out, into", [(6, 6), (9, 5), (5, 9)])
def test_cayley_and_matrix_exp_equal_torch_up_to_where_they_are_based(name, out, into):
    layer, _ = mapped(MAPS[name], out, into, std=0.5)
    chain, theirs = layer.parametrizations.weight, nn.Linear(into, out, dtype=F64)
    parametrizations.orthogonal(theirs, orthogonal_map=name, use_trivialization=False)
    theta = chain.original.detach()
    tall = theta if out >= into else theta.mT
    # torch's A has θ below its diagonal and −θᵀ above, and its Cayley map is (I + A / 2) (I − A / 2)⁻¹
    tall = (-2 * tall if name == "cayley" else tall).tril(-1)
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(tall if out >= into else tall.mT)
        q = theirs.weight if out >= into else theirs.weight.mT
        q = chain[0].base @ q if name == "matrix_exp" else q * chain[0].sign
    torch.testing.assert_close(layer.weight, q if out >= into else q.mT, rtol=1e-10, atol=1e-10)


def test_cayley_is_a_rotation_by_twice_the_arctangent():
    layer = nn.Linear(2, 2, bias=False, dtype=F64)
    layer.weight.data.copy_(torch.eye(2))
    weights.put(layer, weights.cayley(), on="weight")
    with torch.no_grad():
        layer.parametrizations.weight.original[1, 0] = 0.7
    angle = -2 * math.atan(0.7)  # (I + A)⁻¹ (I − A) with A = [[0, −a], [a, 0]]
    w = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    torch.testing.assert_close(layer.weight, torch.tensor(w, dtype=F64), rtol=1e-12, atol=1e-12)


def test_matrix_exp_moves_along_a_geodesic_from_the_weight():
    """The angle of the rotation grows as θ does, from the weight itself."""
    layer, start = mapped(weights.matrix_exp, 5, 5)
    theta = layer.parametrizations.weight.original
    assert torch.equal(theta, torch.zeros(5, 5))
    direction = torch.randn(5, 5, dtype=F64).tril(-1) * 0.3
    turns = []
    for t in (1.0, 2.0):
        with torch.no_grad():
            theta.copy_(t * direction)
        turns.append(start.mT @ layer.weight.detach())
    torch.testing.assert_close(turns[0] @ turns[0], turns[1], rtol=1e-10, atol=1e-10)


@every
def test_householder_and_the_others_give_a_layer_back_that_keeps_lengths(make):
    layer, _ = mapped(make, 6, 6, std=0.5)
    x = torch.randn(8, 6, dtype=F64)
    merged = weights.merge(copy.deepcopy(layer))
    y = merged(x) - merged.bias
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1), rtol=1e-10, atol=1e-10)
