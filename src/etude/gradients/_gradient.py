"""What every way to a gradient is: ``(loss_fn, params) → (loss, grads)``; weights and ``.grad`` keep their bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from etude._method import stamp

LossFn = Callable[[], Tensor]
Grads = list[Tensor | None]


class Gradient:
    """A way to obtain g. ``loss_fn()`` closes over model and batch and returns a scalar loss.

    ``grads`` has one entry per parameter, None where the loss does not reach it or it is frozen. ``buffers``: running
    statistics (``model.buffers()``) that must move once however often ``loss_fn`` is called. Gradients come from
    ``torch.autograd.grad``, so hooks on ``.grad`` (DistributedDataParallel's among them) do not run.
    """

    def __call__(
        self, loss_fn: LossFn, params: Iterable[Tensor], buffers: Iterable[Tensor] = ()
    ) -> tuple[Tensor, Grads]:
        """The loss at the weights, detached, and the gradients."""
        raise NotImplementedError(f"{type(self).__name__} is not a gradient yet: write __call__")

    def on_stacks(self, losses: LossFn, params: list[Tensor], buffers: list[Tensor]) -> tuple[Tensor, Grads]:
        """The same for k models at once: ``losses()``: [k], each parameter [k, …]; every row as if it were alone."""
        raise NotImplementedError(f"{self} is not written for several models at once")

    def __repr__(self) -> str:
        return str(stamp(self) or object.__repr__(self))


def differentiate(loss_fn: LossFn, params: list[Tensor]) -> tuple[Tensor, Grads]:
    """The loss and its gradient at the weights as they are."""
    if len({id(p) for p in params}) < len(params):
        raise ValueError("a parameter stands twice in params; pass each once, as model.parameters() does")
    with torch.enable_grad():
        loss = loss_fn()
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return one loss, got {got}; average it by a risk, e.g. risks.mean()")
    trained = [p for p in params if p.requires_grad]
    if not loss.requires_grad or not trained:
        raise ValueError("the loss does not depend on any weight that requires a gradient; is the model frozen?")
    found = iter(torch.autograd.grad(loss, trained, allow_unused=True))
    return loss.detach(), [next(found) if p.requires_grad else None for p in params]


def backward(gradient: Gradient, loss_fn: LossFn, params: Iterable[Tensor], buffers: Iterable[Tensor] = ()) -> Tensor:
    """Puts the gradients into ``.grad``, in place of what stood there; returns the loss. ``opt.step()`` follows."""
    if not isinstance(gradient, Gradient):
        raise TypeError(f"backward needs a gradient first, such as gradients.plain(), got {type(gradient).__name__}")
    if isinstance(params, (nn.Module, Tensor)):
        raise TypeError(f"backward needs the parameters, as model.parameters(), got {type(params).__name__}")
    params = list(params)
    loss, grads = gradient(loss_fn, params, buffers)
    for p, g in zip(params, grads):
        p.grad = g
    return loss


def differentiate_stacks(losses: LossFn, params: list[Tensor]) -> tuple[Tensor, Grads]:
    """The losses [k] and each model's gradient: no model's loss reaches another's weights, so those of the sum."""
    with torch.enable_grad():
        each = losses()
    return each.detach(), list(torch.autograd.grad(each.sum(), params, allow_unused=True))
