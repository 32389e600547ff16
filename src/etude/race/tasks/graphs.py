"""Random graphs of one size: how many triangles has each? The network sees which nodes are joined."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from etude.race.models import GraphTransformer
from etude.race.task import Task

_NODES, _EDGES = 12, 24
"""Of every graph: the number of edges tells nothing."""


def task(seed: int) -> Task:
    """2,000 graphs of 12 nodes and 24 edges: the number of triangles, by the squared error in variances of it."""
    train, valid, test = _graphs()
    torch.manual_seed(seed)
    loss = nn.functional.mse_loss
    return Task(GraphTransformer(1), train, valid, loss, steps=400, test=test, name="squared error")


@functools.cache
def _graphs() -> tuple[tuple[Tensor, Tensor], ...]:
    """(adjacency [n, 12, 12], standardised number of triangles [n, 1]): 1,200 train, 400 each validate and test."""
    rng = torch.Generator().manual_seed(0)
    row, column = torch.triu_indices(_NODES, _NODES, 1)
    edges = torch.rand(2000, len(row), generator=rng).topk(_EDGES).indices
    x = torch.zeros(len(edges), _NODES, _NODES)
    x[torch.arange(len(edges))[:, None], row[edges], column[edges]] = 1
    x = x + x.mT
    triangles = (x @ x @ x).diagonal(dim1=1, dim2=2).sum(1, keepdim=True) / 6
    y = (triangles - triangles[:1200].mean()) / triangles[:1200].std()
    return tuple((x[part], y[part]) for part in (slice(1200), slice(1200, 1600), slice(1600, None)))
