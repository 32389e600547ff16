"""The numbers of a chain's parts at one step: their fields, their clocks, and what they read of the step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from etude.rules._bucket import Work
from etude.rules._kernel import Numbers, packed
from etude.rules._rule import Chain


@dataclass(frozen=True)
class Moment:
    """What all of a group's work at one step count shares."""

    numbers: Numbers
    floats: Tensor | None
    """The plain ones as one tensor, where a kernel will take them."""
    each: bool
    """Whether some knob is a tensor: another number for each owner model, perhaps."""
    names: Any
    """What they are called: a kernel is made for names."""

    @classmethod
    def of(cls, chain: Chain, step: Mapping[str, Any], device: torch.device | None) -> Moment:
        """Of a chain at a step that tells ``t``, ``multiplier`` and ``loss``; packed for the device, if for one."""
        numbers = [
            {**part.numbers(), **part.clock(int(step["t"])), **{k: step[k] for k in part.reads if k in step}}
            for part in chain.parts
        ]
        each = any(isinstance(x, Tensor) for n in numbers for x in n.values())
        names = tuple(map(tuple, numbers))
        return cls(numbers, None if device is None else packed(numbers, device), each, names)

    def of_work(self, work: Work, chain: Chain) -> Numbers:
        """With what is of this work's own: its noise, its estimate of curvature, its owners' knobs."""
        numbers = self.numbers
        if self.each:
            numbers = [
                {k: work.per_member(x) if isinstance(x, Tensor) and x.ndim else x for k, x in n.items()}
                for n in numbers
            ]
        if chain.steady:
            return numbers
        own = {}
        if any("noise" in part.reads and part.draws(work.t) for part in chain.parts):
            own["noise"] = work.noise()
        if any("hessian" in part.reads for part in chain.parts):
            if (found := work.hessian()) is not None:
                own["hessian"] = found
            elif work.t == 1:
                raise ValueError(
                    f"{chain.name} reads an estimate of the Hessian's diagonal and {work.bucket.members[0].name} has "
                    "none: take the gradient by gradients.backward(gradients.hutchinson(), loss_fn, params)"
                )
        return [{**n, **{k: x for k, x in own.items() if k in part.reads}} for n, part in zip(numbers, chain.parts)]


def told(loss: Any, chains: Sequence[Chain]) -> float:
    """The loss, where a part reads it."""
    asks = next((c.name for c in chains for part in c.parts if "loss" in part.reads), None)
    if asks is None:
        return 0.0
    if loss is None:
        raise ValueError(f"{asks} reads the loss: step(closure), where closure() returns it; lambda: loss will do")
    return float(loss)


def only_allocates(groups: Sequence[Mapping[str, Any]], chains: Sequence[Chain]) -> bool:
    """Whether a first step is how torch.distributed.checkpoint has an optimizer allocate: lr 0, and nothing is told.

    Most rules just take that step, which moves nothing; one that reads the loss or curvature could not.
    """
    asks = any({"loss", "hessian"} & set(part.reads) for chain in chains for part in chain.parts)
    idle = asks and not any(torch.as_tensor(group.get("lr", 1.0)).any() for group in groups)
    return idle and all(getattr(p, "hessian", None) is None for group in groups for p in group["params"])


def multiplier(lr: Any, initial: Any) -> Any:
    """lr / initial lr: the schedule's multiplier, 0 where it began at 0."""
    if isinstance(lr, Tensor) or isinstance(initial, Tensor):
        initial = torch.as_tensor(initial)
        return torch.where(initial == 0, 0.0, lr / initial)
    return lr / initial if initial else 0.0
