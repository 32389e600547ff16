"""Linear decay (Defazio et al. 2023) and SGDR (Loshchilov & Hutter 2016), by the papers' formulas and by torch."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LinearLR

from etude import schedules


def lrs(make_scheduler, steps, lr=1.0):
    opt = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make_scheduler(opt)
    seen = []
    for _ in range(steps):
        seen.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return seen


def test_linear_decay_is_what_constant_gradient_norms_refine_to():
    """The paper's refinement: lr_t = w_t Σ_{p>t} w_p / Σ w_p with w = 1/G² runs to 0; for constant G it is linear."""
    steps = 9
    w = [1 / 2.5**2] * (steps + 1)
    refined = [w[t] * sum(w[t + 1 :]) / sum(w) for t in range(steps + 1)]
    refined = [r / max(refined) for r in refined]
    assert [schedules.linear_decay(steps)(t) for t in range(steps + 1)] == pytest.approx(refined, abs=1e-12)


@pytest.mark.parametrize("end", [0.0, 0.1])
def test_linear_decay_is_torchs_linear_lr(end):
    torchs = lrs(lambda opt: LinearLR(opt, start_factor=1.0, end_factor=end, total_iters=8), 12, lr=0.3)
    ours = lrs(lambda opt: schedules.attach(opt, schedules.linear_decay(8, end=end)), 12, lr=0.3)
    assert ours == pytest.approx(torchs, abs=1e-12)


def test_linear_decay_wastes_no_step_on_zero():
    assert schedules.linear_decay(4)(3) == 0.25
    assert schedules.linear_decay(4)(4) == 0.0


def test_linear_decay_has_a_last_iterate_better_than_a_constant_rate_and_close_to_the_average():
    """SGD on |x|, the worst case: at a constant rate the last iterate hops about, with decay it settles."""

    def run(multiplier, steps=400):
        x, mean = 1.0, 0.0
        for t in range(steps):
            mean += x / steps
            x -= 0.1 * multiplier(t) * (1.0 if x > 0 else -1.0)
        return abs(x), abs(mean)

    decayed, constant = run(schedules.linear_decay(400)), run(lambda t: 0.99)
    assert decayed[0] < 0.1 * constant[0]
    assert decayed[0] <= decayed[1]


@pytest.mark.parametrize("t_mult", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 5])
def test_cosine_restarts_is_torchs_cosine_annealing_warm_restarts(steps, t_mult):
    torchs = lrs(lambda opt: CosineAnnealingWarmRestarts(opt, steps, t_mult, eta_min=0.05 * 0.4), 60, lr=0.4)
    value = schedules.cosine_restarts(steps, t_mult=t_mult, end=0.05)
    assert lrs(lambda opt: schedules.attach(opt, value), 60, lr=0.4) == pytest.approx(torchs, abs=1e-12)


def test_cosine_restarts_restarts_at_1_3_7_15_and_takes_fractions_of_a_step():
    """T₀ = 1, T_mult = 2 of the paper, counted in epochs: it is updated within them."""
    value = schedules.cosine_restarts(1, t_mult=2)
    assert [value(t) for t in (0, 1, 3, 7, 15)] == [1.0] * 5
    assert value(0.5) == pytest.approx(0.5)
    assert value(2) == pytest.approx(0.5)
    assert value(15 - 1e-6) == pytest.approx(0.0, abs=1e-9)
