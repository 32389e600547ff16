"""One residual block with three named norm slots; the placements of the literature fill them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from etude._method import method

MakeNorm = Callable[[int], nn.Module]


class Residual(nn.Module):
    """norm_sum(x + norm_out(f(norm_in(x)))); an empty slot is the identity. x: [..., d]; f keeps the shape."""

    def __init__(
        self,
        f: nn.Module,
        norm_in: nn.Module | None = None,
        norm_out: nn.Module | None = None,
        norm_sum: nn.Module | None = None,
    ):
        super().__init__()
        self.f = f
        self.norm_in = norm_in or nn.Identity()
        self.norm_out = norm_out or nn.Identity()
        self.norm_sum = norm_sum or nn.Identity()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Further arguments (a mask, a context) go to f."""
        y = self.norm_out(self.f(self.norm_in(x), *args, **kwargs))
        if y.shape != x.shape:
            raise ValueError(f"a residual block adds f(x) to x, but f made {tuple(y.shape)} of {tuple(x.shape)}")
        return self.norm_sum(x + y)  # type: ignore[no-any-return]


@method("Xiong et al. 2020, On Layer Normalization in the Transformer Architecture, arXiv:2002.04745")
def pre_ln(d: int, f: nn.Module, norm: MakeNorm = nn.LayerNorm) -> Residual:
    """x + f(norm(x)): the residual path is never normalised; a stack ends in one norm. x: [..., d].

    Needs no warm-up of the learning rate: without it pre_ln reaches what post_ln reaches with it, says the paper.
    """
    return Residual(f, norm_in=norm(d))


@method("Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762")
def post_ln(d: int, f: nn.Module, norm: MakeNorm = nn.LayerNorm) -> Residual:
    """norm(x + f(x)): the residual path itself is normalised after each block. x: [..., d]."""
    return Residual(f, norm_sum=norm(d))


@method(
    "Kim et al. 2025, Peri-LN: Revisiting Layer Normalization in the Transformer Architecture, arXiv:2502.02732",
    off=lambda: (peri_ln(8, nn.Tanh(), norm_out=nn.Identity), pre_ln(8, nn.Tanh())),
)
def peri_ln(d: int, f: nn.Module, norm: MakeNorm = nn.LayerNorm, norm_out: MakeNorm | None = None) -> Residual:
    """x + norm_out(f(norm(x))): what f adds has unit scale too. norm_out is norm unless given. x: [..., d].

    Against the massive activations of pre_ln and the vanishing gradients of post_ln: variance grows evenly with depth,
    and gradients stay steady, says the paper. Its authors put the loss spikes of OPT-175B down to pre_ln in float16
    (NAVER Cloud 2025, Stable training: Preventing divergence with Peri-LN).
    """
    return Residual(f, norm_in=norm(d), norm_out=(norm_out or norm)(d))
