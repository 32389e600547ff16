"""What the papers of the named rules say: against torch.optim, against timm, and by the algorithm box in plain floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from etude import rules
from etude._linalg import polar
from tests.peers import timm

GRADS = [0.7, -1.3, 0.2, 2.5, -0.4, 0.0, 1.1]
SHAPES = [(3, 4), (4,), (2, 3, 2), (), (3, 4), (5, 1), (300, 500)]


def walk(rule, w=1.0, grads=GRADS):
    """One weight along the given gradients, in float64."""
    p = nn.Parameter(torch.tensor([w], dtype=torch.float64))
    opt = rules.optimizer([p], rule)
    for g in grads:
        p.grad = torch.tensor([g], dtype=torch.float64)
        opt.step()
    return p.item()


def trajectories(*makers, shapes=SHAPES, steps=50):
    """Where each maker's optimizer takes the same weights along the same gradients, in float64."""
    ends = []
    for make in makers:
        seeded = torch.Generator().manual_seed(0)
        ps = [nn.Parameter(torch.randn(s, generator=seeded, dtype=torch.float64)) for s in shapes]
        opt = make(ps)
        for _ in range(steps):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=seeded, dtype=torch.float64)
            opt.step()
        ends.append([p.detach() for p in ps])
    return ends


def far(a, b):
    return max((x - y).abs().max().item() for x, y in zip(a, b))


TORCH = {
    "sgd": (rules.sgd(lr=0.01), lambda ps: torch.optim.SGD(ps, 0.01)),
    "momentum": (rules.sgd(lr=0.01, momentum=0.9), lambda ps: torch.optim.SGD(ps, 0.01, 0.9)),
    "decay": (rules.sgd(lr=0.01, momentum=0.8, weight_decay=0.1), lambda ps: torch.optim.SGD(ps, 0.01, 0.8, weight_decay=0.1)),
    "nesterov": (
        rules.sgd(lr=0.01, momentum=0.9, nesterov=True),
        lambda ps: torch.optim.SGD(ps, 0.01, 0.9, nesterov=True),
    ),
    "adam": (
        rules.adam(lr=0.01, betas=(0.8, 0.95), eps=1e-6),
        lambda ps: torch.optim.Adam(ps, 0.01, betas=(0.8, 0.95), eps=1e-6),
    ),
    "adamw": (rules.adamw(lr=0.01, weight_decay=0.2), lambda ps: torch.optim.AdamW(ps, 0.01, weight_decay=0.2)),
}  # fmt: skip


@pytest.mark.parametrize("engine", ["eager", "reference"])
@pytest.mark.parametrize("name", ["sgd", "momentum", "decay", "nesterov"])
def test_sgd_equals_torch_over_50_steps_in_float64(name, engine):
    rule, theirs = TORCH[name]
    mine, torchs = trajectories(lambda ps: rules.optimizer(ps, rule, engine=engine), theirs)
    assert far(mine, torchs) <= 1e-12


@pytest.mark.parametrize("engine", ["eager", "reference"])
def test_adam_equals_torch_over_50_steps_in_float64(engine):
    rule, theirs = TORCH["adam"]
    mine, torchs = trajectories(lambda ps: rules.optimizer(ps, rule, engine=engine), theirs)
    assert far(mine, torchs) <= 1e-12


def test_adam_first_step_is_lr_times_the_sign():
    assert walk(rules.adam(lr=0.1, eps=0.0), grads=[-3.7]) == pytest.approx(1.1, abs=1e-15)


@pytest.mark.parametrize("engine", ["eager", "reference"])
def test_adamw_equals_torch_over_50_steps_in_float64(engine):
    rule, theirs = TORCH["adamw"]
    mine, torchs = trajectories(lambda ps: rules.optimizer(ps, rule, engine=engine), theirs)
    assert far(mine, torchs) <= 1e-12


def test_adamw_uncoupled_decays_by_lambda_alone_as_its_algorithm_2():
    """With zero gradients the weight shrinks by exactly 1 − η_t λ, whatever the learning rate α."""
    assert walk(rules.adamw(lr=0.3, weight_decay=0.1, uncoupled=True), grads=[0.0] * 3) == pytest.approx(
        0.9**3, abs=1e-12
    )
    w, m, v, alpha, lam = 1.0, 0.0, 0.0, 0.02, 0.05
    for t, g in enumerate(GRADS, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w -= alpha * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8) + lam * w
    assert walk(rules.adamw(lr=alpha, weight_decay=lam, uncoupled=True)) == pytest.approx(w, abs=1e-12)


def test_adamw_uncoupled_decay_follows_the_schedule_multiplier():
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    opt = rules.optimizer([p], rules.adamw(lr=0.3, weight_decay=0.1, uncoupled=True))
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t)
    expected = 1.0
    for t in range(4):
        p.grad = torch.zeros_like(p)
        opt.step()
        schedule.step()
        expected *= 1 - 0.5**t * 0.1
    assert p.item() == pytest.approx(expected, abs=1e-12)


def test_signum_is_algorithm_2_of_its_paper():
    w, m = 1.0, 0.0
    for g in GRADS:
        m = 0.7 * m + 0.3 * g
        w -= 0.1 * (math.copysign(1, m) + 0.5 * w)
    assert walk(rules.signum(lr=0.1, momentum=0.7, weight_decay=0.5)) == pytest.approx(w, abs=1e-12)


def test_signum_step_does_not_change_with_the_gradients_size():
    assert walk(rules.signum(lr=0.1)) == pytest.approx(
        walk(rules.signum(lr=0.1), grads=[1e6 * g for g in GRADS]), abs=1e-15
    )


