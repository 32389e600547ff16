"""Risks that protect the group that fares worst."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from etude._method import method
from etude.risks._risk import Risk, check


class GroupDro(Risk):
    """q_g ← q_g exp(step_size·ℓ_g)/Σ, then Σ q_g ℓ_g; the state is the buffer ``log_q``: [G], which eval() keeps."""

    log_q: Tensor
    shift: Tensor

    def __init__(self, group_counts: Sequence[int], step_size: float, adjustment: float) -> None:
        super().__init__()
        counts = [int(n) for n in group_counts]
        if not counts or min(counts) < 1:
            raise ValueError(f"group_dro needs the number of training examples of each group (≥ 1), got {counts}")
        if step_size < 0 or adjustment < 0:
            raise ValueError(f"group_dro needs step_size, adjustment ≥ 0, got {step_size} and {adjustment}")
        self.step_size = step_size
        self.register_buffer("log_q", torch.full((len(counts),), -math.log(len(counts))))
        self.register_buffer("shift", torch.tensor([adjustment / math.sqrt(n) for n in counts]), persistent=False)

    @property
    def q(self) -> Tensor:
        """The weight of each group, on the simplex.  [G]"""
        return self.log_q.exp()

    def forward(self, losses: Tensor, group: Tensor | None = None) -> Tensor:
        loss = self.group_means(losses, group) + self.shift
        log_q = self.log_q
        if self.training:
            log_q = torch.log_softmax(log_q + self.step_size * loss.detach(), 0)  # in logs nothing over- or underflows
            self.log_q.copy_(log_q)
        return (log_q.exp() @ loss).to(losses.dtype)

    def group_means(self, losses: Tensor, group: Tensor | None) -> Tensor:
        """The mean loss of each group, 0 where the batch holds none of it.  [n], [n] → [G]"""
        check(losses)
        groups = len(self.log_q)
        if group is None or group.shape != losses.shape[:1] or group.is_floating_point():
            got = "nothing" if group is None else f"{group.dtype} {list(group.shape)}"
            raise ValueError(f"group_dro needs group: integers [{len(losses)}], the group of each loss; got {got}")
        wide = losses.to(torch.promote_types(losses.dtype, self.log_q.dtype))
        each = wide.reshape(len(losses), -1).mean(1)
        zero = each.new_zeros(groups)
        try:
            count = zero.index_add(0, group.long(), torch.ones_like(each))
        except IndexError as error:
            raise ValueError(f"groups must lie in 0 … {groups - 1} for {groups} group_counts") from error
        return zero.index_add(0, group.long(), each) / count.clamp(min=1)


@method(
    "Sagawa et al. 2019, Distributionally Robust Neural Networks for Group Shifts: On the Importance of Regularization "
    "for Worst-Case Generalization, arXiv:1911.08731"
)
def group_dro(group_counts: Sequence[int], step_size: float = 0.01, adjustment: float = 0.0) -> GroupDro:
    """ℓ = Σ_g q_g ℓ_g with q_g ← q_g exp(step_size·ℓ_g)/Σ first, ℓ_g = the group's mean loss + adjustment/√n_g.

    ``group_counts``: n_g, the training examples of each group. A group that is absent from the batch has mean loss 0.
    The paper warns: a network that can fit everything needs strong weight decay or early stopping beside it.
    """
    return GroupDro(group_counts, step_size, adjustment)
