"""What Chain of LoRA and LoRA-Pro say."""

import pytest
import torch
from torch import nn

from etude import weights

F64 = torch.float64


def linear(out=12, into=12):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(into, out, bias=False, dtype=F64))


def test_chain_of_lora_ties_a_knot_that_changes_nothing_and_forgets_the_optimizer():
    net = weights.put(linear(), weights.lora(r=3), on="0")
    lora, x = net[0].parametrizations.weight[0], torch.randn(8, 12, dtype=F64)
    opt = torch.optim.Adam([lora.A, lora.B], lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        net(x).square().sum().backward()
        opt.step()
    y, w, a = net(x), net[0].weight.clone(), lora.A.clone()
    assert weights.chain_of_lora(net, opt) is net
    torch.testing.assert_close(net(x), y)
    torch.testing.assert_close(net[0].parametrizations.weight.original, w)
    assert lora.B.abs().max() == 0
    assert not torch.equal(lora.A, a)
    assert not opt.state
    assert {id(p) for p in opt.param_groups[0]["params"]} == {id(lora.A), id(lora.B)}


@pytest.mark.parametrize("links, plateau", [(1, True), (4, False)])
def test_chain_of_lora_reaches_a_rank_that_one_link_cannot(links, plateau):
    """A change of rank 8 is learned by r = 2: four links of 150 steps against one of 600, with Adam."""
    net = weights.put(linear(), weights.lora(r=2, alpha=2.0), on="0")
    torch.manual_seed(1)
    change = torch.randn(12, 8, dtype=F64) @ torch.randn(8, 12, dtype=F64) / 8
    base = net[0].parametrizations.weight.original.clone()
    lora = net[0].parametrizations.weight[0]
    for link in range(links):
        opt = torch.optim.Adam([lora.A, lora.B], lr=0.05)
        for _ in range(600 // links):
            opt.zero_grad()
            (net[0].weight - base - change).square().sum().backward()
            opt.step()
        if link < links - 1:
            weights.chain_of_lora(net, opt)
    found = net[0].weight.detach() - base
    tail = torch.linalg.svdvals(change)[2:].norm()
    error = (found - change).norm()
    if plateau:
        assert error >= 0.999 * tail
        assert torch.linalg.matrix_rank(found, atol=1e-9) == 2
    else:
        assert error < 0.1 * tail
        assert torch.linalg.matrix_rank(found, atol=1e-9) == 8


def test_chain_of_lora_refuses_a_lora_beneath_what_multiplies():
    net = weights.put(linear(), weights.lora(r=2), on="0")
    weights.put(net, weights.ia3(), on="0")
    with pytest.raises(ValueError, match=r"0\.weight: lora\(.*goes into the weight only where all its maps merely add"):
        weights.chain_of_lora(net, torch.optim.SGD(net.parameters()))


def given(s=1.5):
    """Factors, the gradient of the whole weight, and the factors' gradients: what backward gives."""
    torch.manual_seed(0)
    a, b, g = (torch.randn(n, dtype=F64) for n in ((3, 9), (7, 3), (7, 9)))
    return a, b, g, s * b.mT @ g, s * g @ a.mT, s


def projector(m):
    """On the column space of m."""
    return m @ torch.linalg.pinv(m)


def test_lora_pro_steps_as_near_to_full_training_as_the_factors_can():
    """The paper's Theorem 2.1: s B gA + s gB A = P_B g + (I − P_B) g P_A, of the factors' gradients alone."""
    a, b, g, da, db, s = given()
    ga, gb = weights.lora_pro(a, b, da, db, lambda g: g, scale=s, damping=1e-14)
    step, on_b, on_a = s * (b @ ga + gb @ a), projector(b), projector(a.mT)
    torch.testing.assert_close(step, on_b @ g + (g - on_b @ g) @ on_a)
    jacobian = torch.cat(
        [s * torch.kron(b, torch.eye(9, dtype=F64)), s * torch.kron(torch.eye(7, dtype=F64), a.mT.contiguous())], 1
    )
    best = torch.linalg.lstsq(jacobian, g.reshape(-1, 1), driver="gelsd").solution
    torch.testing.assert_close(step.reshape(-1, 1), jacobian @ best)


def test_lora_pro_stays_as_near_to_the_factors_own_gradients_as_such_a_step_can():
    """Theorem 2.3: X is the one freedom, gA + X A and gB − B X; any other lies farther from LoRA's gradients."""
    a, b, g, da, db, s = given()
    on_b, on_a = projector(b), projector(a.mT)
    way = on_b @ g + (g - on_b @ g) @ on_a
    ga, gb = weights.lora_pro(a, b, da, db, lambda g: g, scale=s, damping=1e-14)

    def far(x):
        return (ga + x @ a - s * b.mT @ way).square().sum() + (gb - b @ x - s * way @ a.mT).square().sum()

    x = torch.zeros(3, 3, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(far(x), [x])
    assert slope.abs().max() < 1e-9
    assert all(far(1e-2 * torch.randn(3, 3, dtype=F64)) > far(x) for _ in range(20))


def test_lora_pro_hands_the_equivalent_gradient_to_the_rule_and_projects_its_direction():
    a, b, g, da, db, s = given()
    seen = []

    def rule(g):
        seen.append(g)
        return g.sign()

    ga, gb = weights.lora_pro(a, b, da, db, rule, scale=s, damping=1e-14)
    on_b, on_a = projector(b), projector(a.mT)
    torch.testing.assert_close(seen[0], on_b @ g + (g - on_b @ g) @ on_a)
    way = seen[0].sign()
    torch.testing.assert_close(s * (b @ ga + gb @ a), on_b @ way + (way - on_b @ way) @ on_a)


def test_lora_pro_at_birth_moves_b_by_the_preconditioned_gradient_and_a_not_at_all():
    a, _, g, _, _, s = given()
    b = torch.zeros(7, 3, dtype=F64)
    ga, gb = weights.lora_pro(a, b, b.mT @ g, s * g @ a.mT, lambda g: g, scale=s, damping=1e-14)
    assert ga.abs().max() == 0
    torch.testing.assert_close(gb, s * g @ a.mT @ torch.linalg.inv(a @ a.mT) / s**2)
