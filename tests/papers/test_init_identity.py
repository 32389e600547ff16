import math

import pytest
import torch
from scipy.linalg import hadamard
from torch import nn

from etude import init


def algorithm_1(m, n):
    """The paper's algorithm 1 as its authors' notebook writes it, with scipy's Hadamard matrices."""
    if m <= n:
        return torch.eye(m, n, dtype=torch.float64)
    c = math.ceil(math.log2(m))
    h = torch.tensor(hadamard(2**c), dtype=torch.float64) / 2 ** (c / 2)
    return torch.eye(m, 2**c, dtype=torch.float64) @ h @ torch.eye(2**c, n, dtype=torch.float64)


def test_zero_init_is_algorithm_1_for_every_small_shape():
    for m in range(1, 35):
        for n in range(1, 35):
            assert torch.equal(init.zero_init(torch.randn(m, n, dtype=torch.float64)), algorithm_1(m, n)), (m, n)


def test_zero_init_needs_no_randomness():
    torch.manual_seed(1)
    one = init.zero_init(torch.randn(9, 4))
    torch.manual_seed(2)
    assert torch.equal(one, init.zero_init(torch.randn(9, 4)))


@pytest.mark.parametrize("m, n", [(7, 3), (8, 5), (48, 20), (64, 63)])
def test_zero_init_widens_by_entries_of_one_size_and_full_rank(m, n):
    w = init.zero_init(torch.empty(m, n, dtype=torch.float64))
    torch.testing.assert_close(w.abs(), torch.full_like(w, 2 ** (-math.ceil(math.log2(m)) / 2)), rtol=1e-15, atol=0)
    assert torch.linalg.matrix_rank(w) == n
    if m & (m - 1) == 0:  # a whole Hadamard matrix: its columns are orthonormal
        torch.testing.assert_close(w.mT @ w, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
@pytest.mark.parametrize("k", [1, 3])
def test_zero_init_makes_a_convolution_of_one_width_the_identity(conv, k):
    layer = conv(3, 3, k, padding=k // 2, bias=False).double()
    init.apply(layer, init.zero_init, where="conv")
    x = torch.randn(2, 3, *[5] * (layer.weight.ndim - 2), dtype=torch.float64)
    assert torch.equal(layer(x), x)


def test_zero_init_puts_the_widening_matrix_at_the_centre_of_the_kernel():
    """Algorithm 2: index ⌊k/2⌋ of each kernel axis, also of even ones."""
    w = init.zero_init(torch.randn(6, 2, 4, 5, dtype=torch.float64))
    assert torch.equal(w[:, :, 2, 2], algorithm_1(6, 2))
    assert w.count_nonzero() == 12


def test_zero_init_trains_a_network_that_starts_from_it():
    """The claim: nothing random is needed to learn; here the product of two signs, which no linear map can do."""
    x = torch.randn(64, 4)
    y = (x[:, :1] * x[:, 1:2]).sign()
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))
    init.apply(model, init.zero_init, where=["hidden", "head"])
    opt = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(150):
        loss = nn.functional.soft_margin_loss(model(x), y)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
