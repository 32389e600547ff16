"""SELU networks and Fixup: what their papers say of a network without norms."""

import math

import pytest
import torch
from torch import nn

from etude import blocks, recipes, weights
from etude.recipes import parse


def deep(n=24, d=256):
    torch.manual_seed(0)
    layers = [part for _ in range(n) for part in (nn.Linear(d, d), nn.LayerNorm(d), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(d, 10))


def moments(model, x):
    """Mean and variance after each activation."""
    seen = []
    for m in model.modules():
        if isinstance(m, nn.SELU):
            m.register_forward_hook(lambda _m, _x, y: seen.append((y.mean().item(), y.var().item())))
    with torch.no_grad():
        model(x)
    return seen


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1.2, 0.1), (0.7, -0.1)])
def test_self_normalizing_draws_mean_to_zero_and_variance_to_one_through_24_layers(scale, shift):
    model = recipes.self_normalizing()(deep())
    seen = moments(model, scale * torch.randn(512, 256) + shift)
    assert len(seen) == 24
    assert abs(seen[-1][0]) < 0.15
    assert 0.7 < seen[-1][1] < 1.3


def test_self_normalizing_takes_norms_out_and_draws_lecun_normal_weights():
    model = recipes.self_normalizing()(deep())
    assert {type(m).__name__ for m in model} == {"Linear", "Identity", "SELU"}
    w = torch.cat([m.weight.flatten() for m in model if isinstance(m, nn.Linear)])
    assert w.std().item() == pytest.approx(256**-0.5, rel=0.01)
    assert abs(w.mean().item()) < 1e-4
    assert all((m.bias == 0).all() for m in model if isinstance(m, nn.Linear))
    conv = recipes.self_normalizing()(nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU()))
    assert conv[0].weight.std().item() == pytest.approx((64 * 9) ** -0.5, rel=0.02)


def test_self_normalizing_turns_dropout_into_alpha_dropout_which_keeps_mean_and_variance():
    model = recipes.self_normalizing()(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Dropout(0.3)))
    assert repr(model[2]) == "AlphaDropout(p=0.3, inplace=False)"
    model = recipes.self_normalizing(p=0.1)(deep(n=2))
    assert repr(model[2]) == repr(nn.Sequential(nn.SELU(), nn.AlphaDropout(0.1)))
    x = torch.randn(400, 256)
    y = model[2](x)
    assert y.var().item() == pytest.approx(1.0, abs=0.05)
    assert y.mean().item() == pytest.approx(0.0, abs=0.05)


def test_self_normalizing_stands_in_a_recipe_and_asks_for_activations():
    recipe = parse("weight_norm + self_normalizing(p=0.05) + adamw")
    assert str(recipe) == "adamw + self_normalizing(p=0.05) + weight_norm"
    model = recipe.apply(deep(n=2))
    assert isinstance(model[1], nn.Identity)
    assert recipes.Recipe.from_json(recipe.to_json()) == recipe
    weights.merge(model)
    with pytest.raises(
        ValueError, match=r"^self_normalizing.* in the recipe .* looks for activation layers; Sequential has"
    ):
        recipe.apply(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"p, the share of values dropped, must be in \[0, 1\), got 1"):
        recipes.self_normalizing(p=1)


def stack(n, d=32, m=2):
    """A stem, n residual blocks of m weight layers each, a final norm, a head of ten classes."""
    torch.manual_seed(1)
    if m == 2:
        branches = [blocks.mlp(d, d) for _ in range(n)]
    else:
        branches = [
            nn.Sequential(*[p for _ in range(m - 1) for p in (nn.Linear(d, d), nn.ReLU())], nn.Linear(d, d))
            for _ in range(n)
        ]
    return nn.Sequential(nn.Linear(d, d), *(blocks.pre_ln(d, f) for f in branches), nn.LayerNorm(d), nn.Linear(d, 10))


def test_fixup_starts_with_identity_blocks_and_a_loss_of_log_classes():
    model = recipes.fixup()(stack(5))
    x = torch.randn(7, 32)
    for block in model[1:6]:
        assert torch.equal(block(x), x)
    assert (model(x) == 0).all()
    loss = nn.functional.cross_entropy(model(x), torch.arange(7))
    assert loss.item() == pytest.approx(math.log(10), abs=1e-6)


