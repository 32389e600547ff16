"""What the LoRMA paper says."""

import pytest
import torch
from adapters import count, on
from torch import nn

from etude import weights

F64 = torch.float64
modes = pytest.mark.parametrize("mode, n", [("pre", 5), ("post", 7)])


@modes
def test_lorma_plus_multiplies_by_the_identity_and_a_low_rank(mode, n):
    layer, map, w = on(nn.Linear(7, 5), weights.lorma_plus(r=2, alpha=3.0, mode=mode))
    assert torch.equal(layer.weight, w)
    nn.init.normal_(map.B)
    m = torch.eye(n, dtype=F64) + 1.5 * map.B @ map.A
    torch.testing.assert_close(layer.weight, m @ w if mode == "pre" else w @ m)
    assert count(map) == 2 * 2 * n


def test_lorma_plus_is_lora_whose_a_is_tied_to_w():
    layer, map, w = on(nn.Linear(7, 5), weights.lorma_plus(r=2, alpha=3.0))
    other, lora, _ = on(nn.Linear(7, 5), weights.lora(r=2, alpha=3.0))
    nn.init.normal_(map.B)
    with torch.no_grad():
        other.parametrizations.weight.original.copy_(w)
        lora.A.copy_(map.A @ w)
        lora.B.copy_(map.B)
    torch.testing.assert_close(layer.weight, other.weight)


@modes
@pytest.mark.parametrize("alpha", [2.0, 7.0])
def test_lorma_pi_starts_as_the_identity_by_a_row_of_ones_that_turns(mode, n, alpha):
    layer, map, w = on(nn.Linear(7, 5), weights.lorma_pi(r=2, alpha=alpha, mode=mode))
    torch.testing.assert_close(layer.weight, w)
    product = (alpha / 2 * map.B @ map.A).tolist()
    assert [row[0] for row in product] == pytest.approx([1.0] * n)
    assert all(abs(v) < 1e-12 for row in product for v in row[1:])


@modes
def test_lorma_pi_turns_row_i_right_by_i(mode, n):
    layer, map, w = on(nn.Linear(7, 5), weights.lorma_pi(r=2, alpha=3.0, mode=mode))
    nn.init.normal_(map.A)
    nn.init.normal_(map.B)
    m = torch.stack([row.roll(i) for i, row in enumerate(1.5 * map.B @ map.A)])
    torch.testing.assert_close(layer.weight, m @ w if mode == "pre" else w @ m)


def test_lorma_pi_inflates_the_rank():
    layer, map, w = on(nn.Linear(9, 9), weights.lorma_pi(r=1))
    nn.init.normal_(map.A)
    nn.init.normal_(map.B)
    assert torch.linalg.matrix_rank(layer.weight) == torch.linalg.matrix_rank(w) == 9
    assert torch.linalg.matrix_rank(map.B @ map.A) == 1


def test_lorma_pi_refuses_a_scale_it_cannot_take_the_root_of():
    with pytest.raises(ValueError, match=r"weight: lorma_pi: alpha=-1\.0 must be positive"):
        weights.put(nn.Linear(3, 3), weights.lorma_pi(alpha=-1.0), on="weight")
