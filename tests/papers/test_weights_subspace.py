"""What the papers of the adapters inside the singular vectors of W say."""

import math

import pytest
import torch
from adapters import count, on
from torch import nn

from etude import weights

F64 = torch.float64


def svd(w):
    return torch.linalg.svd(w, full_matrices=False)


def test_lora_xs_trains_r_by_r_numbers_between_frozen_singular_vectors():
    """The authors' code: lora_A = Σ V, lora_B = U, of the r leading triples; x → s U R Σ V x."""
    layer, map, w = on(nn.Linear(9, 7), weights.lora_xs(r=3, alpha=6.0))
    nn.init.normal_(map.R)
    u, s, v = svd(w)
    change = 2 * u[:, :3] @ map.R @ s[:3].diag() @ v[:3]
    torch.testing.assert_close(layer.weight, w + change)
    assert count(map) == 3 * 3
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["bias", "parametrizations.weight.0.R"]


def test_sorsa_takes_the_leading_triples_out_and_trains_them():
    layer, map, w = on(nn.Linear(9, 7), weights.sorsa(r=3))
    u, s, v = svd(w)
    torch.testing.assert_close(layer.weight, w)
    torch.testing.assert_close((map.B * map.S) @ map.A, (u[:, :3] * s[:3]) @ v[:3])
    with torch.no_grad():
        map.S.add_(1.0)
    torch.testing.assert_close(layer.weight, (u * (s + (torch.arange(7) < 3))) @ v)
    assert count(map) == 3 * (9 + 7 + 1)


def test_sorsa_scales_what_it_takes_as_what_it_adds():
    layer, map, w = on(nn.Linear(9, 7), weights.sorsa(r=3, alpha=6.0))
    before = ((map.B * map.S) @ map.A).detach()
    torch.testing.assert_close(layer.weight, w)
    nn.init.normal_(map.B)
    torch.testing.assert_close(layer.weight, w + 2 * ((map.B * map.S) @ map.A - before))


def test_sorsa_has_a_regulariser_that_is_zero_at_birth_and_not_squared():
    model = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5)).double()
    weights.put(model, weights.sorsa(r=3), on="*")
    assert weights.orthonormality(model).item() == pytest.approx(0, abs=1e-12)
    map = model[0].parametrizations.weight[0]
    with torch.no_grad():
        map.A.mul_(2)  # ‖4 I − I‖ = 3 √3, one of four factors
    assert weights.orthonormality(model).item() == pytest.approx(3 * math.sqrt(3) / 4)
    with torch.no_grad():
        map.B.mul_(2)
    assert weights.orthonormality(model).item() == pytest.approx(3 * math.sqrt(3) / 2)
    with pytest.raises(ValueError, match="carries no adapter with trained factors"):
        weights.orthonormality(nn.Linear(3, 3))


def test_svft_plain_moves_singular_values_alone():
    layer, map, w = on(nn.Linear(9, 7), weights.svft())
    assert count(map) == 7 + 1
    nn.init.normal_(map.M)
    u, s, v = svd(w)
    torch.testing.assert_close(layer.weight, (u * (s + 0.5 * map.M)) @ v)  # σ(0) = ½


@pytest.mark.parametrize("k", [0, 1, 2])
@pytest.mark.parametrize("pattern", ["banded", "random"])
def test_svft_trains_as_many_numbers_as_its_band_has(k, pattern):
    _, map, _ = on(nn.Linear(9, 7), weights.svft(off_diag=k, pattern=pattern))
    assert len(map.M) == 7 * (2 * k + 1) - k * (k + 1)


def test_svft_with_a_band_is_zero_outside_of_it():
    layer, map, w = on(nn.Linear(9, 7), weights.svft(off_diag=1))
    nn.init.normal_(map.M)
    nn.init.constant_(map.gate, 2.0)
    u, s, v = svd(w)
    inner = u.mT @ layer.weight @ v.mT - s.diag()
    i = torch.arange(7)
    inside = (i[:, None] - i).abs() <= 1
    assert inner[~inside].abs().max() < 1e-12
    torch.testing.assert_close(inner[inside], map.M * torch.sigmoid(torch.tensor(2.0, dtype=F64)))


