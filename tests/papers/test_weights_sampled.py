"""What the papers of the sampled adapters say; peft as reference."""

import math

import pytest
import torch
from adapters import against_peft, count, on
from torch import nn

from etude import weights

peft = pytest.importorskip("peft")


def test_shira_equals_peft():
    config = peft.ShiraConfig(r=2, target_modules=["0"], random_seed=5)
    against_peft(weights.shira(r=2, seed=5), config, {"theta": "shira_weight"})


def test_shira_trains_as_many_entries_as_lora_but_reaches_a_high_rank():
    layer, map, w = on(nn.Linear(20, 20), weights.shira(r=2))
    nn.init.normal_(map.theta)
    change = layer.weight - w
    assert count(map) == (change != 0).sum() == 2 * (20 + 20)
    assert torch.linalg.matrix_rank(change) > 2 * 2


def test_fourierft_is_the_real_part_of_the_inverse_transform_of_sparse_coefficients():
    layer, map, w = on(nn.Linear(4, 3), weights.fourierft(n_frequency=5, scaling=7.0))
    nn.init.normal_(map.theta)
    for i in range(3):
        for j in range(4):
            change = sum(
                c * math.cos(2 * math.pi * (i * (k // 4) / 3 + j * (k % 4) / 4))
                for c, k in zip(map.theta.tolist(), map.at.tolist(), strict=True)
            )
            assert layer.weight[i, j].item() == pytest.approx(w[i, j].item() + 7 * change / 12, abs=1e-12)


def test_fourierft_equals_peft_and_draws_the_same_frequencies():
    config = peft.FourierFTConfig(n_frequency=9, scaling=20.0, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 8)), config)
    module = model.base_model.model[0]
    layer, map, w = on(nn.Linear(12, 8), weights.fourierft(n_frequency=9, scaling=20.0))
    row, column = module.indices["default"]
    flat = row * 12 + column
    assert set(flat.tolist()) == set(map.at.tolist())
    with torch.no_grad():
        map.theta.copy_(module.fourierft_spectrum["default"][flat.argsort()])
    torch.testing.assert_close(layer.weight - w, module.get_delta_weight("default").double(), rtol=1e-5, atol=1e-6)
    assert count(map) == 9


def test_fourierft_starts_where_the_weight_is_unlike_the_authors():
    layer, _, w = on(nn.Linear(12, 8), weights.fourierft())
    assert torch.equal(layer.weight, w)