@pytest.mark.parametrize("n, m", [(4, 2), (16, 2), (16, 3), (81, 3)])
def test_fixup_scales_the_inner_layers_by_the_number_of_branches(n, m):
    """Std He · L^(−1/(2m − 2)): L^−½ for two layers, L^−¼ for three. He is by fan-out, as in the authors' code."""
    model = recipes.fixup()(stack(n, d=48, m=m))
    inner = torch.cat([p.weight.flatten() for b in model[1 : n + 1] for p in b.f if isinstance(p, nn.Linear)][::1])
    inner = inner[inner != 0]
    assert inner.std().item() == pytest.approx(math.sqrt(2 / 48) * n ** (-1 / (2 * m - 2)), rel=0.03)
    assert model[0].weight.std().item() == pytest.approx(math.sqrt(2 / 48), rel=0.1), "the stem is plain He"
    wide = nn.Sequential(blocks.pre_ln(48, blocks.mlp(48, 400)), nn.Linear(48, 3))
    assert recipes.fixup()(wide)[0].f[1].weight.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.03)


def test_fixup_has_one_scale_and_scalar_biases_where_the_paper_puts_them():
    """x → +b → W1 → +b → ReLU → +b → W2 → · scale → +b, no norm, and + b before the classifier."""
    model = recipes.fixup()(stack(2))
    kinds = [type(p).__name__ for p in (*model[1].f, *model[1].gate_out)]
    assert kinds == ["Shift", "Linear", "Shift", "ReLU", "Shift", "Linear", "Gain", "Shift"]
    shapes = sorted(tuple(p.shape) for p in model[1].parameters())
    assert shapes == [(), (), (), (), (), (32, 32), (32, 32)]
    assert (model[1].gate_out[0].weight.item(), model[1].gate_out[1].bias.item()) == (1.0, 0.0)
    assert [type(p).__name__ for p in model[-1]] == ["Shift", "Linear"]
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())


def test_fixup_moves_the_function_by_the_learning_rate_whatever_the_depth():
    """One step of SGD on the matrices, through a head that is not 0; He without the scale grows with depth.

    On the scalar biases too it would grow: each of L blocks shifts the same stream. The authors' code gives them a
    tenth of the learning rate.
    """

    def moved(n, change):
        model = change(stack(n).double())
        head = model[-1][1] if isinstance(model[-1], nn.Sequential) else model[-1]
        torch.manual_seed(2)
        nn.init.normal_(head.weight, std=0.2)
        x, y = torch.randn(64, 32, dtype=torch.float64), torch.arange(64) % 10
        opt = torch.optim.SGD([p for p in model.parameters() if p.ndim > 1], lr=1e-3)
        before = model(x)
        nn.functional.cross_entropy(before, y).backward()
        opt.step()
        return (model(x) - before).norm().item()

    def he(model):
        for m in model.modules():
            if isinstance(m, nn.Linear):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")
            if isinstance(m, blocks.Residual):
                m.norm_in = nn.Identity()
        model[-2] = nn.Identity()
        return model

    fixed = [moved(n, recipes.fixup()) for n in (4, 40)]
    print(fixed, [moved(n, he) for n in (4, 12)])
    assert fixed[1] < 1.5 * fixed[0]
    assert moved(12, he) > 100 * moved(4, he)


def test_fixup_refuses_what_it_cannot_count():
    d = 8
    gated = blocks.rezero(d, blocks.mlp(d))
    wrong = {
        "fixup looks for residual blocks, blocks.Residual; Sequential has none": nn.Linear(d, d),
        "a branch is an nn.Sequential of layers or blocks.mlp, not Attention": blocks.pre_ln(d, blocks.attention(d)),
        "a branch is an nn.Sequential of layers or blocks.mlp, not GatedMlp": blocks.pre_ln(d, blocks.swiglu(d)),
        "where this block has Gain": gated,
        "found a branch without a linear layer": blocks.pre_ln(d, nn.Sequential(nn.Tanh())),
    }
    for why, block in wrong.items():
        with pytest.raises(ValueError, match=why):
            recipes.fixup()(nn.Sequential(block, nn.Linear(d, 2)))
    with pytest.raises(ValueError, match=r"^fixup in the recipe adamw .* looks for residual blocks"):
        parse("adamw + fixup").apply(nn.Sequential(nn.Linear(d, d)))
    assert str(parse("fixup + adamw + dyt")) == "adamw + fixup + dyt"
    one = recipes.fixup()(nn.Sequential(blocks.pre_ln(d, nn.Sequential(nn.Linear(d, d))), nn.Linear(d, 2)))
    assert (one[0].f[1].weight == 0).all()