def test_svft_with_all_diagonals_reaches_any_change_of_a_square_weight():
    layer, map, w = on(nn.Linear(5, 5), weights.svft(off_diag=4))
    target = torch.randn(5, 5, dtype=F64)
    u, _, v = svd(w)
    with torch.no_grad():
        map.M.copy_(2 * (u.mT @ target @ v.mT).flatten())
    torch.testing.assert_close(layer.weight, w + target)


def test_svft_of_lower_rank_leaves_the_other_directions():
    layer, map, w = on(nn.Linear(9, 7), weights.svft(rank=2))
    nn.init.normal_(map.M)
    assert torch.linalg.matrix_rank(layer.weight - w) == len(map.M) == 2


def test_clover_trains_a_square_matrix_per_head_on_orthonormal_rows():
    layer, map, w = on(nn.Linear(12, 8), weights.clover(head_dim=4))
    assert map.R.shape == (2, 4, 4)
    assert torch.equal(layer.weight, w)
    nn.init.normal_(map.R)
    for h in range(2):
        rows = torch.linalg.solve(map.R[h], layer.weight[4 * h : 4 * h + 4])
        torch.testing.assert_close(rows @ rows.mT, torch.eye(4, dtype=F64))
        back = rows @ w[4 * h : 4 * h + 4].mT @ w[4 * h : 4 * h + 4]
        torch.testing.assert_close(back @ rows.mT @ rows, back)  # they span what the head's rows spanned


def scores(q, k, x, heads):
    q, k = (layer(x).unflatten(-1, (heads, -1)).transpose(-2, -3) for layer in (q, k))
    return q @ k.mT


def test_clover_gives_a_pair_one_basis_and_leaves_the_scores_of_attention():
    q, k = nn.Linear(12, 8, bias=False).double(), nn.Linear(12, 8, bias=False).double()
    x = torch.randn(2, 5, 12, dtype=F64)
    before, product = scores(q, k, x, 2), [q.weight[4 * h : 4 * h + 4].mT @ k.weight[4 * h : 4 * h + 4] for h in (0, 1)]
    weights.orthonormal_pair(q, k, heads=2)
    torch.testing.assert_close(scores(q, k, x, 2), before)
    for h in range(2):
        block = k.weight[4 * h : 4 * h + 4]
        torch.testing.assert_close(block @ block.mT, torch.eye(4, dtype=F64))
        sizes = q.weight[4 * h : 4 * h + 4].norm(dim=1)
        torch.testing.assert_close(sizes, torch.linalg.svdvals(product[h])[:4])
    weights.put(q, weights.clover(head_dim=4), on="weight")
    torch.testing.assert_close(scores(q, k, x, 2), before)


def test_clover_prunes_at_the_cost_of_the_discarded_singular_values():
    q, k = nn.Linear(12, 8, bias=False).double(), nn.Linear(12, 8, bias=False).double()
    product = q.weight[:4].mT @ k.weight[:4]
    weights.orthonormal_pair(q, k, heads=2, r=3)
    lost = (product - q.weight[:4].mT @ k.weight[:4]).norm()
    assert lost.item() == pytest.approx(torch.linalg.svdvals(product)[3].item())
    assert q.weight[3].abs().max() == k.weight[3].abs().max() == 0


def test_clover_prunes_a_planted_rank_for_nothing():
    q, k = nn.Linear(12, 8, bias=False).double(), nn.Linear(12, 8, bias=False).double()
    with torch.no_grad():
        q.weight[2] = q.weight[0] + q.weight[1]
    x = torch.randn(5, 12, dtype=F64)
    before = scores(q, k, x, 2)[0]
    weights.orthonormal_pair(q, k, heads=2, r=3)
    torch.testing.assert_close(scores(q, k, x, 2)[0], before)


def test_clover_refuses_a_pair_with_biases():
    with pytest.raises(ValueError, match="a bias of a pair does not survive"):
        weights.orthonormal_pair(nn.Linear(4, 4), nn.Linear(4, 4), heads=2)
