"""What the papers of the product and block adapters say; peft as reference."""

import pytest
import torch
from adapters import against_peft, count, on
from torch import nn

from etude import weights

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("base", [nn.Linear(12, 8), nn.Conv2d(4, 6, 3, padding=1)], ids=["linear", "conv"])
def test_loha_equals_peft(base):
    config = peft.LoHaConfig(r=3, alpha=6, target_modules=["0"])  # its scale is in float32
    theta = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    against_peft(weights.loha(r=3, alpha=6.0), config, theta, base=base)


def test_loha_reaches_the_square_of_its_rank_with_2_r_in_plus_out():
    layer, map, w = on(nn.Linear(20, 18), weights.loha(r=3))
    nn.init.normal_(map.A2)
    assert torch.linalg.matrix_rank(layer.weight - w) == 9
    assert count(map) == 2 * 3 * (20 + 18)


@pytest.mark.parametrize(
    "r, base, theta",
    [
        (2, nn.Linear(36, 24), {"C": "lokr_w1", "D": "lokr_w2_a", "E": "lokr_w2_b"}),
        (8, nn.Linear(12, 8), {"C": "lokr_w1", "D": "lokr_w2"}),
        (8, nn.Conv2d(4, 6, 3, padding=1), {"C": "lokr_w1", "D": "lokr_w2"}),
        (8, nn.Linear(7, 5), {"C": "lokr_w1", "D": "lokr_w2"}),
    ],
    ids=["low", "full", "conv", "prime"],
)
def test_lokr_equals_peft(r, base, theta):
    against_peft(weights.lokr(r=r, alpha=7.0), peft.LoKrConfig(r=r, alpha=7, target_modules=["0"]), theta, base=base)


def test_lokr_is_a_kronecker_product_whose_rank_is_the_product_of_ranks():
    layer, map, w = on(nn.Linear(16, 16), weights.lokr(r=1))
    nn.init.normal_(map.C)
    assert torch.linalg.matrix_rank(layer.weight - w) == 4 * 1
    assert count(map) == 4 * 4 + 4 + 4


@pytest.mark.parametrize("base", [nn.Linear(12, 8), nn.Linear(10, 8)], ids=["divides", "does not"])
def test_bone_equals_peft(base):
    config = peft.MissConfig(r=4, target_modules=["0"], init_weights=True)
    against_peft(weights.bone(r=4), config, {"D": "miss_block"}, base=base)


def test_bone_sums_the_blocks_of_the_input_and_has_rank_r():
    layer, map, w = on(nn.Linear(12, 8, bias=False), weights.bone(r=3))
    nn.init.normal_(map.D)
    x = torch.randn(12, dtype=torch.float64)
    sums = [sum(x[j].item() for j in range(12) if j % 3 == i) for i in range(3)]
    expected = w @ x + sum(s * map.D[i] for i, s in enumerate(sums))
    torch.testing.assert_close(layer(x), expected)
    assert torch.linalg.matrix_rank(layer.weight - w) == 3
    assert count(map) == 3 * 8


def test_bat_equals_peft():
    config = peft.MissConfig(r=4, target_modules=["0"], init_weights="bat")
    against_peft(weights.bat(r=4), config, {"B": "miss_block"})


def test_bat_where_the_rank_does_not_divide_is_bat_of_the_weight_filled_up():
    layer, map, w = on(nn.Linear(5, 7), weights.bat(r=3))
    nn.init.normal_(map.B)
    wide = torch.zeros(9, 6, dtype=torch.float64)
    wide[:7, :5] = w
    for i in range(3):
        for j in range(2):
            block = wide[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            block.add_(block.clone() @ map.B[i].detach() + map.B[i].detach())
    torch.testing.assert_close(layer.weight, wide[:7, :5])


def test_bat_is_undone_by_the_inverse_of_one_plus_b():
    layer, map, w = on(nn.Linear(4, 4), weights.bat(r=2))
    nn.init.normal_(map.B, std=0.1)
    eye = torch.eye(2, dtype=torch.float64)
    for i in range(2):
        back = (layer.weight[2 * i : 2 * i + 2, :2] - map.B[i]) @ torch.linalg.inv(eye + map.B[i])
        torch.testing.assert_close(back, w[2 * i : 2 * i + 2, :2])


def test_conv_lora_is_read_as_the_kernel_in_memory_order():
    """loralib's layer: A [r k, in k], B [out k, r k], and (B A).view(weight.shape)."""
    layer, map, w = on(nn.Conv2d(4, 6, 3), weights.conv_lora(r=2, alpha=3.0))
    assert (tuple(map.A.shape), tuple(map.B.shape)) == ((6, 12), (18, 6))
    nn.init.normal_(map.B)
    a, b = map.A.tolist(), map.B.tolist()
    o, i, y, x = 4, 2, 1, 2
    row, column = divmod(((o * 4 + i) * 3 + y) * 3 + x, 12)
    change = sum(b[row][k] * a[k][column] for k in range(6))
    assert layer.weight[o, i, y, x].item() == pytest.approx(w[o, i, y, x].item() + 1.5 * change, abs=1e-12)


def test_conv_lora_has_rank_at_most_r_k_in_its_own_order():
    layer, map, w = on(nn.Conv2d(9, 8, 3), weights.conv_lora(r=2))
    nn.init.normal_(map.B)
    change = (layer.weight - w).detach()
    assert torch.linalg.matrix_rank(change.reshape(24, 27)) == 6
    assert torch.linalg.matrix_rank(change.flatten(1)) == 8  # the usual order knows no such bound


def test_conv_lora_is_born_as_lora_is():
    layer, map, w = on(nn.Conv2d(40, 6, 3), weights.conv_lora())
    assert torch.equal(layer.weight, w)
    assert map.B.abs().max() == 0
    assert 0.9 / 120**0.5 < map.A.abs().max() <= 1 / 120**0.5  # kaiming_uniform_(a=√5) over in · k
