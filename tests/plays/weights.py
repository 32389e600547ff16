"""A map played on one layer of fixed weights: the weight, the output, and the gradient of the input.

What else the room makes is played too: a layer or a model on an input, a pure function by the tensors it gives.
"""

import torch
from torch import nn

from etude import weights


def linear(out=5, into=6):
    torch.manual_seed(0)
    return nn.Linear(into, out, dtype=torch.float64)


def stir(model):
    for p in model.parameters():
        p.data.add_(torch.randn_like(p))
    return model


def chained(fn, **knobs):
    """A model with two LoRAs, of which one is tied into the weight and born again."""
    model = nn.Sequential(linear())
    for name in ("lora", "other"):
        weights.put(model, weights.lora(r=2), on="0", name=name)
    return fn(stir(model), torch.optim.SGD(model.parameters()), **knobs)


def factors(fn, **knobs):
    """The updates of two factors and their gradients, with the sign as the rule."""
    torch.manual_seed(0)
    a, b, g = (torch.randn(s, dtype=torch.float64) for s in ((2, 6), (5, 2), (5, 6)))
    return fn(a, b, b.mT @ g, g @ a.mT, torch.sign, **knobs)


def norms_only(fn, **knobs):
    """What the parameters are after it, and which of them train."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    fn(stir(model), **knobs)
    return tuple(t.double().flatten() for p in model.parameters() for t in (p.detach(), torch.tensor(p.requires_grad)))


def by_task(fn, **knobs):
    torch.manual_seed(0)
    made = fn(nn.Sequential(linear(), nn.LayerNorm(5, dtype=torch.float64)), 5, **knobs)
    return tuple(p.detach().flatten() for p in made.parameters())


def tweaked(fn, **knobs):
    """The norms of two blocks whose matrices are rounded to halves."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(linear(6), nn.LayerNorm(6, dtype=torch.float64)) for _ in range(2)]
    fn(blocks, torch.randn(3, 8, 6, dtype=torch.float64), lambda b: b[0].weight.data.mul_(2).round_().div_(2), **knobs)
    return tuple(p.detach().flatten() for b in blocks for p in b[1].parameters())


def predicted(fn, **knobs):
    torch.manual_seed(0)
    made = fn(linear(), **knobs).double()
    return tuple(p.detach().flatten() for p in made(torch.full((made.inputs,), 0.3, dtype=torch.float64)).values())


def cut(fn, **knobs):
    """The gradient of the mapped weight as it is handed to the optimizer."""
    model, x = nn.Sequential(linear()), torch.randn(3, 8, 6, dtype=torch.float64)
    weights.put(model, fn(**knobs), on="0", batches=x, loss=lambda m, x: m(x).pow(3).sum())
    model(x).pow(3).sum().backward()
    g = model[0].parametrizations.weight.original.grad
    return (g.coalesce().values() if g.is_sparse else g, torch.zeros(2))


BUILD = {
    "bn_only": norms_only,
    "layernorm_tuning": norms_only,
    "layernorm_tuning_cl": by_task,
    "magnitude_invariant_hypernetwork": predicted,
    "norm_tweaking": tweaked,
    "sparsegrad": cut,
    "chain_of_lora": chained,
    "goat": lambda fn, **knobs: stir(fn(linear(32, 40), **knobs)),
    "lora_pro": factors,
}
TURNS = {
    "oft.block_size": ({"block_size": 2}, {"block_size": 3}),
    "oft_v2.block_size": ({"block_size": 2}, {"block_size": 3}),
    "boft.block_size": ({"block_size": 2}, {"block_size": 4}),
    "hra.r": ({"r": 2}, {"r": 4}),
    "psoft.r": ({"r": 2}, {"r": 3}),
    "block_tensor_train.fresh": ({"r": 1}, {"r": 1, "fresh": False}),
    "fish_mask.keep": ({"keep": 0.1}, {"keep": 0.4}),
    "fish_mask.grad": ({"keep": 0.4}, {"keep": 0.4, "grad": "absolute"}),
    "fish_mask.whole": ({"keep": 0.5}, {"keep": 0.5, "whole": 10}),
    "sparsegrad.share": ({"share": 0.1}, {"share": 0.3}),
    "orthogonal_adaptation.r": ({"r": 2}, {"r": 3}),
    "orthogonal_adaptation.concept": ({"r": 2}, {"r": 2, "concept": 1}),
    "corda.mode": ({"r": 2}, {"r": 2, "mode": "kpm"}),
    "eva.r": ({"r": 2}, {"r": 3}),
    "eva.rho": ({"r": 2, "rho": 1.0}, {"r": 2, "rho": 2.0}),
    "eva.tau": ({"r": 2, "tau": -1.0}, {"r": 2, "tau": 1.0}),
    "lora_sb.r": ({"r": 2}, {"r": 3}),
    "chain_of_lora.name": ({"name": "lora"}, {"name": "other"}),
    "clover.head_dim": ({"head_dim": 5}, {"head_dim": 2}),
    "bone.r": ({"r": 6}, {"r": 4}),
    "bat.r": ({"r": 5}, {"r": 2}),
    "shira.r": ({"r": 1}, {"r": 2}),
    "shira.seed": ({"r": 1}, {"r": 1, "seed": 1}),
    "fourierft.n_frequency": ({"n_frequency": 5}, {"n_frequency": 6}),
    "fourierft.seed": ({"n_frequency": 5}, {"n_frequency": 5, "seed": 1}),
    "goat.r": ({"r": 32}, {"r": 24}),
    "t_lora.min_rank": ({"r": 5, "min_rank": 1}, {"r": 5, "min_rank": 3}),
    "t_lora.alpha": ({"r": 5, "min_rank": 1}, {"r": 5, "min_rank": 1, "alpha": 3.0}),
}


def make(method, **knobs):
    return BUILD[method.name](method.fn, **knobs) if method.name in BUILD else method.fn(**knobs)


def play(value):
    if isinstance(value, tuple):
        return torch.cat([t.flatten() for t in value])
    with torch.random.fork_rng():
        if isinstance(value, weights.Map):
            layer = linear()
            data = {"batches": torch.randn(3, 8, 6, dtype=torch.float64), "loss": lambda m, x: m(x).pow(3).sum()}
            weights.put(layer, value, on="weight", **(data if value.watch() else {}))
            map = layer.parametrizations.weight[0]
            stir(map)
            if hasattr(map, "at") and callable(map.at):
                map.at(400)  # the timestep of a diffusion model
        else:
            layer = value
        torch.manual_seed(1)
        width = next(m.in_features for m in layer.modules() if isinstance(m, nn.Linear))
        x = torch.randn(4, width, dtype=torch.float64, requires_grad=True)
        y = layer(x)  # in training mode, so that a map that moves with use has moved
        (dx,) = torch.autograd.grad(y.square().sum(), x)
    seen = [layer.weight.detach()] if isinstance(value, weights.Map) else []
    return torch.cat([t.flatten() for t in [*seen, y.detach(), dx]])
