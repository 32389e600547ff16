"""Tasks that finish at once, and tasks that go wrong in one way each."""

import os
import signal

import torch
from torch import Tensor, nn

from etude.race import Task

X = torch.linspace(-1, 1, 64).reshape(32, 2)
Y = torch.sin(3 * X[:, :1])
SPLIT = {"train": (X[::2], Y[::2]), "valid": (X[1::2], Y[1::2])}


class Net(nn.Sequential):
    """A linear layer, a LayerNorm and a head; it counts its calls in training."""

    def __init__(self, fault=None):
        super().__init__(nn.Linear(2, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1))
        self.calls, self.fault = 0, fault

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        out = super().forward(x)
        return self.fault(self, out) if self.fault else out


def make(seed, fault=None, **more):
    torch.manual_seed(seed)
    return Task(Net(fault), loss=nn.functional.mse_loss, steps=24, batch=8, **{**SPLIT, **more})


def task(seed):
    return make(seed)


def late_fault(seed):
    """Without its LayerNorm the model raises after the steps that a probe takes."""

    def fault(net, out):
        if not isinstance(net[1], nn.LayerNorm) and net.calls > 21:
            raise RuntimeError("no LayerNorm here\nsecond line")
        return out

    return make(seed, fault)


def killed(seed):
    """It prints; its process dies at seed 13."""
    print("a task that prints")
    if seed == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return make(seed)


def moving_data(seed):
    return make(seed, valid=(X + seed, Y))


def broken(seed):
    raise OSError(f"no data for {seed}")


def broken_loss(seed):
    return make(seed, lambda net, out: out[:, :0].reshape(7))


def not_a_task(seed):
    return nn.Linear(1, 1)
