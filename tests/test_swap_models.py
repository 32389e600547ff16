"""norms.swap on models of torch, timm and transformers: what is carried, what is refused, and after an optimizer."""

import copy
from functools import partial

import peers
import pytest
import torch
import transformers
from torch import nn

from etude import norms, recipes, rules
from etude.recipes import _part

TOKENS = torch.arange(12).view(2, 6) % 11
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit():
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return peers.timm_model("vision_transformer").VisionTransformer(**sizes, qk_norm=True)


def gpt2():
    size = {"vocab_size": 11, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, bos_token_id=None, eos_token_id=None))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(16), enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(11, 16), stack, nn.Linear(16, 11))


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten()
    )


MODELS = {"torch": (encoder, TOKENS, 5), "timm": (vit, IMAGES, 9), "transformers": (gpt2, TOKENS, 5)}


def built(name):
    make, x, count = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    for m in norms.layers(model).values():
        nn.init.normal_(m.weight, 1.0, 0.3), nn.init.normal_(m.bias, 0.0, 0.3)
    return model, x, count


def out(model, x):
    y = model(x)
    return (y if torch.is_tensor(y) else y[0]).detach()


@pytest.mark.parametrize("name", MODELS)
def test_the_same_mathematics_under_another_eps_keeps_the_function_and_every_parameter(name):
    model, x, count = built(name)
    want, params = out(model, x), dict(model.named_parameters())
    assert len(norms.swap(model, partial(norms.layer_norm, eps=1.1e-5))) == count
    assert {id(p) for p in model.parameters()} == {id(p) for p in params.values()}
    torch.testing.assert_close(out(model, x), want, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_what_has_learned_finds_its_place_or_is_refused(name):
    model, x, count = built(name)
    assert len(norms.swap(copy.deepcopy(model), norms.dyt)) == count
    for factory, lost in ((norms.rms_norm, "bias"), (norms.scale_norm, "weight"), (norms.rs_norm, "weight")):
        state = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(ValueError, match=rf"\.{lost} has learned something, for which .* has no place; norms.fold"):
            norms.swap(model, factory)
        assert state.keys() == model.state_dict().keys()
    for m in norms.layers(model).values():
        nn.init.zeros_(m.bias)
    assert len(norms.swap(model, norms.rms_norm)) == count
    assert out(model, x).isfinite().all()


def test_a_fold_makes_room_for_a_norm_without_a_bias():
    model, x, _ = built("timm")
    where = "blocks.*.norm?"
    with pytest.raises(ValueError, match="has learned something"):
        norms.swap(model, norms.rms_norm, where)
    assert len(norms.fold(model, x, where)) == 4
    assert len(norms.swap(model, norms.rms_norm, where)) == 4
    assert out(model, x).isfinite().all()


def test_batch_statistics_are_carried_where_they_mean_the_same():
    torch.manual_seed(0)
    model = resnet().train()
    for _ in range(3):
        model(IMAGES)
    mean, var = model[1].running_mean.clone(), model[1].running_var.clone()
    same = copy.deepcopy(model).eval()
    norms.swap(same, partial(norms.batch_norm, momentum=0.3))
    torch.testing.assert_close(same(IMAGES), model.eval()(IMAGES))
    assert same[1].num_batches_tracked == 3
    online = copy.deepcopy(model)
    norms.swap(online, norms.online_norm)
    assert torch.equal(online[1].running_var, var)
    rows = nn.Sequential(nn.BatchNorm1d(4))
    rows(torch.randn(9, 4) + 5)
    norms.swap(rows, norms.rs_norm)  # counts rows, which a batch norm does not: it begins anew
    assert (rows[0].running_mean == 0).all()
    seen = nn.Sequential(norms.rs_norm(4))
    seen(torch.randn(9, 4) + 5)
    kept = seen[0].running_mean.clone()
    norms.swap(seen, partial(norms.rs_norm, eps=1e-3))
    assert torch.equal(seen[0].running_mean, kept)
    assert seen[0].num_rows_tracked == 9
    assert mean.abs().max() > 0


def test_a_norm_that_remembers_keeps_its_memory_under_another_knob():
    model = nn.Sequential(norms.unified_norm(4))
    model(torch.randn(3, 5, 4))
    kept = model[0].running_square.clone()
    norms.swap(model, partial(norms.unified_norm, eps=1e-3))
    assert torch.equal(model[0].running_square, kept)
    fresh = nn.Sequential(norms.unified_norm(4))
    fresh(torch.randn(3, 5, 4))
    norms.swap(fresh, norms.power_norm)  # a mean square of something else
    assert (fresh[0].running_square == 1).all()


def holder(method, value):
    """A model with a norm of the kind that the value can stand for, and what it is called with."""
    d, ndim = value.features, getattr(value, "_ndim", 3)
    inner = (4, 5, 3)[: ndim - 2]
    if value.axis == 1:
        first = norms.Norm("b c ... -> b c", d)
        return nn.Sequential(first), torch.randn(3, d, *inner)
    other = nn.RMSNorm if method.name == "layer_norm" else nn.LayerNorm
    return nn.Sequential(other(d)), torch.randn(3, *inner, d)


SWAPPED = [m for m in _part.candidates() if m.room == "norms"]
NEEDED = {"labels": 3}


@pytest.mark.parametrize("m", SWAPPED, ids=lambda m: m.name)
def test_every_norm_is_known_as_a_target_and_as_a_source(m):
    """Each by the text of a recipe; those that need a condition are refused in one line."""
    d = 128
    needed = {p.name: NEEDED[p.name] for p in _part.knobs(m) if p.default is p.empty}
    text = f"{m.name}({', '.join(f'{k}={v}' for k, v in needed.items())})"
    value = m.fn(d, **needed)
    model, x = holder(m, value)
    if isinstance(value, norms.Conditional) or m.name == "region_norm":
        with pytest.raises(ValueError, match="is called with 2 arguments, but the model gives it x alone"):
            recipes.parse(text).apply(model)
        assert norms.layers(nn.Sequential(value)) == {}, "nor is it, or its inside, found"
        return
    if m.name != "instance_norm":
        recipes.parse(text).apply(model)
    y = model(x.requires_grad_())
    assert type(model[0]) is type(value)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert norms.layers(model) == {"0": model[0]}
    with pytest.raises(ValueError, match="would change nothing"):
        norms.swap(nn.Sequential(value), partial(m.fn, **needed))
    other = partial(norms.dyt, channels_last=value.axis != 1)
    assert norms.swap(nn.Sequential(value), norms.derf if m.name == "dyt" else other) == ["0"]


def test_a_calibrated_norm_is_restored_first():
    model = resnet().train()
    model(IMAGES)
    norms.calibrate(model, norms.alpha_bn())
    with pytest.raises(ValueError, match=r"1 takes its statistics from a source; norms.restore"):
        norms.swap(model, norms.instance_norm)


def test_the_parts_of_a_norm_are_not_swapped():
    model = nn.Sequential(norms.spade(6, labels=3), norms.lin(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    assert list(norms.layers(model)) == ["1", "3"]


def train(model, opt, steps=2):
    for _ in range(steps):
        opt.zero_grad()
        model(torch.linspace(-1, 1, 12).view(3, 4)).square().mean().backward()
        opt.step()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    "make", [lambda m: torch.optim.AdamW(m.parameters(), 0.1), lambda m: rules.optimizer(m, rules.adamw(0.1))]
)
def test_an_optimizer_that_is_handed_in_goes_on_with_what_the_model_has_now(make):
    model = net()
    opt = make(model)
    kept, gone = model[2].weight, model[1].bias
    if isinstance(opt, rules.Optimizer):
        with pytest.raises(
            ValueError, match=r"norms that swap would replace: swap before you make it, or pass optimizer="
        ):
            norms.swap(model, norms.dyt)
    norms.swap(model, norms.dyt, "1", optimizer=opt)  # adds alpha
    norms.swap(model, norms.rms_norm, "3", optimizer=opt)  # takes a bias
    held = [p for g in opt.param_groups for p in g["params"]]
    assert {*map(id, held)} == {*map(id, model.parameters())}
    assert len(held) == len({*map(id, held)})
    assert any(p is gone for p in held)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, opt)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert any(p is kept for p in held)
    if "param_names" in opt.param_groups[0]:
        assert [*opt.param_groups[0]["param_names"]] == [
            next(n for n, q in model.named_parameters() if q is p) for p in held
        ]


def test_a_route_of_rules_cannot_place_new_parameters():
    model = net()
    opt = rules.optimizer(model, rules.muon())
    with pytest.raises(ValueError, match=r"norms\.swap: this optimizer sends parameters to several rules by role"):
        norms.swap(model, norms.dyt, optimizer=opt)
