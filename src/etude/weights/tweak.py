"""What is retrained after the weights have been quantised: the norms alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from etude._method import method
from etude.weights.tuning import token_norms


def channel_distance(y: Tensor, target: Tensor) -> Tensor:
    """Σ_c (|mean y_c − mean target_c| + |var y_c − var target_c|) / C over all tokens; y, target: [..., C]."""
    (var, mean), (want_var, want_mean) = (
        torch.var_mean(t.reshape(-1, t.shape[-1]), 0, correction=1) for t in (y, target)
    )
    return ((mean - want_mean).abs() + (var - want_var).abs()).mean()


@method(
    "Li et al. 2023, Norm Tweaking: High-performance Low-bit Quantization of Large Language Models, arXiv:2309.02784",
    note="the paper searches a grid for lr_scale; 5 is the default of the implementation this was checked against",
)
def norm_tweaking(
    blocks: Sequence[nn.Module], inputs: Iterable[Tensor], quantize: Callable[[nn.Module], Any],
    lr: float = 1e-5, lr_scale: float = 5.0, iters: int = 1,
) -> list[tuple[float, float]]:  # fmt: skip
    """Block by block: quantise it, then Adam on its norms alone draws each channel's mean and variance back to float's.

    ``inputs``: calibration samples [.., t, C] as they enter the first block; each further block gets what the quantised
    one before it makes, and its target is its own float output for the same input. The rate of block l of L is
    lr · (1 + lr_scale · l / L). ``quantize(block)`` changes the block's weights in place. ``iters``: passes over the
    samples; the paper finds 1 best. Returns each block's mean `channel_distance` before and after.
    """
    samples = list(inputs)
    if not blocks or not samples:
        raise ValueError(f"norm_tweaking needs blocks and samples, got {len(blocks)} and {len(samples)}")
    found: list[tuple[float, float]] = []
    for i, block in enumerate(blocks):
        theta = [p for m in token_norms(block) for p in m.parameters(recurse=False)]
        targets = [
            _run(block, x).detach() for x in samples
        ]  # not under no_grad, where torch's fast paths round otherwise
        with torch.no_grad():
            quantize(block)
        before = _mean_distance(block, samples, targets)
        frozen = [p for p in theta if not p.requires_grad]
        optimizer = torch.optim.Adam([p.requires_grad_() for p in theta], lr * (1 + lr_scale * i / len(blocks)))
        for _ in range(iters):
            for x, target in zip(samples, targets):
                grads = torch.autograd.grad(channel_distance(_run(block, x), target), theta)
                for p, g in zip(theta, grads):
                    p.grad = g
                optimizer.step()
        for p in theta:
            p.grad = None
        for p in frozen:
            p.requires_grad_(False)
        found.append((before, _mean_distance(block, samples, targets)))
        samples = [_run(block, x).detach() for x in samples]  # anew, since the norms moved from sample to sample
    return found


def _run(block: nn.Module, x: Tensor) -> Tensor:
    y = block(x)
    out: Tensor = y[0] if isinstance(y, tuple) else y
    return out


def _mean_distance(block: nn.Module, samples: list[Tensor], targets: list[Tensor]) -> float:
    gaps = [channel_distance(_run(block, x).detach(), y) for x, y in zip(samples, targets)]
    return float(torch.stack(gaps).mean())
