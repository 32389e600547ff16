"""Adapters of low rank. A weight counts as a matrix [out, in], however stored; a kernel as [out, in · kh · kw]."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from etude._method import method
from etude.weights._birth import Birth, Watch
from etude.weights._factored import Factored
from etude.weights._map import Adapter


def _silent(w: Tensor, r: int, _scale: float, _seen: Watch | None) -> tuple[Tensor, Tensor]:
    """The authors' birth, A as nn.Linear's default and B zero: B A = 0."""
    out, into = w.shape
    return nn.init.kaiming_uniform_(w.new_empty(r, into), a=math.sqrt(5)), w.new_zeros(out, r)


SILENT = Birth(_silent)


class LoRA(Factored):
    """W + (alpha / r) (B A − B0 A0); A: [r, in], B: [out, r]; B0 A0 is what the birth took out of W, mostly nothing."""

    fixed = False  # whether A stays as it was born
    A: Tensor
    B: nn.Parameter
    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, r: int, alpha: float, birth: Birth = SILENT) -> None:
        super().__init__()
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"lora: r={r!r} must be at least 1, and a whole number")
        if not isinstance(alpha, (int, float)) or not math.isfinite(alpha) or (birth.takes and alpha <= 0):
            raise ValueError(f"lora: alpha={alpha!r} must be a finite number{', and positive' * birth.takes}")
        self.r, self.scale, self.birth = r, alpha / r, birth

    def watch(self) -> Watch | None:
        return self.birth.watch() if self.birth.watch else None

    def born(self, w: Tensor, seen: Watch | None = None) -> None:
        a, b = self.birth(self.matrix(w), self.r, self.scale, seen)
        self.r = len(a)
        if self.fixed:
            self.register_buffer("A", a)
        else:
            self.A = nn.Parameter(a)
        self.B = nn.Parameter(b)
        for name, taken in (("A0", a), ("B0", b)):
            self.register_buffer(name, taken.clone() if self.birth.takes else None)

    def blank(self, w: Tensor, state: Mapping[str, Tensor]) -> None:
        if self.birth.takes and "A0" not in state:  # a file of peft's: what was taken is born again
            return self.born(w)
        self.r = len(state["A"]) if "A" in state else self.r
        self.born(w.to("meta"))
        self.to_empty(device=w.device)
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B with what was taken out beside them: their product is the change of W over ``scale``."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], 1)


class Core(Factored):
    """W + (alpha / r) B R A with A: [r, in] and B: [out, r] as they were born; only R: [r, r] trains."""

    A: Tensor
    B: Tensor
    R: nn.Parameter

    def __init__(self, r: int, alpha: float, birth: Birth) -> None:
        super().__init__()
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"r={r!r} must be at least 1, and a whole number")
        self.r, self.scale, self.birth = r, alpha / r, birth

    def watch(self) -> Watch | None:
        return self.birth.watch() if self.birth.watch else None

    def born(self, w: Tensor, seen: Watch | None = None) -> None:
        a, b, *core = self.birth(self.matrix(w), self.r, self.scale, seen)
        self.r = len(a)
        self.register_buffer("A", a)
        self.register_buffer("B", b)
        self.R = nn.Parameter(core[0] if core else a.new_empty(self.r, self.r))

    def blank(self, w: Tensor, state: Mapping[str, Tensor]) -> None:
        self.born(w.to("meta"))
        self.to_empty(device=w.device)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B @ self.R


@method("Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685")
def lora(r: int = 8, alpha: float = 16.0) -> Adapter:
    """W + (alpha / r) B A with W frozen; A: [r, in] random, B: [out, r] zero.

    To fine-tune a large pretrained model: with all else frozen, the optimizer's memory is that of A and B.
    Biases, norms and head go on training; ``weights.freeze(model)`` leaves the adapters alone to train, as the paper.
    """
    return LoRA(r, alpha)
