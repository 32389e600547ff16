"""What the paper of S4D says."""

import cmath
import math

import numpy as np
import pytest
import scipy.signal
import torch
import torch.nn.functional as F

from etude import blocks

D = torch.float64


def layer(**knobs):
    torch.manual_seed(1)
    made = blocks.s4d(3, n=8, dt=(0.05, 0.5), **knobs).double()
    torch.nn.init.normal_(made.frequency, std=3.0)
    torch.nn.init.normal_(made.log_decay)
    return made


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_s4d_has_the_papers_kernel_in_plain_complex_numbers(rule):
    made = layer(rule=rule)
    for h in range(3):
        dt, want = math.exp(made.log_dt[h].item()), []
        for step in range(6):
            total = 0
            for n in range(4):
                a = complex(-math.exp(made.log_decay[h, n].item()), made.frequency[h, n].item())
                c = complex(*made.c[h, n].tolist())
                if rule == "zoh":
                    total += c * (cmath.exp(dt * a) - 1) / a * cmath.exp(step * dt * a)
                else:
                    total += c * dt / (1 - dt * a / 2) * ((1 + dt * a / 2) / (1 - dt * a / 2)) ** step
            want.append(2 * total.real)
        assert made.kernel(6)[h].tolist() == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_s4d_samples_its_continuous_system_as_scipy_does(rule):
    """The two conjugate modes of one pair are a real system of two states; scipy makes its time discrete."""
    made = blocks.s4d(1, n=2, rule=rule, dt=(0.3, 0.3)).double()
    made.frequency.data.fill_(2.0)
    c = made.c[0, 0].tolist()
    continuous = np.array([[-0.5, -2.0], [2.0, -0.5]]), np.array([[1.0], [0.0]]), np.eye(2), np.zeros((2, 1))
    a, b, *_ = scipy.signal.cont2discrete(continuous, 0.3, rule)
    state, want = b[:, 0], []
    for _ in range(5):
        want.append(2 * (c[0] * state[0] - c[1] * state[1]))  # 2 Re C s
        state = a @ state
    assert made.kernel(5)[0].tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("rule", ["zoh", "bilinear"])
def test_s4d_as_a_recurrence_equals_itself_as_a_convolution(rule):
    made, u = layer(rule=rule), torch.randn(2, 11, 3, dtype=D)
    state, ys = None, []
    for t in range(11):
        y, state = made.step(u[:, t], state)
        ys.append(y)
    torch.testing.assert_close(made(u), torch.stack(ys, 1), rtol=1e-12, atol=1e-12)


def test_s4d_convolves_causally_adds_the_skip_and_mixes_with_a_gate():
    made, u = layer(), torch.randn(2, 7, 3, dtype=D)
    k = made.kernel(7)
    y = torch.stack([sum(k[:, j] * u[:, t - j] for j in range(t + 1)) for t in range(7)], 1) + made.D * u
    a, gate = (F.gelu(y) @ made.linear.weight.T + made.linear.bias).chunk(2, -1)
    torch.testing.assert_close(made(u), a * gate.sigmoid())
    later = u.clone()
    later[:, 4:] += 1
    torch.testing.assert_close(made(later)[:, :4], made(u)[:, :4])


def test_s4d_starts_from_the_papers_spectra_half_of_n_modes():
    lin, inv = blocks.s4d(2, n=8), blocks.s4d(2, n=8, spectrum="inv")
    assert lin.frequency[1].tolist() == pytest.approx([math.pi * k for k in range(4)])
    assert inv.frequency[1].tolist() == pytest.approx([8 / math.pi * (8 / (2 * k + 1) - 1) for k in range(4)])
    assert lin.log_decay.exp().flatten().tolist() == pytest.approx([0.5] * 8)


def test_s4d_has_the_highest_frequency_of_legs_with_its_inverse_law():
    """The law behind "inv": the largest imaginary part of HiPPO-LegS's normal part grows as n² / π."""
    n = 64
    q = (torch.arange(n, dtype=D) + 0.5).sqrt()
    skew = torch.tril(-torch.outer(q, q), -1)
    top = torch.linalg.eigvals(skew - skew.T).imag.max().item()
    assert blocks.s4d(1, n=n, spectrum="inv").frequency.max().item() == pytest.approx(top, rel=0.05)


def test_s4d_draws_its_step_log_uniformly_and_cannot_grow():
    torch.manual_seed(0)
    made = blocks.s4d(4000, n=2)
    dt = made.log_dt.exp()
    assert 0.001 <= dt.min() <= dt.max() <= 0.1 * 1.0001
    assert made.log_dt.mean().item() == pytest.approx((math.log(0.001) + math.log(0.1)) / 2, abs=0.1)
    torch.nn.init.normal_(made.log_decay, std=3)
    torch.nn.init.normal_(made.frequency, std=30)
    assert (made.discrete()[0].real < 0).all()


def test_s4d_draws_c_of_unit_variance():
    c = blocks.s4d(500, n=64).c
    assert c.square().sum(-1).mean().item() == pytest.approx(1, abs=0.03)
