"""Ways to a gradient on two steps of a small network: the losses and the gradients; functions on what they take.

``at_work`` gives a value what else it needs: the model it is bound to, a second loss.
"""

import functools
import inspect

import torch
from torch import nn
from torch.nn import functional as F

from etude.gradients import Gradient
from etude.gradients._gradient import bound

SECOND = ("harmful", "auxiliary")
"""What a second loss is called."""

TURNS = {
    "hutchinson.every": ({"every": 1}, {"every": 2}),
    "inductive_gradient_adjustment.end": ({"end": 2}, {"end": 3}),  # the last modes of a small network are all 0
    "inverse_free_ngd.alpha1": ({"T": 1, "alpha1": 0.5}, {"T": 1, "alpha1": 0.9}),
    "inverse_free_ngd.loss_average": ({"loss_average": "batch"}, {"loss_average": "sum"}),  # there are no positions
    "inverse_free_ngd.T": ({"T": 1}, {"T": 2}),
    "drop_muon.p": ({}, {"p": (0.0, 1.0)}),
    "smb.lr": ({"lr": 20.0}, {"lr": 30.0}),  # where the trial does not descend
    "smb.eta": ({"lr": 20.0, "eta": 0.9}, {"lr": 20.0, "eta": 0.5}),
    "smb.c": ({"c": 0.1}, {"c": 2.0}),
}


def is_gradient(method):
    """Whether it makes a Gradient; the others are functions."""
    made = inspect.signature(method.fn, eval_str=True).return_annotation
    return inspect.isclass(made) and issubclass(made, Gradient)


def nothing():
    raise AssertionError("a play puts its own loss here")


def trained(fn, **knobs):
    """Hyperparameters of a penalty, at weights that are not quite trained."""
    torch.manual_seed(0)
    w, h = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    loss, grads = fn(
        lambda: (x @ w - y).square().mean() + (h.exp() * w * w).sum(), lambda: (x @ w + y).square().mean(), [w], [h],
        alpha=0.05, **knobs,
    )  # fmt: skip
    return loss, *grads


def replayed(fn, **knobs):
    """The learning rates of five steps, and how often a step was taken: k decides nothing else."""
    taken = []

    def step(state, meta, t):
        taken.append(t)
        return (state[0] - meta[0][t] * state[0].sin(),)

    rates = torch.full((5,), 0.1, dtype=torch.float64, requires_grad=True)
    start = torch.linspace(1, 2, 3, dtype=torch.float64)
    loss, grads = fn(step, [start], [rates], 5, lambda s: s[0].square().sum(), **knobs)
    return loss, *grads, torch.tensor(len(taken))


def responding(fn, **knobs):
    hyper = torch.ones(2)
    net = fn(hyper, 3, **knobs)
    return net(hyper), net.training_loss(lambda w, h: (w - h.sum().exp()).square().sum(), hyper)


def adjusted(fn, **knobs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 9), nn.Tanh(), nn.Linear(9, 2)).double()
    x = torch.linspace(-1, 1, 24 * 3, dtype=torch.float64).view(24, 3, 1)
    loss = fn(net(x) - torch.cat([x.sin(), (9 * x).cos()], -1), net.parameters(), **knobs)
    return loss, *torch.autograd.grad(loss, list(net.parameters()))


FUNCTIONS = {
    "implicit_hypergradient": trained, "metagradient_descent": replayed, "best_response": responding,
    "inductive_gradient_adjustment": adjusted,
}  # fmt: skip


def make(method, **knobs):
    if method.name in FUNCTIONS:
        return functools.partial(FUNCTIONS[method.name], method.fn, **knobs)
    needed = inspect.signature(method.fn).parameters
    if "optimizer" in needed:
        knobs = {"optimizer": torch.optim.Adam([torch.zeros(1)]), **knobs}  # which remembers nothing; see ``play``
    return method.fn(**{name: nothing for name in SECOND if name in needed}, **knobs)


def remembering(gradient, model):
    """The value for an optimizer of this model that has taken a step, at a rate of 0."""
    opt = torch.optim.Adam(model.parameters(), 0.0)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.linspace(-1, 1 + i, p.numel(), dtype=p.dtype).view_as(p)
    opt.step()
    opt.zero_grad()
    opt.param_groups[0]["lr"] = 0.1
    return bound(gradient, optimizer=opt)


def at_work(gradient, model, other):
    """The value for this model, with ``other`` for a second loss."""
    second = next((name for name in SECOND if hasattr(gradient, name)), None)
    if second:
        return bound(gradient, **{second: other})
    return gradient.bind(model)


def anew(params):
    """The weights as if no gradient that draws numbers had been taken at them."""
    params = list(params)
    for p in params:
        vars(p).pop("_asked", None)
    return params


def play(gradient):
    if isinstance(gradient, functools.partial):
        return torch.cat([x.detach().double().flatten() for x in gradient()])
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 2)).double()
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randint(2, (7,))
    value = at_work(gradient, model, lambda: model(x).exp().mean())
    value = remembering(value, model) if hasattr(value, "optimizer") else value
    params, seen = list(model.parameters()), []
    for _ in range(2):
        loss, grads = value(lambda: F.cross_entropy(model(x), y), params)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, grads)]  # where layers rest
        seen += [loss[None], *(g.flatten() for g in grads)]
        seen += [p.hessian.flatten() for p in params if getattr(p, "hessian", None) is not None]
        with torch.no_grad():
            for p, g in zip(params, grads):
                p.sub_(0.1 * g)
    return torch.cat(seen)
