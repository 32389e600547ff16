"""How LoRA's factors are trained: link after link, or along the gradient of the whole weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from etude._method import method
from etude.weights._host import held
from etude.weights._map import Chain
from etude.weights.low_rank import LoRA


@method(
    "Xia et al. 2024, Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning, arXiv:2401.04151"
)
@torch.no_grad()
def chain_of_lora(model: nn.Module, optimizer: torch.optim.Optimizer, name: str = "lora") -> nn.Module:
    """Tie a knot: W ← W + (alpha / r) B A, then A random and B zero anew, and no memory of them in the optimizer.

    Call it between the links of the chain; the model computes what it did. W is changed in place, so that the links
    before cost nothing: a file of the adapter then needs the weights of the model beside it.
    """
    found = [(w, m) for w, maps in held(model, name, LoRA) for m in maps if isinstance(m, LoRA)]
    for weight, m in found:
        chain = cast(Chain, weight.chain)
        if not chain.is_tensor or not all(getattr(n, "additive", False) for n in chain.maps()):
            raise ValueError(f"{weight.names[0]}: {m!r} goes into the weight only where all its maps merely add")
    for weight, m in found:
        root = cast(Chain, weight.chain).roots()[0]
        root.copy_(m(root))
        fresh = LoRA(m.r, m.scale * m.r)
        fresh.axis = m.axis
        fresh.born(root)
        for old, new in ((m.A, fresh.A), (m.B, fresh.B)):
            old.copy_(new)
            optimizer.state.pop(old, None)
        m.A0 = m.B0 = None
    return model


def _adjusted(a: Tensor, b: Tensor, da: Tensor, db: Tensor, s: float, d: float) -> tuple[Tensor, Tensor]:
    """The factors' gradients whose step moves W nearest to where its own gradient would: X = 0."""
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    ga, gb = (torch.linalg.pinv(g + d * eye, hermitian=True) for g in (a @ a.mT, b.mT @ b))
    db = db @ ga / s**2
    return gb @ da / s**2, db - b @ (torch.linalg.pinv(b.mT @ b, hermitian=True) @ (b.mT @ db))


def _sylvester(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
    """The least X with P X + X Q = C, for symmetric P and Q ≥ 0."""
    (lp, up), (lq, uq) = torch.linalg.eigh(p), torch.linalg.eigh(q)
    total = lp[:, None] + lq
    zero = total <= total.max() * torch.finfo(total.dtype).eps * len(total)
    x: Tensor = up @ torch.where(zero, 0.0, (up.mT @ c @ uq) / torch.where(zero, 1.0, total)) @ uq.mT
    return x


@method("Wang et al. 2024, LoRA-Pro: Are Low-Rank Adapters Properly Optimized?, arXiv:2407.18242")
@torch.no_grad()
def lora_pro(
    a: Tensor, b: Tensor, da: Tensor, db: Tensor, rule: Callable[[Tensor], Tensor], scale: float = 2.0,
    damping: float = 1e-8,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The updates of A: [r, in] and B: [out, r] whose step s (B uA + uB A) is nearest to ``rule`` of W's own gradient.

    ``rule`` takes the equivalent gradient g = s (B gA + gB A): [out, in] to a direction (the paper: Adam, whose moments
    then have the size of W). Subtract lr times the updates. ``da``, ``db``: the gradients; ``scale``: s, alpha / r.
    """
    ga, gb = _adjusted(a, b, da, db, scale, damping)
    way = rule(scale * (b @ ga + gb @ a))
    da, db = scale * b.mT @ way, scale * way @ a.mT
    ga, gb = _adjusted(a, b, da, db, scale, damping)
    p, q = b.mT @ b, a @ a.mT
    x = _sylvester(p, q, -torch.linalg.pinv(p, hermitian=True) @ da @ a.mT / scale**2)
    return ga + x @ a, gb - b @ x
