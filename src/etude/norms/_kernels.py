"""RMSNorm, DyT and Derf with backward passes by hand: on a CPU torch's own cost 3 to 7 LayerNorms, these 1.3 to 3."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_layer_norm_backward = torch.ops.aten.native_layer_norm_backward


def rms(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """x / √(mean x² + eps) · w over the last axis. x: [..., d], w: [d]."""
    if x.device.type != "cpu":
        return torch.nn.functional.rms_norm(x, w.shape, w, eps)
    return _Rms.apply(x, w, eps)[0]  # type: ignore[no-untyped-call, no-any-return]


def scaled_tanh(x: Tensor, alpha: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """w · tanh(alpha x) + b. x: [..., d], alpha: [], w and b: [d]."""
    if x.device.type != "cpu":
        return torch.addcmul(b, torch.tanh(alpha * x), w).to(x.dtype)
    return _ScaledTanh.apply(x, alpha, w, b)[0]  # type: ignore[no-untyped-call, no-any-return]


def scaled_erf(x: Tensor, alpha: Tensor, s: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """w · erf(alpha x + s) + b. x: [..., d], alpha and s: [], w and b: [d]."""
    if x.device.type != "cpu":
        return torch.addcmul(b, torch.erf(alpha * x + s), w).to(x.dtype)
    return _ScaledErf.apply(x, alpha, s, w, b)[0]  # type: ignore[no-untyped-call, no-any-return]


def _wide(*ts: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in ts)


def _as(like: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(g.to(t.dtype) for t, g in zip(like, grads, strict=True))


def _written_out() -> bool:
    """Whether backward must be differentiable itself, or compiled: then in plain formulas, else by kernels."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()


def _down(p: Tensor) -> Tensor:
    """The sum of [..., d] over all rows; in blocks, or the compiler walks down one column after another."""
    n, d = p.numel() // p.shape[-1], p.shape[-1]
    rows = p.reshape(n, d)
    return rows.view(n // 8, 8, d).sum(1).sum(0) if n % 8 == 0 else rows.sum(0)


class _Rms(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        v, u = _wide(x, w)
        if torch.compiler.is_compiling():
            # Not by r, which backward wants saved: the compiler would give r, and then y, a pass of their own.
            ms = v.square().mean(-1, keepdim=True) + eps
            return (v * u / ms.sqrt()).to(x.dtype), ms.rsqrt()
        norm = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
        r = norm.square().div_(x.shape[-1]).add_(eps).rsqrt_()
        return (v * u).mul_(r).to(x.dtype), r

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w, ctx.eps = inputs
        ctx.save_for_backward(x, w, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, r = ctx.saved_tensors
        g, v, u = _wide(grads[0], x, w)
        d = x.shape[-1]
        if _written_out():
            r = (v.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
            p = g * v * r
            gx, gw = g * u * r - v * ((p * u).sum(-1, keepdim=True) * r.square() / d), _down(p)
        else:
            # LayerNorm's backward at mean 0 is ours less what its centring takes away, r · mean(g w).
            gx, gw, _ = _layer_norm_backward(g, v, (d,), torch.zeros_like(r), r, u, None, (True, True, False))
            gx.add_(torch.mv(g.reshape(-1, d), u).view(r.shape).mul_(r).div_(d))
        return *_as((x, w), (gx, gw)), None


class _ScaledTanh(torch.autograd.Function):
    """tanh z = 2 σ(2z) − 1: on a CPU torch.sigmoid is vectorised and torch.tanh, ten times slower, is not."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        v, a, u, c = _wide(x, alpha, w, b)
        s = (v * (2 * a)).sigmoid_()
        return torch.addcmul(c - u, s, 2 * u).to(x.dtype), s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, alpha, w, b, s = ctx.saved_tensors
        g, v, a, u = _wide(grads[0], x, alpha, w)
        d = x.shape[-1]
        if _written_out():
            t = 2 * torch.sigmoid(v * (2 * a)) - 1
            p = g * t
            q = (g - p * t) * u
            return _as((x, alpha, w, b), (q * a, (q * v).sum(-1).sum(), _down(p), _down(g)))
        # LayerNorm's backward sums g · (s − ½) · 2 = g · tanh and g down the rows in one pass over both.
        half, one = s.new_full((*s.shape[:-1], 1), 0.5), s.new_ones((*s.shape[:-1], 1))
        _, gw, gb = _layer_norm_backward(g, s, (d,), half, 2 * one, u, u, (False, True, True))
        q = torch.ops.aten.sigmoid_backward(g, s)
        _, qx, _ = _layer_norm_backward(q, v, (d,), 0 * one, one, u, u, (False, True, False))
        return _as((x, alpha, w, b), (q.mul_(4 * a * u), torch.dot(4 * u, qx), gw, gb))


class _ScaledErf(torch.autograd.Function):
    """The slope of erf is a gaussian of x; by torch.exp2, which takes a third of the time of torch.exp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: Tensor, s: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        v, a, o, u, c = _wide(x, alpha, s, w, b)
        e = torch.addcmul(o, v, a).erf_()
        return torch.addcmul(c, e, u).to(x.dtype), e

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x, alpha, s, w, b, e = ctx.saved_tensors
        g, v, a, o, u = _wide(grads[0], x, alpha, s, w)
        d, slope = x.shape[-1], 2 / math.sqrt(math.pi)
        if _written_out():
            z = v * a + o
            q = g * u * (slope * torch.exp(-z * z))
            sums = (q * v).sum(-1).sum(), q.sum(-1).sum()
            return _as((x, alpha, s, w, b), (q * a, *sums, _down(g * z.erf()), _down(g)))
        # LayerNorm's backward at mean 0 and scale 1 sums g · erf and g down the rows in one pass over both.
        zero, one = e.new_zeros((*e.shape[:-1], 1)), e.new_ones((*e.shape[:-1], 1))
        _, gw, gb = _layer_norm_backward(g, e, (d,), zero, one, u, u, (False, True, True))
        root = math.sqrt(1 / math.log(2))
        q = g * torch.addcmul(root * o, v, root * a).square_().neg_().exp2_()
        _, qx, q1 = _layer_norm_backward(q, v, (d,), zero, one, u, u, (False, True, True))
        u = slope * u
        return _as((x, alpha, s, w, b), (q.mul_(a * u), torch.dot(u, qx), torch.dot(u, q1), gw, gb))
