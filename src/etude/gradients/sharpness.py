"""Gradients taken at a worse point nearby, so that descent prefers flat minima."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from etude._method import method
from etude.gradients._gradient import Gradient, Grads, LossFn, differentiate, differentiate_stacks
from etude.gradients.plain import plain


@dataclass(frozen=True, repr=False)
class Sam(Gradient):
    """g = ∇ℓ(w + ε), ε = rho·∇ℓ(w)/‖∇ℓ(w)‖₂; the loss is that of w."""

    rho: float

    def __call__(
        self, loss_fn: LossFn, params: Iterable[Tensor], buffers: Iterable[Tensor] = ()
    ) -> tuple[Tensor, Grads]:
        params, buffers = list(params), list(buffers)
        if self.rho == 0:  # the authors' code does not take the second pass either
            return differentiate(loss_fn, params)
        generators = _generators(params)
        loss, grads = differentiate(loss_fn, params)
        moved = [(p, g) for p, g in zip(params, grads) if g is not None]
        kept = [(x, x.detach().clone()) for x in (*(p for p, _ in moved), *buffers)]
        try:
            _climb(moved, self.rho)
            _rewind(generators)
            _, grads = differentiate(loss_fn, params)
        finally:  # copied back, never subtracted: the weights have their old bits also when loss_fn raises
            with torch.no_grad():
                for x, old in kept:
                    x.copy_(old)
            torch.clear_autocast_cache()
        return loss, grads

    def on_stacks(self, losses: LossFn, params: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, Grads]:
        each, grads = differentiate_stacks(losses, params)
        if self.rho == 0:
            return each, grads
        kept = [(x, x.detach().clone()) for x in (*params, *buffers)]
        with torch.no_grad():
            squares = [g.reshape(len(g), -1).square().sum(1) for g in grads if g is not None]
            norm = torch.stack(squares).sum(0).sqrt()
            scale = torch.where(norm > 0, self.rho / norm, 0.0)
            for w, g in zip(params, grads):
                if g is not None:
                    w.add_(g * scale.view(-1, *[1] * (g.ndim - 1)))
        _, grads = differentiate_stacks(losses, params)
        with torch.no_grad():
            for x, old in kept:
                x.copy_(old)
        return each, grads


def _climb(moved: list[tuple[Tensor, Tensor]], rho: float) -> None:
    """w ← w + rho·g/‖g‖ in place, ‖g‖ over all (w, g); half precision is summed in float32."""
    if any(g.layout != torch.strided for _, g in moved):
        raise TypeError("sam needs dense gradients; build nn.Embedding with sparse=False")
    wide = [torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32)) for _, g in moved]
    norm = torch.linalg.vector_norm(torch.stack([n.to(wide[0].device) for n in wide]))
    scale = torch.where(norm > 0, rho / norm, 0.0)
    with torch.no_grad():
        for w, g in moved:
            w.add_(g * scale.to(w.device))
    torch.clear_autocast_cache()  # or a surrounding autocast would go on with casts of the old weights


def _generators(params: list[Tensor]) -> dict[torch.device, Tensor]:
    """The state of each of torch's generators that a pass over these weights may draw from."""
    cuda = {p.device: torch.cuda.get_rng_state(p.device) for p in params if p.is_cuda}
    return {torch.device("cpu"): torch.get_rng_state(), **cuda}


def _rewind(generators: dict[torch.device, Tensor]) -> None:
    for device, state in generators.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


@method(
    "Foret et al. 2020, Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv:2010.01412",
    off=lambda: (sam(rho=0.0), plain()),
    note="rho 0.05 on CIFAR from scratch; the authors fine-tune EfficientNet with 0.1",
)
def sam(rho: float = 0.05) -> Sam:
    """g = ∇ℓ(w + rho·∇ℓ(w)/‖∇ℓ(w)‖₂), one norm over all parameters; two passes over the same batch.

    Against overfitting: flat minima generalise better, also after fine-tuning and with label noise, says the paper.
    As in the authors' code the second pass sees the dropout masks of the first, and ``buffers`` (BatchNorm's running
    statistics) keep what the first pass made of them. Where the gradient is zero so is the step.
    """
    if not isinstance(rho, (int, float)) or not 0 <= rho < math.inf:
        raise ValueError(f"sam: rho is the radius of a ball, so finite and ≥ 0; got {rho!r}")
    return Sam(rho)
