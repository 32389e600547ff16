"""Tasks whose right verdict is computable: f(w) = ½ Σ h w², w drawn by the seed. And races of them in this process."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from etude.race import Cell, Task, loop
from etude.race import _run as running
from etude.race.subject import find

BOWL = f"{Path(__file__)}:bowl"
CURVATURE = torch.tensor([1.0, 0.02], dtype=torch.float64)


class Bowl(nn.Module):
    """Its output is its weight, whatever the input."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(10 + torch.randn(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), 2)


def height(output, target):
    return 0.5 * (CURVATURE * output.square()).sum(1)


def bowl(seed, steps=60, **more):
    torch.manual_seed(seed)
    data = (torch.zeros(4, 1), torch.zeros(4, 1))
    return Task(Bowl(), data, data, height, steps=steps, batch=4, roles={"w": "hidden"}, **more)


def with_test(seed):
    """With test data that are counted when they are looked at."""
    looked.clear()
    return bowl(seed, test=Counted())


looked: list[int] = []


class Counted(list):
    def __init__(self):
        super().__init__([(torch.zeros(4, 1), torch.zeros(4, 1))])

    def __iter__(self):
        looked.append(1)
        return super().__iter__()


class Here:
    """An executor that trains in this process, one request after another, or ``last`` first."""

    last = False

    def __init__(self, task, steps, device="cpu"):
        self.subject, self.how, self.asked = find(task), {"steps": steps, "device": device}, []
        self.order = []

    def submit(self, request):
        self.asked.append(request)

    def results(self):
        while self.asked:
            request = self.asked.pop(-1 if self.last else 0)
            self.order.append(request)
            if request["kind"] == "cell":
                yield request, asdict(self.subject.train(Cell.of(request["cell"]), **self.how))
            else:
                asked = {k: request[k] for k in ("lr", "whole")}
                yield request, self.subject.probe(request["contender"], **asked, **self.how)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="module")
def here():
    """Races are trained in this process; yields the executors that were opened."""
    opened, real = [], running.open_executor

    def open_here(on, task, *, steps, device, workers):
        opened.append(Here(task, steps, device))
        return opened[-1], 1

    running.open_executor, watched = open_here, loop.WATCHED
    loop.WATCHED = 0.0
    yield opened
    running.open_executor, loop.WATCHED = real, watched
