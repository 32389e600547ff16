"""What the papers of the scaling adapters say; peft as reference."""

import math

import pytest
import torch
from adapters import against_peft, count, on
from torch import nn

from etude import weights

peft = pytest.importorskip("peft")
LORA = {"A": "lora_A.weight", "B": "lora_B.weight"}


def test_rslora_divides_by_the_root_of_the_rank():
    config = peft.LoraConfig(r=4, lora_alpha=7.0, use_rslora=True, target_modules=["0"])
    against_peft(weights.rslora(r=4, alpha=7.0), config, LORA)


def test_rslora_keeps_the_size_of_what_the_adapter_learns_at_any_rank():
    """The paper's theorem, in the first step: B moves by the gradient, and s² B A x does not shrink with r."""
    sizes = []
    for r in (64, 256):
        torch.manual_seed(0)
        layer, lora, _ = on(nn.Linear(400, 300, bias=False), weights.rslora(r=r))
        x = torch.randn(16, 400, dtype=torch.float64)
        y = layer(x)
        (db,) = torch.autograd.grad(y.square().sum(), [lora.B])
        lora.B.data.sub_(1e-6 * db)
        sizes.append((layer(x) - y).norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.3)


@pytest.mark.parametrize("base", [nn.Linear(12, 8), nn.Conv2d(4, 6, 3, padding=1)], ids=["linear", "conv"])
def test_dora_equals_peft(base):
    config = peft.LoraConfig(r=4, lora_alpha=7.0, use_dora=True, target_modules=["0"])
    against_peft(weights.dora(r=4, alpha=7.0), config, {**LORA, "m": "lora_magnitude_vector.weight"}, base=base)


def test_dora_learns_length_and_direction_apart():
    layer, dora, w = on(nn.Linear(6, 4), weights.dora(r=2))
    nn.init.normal_(dora.B)
    with torch.no_grad():
        dora.m.mul_(3)
    torch.testing.assert_close(layer.weight.norm(dim=1), 3 * w.norm(dim=1))
    direction = w + dora.scale * dora.B @ dora.A
    torch.testing.assert_close(torch.cosine_similarity(layer.weight, direction), torch.ones(4, dtype=w.dtype))


def test_dora_takes_the_norm_as_a_constant_of_the_gradient():
    """So that the gradient of B is m / ‖V‖ times that of LoRA, with its part along V."""
    layer, dora, _ = on(nn.Linear(6, 4), weights.dora(r=2))
    g = torch.randn(4, 6, dtype=torch.float64)
    (db,) = torch.autograd.grad((layer.weight * g).sum(), [dora.B])
    torch.testing.assert_close(db, dora.scale * g @ dora.A.mT)  # at birth m / ‖V‖ = 1


def test_dora_on_another_adapter_measures_the_weight_it_stands_on():
    layer, x = nn.Linear(6, 4, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    for name, map in (("under", weights.lora(r=2)), ("over", weights.dora(r=2))):
        weights.put(layer, map, on="weight", name=name)
    for m in layer.parametrizations.weight:
        nn.init.normal_(m.B)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("inputs", [False, True])
def test_ia3_equals_peft_where_there_is_no_bias(inputs):
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if inputs else [])
    against_peft(weights.ia3(inputs=inputs), config, {"l": "ia3_l"}, base=nn.Linear(12, 8, bias=False))


def test_ia3_scales_keys_and_trains_as_many_numbers_as_there_are_units():
    layer, ia3, w = on(nn.Conv2d(4, 6, 3), weights.ia3(inputs=True))
    with torch.no_grad():
        ia3.l.copy_(torch.tensor([1.0, 2, 3, 4]))
    torch.testing.assert_close(layer.weight, w * torch.tensor([1.0, 2, 3, 4], dtype=w.dtype).view(1, 4, 1, 1))
    assert (count(ia3), count(on(nn.Conv2d(4, 6, 3), weights.ia3())[1])) == (4, 6)


@pytest.mark.parametrize("base", [nn.Linear(12, 8), nn.Linear(8, 12)])
def test_vera_equals_peft(base):
    config = peft.VeraConfig(r=5, target_modules=["0"], projection_prng_key=0)
    theta = {"b": "vera_lambda_b", "d": "vera_lambda_d"}
    against_peft(weights.vera(r=5), config, theta, {"A": "vera_A", "B": "vera_B"}, base)


def test_vera_shares_its_frozen_matrices_and_trains_out_plus_r():
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 40), nn.Linear(40, 30))
    weights.put(model, weights.vera(r=64), on="*")
    one, other, twin = (layer.parametrizations.weight[0] for layer in model)
    assert one.A is twin.A
    assert one.A is not other.A
    assert count(one) == 30 + 64
    assert one.A.abs().max().item() == pytest.approx(math.sqrt(6 / 40), rel=0.01)  # Kaiming uniform
    assert one.B.abs().max().item() == pytest.approx(math.sqrt(6 / 64), rel=0.01)
    assert torch.equal(one.d, torch.full((64,), 0.1))


def test_vera_is_saved_without_its_random_matrices(tmp_path):
    model = weights.put(nn.Sequential(nn.Linear(40, 30)), weights.vera(seed=3), on="0")
    nn.init.normal_(model[0].parametrizations.weight[0].b)
    file = weights.save(model, tmp_path)
    assert file.stat().st_size < 4 * (30 + 256) + 1000
    bare = nn.Sequential(nn.Linear(40, 30))
    bare.load_state_dict({k: model[0].parametrizations.weight.original if k == "0.weight" else model[0].bias
                          for k in bare.state_dict()})  # fmt: skip
    x = torch.randn(2, 40)
    torch.testing.assert_close(weights.load(bare, file)(x), model(x))


@pytest.mark.parametrize("base", [nn.Linear(12, 8), nn.Linear(8, 12)])
def test_randlora_equals_peft(base):
    config = peft.RandLoraConfig(r=3, randlora_alpha=7, target_modules=["0"], projection_prng_key=0)
    theta = {"lam": "randlora_lambda", "gamma": "randlora_gamma"}
    against_peft(weights.randlora(r=3, alpha=7.0), config, theta, {"A": "randlora_A", "B": "randlora_B"}, base)


def test_randlora_reaches_full_rank():
    layer, map, w = on(nn.Linear(12, 9), weights.randlora(r=2))
    nn.init.normal_(map.lam)
    nn.init.normal_(map.gamma)
    assert torch.linalg.matrix_rank(layer.weight - w) == 9
    assert count(map) == 2 * 5 + 5 * 9  # n = ⌈9 / 2⌉ = 5 bases


def test_delora_equals_peft():
    config = peft.DeloraConfig(r=3, delora_lambda=5, target_modules=["0"])
    theta = {"A": "delora_A", "B": "delora_B", "lam": "delora_lambda"}
    against_peft(weights.delora(r=3, lam=5.0), config, theta)


def test_delora_bounds_the_change_by_lambda_whatever_a_and_b():
    layer, map, w = on(nn.Linear(7, 7), weights.delora(r=3, lam=0.5))
    for size in (1.0, 1e3):
        nn.init.normal_(map.A, std=size)
        nn.init.normal_(map.B, std=size)
        change = (layer.weight - w) / w.norm(dim=0)
        assert change.norm() <= 0.5
    map.B.data = map.B[:, :1].repeat(1, 3)
    map.A.data = map.A[:1].repeat(3, 1)
    assert ((layer.weight - w) / w.norm(dim=0)).norm().item() == pytest.approx(0.5)  # all along one direction
