import math

import pytest
import torch

from etude import risks


def test_group_dro_is_the_online_algorithm_of_its_authors():
    """Their loss computer in plain floats: group means (0 where absent), + C/√n_g, q ← q exp(η ℓ) / Σ, then q·ℓ."""
    eta, c, counts = 0.3, 2.0, [4, 16, 64, 256]
    risk = risks.group_dro(counts, step_size=eta, adjustment=c).double()
    q = [0.25] * 4
    for _ in range(6):
        losses = torch.rand(10, dtype=torch.float64, requires_grad=True)
        group = torch.randint(3, (10,))  # group 3 never comes
        ours = risk(losses, group)
        loss = []
        for g in range(4):
            mine = [v for v, k in zip(losses.tolist(), group.tolist()) if k == g]
            loss.append((sum(mine) / len(mine) if mine else 0.0) + c / math.sqrt(counts[g]))
        q = [a * math.exp(eta * v) for a, v in zip(q, loss)]
        q = [a / sum(q) for a in q]
        assert ours.item() == pytest.approx(sum(a * v for a, v in zip(q, loss)), abs=1e-12)
        assert risk.q.tolist() == pytest.approx(q, abs=1e-12)
        (grad,) = torch.autograd.grad(ours, losses)  # q is a constant to autograd
        size = group.bincount(minlength=4)
        assert grad.tolist() == pytest.approx([q[k] / size[k].item() for k in group.tolist()], abs=1e-12)


def test_group_dro_without_steps_is_the_mean_of_the_group_means():
    risk = risks.group_dro([5, 5, 5], step_size=0.0).double()
    losses, group = torch.rand(9, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 0, 0, 1, 2, 2])
    means = [losses[group == g].mean() for g in range(3)]
    for _ in range(3):
        torch.testing.assert_close(risk(losses, group), sum(means) / 3)


def test_group_dro_weights_go_to_the_worst_group():
    risk = risks.group_dro([5, 5, 5], step_size=0.5)
    losses, group = torch.tensor([0.2, 0.9, 0.5]), torch.tensor([0, 1, 2])
    for _ in range(200):
        value = risk(losses, group)
    assert risk.q.tolist() == pytest.approx([0, 1, 0], abs=1e-4)
    assert value.item() == pytest.approx(0.9, abs=1e-4)


def test_group_dro_solves_the_minimax_problem_of_a_convex_toy():
    """min_θ max(θ², (θ − 1)² + ½): the two are equal at θ = ¾, where q = (¼, ¾) balances their slopes."""
    grid = torch.linspace(-1, 2, 3001)
    assert grid[torch.maximum(grid**2, (grid - 1) ** 2 + 0.5).argmin()] == pytest.approx(0.75, abs=1e-3)
    theta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    risk, opt = risks.group_dro([9, 1], step_size=0.2).double(), torch.optim.SGD([theta], lr=0.1)
    centre, floor, group = torch.tensor([0.0] * 9 + [1.0]), torch.tensor([0.0] * 9 + [0.5]), torch.tensor([0] * 9 + [1])
    for _ in range(500):
        opt.zero_grad()
        risk((theta - centre).square() + floor, group).backward()
        opt.step()
    assert theta.item() == pytest.approx(0.75, abs=1e-3)
    assert risk.q.tolist() == pytest.approx([0.25, 0.75], abs=1e-2)


def test_group_dro_adjustment_guards_the_small_group():
    """Section 3.3: at equal losses the group of fewer examples is up-weighted, by C/√n."""
    risk = risks.group_dro([100, 4], step_size=1.0, adjustment=1.0)
    value = risk(torch.ones(4), torch.tensor([0, 0, 1, 1]))
    odds = math.exp(1 / 2 - 1 / 10)
    assert (risk.q[1] / risk.q[0]).item() == pytest.approx(odds, rel=1e-5)
    assert value.item() == pytest.approx((1.1 + 1.5 * odds) / (1 + odds), rel=1e-5)


def test_group_dro_beats_the_mean_on_the_worst_group_of_a_spurious_set():
    """The paper's setting in two columns: the cleaner feature is right for the majority and wrong for the minority."""
    torch.manual_seed(0)
    y = torch.randint(2, (400,)) * 2 - 1.0
    minority = torch.arange(400) < 40
    spurious = torch.where(minority, -y, y) + 0.1 * torch.randn(400)
    x = torch.stack([y + torch.randn(400), spurious], 1)
    worst = {}
    for name, risk in {"mean": risks.mean(), "dro": risks.group_dro([360, 40], step_size=0.1)}.items():
        w = torch.zeros(2, requires_grad=True)
        opt = torch.optim.SGD([w], lr=0.5, weight_decay=1e-2)
        for _ in range(200):
            opt.zero_grad()
            risk(torch.nn.functional.softplus(-y * (x @ w)), minority.long()).backward()
            opt.step()
        worst[name] = ((x @ w).sign() == y)[minority].double().mean().item()
    assert worst["dro"] > worst["mean"] + 0.2
