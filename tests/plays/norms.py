"""How a norm is played: two training steps and one in eval, with gradients, on small numbers so that eps matters.

``REQUIRED`` holds arguments without a default by their name, ``CONDITIONS`` what a method's forward takes besides x.
"""

import copy
import inspect

import torch
from torch import nn

from etude import norms
from etude._method import stamp

REQUIRED = {"labels": 3, "tasks": 3}
TURNS = {
    "adab2n.kappa": ({"kappa": 1.0}, {"kappa": 0.4}),
    "ccnorm.T": ({"T": 1e6}, {"T": 0.01}),
    "ghost_batch_norm.ghost_batch_size": ({"ghost_batch_size": 3}, {"ghost_batch_size": 2}),
    "online_norm.clamp_val": ({"ecm": "clamping", "clamp_val": 0.5}, {"ecm": "clamping", "clamp_val": 0.6}),
    "partial_rms_norm.p": ({"p": 0.4}, {"p": 0.9}),
    "power_norm.warmup_iters": ({"warmup_iters": 0}, {"warmup_iters": 1}),
    "scale_norm.eps": ({"eps": 1.0}, {"eps": 2.0}),
    "unified_norm.outlier_filtration": ({"warmup_iters": 0}, {"warmup_iters": 0, "outlier_filtration": True}),
    "unified_norm.warmup_iters": tuple({"warmup_iters": n, "outlier_filtration": True} for n in (0, 3)),
    "unified_norm.window_size": ({"window_size": 1}, {"window_size": 2}),
}
CONDITIONS = {  # name: (norm, x, rng) → the arguments after x
    "adain": lambda norm, x, rng: (normal((*x.shape[:2], 7), x, rng),),
    "adalin": lambda norm, x, rng: ((normal(x.shape[:2], x, rng), normal(x.shape[:2], x, rng)),),
    "coordinate_aware_modulation": lambda norm, x, rng: (normal((*x.shape[:-1], 2), x, rng),),
    "region_norm": lambda norm, x, rng: ((normal((len(x), 1, 2, 5), x, rng) > 0),),
    "spade": lambda norm, x, rng: (normal((len(x), 3, 2, 3), x, rng),),
}


def make(method, **knobs):
    groups = method.knobs.get("groups") or 1
    required = {"d": groups * (groups + 1) if groups > 1 else 6} | REQUIRED  # divides into groups and one more
    names = inspect.signature(method.fn).parameters
    if "model" not in names:
        return method.fn(**{k: v for k, v in required.items() if k in names} | knobs)
    model, rng = net(), torch.Generator().manual_seed(3)
    method.fn(model, [torch.randn(n, 6, 4, generator=rng) for n in (2, 3)], **knobs)
    return model


def net():
    """A small model with two batch norms, that can be played like a norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Conv1d(6, 6, 1), nn.Tanh(), nn.BatchNorm1d(6))
    model.features, model.axis = 6, 1
    return model


def normal(shape, like, rng):
    return torch.randn(shape, generator=rng).to(like.dtype)


def layer(value):
    """The value as a layer x → x̂: a source of statistics within a batch norm that has learned some."""
    if not isinstance(value, norms.Source):
        return value
    model, rng = nn.Sequential(norms.batch_norm(6)), torch.Generator().manual_seed(2)
    model[0].running_mean.copy_(torch.randn(6, generator=rng) / 10)
    model[0].running_var.copy_(torch.rand(6, generator=rng) / 10)
    norms.calibrate(model, value)
    return model[0]


def example(norm, rng, batch=3):
    """x as the norm wants it: features on axis 1 or last, ``_ndim`` axes. float64."""
    d, ndim = norm.features, getattr(norm, "_ndim", 3)
    inner = (4, 5, 3)[: ndim - 2]
    return torch.randn((batch, d, *inner) if norm.axis == 1 else (batch, *inner, d), generator=rng, dtype=torch.float64)


def conditions(norm, x):
    """What the norm's forward takes besides x, by the table; and the tasks are told to a norm that asks for them."""
    if getattr(getattr(norm, "source", None), "tasks", None):
        norms.tell_tasks(norm, torch.arange(len(x)) % 2)
    made, rng = stamp(norm), torch.Generator().manual_seed(1)
    return CONDITIONS[made.name](norm, x.detach(), rng) if made and made.name in CONDITIONS else ()


def call(norm, x):
    return norm(x, *conditions(norm, x))


def play(value):
    norm = copy.deepcopy(layer(value)).double()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in norm.parameters():
            p.add_(torch.rand(p.shape, generator=rng, dtype=torch.float64))
    seen = []
    for training in (True, True, False):
        x = 0.05 * example(norm, rng)
        x.requires_grad_()
        y = call(norm.train(training), x + 0.02)
        leaves = [x, *(p for p in norm.parameters() if p.requires_grad)]
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        seen += [y.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]
    return torch.cat([t.flatten() for t in seen])
