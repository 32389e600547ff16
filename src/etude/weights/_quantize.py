"""A frozen base in 8 or 4 bits: codes and one scale per block, read back at each use. Adapters stand on it as ever."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize as P

from etude.weights._host import Weight, choose, following
from etude.weights._map import Map, chain_at, install

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""The 16 levels of QLoRA's NormalFloat, quantiles of a normal distribution between −1 and 1."""


class Blocks(Map):
    """codes → W: per block of entries, in the order of storage, level[code] · the block's largest |entry|."""

    changes = "every entry is rounded to the nearest level of its block"
    twin = True
    scale: Tensor
    levels: Tensor

    def __init__(self, bits: int, block: int) -> None:
        super().__init__()
        self.bits, self.block = bits, block

    def encode(self, w: Tensor) -> Tensor:
        """The codes of w, [blocks, block] int8 or [blocks, block / 2] uint8, two to a byte; keeps the scales."""
        self.shape = w.shape
        wide = F.pad(w.detach().float().flatten(), (0, -w.numel() % self.block)).view(-1, self.block)
        scale = wide.abs().amax(1, keepdim=True)
        self.register_buffer("scale", scale.to(w.dtype))
        unit = wide / torch.where(scale > 0, scale, 1.0)
        if self.bits == 8:
            self.register_buffer("levels", None)
            return (unit * 127).round().to(torch.int8)
        self.register_buffer("levels", torch.tensor(NF4, dtype=w.dtype, device=w.device))
        levels = torch.tensor(NF4, device=w.device)
        code = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        return code[:, ::2] << 4 | code[:, 1::2]

    def forward(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            unit = codes.to(self.scale.dtype) / 127
        else:
            unit = self.levels[torch.stack([codes >> 4, codes & 15], -1).flatten(1).int()]
        return (unit * self.scale).flatten()[: math.prod(self.shape)].view(self.shape)

    def product(self, codes: Tensor, x: Tensor) -> Tensor:
        """x Wᵀ; backward reads W back again instead of keeping it."""
        y: Tensor = _Product.apply(x, codes, self)  # type: ignore[no-untyped-call]
        return y

    def __repr__(self) -> str:
        return f"quantize(bits={self.bits}, block={self.block})"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, blocks: Blocks) -> Tensor:
        ctx.blocks = blocks
        ctx.save_for_backward(codes)
        y: Tensor = x @ blocks(codes).mT
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g @ ctx.blocks(*ctx.saved_tensors), None, None


def quantize(
    model: nn.Module, bits: Literal[8, 4] = 4, block: int = 64, on: str | Iterable[str] = "hidden", *,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, float]:  # fmt: skip
    """Freeze the weights that ``on`` selects in 8 bits (absmax) or 4 (NF4), in blocks; returns each one's error.

    The error is ‖W' − W‖ / ‖W‖ by name. Adapters come after it; ``weights.merge(model)`` then gives plain weights in
    full precision, W' and the adapters together, and a second ``quantize`` says what rounding that costs. The originals
    are not kept. A scale has the weight's own dtype, so a block of 64 takes 8.25 or 4.25 bits an entry in bfloat16.
    """
    if bits not in (8, 4):
        raise ValueError(f"weights.quantize: bits={bits!r}: choose 8 or 4")
    if block < 2 or block % 2:
        raise ValueError(f"weights.quantize: block={block!r} must be even, and at least 2")
    chosen = [w for w in choose(model, on) if w.value().ndim >= 2 and w.value().is_floating_point()]
    if not chosen:
        raise ValueError(f"{on!r} selects no weight to quantize (biases and gains are left alone)")
    if mapped := [w for w in chosen if w.chain]:
        raise ValueError(f"{mapped[0].names[0]} carries maps: quantize before them, or merge them first")
    gone = [root for weight in chosen for root in weight.roots]
    with following(optimizer, model, chosen, gone, "weights.quantize"):
        return {weight.names[0]: _quantized(weight, Blocks(bits, block)) for weight in chosen}


@torch.no_grad()
def _quantized(weight: Weight, blocks: Blocks) -> float:
    w, (module, key) = weight.value(), weight.spots[0]
    blocks.name = "quantize"
    codes = nn.Parameter(blocks.encode(w), requires_grad=False)
    for m, k in weight.spots:
        m._parameters[k] = codes
    P.register_parametrization(module, key, blocks, unsafe=True)
    install(weight.spots, cast(Any, chain_at(weight.spots[0])))
    if w.is_meta:
        return math.nan
    return float((blocks(codes).float() - w.float()).norm() / w.float().norm().clamp(min=1e-30))
