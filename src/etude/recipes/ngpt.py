"""nGPT: a transformer of unit vectors, and what puts its matrices back on the sphere after each step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etude import blocks
from etude._method import method
from etude.after import After

_NGPT = (
    "Loshchilov et al. 2024, nGPT: Normalized Transformer with Representation Learning on the Hypersphere, "
    "arXiv:2410.01131"
)


class Ngpt(nn.Module):
    """s_z ⊙ head(layers(embedding(tokens))), causal; no norm layer, no bias. tokens: [b, t] → [b, t, words]."""

    def __init__(self, words: int, d: int, layers: int, heads: int, alpha: float, s_z: float):
        super().__init__()
        self.embedding = nn.Embedding(words, d)
        self.layers = nn.Sequential(*(_layer(d, heads, alpha) for _ in range(layers)))
        self.head = nn.Linear(d, words, bias=False)
        self.s_z = blocks.ScaledParameter(words, s_z, d**-0.5)
        for w in sphere_axes(self).values():
            nn.init.normal_(w[0], std=d**-0.5)
        project(self)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(self.embedding(tokens)))
        s: Tensor = self.s_z()
        return y * s.to(y.dtype)


def _layer(d: int, heads: int, alpha: float) -> blocks.Layer:
    attention = blocks.normalized_attention(d, heads, causal=True)
    return blocks.Layer(
        blocks.normalized_residual(d, attention, alpha), blocks.normalized_residual(d, blocks.normalized_mlp(d), alpha)
    )


def sphere_axes(model: nn.Module) -> dict[str, tuple[Tensor, int]]:
    """Every matrix and embedding, with its axis along d: the output's of those that end a block, else the input's."""
    ends: set[int] = set()
    for m in model.modules():
        last = m.out if isinstance(m, blocks.Attention) else getattr(m, "down", None)
        ends |= {id(last.weight)} if isinstance(last, nn.Linear) else set()
    return {
        f"{name}.weight".lstrip("."): (m.weight, 0 if id(m.weight) in ends else 1)
        for name, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.Embedding))
    }


@torch.no_grad()
def project(model: nn.Module) -> None:
    """Bring every matrix and embedding to unit length along d, in place."""
    for w, axis in sphere_axes(model).values():
        w.copy_(_unit(w, axis))


def _unit(w: Tensor, axis: int) -> Tensor:
    return F.normalize(w.to(torch.promote_types(w.dtype, torch.float32)), dim=axis)


@dataclass(frozen=True, repr=False)
class Sphere(After):
    """Matrices and embeddings are kept at unit length along d; what is kept of each is that axis."""

    def begin(self, model: nn.Module) -> dict[str, Tensor]:
        if not any(isinstance(m, blocks.Residual) for m in model.modules()):
            raise ValueError(
                f"hypersphere tells by its residual blocks how a model is made; {type(model).__name__} has none"
            )
        project(model)
        return {name: torch.tensor(axis) for name, (_, axis) in sphere_axes(model).items()}

    def step(self, weights: dict[str, nn.Parameter], kept: dict[str, Tensor], t: int) -> None:
        for name, axis in kept.items():
            weights[name].copy_(_unit(weights[name], int(axis)))


@method(_NGPT, note="lr 1.5e-3 at d = 1024, by adam; no weight decay, no warm-up")
def ngpt(words: int, d: int = 256, layers: int = 6, heads: int = 8, alpha: float = 0.05, s_z: float = 1.0) -> Ngpt:
    """h ← N(h + |a| ⊙ (N(f(h)) − h)) through attention and MLP in turn; the logits are s_z ⊙ cosines.

    Tokens [b, t] → [b, t, words]. s_z: [words] is learned from ``s_z``, stored as p · s_z √d with p from 1 / √d. To be
    trained by adamw(weight_decay=0), without warm-up, with ``hypersphere``, which holds all matrices at unit length.
    """
    return Ngpt(words, d, layers, heads, alpha, s_z)


@method(_NGPT)
def hypersphere() -> Sphere:
    """W ← W / ‖W‖ along the axis of d, when bound and after each step, for every matrix and embedding of the model.

    That axis is the input's, but the output's for the matrix that ends an attention or an MLP. For `ngpt`, or another
    model of blocks.normalized_residual.
    """
    return Sphere()
