"""What Compute Better Spent says of weights made of two cores."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from etude import weights
from etude._roles import roles

F64 = torch.float64


def mapped(out, into, r=1, **knobs):
    torch.manual_seed(0)
    layer = nn.Linear(into, out, dtype=F64)
    weights.put(layer, weights.block_tensor_train(r=r, **knobs), on="weight")
    chain = layer.parametrizations.weight
    return layer, chain[0], chain.original0, chain.original1


def test_block_tensor_train_is_the_sum_over_its_bond_in_plain_floats():
    layer, _, first, second = mapped(6, 8, r=3)  # 6 = 2 · 3, 8 = 2 · 4
    assert first.shape == (4, 2, 2 * 3)
    assert second.shape == (2, 4 * 3, 3)
    one, two = first.tolist(), second.tolist()
    for out in range(6):
        for into in range(8):
            a, b, m, c = out // 3, out % 3, into // 2, into % 2
            w = sum(two[a][m * 3 + s][b] * one[m][c][a * 3 + s] for s in range(3))
            assert layer.weight[out, into].item() == pytest.approx(w, abs=1e-12)


@pytest.mark.parametrize("out, into, r", [(6, 8, 1), (64, 64, 2), (48, 100, 4), (31, 12, 1)])
def test_block_tensor_train_has_the_parameters_and_the_output_of_the_paper(out, into, r):
    layer, map, first, second = mapped(out, into, r)
    (n1, n2), (m1, m2) = (map.n1, map.n2), (map.m1, map.m2)
    assert n1 * n2 == out
    assert m1 * m2 == into
    assert n1 <= n2
    assert m1 <= m2
    assert first.numel() + second.numel() == r * (into * n1 + m2 * out)
    x = torch.randn(2, 3, into, dtype=F64, requires_grad=True)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-10, atol=1e-10)
    found = [
        torch.autograd.grad(y.pow(3).sum(), [x, first, second])
        for y in (map.product(first, second, x), F.linear(x, layer.weight))
    ]
    for g, h in zip(*found, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-9)


def test_block_tensor_train_of_rank_1_is_a_monarch_matrix():
    """P L P R with block-diagonal L and R and P the transposition of a square of coordinates."""
    layer, _, first, second = mapped(16, 16)
    p = torch.eye(16, dtype=F64).view(4, 4, 16).transpose(0, 1).reshape(16, 16)
    right, left = (torch.block_diag(*(m.mT for m in core)) for core in (first, second))
    torch.testing.assert_close(layer.weight, left @ p @ right, rtol=1e-12, atol=1e-12)


def test_block_tensor_train_is_drawn_as_the_spectral_condition_asks():
    _, _, first, second = mapped(1024, 400, r=2)  # 1024 = 32 · 32, 400 = 20 · 20
    assert first.std().item() == pytest.approx(math.sqrt(1 / 20), rel=0.02)  # fan-in 20, fan-out 64
    assert second.std().item() == pytest.approx(math.sqrt(1 / 40) * math.sqrt(32 / 40), rel=0.02)


@pytest.mark.parametrize("width", [64, 256, 1024])
def test_block_tensor_train_keeps_the_size_of_its_input_at_any_width(width):
    layer, _, _, _ = mapped(width, width)
    y = torch.randn(200, width, dtype=F64) @ layer.weight.mT
    assert 0.7 < y.square().mean().sqrt() < 1.3


@pytest.mark.parametrize("scaled", [True, False])
def test_block_tensor_train_learns_at_any_width_alike_under_the_lr_of_its_cores(scaled):
    """The change of the output in one step of Adam, of a layer after a dense layer's lr of 1 / width."""
    moves = []
    for width in (64, 1024):
        layer, _, _, _ = mapped(width, width)
        model = nn.Sequential(layer)
        x = torch.randn(64, width, dtype=F64)
        x = x / x.square().mean(1, keepdim=True).sqrt()
        target = torch.randn(64, width, dtype=F64)
        lr = 1 / width
        groups = weights.lr_groups(model, lr) if scaled else [{"params": list(model.parameters()), "lr": lr}]
        opt = torch.optim.Adam(groups)
        before = layer.weight.detach()
        (x[:1] @ layer.weight.mT * target[:1]).sum().backward()
        opt.step()
        moves.append((x[:1] @ (layer.weight.detach() - before).mT).square().mean().sqrt().item())
    ratio = moves[1] / moves[0]
    assert 0.5 < ratio < 2 if scaled else ratio < 0.5


def test_block_tensor_train_has_an_lr_for_each_core():
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    weights.put(model, weights.block_tensor_train(r=2), on="0.weight")
    groups = {len(g["params"]): g["lr"] for g in weights.lr_groups(model, 0.1)}
    by_param = {p: g["lr"] for g in weights.lr_groups(model, 0.1) for p in g["params"]}
    chain = model[0].parametrizations.weight
    assert by_param[chain.original0] == pytest.approx(0.1 * 64 / 8 / 2)  # in / m1 / number of cores
    assert by_param[chain.original1] == pytest.approx(0.1 * 64 / (2 * 8) / 2)  # in / (r m2) / number of cores
    assert groups[3] == 0.1
    assert sum(len(g["params"]) for g in weights.lr_groups(model, 0.1)) == len(list(model.parameters()))
    with pytest.raises(ValueError, match=r"Linear has no weight of cores; put weights\.block_tensor_train"):
        weights.lr_groups(nn.Linear(3, 3), 0.1)


def test_block_tensor_train_of_a_trained_weight_is_the_nearest():
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, dtype=F64)  # blocks of 3 × 2, kept to their leading singular pair
    w = layer.weight.detach().clone()
    weights.put(layer, weights.block_tensor_train(fresh=False), on="weight")
    lost = 0.0
    for a in range(2):
        for m in range(3):
            block = w[3 * a : 3 * a + 3, 2 * m : 2 * m + 2]
            lost += torch.linalg.svdvals(block)[1:].square().sum()
    torch.testing.assert_close((layer.weight - w).square().sum(), lost, rtol=1e-10, atol=1e-12)


def test_block_tensor_train_keeps_a_weight_that_is_one_already():
    layer, _, _, _ = mapped(12, 20, r=2)
    w = layer.weight.detach().clone()
    plain = weights.merge(layer)
    weights.put(plain, weights.block_tensor_train(r=3), on="weight")
    torch.testing.assert_close(plain.weight, w, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="block_tensor_train: r=0 must be a whole number, and at least 1"):
        weights.block_tensor_train(r=0)


def test_block_tensor_train_factors_have_the_role_of_their_weight():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    weights.put(model, weights.block_tensor_train(), on=["hidden", "head"])
    found = roles(model)
    assert [found[f"0.parametrizations.weight.original{i}"] for i in (0, 1)] == ["hidden", "hidden"]
    assert found["2.parametrizations.weight.original0"] == "head"
