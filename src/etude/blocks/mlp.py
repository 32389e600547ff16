"""Position-wise networks of two layers, plain and gated: what stands in a residual block beside attention."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from etude._method import method
from etude.blocks._residual import ScaledParameter


class Mlp(nn.Module):
    """down(norm(φ(up(x)))); an empty ``norm`` is the identity. x: [..., d]; hidden is 4 d unless given."""

    def __init__(
        self,
        d: int,
        hidden: int | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
        bias: bool = True,
        *,
        norm: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        hidden = 4 * d if hidden is None else hidden
        self.up = nn.Linear(d, hidden, bias)
        self.activation = activation()
        self.norm = None if norm is None else norm(hidden)
        self.down = nn.Linear(hidden, d, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.activation(self.up(x))
        return self.down(h if self.norm is None else self.norm(h))  # type: ignore[no-any-return]


class GatedMlp(nn.Module):
    """down(φ(gate(x)) ⊙ up(x)). x: [..., d]; hidden is 8 d / 3 unless given, as many parameters as an Mlp of 4 d."""

    def __init__(
        self,
        d: int,
        hidden: int | None = None,
        activation: Callable[[], nn.Module] = nn.SiLU,
        bias: bool = False,
    ):
        super().__init__()
        hidden = round(8 * d / 3) if hidden is None else hidden
        self.gate, self.up = nn.Linear(d, hidden, bias), nn.Linear(d, hidden, bias)
        self.activation = activation()
        self.down = nn.Linear(hidden, d, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class NormalizedMlp(GatedMlp):
    """down(SiLU(s_v √d gate(x)) ⊙ s_u √d up(x)), s_u and s_v: [hidden], learned from s_uv. x: [..., d] of length 1."""

    def __init__(self, d: int, hidden: int, s_uv: float):
        super().__init__(d, hidden)
        self.s_u, self.s_v = ScaledParameter(hidden, s_uv, 1.0), ScaledParameter(hidden, s_uv, 1.0)
        self.root = d**0.5

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.up(x), self.gate(x)
        u, v = u * (self.root * self.s_u()).to(u.dtype), v * (self.root * self.s_v()).to(v.dtype)
        return self.down(u * F.silu(v))  # type: ignore[no-any-return]


@method("Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762")
def mlp(d: int, hidden: int | None = None, activation: Callable[[], nn.Module] = nn.ReLU, bias: bool = True) -> Mlp:
    """W₂ φ(W₁ x + b₁) + b₂, each position by itself; hidden is 4 d unless given. x: [..., d]."""
    return Mlp(d, hidden, activation, bias)


@method("Shazeer 2020, GLU Variants Improve Transformer, arXiv:2002.05202")
def swiglu(d: int, hidden: int | None = None, bias: bool = False) -> GatedMlp:
    """W₂ (SiLU(W x) ⊙ V x); hidden is 8 d / 3 unless given, for as many parameters as an mlp of 4 d. x: [..., d].

    ``GatedMlp`` takes the paper's other gates: nn.GELU (GEGLU), nn.ReLU (ReGLU), nn.Sigmoid (GLU), nn.Identity.
    """
    return GatedMlp(d, hidden, nn.SiLU, bias)


@method(
    "Loshchilov et al. 2024, nGPT: Normalized Transformer with Representation Learning on the Hypersphere, "
    "arXiv:2410.01131"
)
def normalized_mlp(d: int, hidden: int | None = None, s_uv: float = 1.0) -> NormalizedMlp:
    """W_o (u ⊙ SiLU(v)) with u = s_u √d ⊙ W_u x and v = s_v √d ⊙ W_v x; hidden is 4 d unless given. x: [..., d].

    √d brings products of unit vectors back to the range in which SiLU bends. The paper has √d on v alone; the authors'
    code has it on both, and so has this. The matrices are to be kept at unit length along d.
    """
    return NormalizedMlp(d, 4 * d if hidden is None else hidden, s_uv)
