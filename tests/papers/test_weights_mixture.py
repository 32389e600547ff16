"""What the GOAT paper says."""

import copy
import math

import pytest
import torch
from torch import nn

from etude import weights

F64 = torch.float64
X = torch.randn(3, 5, 24, dtype=F64, generator=torch.Generator().manual_seed(0))


def made(**knobs):
    torch.manual_seed(0)
    linear = nn.Linear(24, 20, dtype=F64)
    return weights.goat(linear, **{"r": 8, "num_experts": 4, **knobs}), copy.deepcopy(linear)


def test_goat_starts_as_the_layer_where_all_experts_are_weighed_alike():
    goat, linear = made(top_k=4)
    nn.init.zeros_(goat.gate.weight)
    torch.testing.assert_close(goat(X), linear(X))


def test_goat_builds_expert_e_of_the_first_triples_of_segment_e():
    goat, linear = made(rho=3.0, eta=2.0)
    u, s, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    scale = math.sqrt(3 * 2.0 * 24 / 2)
    for e in range(4):
        at = slice(5 * e, 5 * e + 2)  # 20 singular values, 4 segments, rank 8 / 4
        taken = goat.scale * goat.B[:, 2 * e : 2 * e + 2] @ goat.A[2 * e : 2 * e + 2]
        torch.testing.assert_close(taken, (u[:, at] * s[at]) @ v[at] / 3.0)
    assert goat.scale == pytest.approx(scale)
    others = goat.B[:, :2].mT @ goat.B[:, 2:]
    assert others.abs().max() < 1e-12


def test_goat_gives_each_token_the_renormalised_weights_of_its_top_k():
    goat, linear = made(top_k=2)
    nn.init.normal_(goat.A)
    x = X[0, 0]
    p = goat.gate(x).softmax(-1).tolist()
    best = sorted(range(4), key=lambda e: -p[e])[:2]
    y = linear(x) - goat.scale / 4 * goat.B0 @ (goat.A0 @ x)
    for e in best:
        share = p[e] / sum(p[b] for b in best)
        y = y + share * goat.scale * goat.B[:, 2 * e : 2 * e + 2] @ (goat.A[2 * e : 2 * e + 2] @ x)
    torch.testing.assert_close(goat(X)[0, 0], y)


def test_goat_balance_is_top_k_where_the_load_is_even():
    goat, _ = made(top_k=2)
    nn.init.zeros_(goat.gate.weight)
    goat(X)
    assert goat.balance.item() == pytest.approx(2.0)  # shares sum to k, as the authors count them
    nn.init.normal_(goat.gate.weight, std=9.0)
    goat(X)
    assert goat.balance > 2.0
    (g,) = torch.autograd.grad(goat.balance, [goat.gate.weight])
    assert g.abs().max() > 0


def test_goat_trains_experts_and_router_alone_and_can_be_copied_after_a_forward():
    goat, _ = made()
    y = goat(X)
    assert {n for n, p in goat.named_parameters() if p.requires_grad} == {"A", "B", "gate.weight"}
    assert torch.equal(copy.deepcopy(goat)(X), y)


@pytest.mark.parametrize("knobs", [{"r": 3}, {"r": 24}, {"top_k": 5}])
def test_goat_refuses_a_rank_that_no_expert_can_have(knobs):
    with pytest.raises(ValueError, match=r"goat: r=.* must give each of num_experts=4 a rank from 1 to 5 here"):
        made(**knobs)
