"""A plain transformer over the nodes of a graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from etude.blocks import attention, pre_ln
from etude.race.models.mlp import MakeNorm, Place
from etude.race.models.transformer import MakeAttention, MakeMlp, gelu_mlp, transformer_layers


class GraphTransformer(nn.Module):
    """Nodes as tokens that know their place by random walks, the mean over them, a head.

    x: [b, n, n], the adjacency of graphs without features; the result: [b, outputs]. A node is what a walk of 1 …
    ``walks`` steps from it returns with, (D⁻¹ A)ᵏ_ii, and log(1 + degree); the order of the nodes is of no account.
    """

    def __init__(
        self,
        outputs: int,
        walks: int = 8,
        d: int = 32,
        heads: int = 4,
        depth: int = 2,
        *,
        norm: MakeNorm = nn.LayerNorm,
        place: Place = pre_ln,
        mixer: MakeAttention = attention,
        network: MakeMlp = gelu_mlp,
    ):
        super().__init__()
        self.walks = walks
        self.token = nn.Linear(walks + 1, d)
        self.layers = transformer_layers(d, heads, depth, False, norm, place, mixer, network)
        self.head = nn.Linear(d, outputs)

    def forward(self, x: Tensor) -> Tensor:
        degree = x.sum(-1, keepdim=True)
        step = x / degree.clamp(min=1)
        walk, seen = step, [degree.log1p().squeeze(-1)]
        for _ in range(self.walks):
            seen.append(walk.diagonal(dim1=-2, dim2=-1))
            walk = walk @ step
        return self.head(self.layers(self.token(torch.stack(seen, -1))).mean(1))  # type: ignore[no-any-return]
