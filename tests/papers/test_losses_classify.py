import math

import pytest
import torch
from torch.nn import functional as F

from etude import losses

LOGITS = [[0.5, -1.2, 2.0], [3.0, 0.1, -0.7]]
TARGET = [2, 1]


def test_cross_entropy_is_minus_the_logarithm_of_the_probability_given():
    expected = [math.log(sum(math.exp(v) for v in row)) - row[y] for row, y in zip(LOGITS, TARGET)]
    ours = losses.cross_entropy(torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(TARGET))
    assert ours.tolist() == pytest.approx(expected, abs=1e-14)


def test_cross_entropy_rewards_the_honest_forecast():
    """Good's log score is proper: the expected loss over y ~ p is least where the forecast is p."""
    p = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    honest = (p * losses.cross_entropy(p.log().expand(3, 3), torch.arange(3))).sum()
    assert honest == pytest.approx(-(p * p.log()).sum().item())
    for _ in range(20):
        forecast = p.log() + 0.3 * torch.randn(3, dtype=torch.float64)
        assert (p * losses.cross_entropy(forecast.expand(3, 3), torch.arange(3))).sum() > honest


@pytest.mark.parametrize("shape", [(8, 5), (3, 7, 5)])
def test_cross_entropy_equals_torch_per_element(shape):
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, shape[:-1])
    ours, theirs = (
        losses.cross_entropy(logits, target),
        F.cross_entropy(logits.movedim(-1, 1), target, reduction="none"),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    g, h = (torch.autograd.grad(loss.square().sum(), logits)[0] for loss in (ours, theirs))
    torch.testing.assert_close(g, h, rtol=1e-13, atol=1e-14)


def test_squentropy_adds_the_mean_square_of_the_wrong_logits():
    expected = [
        math.log(sum(math.exp(v) for v in row)) - row[y] + sum(v * v for j, v in enumerate(row) if j != y) / 2
        for row, y in zip(LOGITS, TARGET)
    ]
    ours = losses.squentropy(torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(TARGET))
    assert ours.tolist() == pytest.approx(expected, abs=1e-14)


def test_squentropy_averaged_is_the_loss_of_the_authors_code():
    """Their script: (Σ f² − Σ f_y²) / (C − 1) / n + CrossEntropyLoss."""
    f, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(6, (9,))
    right = f[F.one_hot(y, 6) == 1]
    theirs = (f.square().sum() - right.square().sum()) / 5 / 9 + F.cross_entropy(f, y)
    torch.testing.assert_close(losses.squentropy(f, y).mean(), theirs, rtol=1e-14, atol=0)


def test_squentropy_gradient_is_that_of_its_two_terms():
    f = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    y = torch.randint(6, (9,))
    (grad,) = torch.autograd.grad(losses.squentropy(f, y).sum(), f)
    wrong = 1 - F.one_hot(y, 6).double()
    torch.testing.assert_close(grad, f.softmax(1) - (1 - wrong) + 2 / 5 * f * wrong, rtol=1e-13, atol=1e-14)


def test_squentropy_sees_a_shift_of_all_logits_that_cross_entropy_does_not():
    f, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(6, (9,))
    torch.testing.assert_close(losses.cross_entropy(f + 3, y), losses.cross_entropy(f, y))
    assert (losses.squentropy(f + 3, y) - losses.squentropy(f, y)).abs().min() > 0.1


def test_squentropy_pulls_the_wrong_logits_to_zero():
    """The paper's picture: wrong logits gather at zero, where cross-entropy lets them drift."""
    f = torch.randn(5, 4, dtype=torch.float64).add_(2).requires_grad_()
    y = torch.randint(4, (5,))
    opt = torch.optim.SGD([f], lr=0.5)
    for _ in range(300):
        opt.zero_grad()
        losses.squentropy(f, y).sum().backward()
        opt.step()
    wrong = f.detach()[F.one_hot(y, 4) == 0]
    assert wrong.abs().max() < 0.05
    assert f.detach().argmax(1).equal(y)
