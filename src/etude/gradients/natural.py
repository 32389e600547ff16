"""Natural gradients by layer: curvature from what goes into a layer and what comes back, its inverse never formed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from etude._method import method
from etude.gradients._gradient import Gradient, Grads, LossFn, bound, differentiate, evaluate, placed
from etude.gradients.plain import plain

Average = Literal["batch", "batch+sequence", "sum"]


@dataclass(frozen=True)
class Seen:
    """A call of a layer: its weights at that time, what went in, what came out."""

    layer: nn.Linear | nn.Conv2d
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    y: Tensor

    def rows(self) -> Tensor:
        """The inputs that meet the weight, patches of a convolution, with a 1 for the bias.  [n, p]"""
        if isinstance(self.layer, nn.Conv2d):
            how = {k: getattr(self.layer, k) for k in ("kernel_size", "dilation", "padding", "stride")}
            a = F.unfold(self.x if self.x.ndim == 4 else self.x[None], **how).mT.flatten(0, 1)
        else:
            a = self.x.reshape(-1, self.x.shape[-1])
        return a if self.bias is None else F.pad(a, (0, 1), value=1.0)

    def back(self, g: Tensor) -> Tensor:
        """Rows of the gradient of what came out.  [n, d]"""
        last = g.movedim(-3, -1) if isinstance(self.layer, nn.Conv2d) else g
        return last.reshape(-1, last.shape[-1])

    def terms(self, g: Tensor, average: Average) -> int:
        """How many terms the loss is the mean of."""
        if average == "sum":
            return 1
        alone = g.ndim == (3 if isinstance(self.layer, nn.Conv2d) else 1)
        return len(self.back(g)) if average == "batch+sequence" else 1 if alone else len(g)


@dataclass
class Factors:
    """Of one layer K [p, p] for its inputs, C [d, d] for its outputs, and the momentum of each."""

    K: Tensor
    C: Tensor
    m: tuple[Tensor, Tensor]

    def learn(self, a: Tensor, g: Tensor, damping: float, alpha1: float, lr_cov: float, kfac_like: bool) -> None:
        """One step of both, by the rows of inputs and of what came back, scaled.  a: [n, p], g: [n, d]"""
        H_K, H_C, K_K, C_C = (x.mT @ x for x in (a @ self.K, g @ self.C, self.K, self.C))
        h_K, h_C, k_K, c_C = (1.0 if kfac_like else x.diagonal().mean() for x in (H_K, H_C, K_K, C_C))
        new_K, new_C = h_C * H_K + damping * c_C * K_K, h_K * H_C + damping * k_K * C_C
        for factor, m, new in ((self.K, self.m[0], new_K), (self.C, self.m[1], new_C)):
            new.diagonal().sub_(1.0)
            m.mul_(alpha1).add_(new, alpha=0.5)
            factor.sub_(factor @ m, alpha=lr_cov)

    def natural(self, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """C Cᵀ [w b] K Kᵀ of the gradients of weight and bias."""
        columns = w.flatten(1)
        missing = len(self.K) - columns.shape[1]  # one, for the bias
        whole = F.pad(columns, (0, missing)).to(self.K.dtype)
        if b is not None:
            whole[:, -1] = b
        made = (self.C @ (self.C.mT @ whole @ self.K) @ self.K.mT).to(w.dtype)
        return made[:, : columns.shape[1]].reshape(w.shape), None if b is None else made[:, -1].clone()


@dataclass(frozen=True, repr=False)
class InverseFreeNgd(Gradient):
    """C Cᵀ ∇ℓ(W) K Kᵀ for the layers it is bound to, ∇ℓ for all other weights."""

    damping: float
    alpha1: float
    lr_cov: float
    T: int
    loss_average: Average
    kfac_like: bool
    layers: tuple[nn.Module, ...] = field(default=(), compare=False)
    held: dict[Any, Any] = field(default_factory=dict, compare=False)
    """The number of calls; for the place of each weight in params that of its bias, and the factors."""

    def bind(self, model: nn.Module) -> InverseFreeNgd:
        found = tuple(m for m in model.modules() if _served(m))
        if not found:
            raise ValueError(f"{self}: {type(model).__name__} has no Linear or Conv2d whose weight trains")
        return bound(self, layers=found, held={})

    def __call__(
        self,
        loss_fn: LossFn,
        params: Iterable[Tensor],
        buffers: Iterable[Tensor] = (),  # one pass moves them once
    ) -> tuple[Tensor, Grads]:
        if not self.layers:
            raise ValueError(f"{self} does not know the layers yet: gradients.{self}.bind(model)")
        params, calls = list(params), self.held.get("calls", 0)
        if calls % self.T:
            loss, grads = differentiate(loss_fn, params)
        else:
            with watched(self.layers) as seen, torch.compiler.set_stance("force_eager"):  # compiled, layers are hidden
                loss, trained = evaluate(loss_fn, params)
            if not seen:
                raise ValueError(f"{self}: loss_fn() called none of the {len(self.layers)} layers that it is bound to")
            found = torch.autograd.grad(loss, [*trained, *(call.y for call in seen)], allow_unused=True)
            grads = placed(found[: len(trained)], params)
            self._learn([(c, g) for c, g in zip(seen, found[len(trained) :]) if g is not None], params)
        self.held["calls"] = calls + 1
        for i, (j, factors) in self.held.get("layers", {}).items():
            if (w := grads[i]) is not None:
                grads[i], b = factors.natural(w, None if j is None else grads[j])
                if j is not None:
                    grads[j] = b
        return loss.detach(), grads

    def _learn(self, seen: list[tuple[Seen, Tensor]], params: list[Tensor]) -> None:
        """A step of the factors of every weight that was used; several uses of one are more rows."""
        place = {id(p): i for i, p in enumerate(params) if p.requires_grad}
        uses: dict[int, list[tuple[Seen, Tensor]]] = {}
        for call, g in seen:
            if id(call.weight) in place:
                uses.setdefault(place[id(call.weight)], []).append((call, g))
        held = self.held.setdefault("layers", {})
        for i, calls in uses.items():
            first, g = calls[0]
            dtype = torch.promote_types(params[i].dtype, torch.float32)
            inputs = torch.cat([call.rows() for call, _ in calls]).to(dtype)
            back = torch.cat([call.back(g) for call, g in calls]).to(dtype)
            if i not in held:
                K, C = (torch.eye(x.shape[1], dtype=dtype, device=x.device) for x in (inputs, back))
                held[i] = (place.get(id(first.bias)), Factors(K, C, (torch.zeros_like(K), torch.zeros_like(C))))
            scaled = inputs / math.sqrt(len(inputs)), back * math.sqrt(first.terms(g, self.loss_average))
            held[i][1].learn(*scaled, self.damping, self.alpha1, self.lr_cov, self.kfac_like)


@contextmanager
def watched(layers: Iterable[nn.Module]) -> Iterator[list[Seen]]:
    """Inside ``with``, the calls of these layers, as they come."""
    seen: list[Seen] = []

    def see(layer: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
        if y.requires_grad:
            seen.append(Seen(layer, layer.weight, layer.bias, inputs[0].detach(), y))

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(see).remove)
        yield seen


def _served(m: nn.Module) -> bool:
    """Whether it is a layer whose every call is seen, with a weight of its own."""
    if isinstance(m, nn.Conv2d):
        known = m.groups == 1 and m.padding_mode == "zeros" and not isinstance(m.padding, str)
    else:  # torch's own attention reads the weight of its last layer without calling it
        known = isinstance(m, nn.Linear) and not isinstance(m, nn.modules.linear.NonDynamicallyQuantizableLinear)
    w = m._parameters.get("weight")
    return known and w is not None and w.requires_grad


@method(
    "Lin et al. 2023, Simplifying Momentum-based Positive-definite Submanifold Optimization with Applications to Deep "
    "Learning, arXiv:2302.09738",
    off=lambda: (inverse_free_ngd(lr_cov=0.0), plain()),
    note="the authors warm lr_cov up: 2e-4 to step 100, 2e-3 to 499, then 1e-2; the exponential is of first order",
)
def inverse_free_ngd(
    damping: float = 1e-3, alpha1: float = 0.5, lr_cov: float = 1e-2, T: int = 10, loss_average: Average = "batch",
    kfac_like: bool = False,
) -> InverseFreeNgd:  # fmt: skip
    """g = C Cᵀ ∇ℓ(W) K Kᵀ: K ← K (I − β m_K), m_K ← α m_K + ½ (tr H_C/d · H_K + λ tr CᵀC/d · KᵀK − I), C likewise.

    Second order by layer and by products alone, so that it goes on where a Cholesky factor fails. H_K = Kᵀ E[a aᵀ] K of
    a layer's inputs a (1 appended for the bias), H_C = Cᵀ E[b bᵀ] C of the gradients b of its outputs, the loss's own;
    at every ``T``-th call, from the first on. β = ``lr_cov``, α = ``alpha1``, λ = ``damping``; K, C start at I and are
    at least float32. ``loss_average``: the loss is a mean over examples (the first axis), over all their positions too,
    or a sum. ``kfac_like``: without the traces, which comes near K-FAC. ``inverse_free_ngd().bind(model)`` first: it
    serves Linear and Conv2d (no groups); other weights keep ∇ℓ. Step with ``sgd(momentum=0.9)``.
    """
    for name, value in (("damping", damping), ("lr_cov", lr_cov)):
        if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"inverse_free_ngd: {name} is finite and ≥ 0; got {value!r}")
    if not isinstance(alpha1, (int, float)) or not 0 <= alpha1 < 1:
        raise ValueError(f"inverse_free_ngd: alpha1 is a momentum in [0, 1); got {alpha1!r}")
    if not isinstance(T, int) or T < 1:
        raise ValueError(f"inverse_free_ngd: T is a number of steps from 1; got {T!r}")
    if loss_average not in get_args(Average):
        raise ValueError(
            f"inverse_free_ngd: loss_average is one of {', '.join(get_args(Average))}; got {loss_average!r}"
        )
    return InverseFreeNgd(damping, alpha1, lr_cov, T, loss_average, kfac_like)
