"""What the T-LoRA paper says."""

import pytest
import torch
from adapters import on
from torch import nn

from etude import weights

F64 = torch.float64


@pytest.mark.parametrize("t, live", [(0, 8), (250, 6), (500, 5), (999, 2)])
def test_t_lora_leaves_fewer_ranks_the_noisier_the_timestep(t, live):
    layer, map, w = on(nn.Linear(20, 16), weights.t_lora(r=8, min_rank=2))
    for p in map.parameters():
        nn.init.normal_(p)
    net = nn.Sequential(layer)
    weights.at_timestep(net, t)
    live = int((1000 - t) / 1000 * 6) + 2
    assert int(map.mask.sum()) == live
    zero = layer.weight - w
    with torch.no_grad():
        map.B0.zero_()  # what it learned alone, without what it started from
    assert torch.linalg.matrix_rank(layer.weight - w) == live
    assert torch.linalg.matrix_rank(zero) <= 2 * live


def test_t_lora_gives_no_gradient_to_masked_ranks_and_changes_nothing_at_birth():
    layer, map, w = on(nn.Linear(20, 16), weights.t_lora(r=8, min_rank=2))
    for t in (0, 400, 900):
        map.at(t)
        torch.testing.assert_close(layer.weight, w)
    live = int(map.mask.sum())
    layer(torch.randn(3, 20, dtype=F64)).square().sum().backward()
    assert map.A.grad[live:].abs().max() == map.B.grad[:, live:].abs().max() == map.lam.grad[live:].abs().max() == 0
    assert map.A.grad[:live].abs().min() > 0


def test_t_lora_is_born_orthonormal_with_the_least_singular_values_of_noise():
    _, map, _ = on(nn.Linear(40, 30), weights.t_lora(r=10, min_rank=5))
    eye = torch.eye(10, dtype=F64)
    torch.testing.assert_close(map.A @ map.A.mT, eye)
    torch.testing.assert_close(map.B.mT @ map.B, eye)
    assert (map.lam.diff() <= 0).all()
    assert map.lam[0] < (40**0.5 - 30**0.5 + 4) / 10  # noise has deviation 1/r, and the last of 30 are small
    with pytest.raises(ValueError, match="t=1000 must lie in 0 ≤ t < 1000"):
        weights.at_timestep(nn.Sequential(), 1000)
