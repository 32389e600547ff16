import pytest
import torch

from etude import risks


def test_mean_is_the_empirical_risk():
    losses = [0.3, 2.0, 0.7, 1.1]
    ours = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    risk = risks.mean()(ours, torch.tensor([0, 0, 1, 0]))
    assert risk.item() == pytest.approx(sum(losses) / 4, abs=1e-15)
    assert torch.autograd.grad(risk, ours)[0].tolist() == [0.25] * 4
