"""How a recipe is played: a change on a small feed-forward or residual model, a model on a few tokens."""

import inspect

import torch
from torch import nn

from etude import after, blocks, recipes
from etude._method import stamp

REQUIRED = {"words": 7}
SMALL = {"d": 16, "layers": 1, "heads": 2}
TURNS = {
    f"ngpt.{knob}": (SMALL, SMALL | {knob: other})
    for knob, other in {"d": 12, "layers": 2, "heads": 4, "alpha": 0.1, "s_z": 2.0}.items()
}


def make(method, **knobs):
    required = {k: v for k, v in REQUIRED.items() if k in inspect.signature(method.fn).parameters}
    return method.fn(**required | knobs)


def feed_forward():
    layers = (nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return nn.Sequential(*layers)


def residual():
    block = [blocks.pre_ln(6, blocks.mlp(6)) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 6), *block, nn.LayerNorm(6), nn.Linear(6, 3))


def play(value):
    torch.manual_seed(0)
    if isinstance(value, after.After):
        model = recipes.ngpt(7, **SMALL)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(3)
        value.bind(model)
        return torch.cat([p.flatten() for p in model.parameters()])
    if isinstance(value, nn.Module):
        y = value.double()(torch.arange(10).view(2, 5) % 7)
        return torch.cat([y.flatten(), *(p.flatten() for p in value.parameters())]).detach()
    model = value(residual() if stamp(value).name == "fixup" else feed_forward()).double()
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    y = model(x)
    return torch.cat([t.detach().flatten() for t in (y, *model.parameters())])
