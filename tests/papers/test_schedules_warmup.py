"""The warm-up of Goyal et al. 2017, by its own words and by torch."""

import pytest
import torch

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


def test_warmup_goes_from_0_1_to_3_2_by_a_constant_amount_each_iteration():
    """Section 2.2 with k = 32: start at η = 0.1, add a constant each iteration, reach kη = 3.2, stay there."""
    lr, walked = 0.1, []
    for t in range(60):
        walked.append(lr)
        lr = min(lr + 3.1 / 50, 3.2) if t < 49 else 3.2
    seen = lrs(lambda opt: schedules.attach(opt, schedules.warmup(50, start=1 / 32)), 60, lr=3.2)
    assert seen == pytest.approx(walked, abs=1e-12)
    assert seen[0] == pytest.approx(0.1)
    assert seen[50:] == [3.2] * 10


def test_warmup_is_torchs_linear_lr():
    torchs = lrs(lambda opt: torch.optim.lr_scheduler.LinearLR(opt, start_factor=0.2, total_iters=7), 12)
    assert lrs(lambda opt: schedules.attach(opt, schedules.warmup(7, start=0.2)), 12) == pytest.approx(
        torchs, abs=1e-12
    )


def test_warmup_starts_at_one_thirty_second_by_default():
    assert schedules.warmup(10)(0) == 1 / 32
