"""What every way to a gradient is: ``(loss_fn, params) → (loss, grads)``; weights and ``.grad`` keep their bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self, TypeVar

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

    twice: ClassVar[bool] = False
    """Whether it differentiates the gradient once more, which torch does not do through a compiled model."""

    some: ClassVar[bool] = False
    """Whether it leaves out weights that the loss reaches: None for them, and rules let them rest."""

    def bind(self, model: nn.Module) -> Self:
        """The same, knowing what each weight of ``model`` is for; most need not know."""
        return self

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


G = TypeVar("G", bound=Gradient)


def bound(gradient: G, **fields: Any) -> G:
    """The same method's value with other fields: it still tells its name and knobs."""
    again = dataclasses.replace(gradient, **fields)  # type: ignore[type-var]
    object.__setattr__(again, "_stamp", stamp(gradient))
    return again


def differentiate(loss_fn: LossFn, params: list[Tensor]) -> tuple[Tensor, Grads]:
    """The loss and its gradient at the weights as they are."""
    loss, trained = evaluate(loss_fn, params)
    return loss.detach(), placed(torch.autograd.grad(loss, trained, allow_unused=True), params)


def evaluate(loss_fn: LossFn, params: list[Tensor], several: bool = False) -> tuple[Tensor, list[Tensor]]:
    """The loss with its graph, and the weights that train. ``several``: a row of losses will do."""
    if len({id(p) for p in params}) < len(params):
        raise ValueError("a parameter stands twice in params; pass each once, as model.parameters() does")
    with torch.enable_grad():
        loss = loss_fn()
    if not isinstance(loss, Tensor) or (loss.numel() != 1 and not (several and loss.ndim == 1 and len(loss))):
        got = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return one loss, got {got}; average it by a risk, e.g. risks.mean()")
    trained = [p for p in params if p.requires_grad]
    if not loss.requires_grad or not trained:
        raise ValueError("the loss does not depend on any weight that requires a gradient; is the model frozen?")
    return loss, trained


def placed(found: Iterable[Tensor | None], params: list[Tensor]) -> Grads:
    """One entry for each parameter, None for the frozen ones."""
    left = iter(found)
    return [next(left) if p.requires_grad else None for p in params]


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


@contextmanager
def kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """What is done to the tensors inside is undone at the end: copied back, never subtracted, also when it fails."""
    held = [(x, x.detach().clone()) for x in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, old in held:
                x.copy_(old)
        torch.clear_autocast_cache()


def generators(params: Iterable[Tensor]) -> dict[torch.device, Tensor]:
    """The state of each of torch's generators that a pass over these weights may draw from."""
    cuda = {p.device: torch.cuda.get_rng_state(p.device) for p in params if p.is_cuda}
    return {torch.device("cpu"): torch.get_rng_state(), **cuda}


def rewind(states: dict[torch.device, Tensor]) -> None:
    """Sets torch's generators back, so that a pass sees the dropout masks of the one before."""
    for device, state in states.items():
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
        else:
            torch.set_rng_state(state)


def asked(params: Iterable[Tensor]) -> int:
    """How often a gradient that draws numbers was taken at these weights before; from now on once more."""
    params = list(params)
    calls: int = max((getattr(p, "_asked", 0) for p in params), default=0)
    for p in params:
        p._asked = calls + 1  # type: ignore[attr-defined]
    return calls


def beside(call: int) -> torch.Generator:
    """A generator for this call, by torch's seed, beside torch's own: the next dropout mask is that without it."""
    return torch.Generator().manual_seed((torch.initial_seed() + 0x9E3779B9 * (call + 1)) % 2**63)


def length(x: Tensor, lead: int = 0) -> Tensor:
    """‖x‖, of each model where the first axis counts models; half precision is summed in float32.  [] or [k]"""
    wide = torch.promote_types(x.dtype, torch.float32)
    each = x.reshape(len(x), -1) if lead else x
    norm: Tensor = torch.linalg.vector_norm(each, dim=1 if lead else None, dtype=wide)
    return norm


def joint(tensors: Iterable[Tensor], lead: int = 0) -> Tensor:
    """The norm of all tensors of a model together.  [] or [k]"""
    each = [length(x, lead) for x in tensors]
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(each[0].device) for n in each]), dim=0)
    return norm


def over(number: float | Tensor, norm: Tensor) -> Tensor:
    """number / norm, 0 where the norm is."""
    return torch.where(norm > 0, number / norm, 0.0)


def along(scale: Tensor, x: Tensor) -> Tensor:
    """A number, or one for each model, ready to multiply x.  [] or [k, 1, …]"""
    return scale.to(x.device).view(-1, *[1] * (x.ndim - 1)) if scale.ndim else scale.to(x.device)