def test_lion_is_algorithm_2_of_its_paper():
    w, m = 1.0, 0.0
    for g in GRADS:
        w -= 0.1 * (math.copysign(1, 0.9 * m + 0.1 * g) + 0.5 * w)
        m = 0.99 * m + 0.01 * g
    assert walk(rules.lion(lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)) == pytest.approx(w, abs=1e-12)


def test_lion_equals_timm_over_50_steps():
    mine, theirs = trajectories(
        lambda ps: rules.optimizer(ps, rules.lion(lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)),
        lambda ps: timm("optim.lion").Lion(ps, 0.01, betas=(0.8, 0.95), weight_decay=0.1),
    )
    assert far(mine, theirs) <= 1e-12


def test_lamb_equals_timm_that_adapts_always_and_clips_nothing():
    mine, theirs = trajectories(
        lambda ps: rules.optimizer(ps, rules.lamb(lr=0.01, weight_decay=0.1)),
        lambda ps: timm("optim.lamb").Lamb(ps, 0.01, weight_decay=0.1, max_grad_norm=None, always_adapt=True),
    )
    assert far(mine, theirs) <= 1e-12


def test_lamb_first_step_has_length_lr_times_the_weights_norm():
    for shape in ((6, 3), (4,)):
        p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        before, p.grad = p.detach().clone(), torch.randn(shape, dtype=torch.float64) * 1e3
        rules.optimizer([p], rules.lamb(lr=0.05)).step()
        assert (p.detach() - before).norm().item() == pytest.approx(0.05 * before.norm().item(), rel=1e-12)


def test_lamb_trust_ratio_is_1_for_a_zero_weight():
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    p.grad = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    rules.optimizer([p], rules.lamb(lr=0.1, eps=0.0)).step()
    assert p.detach().tolist() == pytest.approx([-0.1, 0.1, -0.1])


MATRICES = [(6, 4), (4, 6), (5, 5), (6, 4)]


def newton_schulz_in_float64(x, steps=5):
    """Keller Jordan's iteration, one matrix, in float64: the twin of what runs in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    y = x.T if x.shape[0] > x.shape[1] else x
    y = y / max(y.norm().item(), 1e-7)
    for _ in range(steps):
        s = y @ y.T
        y = a * y + (b * s + c * s @ s) @ y
    return y.T if x.shape[0] > x.shape[1] else y


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_equals_a_float64_newton_schulz_twin(adjust, nesterov):
    lr, mu, wd = 0.02, 0.9, 0.1

    class Twin(torch.optim.Optimizer):
        def __init__(self, ps):
            super().__init__(ps, {})

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                s = self.state[p]
                s["m"] = mu * s.get("m", torch.zeros_like(p)) + (1 - mu) * p.grad
                u = mu * s["m"] + (1 - mu) * p.grad if nesterov else s["m"]
                m, n = p.shape
                size = max(1, m / n) ** 0.5 if adjust == "original" else 0.2 * max(m, n) ** 0.5
                p.mul_(1 - lr * wd).sub_(newton_schulz_in_float64(u), alpha=lr * size)

    rule = rules.muon(lr=lr, momentum=mu, weight_decay=wd, nesterov=nesterov, adjust=adjust)
    mine, twin = trajectories(lambda ps: rules.optimizer(ps, rule), Twin, shapes=MATRICES, steps=20)
    assert far(mine, twin) <= 1e-12


def test_muon_equals_torch_within_its_bfloat16_iteration():
    """torch's own five steps run in bfloat16, whose 8 bits leave each update within a few hundredths of an element."""
    steps, lr = 20, 1e-3
    mine, theirs = trajectories(
        lambda ps: rules.optimizer(ps, rules.muon(lr=lr, weight_decay=0.0, adjust="original")),
        lambda ps: torch.optim.Muon(ps, lr, weight_decay=0.0),
        shapes=MATRICES, steps=steps,
    )  # fmt: skip
    assert far(mine, theirs) <= 0.03 * lr * steps


def test_muon_moves_every_singular_direction_about_equally():
    x = torch.randn(1, 30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x @ torch.diag(torch.logspace(0, -1.5, 20, dtype=torch.float64))
    values = torch.linalg.svdvals(polar(x)[0])
    assert 0.5 < values.min().item()
    assert values.max().item() < 1.3


def test_muon_update_has_the_root_mean_square_of_an_adamw_step():
    """Liu et al. 2025: with 0.2 √max(m, n) the update's RMS is about 0.2, whatever the shape."""
    for shape in ((64, 16), (16, 64), (32, 32)):
        p = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        p.grad = torch.randn(shape, dtype=torch.float64)
        rules.optimizer([p], rules.muon(lr=1.0, weight_decay=0.0)).step()
        assert 0.15 < p.detach().square().mean().sqrt().item() < 0.24


def test_muon_treats_a_convolution_as_a_matrix_of_its_kernels():
    seeded = torch.Generator().manual_seed(0)
    kernel = torch.randn(8, 3, 3, 3, generator=seeded, dtype=torch.float64)
    conv, flat = nn.Parameter(kernel.clone()), nn.Parameter(kernel.flatten(1).clone())
    grad = torch.randn(8, 3, 3, 3, generator=seeded, dtype=torch.float64)
    conv.grad, flat.grad = grad, grad.flatten(1)
    for p in (conv, flat):
        rules.optimizer([p], rules.muon(lr=0.1)).step()
    assert torch.equal(conv.detach().flatten(1), flat.detach())
